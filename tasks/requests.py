"""The identity of every stage: a request has exactly the fields that can change the answer, and its key is their hash.

References enter as their keys, so keys form a Merkle chain: every key of a run is known before anything has run. Fields
with `exclude=True` say where or how, never what, and are not part of the key.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from infra import registry
from infra.artifacts.store import ArtifactRef, Kind
from infra.exporting.gguf_file import Type
from infra.keys import stage_key
from tasks.calibration_data import CalibrationData, Template

#: bumped by hand when the numbers of a stage change (plug-ins carry their own VERSION)
#: import 2: a clean checkpoint, whose head, names and dtype are the same for whoever loads it
IMPORT_VERSION = 2
CALIBRATE_VERSION = 1
CAPTURE_VERSION = 1
PROFILE_VERSION = 2
EXPORT_VERSION = 1
FILE_PROFILE_VERSION = 1


class Request(BaseModel):
    """Base: frozen, refuses unknown keys, knows its own artifact."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: ClassVar[Kind]
    LABEL: ClassVar[str]
    VERSION: ClassVar[int]

    @property
    def label(self) -> str:
        """First part of the key: what the stage does."""
        return self.LABEL

    @property
    def version(self) -> int:
        """Version of the code that answers."""
        return self.VERSION

    @property
    def ref(self) -> ArtifactRef:
        """The artifact that this request stands for, made or not."""
        return ArtifactRef(kind=self.kind, key=stage_key(self.label, self.version, self.model_dump(mode="json")))

    @property
    def inputs(self) -> tuple[ArtifactRef, ...]:
        """The artifacts it reads."""
        values = (getattr(self, name) for name in type(self).model_fields)
        return tuple(value for value in values if isinstance(value, ArtifactRef))

    @property
    def origins(self) -> tuple[dict[str, str], ...]:
        """Identities of the models and data sets that it reads from outside the store."""
        return ()


class ImportRequest(Request):
    """A model from the hub, a mirror or a folder as a local safetensors checkpoint."""

    kind: ClassVar[Kind] = "checkpoint"
    LABEL: ClassVar[str] = "import-model"
    VERSION: ClassVar[int] = IMPORT_VERSION

    source: dict[str, str]
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    trust_remote_code: bool = Field(default=False, exclude_if=lambda trusted: not trusted)
    """Left out of the key where it is false: then the checkpoint is what it was before there was this field."""
    model_id: str = Field(exclude=True)
    revision: str | None = Field(default=None, exclude=True)

    @property
    def origins(self) -> tuple[dict[str, str], ...]:
        """The model."""
        return (self.source,)


class CalibrateRequest(Request):
    """Token windows of a text data set."""

    kind: ClassVar[Kind] = "calibration"
    LABEL: ClassVar[str] = "calibrate"
    VERSION: ClassVar[int] = CALIBRATE_VERSION

    checkpoint: ArtifactRef
    source: dict[str, str]
    config: str | None
    split: str
    text_field: str
    data_files: str | None
    num_samples: int
    seq_len: int
    num_heldout: int
    seed: int
    join: str
    template: Template | None = Field(default=None, exclude_if=lambda template: template is None)
    """Left out of the key like `rows` where it says nothing: keys of plain text are older than these two fields."""
    rows: Literal["documents", "lines"] = Field(default="documents", exclude_if=lambda rows: rows == "documents")
    data: CalibrationData = Field(exclude=True)

    @property
    def origins(self) -> tuple[dict[str, str], ...]:
        """The texts."""
        return (self.source,)


class CaptureRequest(Request):
    """Hessians of a checkpoint as it is, for any sparsity."""

    kind: ClassVar[Kind] = "statistics"
    LABEL: ClassVar[str] = "capture"
    VERSION: ClassVar[int] = CAPTURE_VERSION

    checkpoint: ArtifactRef
    calibration: ArtifactRef


class _PluginRequest(Request):
    """A request answered by a plug-in module, whose VERSION and Config are part of the key."""

    package: ClassVar[str]
    noun: ClassVar[str]
    verb: ClassVar[str]

    plugin: str
    config: dict[str, JsonValue]

    @property
    def module(self) -> Any:
        """The plug-in."""
        return registry.load(self.package, self.plugin, self.noun)

    @property
    def typed_config(self) -> Any:
        """The plug-in's own Config."""
        return self.module.Config.model_validate(self.config)

    @property
    def label(self) -> str:
        """E.g. "prune-slimgpt"."""
        return f"{self.verb}-{self.plugin}".replace("_", "-")

    @property
    def version(self) -> int:
        """The plug-in's VERSION."""
        return int(self.module.VERSION)


class PruneRequest(_PluginRequest):
    """A checkpoint made smaller, by what calibration windows show, or by data sets that are trained on or counted."""

    kind: ClassVar[Kind] = "checkpoint"
    package: ClassVar[str] = "pruning.methods"
    noun: ClassVar[str] = "method"
    verb: ClassVar[str] = "prune"

    checkpoint: ArtifactRef
    calibration: ArtifactRef | None = Field(default=None, exclude_if=lambda calibration: calibration is None)
    statistics: ArtifactRef | None = None
    orders: ArtifactRef | None = None
    sources: tuple[dict[str, str], ...] = Field(default=(), exclude_if=lambda sources: not sources)
    """Identities of the data sets that a method reads, in the order in which it names them; left out of the key of one
    that reads none."""

    @property
    def trains(self) -> bool:
        """Whether the method trains while it prunes."""
        return hasattr(self.module, "train")

    @property
    def rebuilds_vocabulary(self) -> bool:
        """Whether the method leaves the layers as they are and gives the model another tokenizer."""
        return hasattr(self.module, "rebuild")

    @property
    def origins(self) -> tuple[dict[str, str], ...]:
        """Its data sets."""
        return self.sources


class OrderRequest(_PluginRequest):
    """The order in which a method would remove from the dense model, for any sparsity."""

    kind: ClassVar[Kind] = "statistics"
    package: ClassVar[str] = "pruning.methods"
    noun: ClassVar[str] = "method"
    verb: ClassVar[str] = "order"

    checkpoint: ArtifactRef
    statistics: ArtifactRef | None = Field(default=None, exclude_if=lambda statistics: statistics is None)
    calibration: ArtifactRef | None = Field(default=None, exclude_if=lambda calibration: calibration is None)
    """One of the two: captured Hessians, or the tokens that the method looks at itself."""

    @property
    def typed_config(self) -> Any:
        """The plug-in's OrderConfig."""
        return self.module.OrderConfig.model_validate(self.config)


class RecoverRequest(_PluginRequest):
    """A checkpoint repaired by training. teacher: the dense model, calibration: the windows that it was pruned with, if
    the recovery needs them."""

    kind: ClassVar[Kind] = "checkpoint"
    package: ClassVar[str] = "pruning.recovery"
    noun: ClassVar[str] = "recovery"
    verb: ClassVar[str] = "recover"

    checkpoint: ArtifactRef
    teacher: ArtifactRef | None = Field(default=None, exclude_if=lambda teacher: teacher is None)
    calibration: ArtifactRef | None = Field(default=None, exclude_if=lambda calibration: calibration is None)
    sources: tuple[dict[str, str], ...]
    """Identities of the data sets it trains on, in the order in which the recovery names them."""

    @property
    def origins(self) -> tuple[dict[str, str], ...]:
        """Its data sets."""
        return self.sources


class EvaluateRequest(_PluginRequest):
    """One suite on one checkpoint, or on a file that was exported from it."""

    kind: ClassVar[Kind] = "report"
    package: ClassVar[str] = "evaluation.suites"
    noun: ClassVar[str] = "suite"
    verb: ClassVar[str] = "evaluate"

    checkpoint: ArtifactRef
    reference: ArtifactRef | None = Field(default=None, exclude_if=lambda reference: reference is None)
    """The dense model, for a suite that compares with it."""
    export: ArtifactRef | None = Field(default=None, exclude_if=lambda export: export is None)
    """The file whose weights are measured in the place of the checkpoint's."""
    sources: tuple[dict[str, str], ...]
    """Identities of the data sets it reads, in the order in which the suite names them; of one that could not be found
    when the run began, {"missing": its id}: the stage fails, and is another one when the data set is there."""

    @property
    def origins(self) -> tuple[dict[str, str], ...]:
        """Its data sets."""
        return self.sources

    @property
    def measured(self) -> ArtifactRef:
        """The artifact whose weights they are."""
        return self.export or self.checkpoint


class ProfileRequest(Request):
    """Speed and size of one checkpoint, beside the dense one if that is another."""

    kind: ClassVar[Kind] = "report"
    LABEL: ClassVar[str] = "profile"
    VERSION: ClassVar[int] = PROFILE_VERSION

    checkpoint: ArtifactRef
    reference: ArtifactRef | None
    settings: dict[str, JsonValue]
    device_name: str
    """The device is the answer here, so it is part of the key."""

    @property
    def measured(self) -> ArtifactRef:
        """As of EvaluateRequest."""
        return self.checkpoint


class ExportRequest(Request):
    """A checkpoint in a form that other programs read."""

    kind: ClassVar[Kind] = "export"
    LABEL: ClassVar[str] = "export"
    VERSION: ClassVar[int] = EXPORT_VERSION

    checkpoint: ArtifactRef
    format: Literal["gguf"]
    type: Type


class FileProfileRequest(Request):
    """Size of an exported file, and llama.cpp's speed with it."""

    kind: ClassVar[Kind] = "report"
    LABEL: ClassVar[str] = "profile-file"
    VERSION: ClassVar[int] = FILE_PROFILE_VERSION

    export: ArtifactRef
    settings: dict[str, JsonValue]
    runtime: str
    """Which llama.cpp on which processor, which is the answer here; "" if there is none."""

    @property
    def measured(self) -> ArtifactRef:
        """As of EvaluateRequest."""
        return self.export
