"""Memory and files give back the very bits that were put, within the budget, and nothing is left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pruning.activations.activations import Activations, FileActivations, MemoryActivations
from pruning.activations.tiers import ActivationStore

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPE = (4, 6)
SPANS = [(0, 3), (3, 6), (6, 7)]


def values(dtype: torch.dtype = torch.float32, count: int = 7, seed: int = 0) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed)).to(dtype)


def filled(room: Activations, values_NLF: Tensor) -> Activations:
    for start, stop in SPANS:
        room.put(start, values_NLF[start:stop])
    return room


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_and_file_give_back_the_same_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    values_NLF = values(dtype)
    memory = filled(MemoryActivations(SHAPE, dtype), values_NLF)
    file = filled(FileActivations(tmp_path / "room", SHAPE, dtype), values_NLF)
    for start, stop in reversed(SPANS):
        for room in (memory, file):
            batch_BLF = room.get(start, stop)
            assert batch_BLF.dtype == dtype
            assert torch.equal(batch_BLF, values_NLF[start:stop])
    assert (tmp_path / "room").stat().st_size == values_NLF.numel() * dtype.itemsize


def test_not_a_number_and_minus_zero_survive_a_file(tmp_path: Path) -> None:
    odd_1LF = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]).to(torch.bfloat16).repeat(6).reshape(1, *SHAPE)
    room = FileActivations(tmp_path / "room", SHAPE, torch.bfloat16)
    room.put(0, odd_1LF)
    assert torch.equal(room.get(0, 1).view(torch.int16), odd_1LF.view(torch.int16))


def test_batches_may_come_in_any_order_and_again(tmp_path: Path) -> None:
    values_NLF, other_NLF = values(), values(seed=1)
    room = FileActivations(tmp_path / "room", SHAPE, torch.float32)
    for start, stop in reversed(SPANS):
        room.put(start, values_NLF[start:stop])
    room.put(3, other_NLF[3:6])
    assert torch.equal(room.get(0, 7), torch.cat([values_NLF[:3], other_NLF[3:6], values_NLF[6:]]))


def test_a_view_with_strides_is_written_as_it_reads(tmp_path: Path) -> None:
    strided_NLF = values().flip(0).transpose(1, 2).contiguous().transpose(1, 2)
    assert not strided_NLF.is_contiguous()
    room = filled(FileActivations(tmp_path / "room", SHAPE, torch.float32), strided_NLF)
    assert torch.equal(room.get(0, 7), strided_NLF)


def test_what_was_read_is_not_the_file(tmp_path: Path) -> None:
    room = filled(FileActivations(tmp_path / "room", SHAPE, torch.float32), values())
    room.get(0, 3).zero_()
    assert torch.equal(room.get(0, 3), values()[:3])


@pytest.mark.parametrize("shape", [(4, 0), (0, 6)])
def test_nothing_at_all(shape: tuple[int, int], tmp_path: Path) -> None:
    # a layer may have no channels
    for room in (FileActivations(tmp_path / "room", shape, torch.float32), MemoryActivations(shape, torch.float32)):
        room.put(0, torch.empty(3, *shape))
        assert room.get(0, 3).shape == (3, *shape)


def test_a_file_that_ends_too_early(tmp_path: Path) -> None:
    room = filled(FileActivations(tmp_path / "room", SHAPE, torch.float32), values())
    with pytest.raises(EOFError, match="room ends before sample 8"):
        room.get(7, 8)
    with (tmp_path / "room").open("r+b") as file:
        file.truncate(6 * 4 * 6 * 4 + 5)
    assert torch.equal(room.get(0, 6), values()[:6])
    with pytest.raises(EOFError, match="room ends before sample 7"):
        room.get(6, 7)
    with pytest.raises(EOFError):
        room.checksum(6, 7)


def test_checksums_find_one_flipped_bit(tmp_path: Path) -> None:
    path = tmp_path / "room"
    room = FileActivations(path, SHAPE, torch.bfloat16)
    filled(room, values(torch.bfloat16))
    assert {start: room.checksum(start, stop) for start, stop in SPANS} == room.checksums
    data = bytearray(path.read_bytes())
    data[4 * 4 * 6 * 2] ^= 1  # in sample 4
    path.write_bytes(data)
    assert [room.checksum(start, stop) == room.checksums[start] for start, stop in SPANS] == [True, False, True]


def test_an_existing_file_is_opened_as_it_is_and_a_moved_one_goes_on(tmp_path: Path) -> None:
    room = FileActivations(tmp_path / "one", SHAPE, torch.float32)
    room.put(0, values()[:3])
    room.move(tmp_path / "two")
    assert not (tmp_path / "one").exists()
    room.put(3, values()[3:6])
    room.close()
    again = FileActivations(tmp_path / "two", SHAPE, torch.float32)
    assert torch.equal(again.get(0, 6), values()[:6])


def test_a_dropped_batch_frees_its_memory() -> None:
    room = filled(MemoryActivations(SHAPE, torch.float32), values())
    room.drop(3)
    assert torch.equal(room.get(0, 3), values()[:3])
    with pytest.raises(KeyError):
        room.get(3, 6)
    room.close()
    with pytest.raises(KeyError):
        room.get(0, 3)


BYTES = 7 * 4 * 6 * 4
"""Of one room of `values`."""


@pytest.mark.parametrize(
    ("budget", "in_memory"),
    [
        (None, [True] * 3),
        (0, [False] * 3),
        (BYTES - 1, [False] * 3),
        (BYTES, [True, False, False]),
        (2 * BYTES, [True, True, False]),
    ],
)
def test_allocated_beyond_the_budget_lie_in_files(budget: int | None, in_memory: list[bool], tmp_path: Path) -> None:
    with ActivationStore(budget, tmp_path) as activations:
        rooms = [filled(activations.allocate(7, SHAPE, torch.float32), values(seed=seed)) for seed in range(3)]
        assert [isinstance(room, MemoryActivations) for room in rooms] == in_memory
        assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == in_memory.count(False)
        for seed, room in enumerate(rooms):
            assert torch.equal(torch.cat([room.get(*span) for span in SPANS]), values(seed=seed))
    assert list(tmp_path.iterdir()) == []


def test_the_budget_is_counted_in_bytes_of_the_dtype(tmp_path: Path) -> None:
    with ActivationStore(BYTES // 2, tmp_path) as activations:
        assert isinstance(activations.allocate(7, SHAPE, torch.float32), FileActivations)
        assert isinstance(activations.allocate(7, SHAPE, torch.bfloat16), MemoryActivations)


def test_a_freed_room_gives_its_budget_and_its_disk_back(tmp_path: Path) -> None:
    with ActivationStore(BYTES, tmp_path) as activations:
        memory, file = (activations.allocate(7, SHAPE, torch.float32) for _ in range(2))
        filled(file, values())
        activations.free(file)
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
        activations.free(memory)
        assert isinstance(activations.allocate(7, SHAPE, torch.float32), MemoryActivations)


def test_a_room_that_was_moved_away_stays(tmp_path: Path) -> None:
    with ActivationStore(0, tmp_path) as activations:
        room = filled(activations.allocate(7, SHAPE, torch.float32), values())
        assert isinstance(room, FileActivations)
        room.move(tmp_path / "kept")
        activations.free(room)
        activations.allocate(7, SHAPE, torch.float32)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert torch.equal(FileActivations(tmp_path / "kept", SHAPE, torch.float32).get(0, 7), values())


def test_files_go_when_the_work_fails(tmp_path: Path) -> None:
    def work() -> None:
        with ActivationStore(0, tmp_path) as activations:
            filled(activations.allocate(7, SHAPE, torch.float32), values())
            raise ValueError("no luck")

    with pytest.raises(ValueError, match="no luck"):
        work()
    assert list(tmp_path.iterdir()) == []


def test_without_files_no_folder_is_made(tmp_path: Path) -> None:
    with ActivationStore(None, tmp_path / "nowhere") as activations:
        filled(activations.allocate(7, SHAPE, torch.float32), values())
    assert not (tmp_path / "nowhere").exists()


def test_what_takes_the_place_of_another_shares_its_budget(tmp_path: Path) -> None:
    """As much as the larger of the two, whoever goes first."""
    with ActivationStore(BYTES, tmp_path) as activations:
        old = activations.allocate(7, SHAPE, torch.float32)
        half = activations.allocate(7, SHAPE, torch.bfloat16, instead_of=old)
        assert isinstance(half, MemoryActivations)
        assert isinstance(activations.allocate(1, SHAPE, torch.float32), FileActivations)
        activations.free(old)
        other = activations.allocate(3, SHAPE, torch.float32)
        assert isinstance(other, MemoryActivations)
        assert isinstance(activations.allocate(7, SHAPE, torch.float32, instead_of=half), FileActivations)
        assert isinstance(activations.allocate(4, SHAPE, torch.float32, instead_of=half), MemoryActivations)
