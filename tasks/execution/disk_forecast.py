"""What a stage will write, as far as it can be told before it starts, and whether there is room for it.

Upper bounds: a pruned checkpoint is counted like the one that it is made from. What another program, or a stage that
runs at the same time, takes is not foreseen: a disk that becomes full all the same is named where it happens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from infra.artifacts.inventory import folder_bytes, store_bytes
from infra.artifacts.store import ArtifactRef, ArtifactStore
from infra.errors import ArtifactMissing, DiskFull
from infra.filesystem.disk import free_bytes
from infra.models.card import ModelCard, card_of_folder
from infra.models.import_model import describe
from infra.settings import Settings
from infra.sources.find import Sources
from pruning.host_memory import activation_budget
from tasks.requests import (
    CalibrateRequest,
    CaptureRequest,
    ExportRequest,
    ImportRequest,
    OrderRequest,
    PruneRequest,
    RecoverRequest,
    Request,
)

#: of the FFN in hidden sizes, where a checkpoint does not tell
_WIDEST_FFN = 4
_ITEM_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
#: a walk keeps the residual stream before and after a layer, that of the layer before for a killed process, and after a
#: kill still has the one open that it went on from
_STREAMS = 4
_FLOAT_BYTES = 4
_TOKEN_BYTES = 8
#: a group's number and the errors around it, as JSON
_ORDER_BYTES = 64
_REPORT_BYTES = 2**16


@dataclass(frozen=True)
class Extent:
    """What the size of a stage's work follows from. bytes: of its artifact; tokens (held-out ones included), samples,
    seq_len and has_heldout: of a calibration set; the other fields: of a checkpoint. item_bytes: of most weights; as
    few as there are where that is not known, so that there are more of them."""

    bytes: int = 0
    tokens: int = 0
    samples: int = 0
    seq_len: int = 0
    has_heldout: bool = False
    num_layers: int = 0
    hidden_size: int = 0
    attention_size: int = 0
    intermediate_size: int = 0
    num_experts: int = 0
    item_bytes: int = min(_ITEM_BYTES.values())

    @property
    def num_parameters(self) -> int:
        """Of a checkpoint, at most."""
        return self.bytes // self.item_bytes

    @classmethod
    def of_card(cls, card: ModelCard) -> Extent:
        """Of a checkpoint."""
        ffn = card.intermediate_size or _WIDEST_FFN * card.hidden_size
        return cls(
            card.bytes,
            num_layers=card.num_layers,
            hidden_size=card.hidden_size,
            attention_size=card.attention_size or card.hidden_size,
            intermediate_size=ffn,
            num_experts=card.num_experts,
            item_bytes=_ITEM_BYTES.get(card.dtype or "", cls.item_bytes),
        )


@dataclass(frozen=True)
class Need:
    """Bytes that a stage writes: its artifact, and its scratch folder while it runs."""

    artifact: int
    scratch: int = 0

    @property
    def total(self) -> int:
        """Both."""
        return self.artifact + self.scratch


class Forecast:
    """Needs of stages whose inputs are in the store, or were asked for before: an input that is still to be made is
    taken to be as large as its own need says."""

    def __init__(self, store: ArtifactStore, sources: Sources, settings: Settings) -> None:
        self._store, self._sources, self._settings = store, sources, settings
        self._extents: dict[str, Extent] = {}

    def need(self, request: Request) -> Need:
        """What the stage will write. Raises SourceInvalid for a model that cannot be imported."""
        checkpoint = self._extent(getattr(request, "checkpoint", None))
        calibration = self._extent(getattr(request, "calibration", None))
        made, scratch = Extent(_REPORT_BYTES), 0
        match request:
            case ImportRequest():
                made = self._imported(request)
            case CalibrateRequest():
                tokens = (request.num_samples + request.num_heldout) * request.seq_len
                size = _REPORT_BYTES + tokens * _TOKEN_BYTES
                made = Extent(
                    size,
                    tokens=tokens,
                    samples=request.num_samples,
                    seq_len=request.seq_len,
                    has_heldout=request.num_heldout > 0,
                )
            case ExportRequest():
                made = Extent(checkpoint.bytes)
            case CaptureRequest():
                linears = max(1, checkpoint.num_experts)
                squares = checkpoint.attention_size**2 + linears * checkpoint.intermediate_size**2
                copies = 2 if calibration.has_heldout else 1  # the held-out samples have Hessians of their own
                made = Extent(checkpoint.num_layers * copies * squares * _FLOAT_BYTES)
            case OrderRequest():
                channels = max(1, checkpoint.num_experts) * checkpoint.intermediate_size
                groups = checkpoint.num_layers * (checkpoint.attention_size + channels)
                made = Extent(groups * _ORDER_BYTES)
                if request.calibration:
                    values = request.typed_config.token_streams(
                        checkpoint.num_layers, calibration.samples, calibration.seq_len
                    )
                    scratch = self._in_files(values * checkpoint.hidden_size * _FLOAT_BYTES)
            case RecoverRequest() | PruneRequest() if isinstance(request, RecoverRequest) or request.trains:
                made = checkpoint
                widest = max(checkpoint.hidden_size, checkpoint.attention_size)
                scratch = request.module.scratch_bytes(
                    request.typed_config,
                    checkpoint.num_parameters,
                    checkpoint.num_layers,
                    widest,
                    checkpoint.intermediate_size,
                )
            case PruneRequest():
                made = checkpoint
                # its finished layers lie in the scratch folder first, but are linked into the artifact
                scratch = (
                    0 if request.statistics else _STREAMS * calibration.tokens * checkpoint.hidden_size * _FLOAT_BYTES
                )
                if between_steps := getattr(request.module, "between_steps", None):
                    values, models = between_steps(
                        request.typed_config, checkpoint.num_layers, calibration.samples, calibration.seq_len
                    )
                    scratch += self._in_files(values * checkpoint.hidden_size * _FLOAT_BYTES)
                    scratch += models * checkpoint.bytes
        self._extents[request.ref.key] = made
        return Need(made.bytes, scratch)

    def _in_files(self, activations: int) -> int:
        """Of so many bytes those beyond the budget of host memory."""
        return max(0, activations - activation_budget(self._settings.activation_budget_gib))

    def _imported(self, request: ImportRequest) -> Extent:
        card = describe(self._sources.find(request.model_id, "model", revision=request.revision))
        dtype = (card.dtype or "float32") if request.dtype == "auto" else request.dtype
        if card.num_parameters is None:  # on the hub: two bytes per parameter is what most are kept in
            size = card.bytes * (2 if request.dtype == "float32" else 1)
        else:
            size = card.num_parameters * _ITEM_BYTES[dtype]
        return replace(Extent.of_card(card), bytes=size + _REPORT_BYTES, item_bytes=_ITEM_BYTES[dtype])

    def _extent(self, ref: ArtifactRef | None) -> Extent:
        """Nothing, if it is neither in the store nor foreseen."""
        if ref is None:
            return Extent()
        if ref.key not in self._extents:
            self._extents[ref.key] = self._stored(ref)
        return self._extents[ref.key]

    def _stored(self, ref: ArtifactRef) -> Extent:
        try:
            manifest, folder = self._store.manifest(ref), self._store.path(ref)
        except ArtifactMissing:
            return Extent()
        size = sum(entry.bytes for entry in manifest.files.values())
        if ref.kind == "checkpoint":
            return replace(Extent.of_card(card_of_folder(folder)), bytes=size)
        if ref.kind == "calibration":
            samples, heldout, length = (
                int(str(manifest.request[name])) for name in ("num_samples", "num_heldout", "seq_len")
            )
            tokens = (samples + heldout) * length
            return Extent(size, tokens=tokens, samples=samples, seq_len=length, has_heldout=heldout > 0)
        return Extent(size)


def check_room(
    what: str, need: Need, store: ArtifactStore, settings: Settings, *, requests: Sequence[Request] = ()
) -> None:
    """Raise DiskFull if the store's disk, or SLIMLINE_DISK_BUDGET_GIB, has no room for it.

    what: begins the sentence. requests: what is to be made: their scratch folders may hold some of it already.
    """
    there = folder_bytes(*(store.root / ".scratch" / request.ref.key for request in requests))
    missing = max(0, need.total - there)
    way_out = "make room with `slimline gc --delete`"
    asked = f"{what} needs about {_gib(missing)} ({_gib(need.artifact)} to keep, {_gib(need.scratch)} while it works)"
    free = free_bytes(store.root)
    if missing > free:
        raise DiskFull(
            f"{asked} and the disk of {store.root} has {_gib(free)} free; {way_out}, or set SLIMLINE_HOME to a folder "
            "on a larger disk"
        )
    budget = settings.disk_budget_gib
    if budget is not None and missing + (used := store_bytes(store)) > budget * 2**30:
        raise DiskFull(
            f"{asked} and {store.root} holds {_gib(used)} of SLIMLINE_DISK_BUDGET_GIB={budget:g}; {way_out}, or raise "
            "the budget"
        )


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size / 2**20:.1f} MiB"
