"""A walk state that outlives its process: finished layers as files, and the residual stream to go on with."""

from __future__ import annotations

import json
import logging
import os
import shutil
import zlib
from pathlib import Path

import torch
from pydantic import BaseModel, ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pruning.activations.activations import FOLDER_PREFIX, FileActivations
from pruning.checkpoints.published_experts import PublishedExperts
from pruning.checkpoints.surgery import shrink_layer_
from pruning.distributed import ProcessGroup
from pruning.families import ModelFamily
from pruning.walk.state import LayerEntry, OnEntry, WalkedLayer, WalkState, no_listener

log = logging.getLogger("slimline")


class _LayerRecord(BaseModel):
    """What is written about one finished layer: the entry, and checksums of its files (CRC-32)."""

    entry: LayerEntry
    shard: int | None
    batches: tuple[tuple[int, int, int], ...]
    """First sample, end, checksum of each batch of the stream."""
    sample_shape: tuple[int, ...]
    dtype: str


class DurableWalkState(WalkState):
    """Keeps finished layers as safetensors shards, already shrunk, and the residual stream after the last ones.

    A process killed at layer 20 finds 20 layers here and goes on with the stream as it was. Each process of a group
    has a folder of its own; the leader alone writes shards. If files do not match their checksums, the walk starts
    again.
    """

    def __init__(
        self,
        folder: Path,
        process_group: ProcessGroup | None = None,
        *,
        shards: bool = True,
        on_entry: OnEntry = no_listener,
    ) -> None:
        super().__init__(on_entry)
        self._writes_shards = shards
        self._group = process_group or ProcessGroup()
        self._root = folder
        self.folder: Path = folder / _folder_name(self._group.rank, self._group.size)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._stream: FileActivations | None = None
        self._resume()

    @property
    def shards(self) -> list[Path]:
        """The safetensors of the finished layers that stay, in order, each cut to its plan."""
        return [self._shard(index) for index, entry in enumerate(self._entries) if entry.plan is not None]

    def branch(self, name: str, *, keeps_weights: bool = False) -> DurableWalkState:
        """The state in the sub-folder of that name; shards only if its weights are wanted."""
        return DurableWalkState(self._root / name, self._group, shards=keeps_weights)

    def discard(self, name: str) -> None:
        """Delete this process's part of the sub-folder."""
        shutil.rmtree(self._root / name / self.folder.name, ignore_errors=True)

    def finish_(self, layer: nn.Module, index: int, family: ModelFamily) -> None:
        """Cut the layer and read its weights, which the leader of the group has written."""
        plan = self._entries[index].plan
        assert plan is not None, index
        shrink_layer_(family, layer, plan)
        written = load_file(self._root / _folder_name(0, self._group.size) / self._shard(index).name)
        own = {name[len(_prefix(family, self._place(index))) :]: tensor for name, tensor in written.items()}
        layer.load_state_dict(own)

    def note_text(self, name: str, text: str) -> None:
        """Store a text in a file of its own."""
        _write_atomically(self.folder / f"{name}.text", text)

    def recall_text(self, name: str) -> str | None:
        """A text that every process of the group stored, now or before it was killed."""
        path = self.folder / f"{name}.text"
        text = path.read_text(encoding="utf-8") if path.is_file() else None
        return None if self._group.largest(text is None) else text

    def resumed(self, start: int, stop: int) -> Tensor:
        """Read the stream after the last finished layer, (stop - start, L, C)."""
        assert self._stream is not None, "nothing is resumed before a layer is finished"
        return self._stream.get(start, stop)

    def note(self, name: str, value: float) -> None:
        """Store a number in a file of its own."""
        _write_atomically(self.folder / f"{name}.json", json.dumps(value))

    def recall(self, name: str) -> float | None:
        """A number that every process of the group noted, now or before it was killed."""
        path = self.folder / f"{name}.json"
        value = float(json.loads(path.read_bytes())) if path.is_file() else None
        # what one of them does not know all must measure again, together
        return None if self._group.largest(value is None) else value

    def _save_layer(self, walked: WalkedLayer, entry: LayerEntry) -> None:
        index = walked.index
        stream = self._save_stream(walked) if walked.spans else None
        shard = None
        if walked.module is not None and entry.plan is not None and self._writes_shards and self._group.leads:
            shrink_layer_(walked.family, walked.module, entry.plan)
            prefix = _prefix(walked.family, self._place(index))
            state = {prefix + name: tensor.cpu().contiguous() for name, tensor in walked.module.state_dict().items()}
            save_file(PublishedExperts(walked.family).apart(state), self._shard(index), metadata={"format": "pt"})
            shard = _checksum(self._shard(index))
        record = _LayerRecord(
            entry=entry,
            shard=shard,
            batches=tuple((start, stop, stream.checksums[start]) for start, stop in walked.spans) if stream else (),
            sample_shape=stream.sample_shape if stream else (),
            dtype=str(stream.dtype).removeprefix("torch.") if stream else "float32",
        )
        _write_atomically(self._record_file(index), record.model_dump_json())
        # a group's processes may die one layer apart: the stream before the last one stays too
        self._stream_file(index - 2).unlink(missing_ok=True)

    def _save_stream(self, walked: WalkedLayer) -> FileActivations:
        """The stream under its own name: moved there if it is a file, else written."""
        target, stream = self._stream_file(walked.index), walked.stream
        assert stream is not None
        if isinstance(stream, FileActivations):
            stream.move(target)
            return stream
        target.unlink(missing_ok=True)
        copy = FileActivations(target, stream.sample_shape, stream.dtype)
        for start, stop in walked.spans:
            copy.put(start, stream.get(start, stop))
        copy.close()
        return copy

    def _resume(self) -> None:
        """Read the records of finished layers, as many as all processes of the group have."""
        for left in self.folder.glob(f"{FOLDER_PREFIX}*"):  # of a killed process
            shutil.rmtree(left)
        records, readable = self._records()
        done = -int(self._group.largest(-len(records)))
        sound = readable and (done == 0 or self._sound(records[:done]))
        if self._group.sum_of(not sound) != (0,):
            log.warning(
                "the pruned layers in %s do not match their checksums: starting from the first layer", self._root
            )
            shutil.rmtree(self.folder)
            self.folder.mkdir()
            return
        for index in range(done, len(records)):
            self._record_file(index).unlink()
        self._entries = [record.entry for record in records[:done]]
        for entry in self._entries:
            self._on_entry(entry)

    def _records(self) -> tuple[list[_LayerRecord], bool]:
        """The records up to the first gap, and whether all of these can be read."""
        records: list[_LayerRecord] = []
        while (path := self._record_file(len(records))).is_file():
            try:
                records.append(_LayerRecord.model_validate_json(path.read_bytes()))
            except ValidationError:
                return records, False
        return records, True

    def _sound(self, records: list[_LayerRecord]) -> bool:
        """Whether shards and the last stream are what was written; opens the stream."""
        for index, record in enumerate(records):
            if record.shard is not None and (
                not self._shard(index).is_file() or _checksum(self._shard(index)) != record.shard
            ):
                return False
        path, last = self._stream_file(len(records) - 1), records[-1]
        if not last.batches:  # nothing was walked
            return True
        if not path.is_file():
            return False
        self._stream = FileActivations(path, last.sample_shape, getattr(torch, last.dtype))
        try:
            return all(self._stream.checksum(start, stop) == crc for start, stop, crc in last.batches)
        except EOFError:
            return False

    def _place(self, index: int) -> int:
        """Which of the layers that stay a layer is."""
        return sum(entry.plan is not None for entry in self._entries[:index])

    def _shard(self, index: int) -> Path:
        return self.folder / f"layer-{index:05d}.safetensors"

    def _record_file(self, index: int) -> Path:
        return self.folder / f"layer-{index:05d}.json"

    def _stream_file(self, index: int) -> Path:
        return self.folder / f"stream-{index:05d}"


def _folder_name(rank: int, size: int) -> str:
    return f"process-{rank}-of-{size}"


def _prefix(family: ModelFamily, place: int) -> str:
    """What the names of a layer's tensors begin with in a checkpoint."""
    return f"{family.layers_path}.{place}."


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            value = zlib.crc32(block, value)
    return value


def _write_atomically(path: Path, text: str) -> None:
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)
