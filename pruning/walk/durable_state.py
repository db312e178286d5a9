"""A walk state that outlives its process: finished layers as files, and the residual stream to go on with."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
import zlib
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from threading import Thread

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

#: share of the time that may go into copies of the stream, beyond which a layer goes without
STREAM_SHARE = 0.05
#: seconds that a copy may take in any case
_SHORT = 0.2
#: last copies that are kept: a group's processes may die one apart
_STREAMS = 2
_STREAM = "stream-"


class _LayerRecord(BaseModel):
    """What is written about one finished layer: the entry, and checksums of its files (CRC-32).

    batches: first sample, end and checksum of each batch of the stream. resumable: whether a walk can go on after this
    layer; not without a copy of the stream, if there is one.
    """

    entry: LayerEntry
    shard: int | None
    batches: tuple[tuple[int, int, int], ...]
    sample_shape: tuple[int, ...]
    dtype: str
    resumable: bool = True


class DurableWalkState(WalkState):
    """Keeps finished layers as safetensors shards, already shrunk, and the residual stream after the last ones.

    A process killed at layer 20 finds 20 layers here and goes on with the stream as it was: or 17, if copying the
    stream after every layer would take more than STREAM_SHARE of the time. Each process of a group has a folder of its
    own; the leader alone writes shards, those of an accelerator's layers while it computes with the next one. If files
    do not match their checksums, the walk starts again.
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
        self._copying, self._copied = 0.0, time.monotonic()  # seconds that the last copy took, and when it ended
        self._writing: Future[None] | None = None
        self._resume()

    @property
    def shards(self) -> list[Path]:
        """The safetensors of the finished layers that stay, in order, each cut to its plan."""
        self.flush()
        return [self._shard(index) for index, entry in enumerate(self._entries) if entry.plan is not None]

    def branch(self, name: str, *, keeps_weights: bool = False) -> DurableWalkState:
        """The state in the sub-folder of that name; shards only if its weights are wanted."""
        return DurableWalkState(self._root / name, self._group, shards=keeps_weights)

    def discard(self, name: str) -> None:
        """Delete this process's part of the sub-folder."""
        shutil.rmtree(self._root / name / self.folder.name, ignore_errors=True)

    def finish_(self, layer: nn.Module, index: int, family: ModelFamily) -> None:
        """Cut the layer and read its weights, which the leader of the group has written."""
        self.flush()
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

    def flush(self) -> None:
        """Wait for the layer that is being written. Raises what writing it raised."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _save_layer(self, walked: WalkedLayer, entry: LayerEntry) -> None:
        self.flush()
        stream = self._save_stream(walked) if walked.spans and self._keeps_stream(walked) else None
        record = _LayerRecord(
            entry=entry,
            shard=None,
            batches=tuple((start, stop, stream.checksums[start]) for start, stop in walked.spans) if stream else (),
            sample_shape=stream.sample_shape if stream else (),
            dtype=str(stream.dtype).removeprefix("torch.") if stream else "float32",
            resumable=stream is not None or not walked.spans,
        )
        state, on_device = None, False
        if walked.module is not None and entry.plan is not None and self._writes_shards and self._group.leads:
            shrink_layer_(walked.family, walked.module, entry.plan)
            prefix = _prefix(walked.family, self._place(walked.index))
            tensors = walked.module.state_dict()
            on_device = any(tensor.device.type != "cpu" for tensor in tensors.values())
            state = {prefix + name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
            state = PublishedExperts(walked.family).apart(state)
        write = partial(self._write, walked.index, record, state)
        if on_device:
            self._writing = _in_thread(write)
        else:  # the weights are the layer's own: it cannot go before they are written
            write()

    def _write(self, index: int, record: _LayerRecord, state: dict[str, Tensor] | None) -> None:
        """The layer's shard, then its record, with which it counts as finished; then older streams go."""
        if state is not None:
            save_file(state, self._shard(index), metadata={"format": "pt"})
            record = record.model_copy(update={"shard": _checksum(self._shard(index))})
        _write_atomically(self._record_file(index), record.model_dump_json())
        if record.batches:
            for path in sorted(self.folder.glob(f"{_STREAM}*"))[:-_STREAMS]:
                path.unlink()

    def _keeps_stream(self, walked: WalkedLayer) -> bool:
        """Whether the stream after this layer is kept, which all processes of the group decide together: one that lies
        in a file is, another if the time since the last copy was long enough for one more."""
        spare = max(_SHORT, STREAM_SHARE * (time.monotonic() - self._copied))
        free = isinstance(walked.stream, FileActivations) or walked.is_last
        return bool(self._group.largest(free or self._copying <= spare))

    def _save_stream(self, walked: WalkedLayer) -> FileActivations:
        """The stream under its own name: moved there if it is a file, else written."""
        target, stream = self._stream_file(walked.index), walked.stream
        assert stream is not None
        if isinstance(stream, FileActivations):
            stream.move(target)
            return stream
        target.unlink(missing_ok=True)
        began = time.monotonic()
        copy = FileActivations(target, stream.sample_shape, stream.dtype)
        for start, stop in walked.spans:
            copy.put(start, stream.on_host(start, stop))
        copy.close()
        self._copied = time.monotonic()
        self._copying = self._copied - began
        return copy

    def _resume(self) -> None:
        """Read the records of finished layers, as many as all processes of the group have."""
        for left in self.folder.glob(f"{FOLDER_PREFIX}*"):  # of a killed process
            shutil.rmtree(left)
        records, readable = self._records()
        able = max((number for number, record in enumerate(records, 1) if record.resumable), default=0)
        done = -int(self._group.largest(-able))
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
        return self.folder / f"{_STREAM}{index:05d}"


def _in_thread(work: Callable[[], None]) -> Future[None]:
    future: Future[None] = Future()

    def run() -> None:
        try:
            work()
            future.set_result(None)
        except BaseException as error:  # raised where the result is asked for
            future.set_exception(error)

    Thread(target=run, name="slimline-write-behind", daemon=True).start()
    return future


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
