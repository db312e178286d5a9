"""What a user asks for: RunSpec, from YAML to frozen, typed values and back. Importing it needs no torch."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    NonNegativeInt,
    PositiveInt,
    SerializerFunctionWrapHandler,
    Tag,
    ValidationError,
    model_serializer,
    model_validator,
)

from evaluation.profile_config import ProfileConfig
from flows.messages import first_problem
from infra import registry
from infra.sources import TextData

DENSE = "dense"
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
_NAME_OR_DEFAULT = rf"{_NAME}|^$"


class _Spec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelSpec(_Spec):
    """The model to make small."""

    id: str
    """Hub id (owner/name), looked for in the mirror or on the hub; or a local folder."""
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the weights from here on; auto keeps the checkpoint's own."""


class CalibrationSpec(_Spec):
    """Text windows that statistics are taken from (random windows of the joined documents, no BOS)."""

    data: TextData
    num_samples: PositiveInt = 256
    seq_len: int = Field(default=2048, ge=2)
    num_heldout: NonNegativeInt = 4
    """Further windows that no statistic sees, for held-out errors and for choices made by measuring."""
    seed: int = 0
    join: str = "\n\n"


class _Plugin(_Spec):
    """An entry that names a module and carries that module's own Config, flat in YAML and typed in Python."""

    PACKAGE: ClassVar[str]
    NOUN: ClassVar[str]

    config: Any
    """The module's Config; its fields stand beside `method`, `recovery` or `suite` in YAML."""

    @property
    def plugin(self) -> str:
        """Name of the module, which is its name in the spec."""
        return str(getattr(self, self.NOUN))

    @property
    def module(self) -> Any:
        """The imported plug-in."""
        return registry.load(self.PACKAGE, self.plugin, self.NOUN)

    @model_validator(mode="before")
    @classmethod
    def _gather_config(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if isinstance(data.get("config"), BaseModel):
            return data
        own = {name: data[name] for name in cls.model_fields if name in data and name != "config"}
        if not isinstance(own.get(cls.NOUN), str):
            raise ValueError(_no_plugin_name(cls.NOUN, own))
        module = registry.load(cls.PACKAGE, own[cls.NOUN], cls.NOUN)
        rest = {key: value for key, value in data.items() if key not in own}
        try:
            return own | {"config": module.Config.model_validate(rest)}
        except ValidationError as error:
            known = [name for name in cls.model_fields if name != "config"]
            raise ValueError(
                f"{own[cls.NOUN]}: {first_problem(error, model=module.Config, also_known=known)}"
            ) from error

    @model_serializer(mode="wrap")
    def _flatten(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        flat = {key: value for key, value in handler(self).items() if key != "config"}
        return flat | dict(self.config.model_dump(mode="json"))


class PruneStep(_Plugin):
    """Make the checkpoint smaller by a pruning method."""

    PACKAGE: ClassVar[str] = "pruning.methods"
    NOUN: ClassVar[str] = "method"

    method: str
    name: str = Field(default="", pattern=_NAME_OR_DEFAULT)
    """Name of the resulting checkpoint in tables; default: method and sparsity, as in "slimgpt-20"."""

    @property
    def checkpoint(self) -> str:
        """Name of the resulting checkpoint."""
        return self.name or f"{self.method}-{100 * self.config.sparsity:g}"


class RecoverStep(_Plugin):
    """Repair the checkpoint by training."""

    PACKAGE: ClassVar[str] = "pruning.recovery"
    NOUN: ClassVar[str] = "recovery"

    recovery: str
    name: str = Field(default="", pattern=_NAME_OR_DEFAULT)
    """Name of the resulting checkpoint in tables; default: that of the checkpoint before it + the recovery."""

    def checkpoint_after(self, before: str) -> str:
        """Name of the resulting checkpoint."""
        return self.name or f"{before}+{self.recovery}"


def _kind_of_step(data: Any) -> str:
    keys = data if isinstance(data, dict) else {type(data).NOUN: None} if isinstance(data, _Plugin) else {}
    if "method" in keys and "recovery" in keys:
        return "both"
    return "prune" if "method" in keys else "recover" if "recovery" in keys else "neither"


Step = Annotated[
    Annotated[PruneStep, Tag("prune")] | Annotated[RecoverStep, Tag("recover")],
    Discriminator(
        _kind_of_step,
        custom_error_type="step_kind",
        custom_error_message="a step names either a `method` (to prune) or a `recovery` (to train)",
    ),
]


def _as_tuple(on: Any) -> Any:
    if isinstance(on, str):
        return on if on == "all" else (on,)
    if not isinstance(on, list | tuple) or not all(isinstance(name, str) for name in on):
        raise ValueError(f'{on!r} names no checkpoints; give "all" or a list of names')
    return on


OnCheckpoints = Annotated[Literal["all"] | tuple[str, ...], BeforeValidator(_as_tuple)]


class EvalSpec(_Plugin):
    """Measure some or all checkpoints with a suite."""

    PACKAGE: ClassVar[str] = "evaluation.suites"
    NOUN: ClassVar[str] = "suite"

    suite: str
    name: str = Field(default="", pattern=_NAME_OR_DEFAULT)
    """Name of the stage; default: the suite's. Needed when a suite is asked twice."""
    on: OnCheckpoints = "all"
    """"all", or one or more names of checkpoints: dense and those of the steps."""

    @property
    def label(self) -> str:
        """Name of this evaluation in stage names."""
        return self.name or self.suite


class ProfileSpec(_Spec):
    """Latency, memory and size, each compressed model timed turn and turn about with the dense one."""

    on: OnCheckpoints = "all"
    settings: ProfileConfig = ProfileConfig()


class RunSpec(_Spec):
    """One run: a model, calibration text, steps from checkpoint to checkpoint, and what to measure."""

    name: str = Field(pattern=_NAME)
    description: str = ""
    model: ModelSpec
    mirror: str | tuple[str, ...] | None = None
    """Where models and data come from: folders laid out <folder>/<owner>/<name>, and the words "offline" and "hub".
    Default: SLIMLINE_MIRROR, else the hub. Not part of any cache key: content is."""
    calibration: CalibrationSpec | None = None
    steps: tuple[Step, ...] = ()
    evals: tuple[EvalSpec, ...] = ()
    profile: ProfileSpec | None = None

    @property
    def checkpoints(self) -> tuple[str, ...]:
        """Names of all checkpoints, the dense one first."""
        names = [DENSE]
        for step in self.steps:
            names.append(step.checkpoint if isinstance(step, PruneStep) else step.checkpoint_after(names[-1]))
        return tuple(names)

    def measured(self, on: OnCheckpoints) -> tuple[str, ...]:
        """The checkpoints that an `on:` means."""
        return self.checkpoints if on == "all" else on

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _refuse_twice("checkpoint", self.checkpoints, "give one of the steps another `name`")
        _refuse_twice("evaluation", [entry.label for entry in self.evals], "give one of them a `name`")
        for on in [entry.on for entry in self.evals] + ([self.profile.on] if self.profile else []):
            for name in () if on == "all" else on:
                if name not in self.checkpoints:
                    raise ValueError(
                        f"on: unknown checkpoint {name!r}{registry.near(name, self.checkpoints)}; "
                        f"this run has: {', '.join(self.checkpoints)}"
                    )
        if self.calibration is None and any(isinstance(step, PruneStep) for step in self.steps):
            raise ValueError("steps prune but there is no `calibration`; add one (data, num_samples, seq_len)")
        return self


def _no_plugin_name(noun: str, own: dict[str, Any]) -> str:
    return f"{noun} = {own[noun]!r}: input should be a name" if noun in own else f"{noun} is missing"


def _refuse_twice(what: str, names: tuple[str, ...] | list[str], way_out: str) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"two {what}s are called {twice[0]!r}; {way_out}")
