"""A ledger that outlives its process: finished layers as files, and the residual stream to go on with."""

from __future__ import annotations

import json
import logging
import os
import shutil
import zlib
from pathlib import Path

import torch
from pydantic import BaseModel, ValidationError
from safetensors.torch import save_file
from torch import Tensor

from pruning.checkpoints.surgery import shrink_layer_
from pruning.distributed import ProcessGroup
from pruning.walk.activations import FOLDER_PREFIX, FileActivations
from pruning.walk.state import LayerEntry, WalkedLayer, WalkState

log = logging.getLogger("slimline")


class _Page(BaseModel):
    """What is written about one finished layer: the entry, and checksums of its files (CRC-32)."""

    entry: LayerEntry
    shard: int | None
    batches: tuple[tuple[int, int, int], ...]
    """First sample, end, checksum of each batch of the stream."""
    sample_shape: tuple[int, ...]
    dtype: str


class DurableWalkState(WalkState):
    """Keeps finished layers as safetensors shards, already shrunk, and the residual stream after the last ones.

    A process killed at layer 20 finds 20 layers here and goes on with the stream as it was. Each process of a team has
    a folder of its own; the leader alone writes shards. Files that do not match their checksums are not trusted: the
    walk then starts again.
    """

    def __init__(self, folder: Path, process_group: ProcessGroup | None = None, *, shards: bool = True) -> None:
        super().__init__()
        self._writes_shards = shards
        self._team = process_group or ProcessGroup()
        self._root = folder
        self.folder: Path = folder / f"process-{self._team.rank}-of-{self._team.size}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._stream: FileActivations | None = None
        self._resume()

    @property
    def shards(self) -> list[Path]:
        """The finished layers' files, in order."""
        return [self._shard(index) for index in range(self.layers_done)]

    def branch(self, name: str) -> DurableWalkState:
        """The one in the folder of that name, without shards."""
        return DurableWalkState(self._root / name, self._team, shards=False)

    def resumed(self, start: int, stop: int) -> Tensor:
        """Read the stream that the last finished layer left."""
        assert self._stream is not None, "nothing is resumed before a layer is finished"
        return self._stream.get(start, stop)

    def note(self, name: str, value: float) -> None:
        """Keep a number in a file."""
        _write_atomically(self.folder / f"{name}.json", json.dumps(value))

    def recall(self, name: str) -> float | None:
        """A number that every process of the team noted, now or before it was killed."""
        path = self.folder / f"{name}.json"
        value = float(json.loads(path.read_bytes())) if path.is_file() else None
        # what one of them does not know all must measure again, together
        return None if self._team.largest(value is None) else value

    def _keep(self, walked: WalkedLayer, entry: LayerEntry) -> None:
        index = walked.index
        stream = self._keep_stream(walked)
        shard = None
        if self._writes_shards and self._team.leads:
            shrink_layer_(walked.family, walked.module, entry.plan)
            prefix = f"{walked.family.layers_path}.{index}."
            state = {prefix + name: tensor.cpu().contiguous() for name, tensor in walked.module.state_dict().items()}
            save_file(state, self._shard(index), metadata={"format": "pt"})
            shard = _checksum(self._shard(index))
        page = _Page(
            entry=entry,
            shard=shard,
            batches=tuple((start, stop, stream.checksums[start]) for start, stop in walked.spans),
            sample_shape=stream.sample_shape,
            dtype=str(stream.dtype).removeprefix("torch."),
        )
        _write_atomically(self._page(index), page.model_dump_json())
        # a team's processes may die one layer apart: the stream before the last one is kept too
        self._stream_file(index - 2).unlink(missing_ok=True)

    def _keep_stream(self, walked: WalkedLayer) -> FileActivations:
        """The stream under its own name: moved there if it is a file, else written."""
        target, stream = self._stream_file(walked.index), walked.stream
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
        """Read the pages of finished layers, as many as the whole team has."""
        for left in self.folder.glob(f"{FOLDER_PREFIX}*"):  # of a killed process
            shutil.rmtree(left)
        pages, readable = self._pages()
        done = -int(self._team.largest(-len(pages)))
        sound = readable and (done == 0 or self._sound(pages[:done]))
        if self._team.sum_of(not sound) != (0,):
            log.warning(
                "the pruned layers in %s do not match their checksums: starting from the first layer", self._root
            )
            shutil.rmtree(self.folder)
            self.folder.mkdir()
            return
        for index in range(done, len(pages)):
            self._page(index).unlink()
        self._entries = [page.entry for page in pages[:done]]

    def _pages(self) -> tuple[list[_Page], bool]:
        """The pages up to the first gap, and whether all of these can be read."""
        pages: list[_Page] = []
        while (path := self._page(len(pages))).is_file():
            try:
                pages.append(_Page.model_validate_json(path.read_bytes()))
            except ValidationError:
                return pages, False
        return pages, True

    def _sound(self, pages: list[_Page]) -> bool:
        """Whether shards and the last stream are what was written; opens the stream."""
        for index, page in enumerate(pages):
            if page.shard is not None and (
                not self._shard(index).is_file() or _checksum(self._shard(index)) != page.shard
            ):
                return False
        path, last = self._stream_file(len(pages) - 1), pages[-1]
        if not path.is_file():
            return False
        self._stream = FileActivations(path, last.sample_shape, getattr(torch, last.dtype))
        try:
            return all(self._stream.checksum(start, stop) == crc for start, stop, crc in last.batches)
        except EOFError:
            return False

    def _shard(self, index: int) -> Path:
        return self.folder / f"layer-{index:05d}.safetensors"

    def _page(self, index: int) -> Path:
        return self.folder / f"layer-{index:05d}.json"

    def _stream_file(self, index: int) -> Path:
        return self.folder / f"stream-{index:05d}"


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
