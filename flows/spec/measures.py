"""What is measured of the checkpoints of a run, and which files are made of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from evaluation.profile.config import FileProfileConfig, ProfileConfig
from flows.spec.parts import NAME_OR_DEFAULT, PluginEntry, SpecPart
from infra import registry
from infra.exporting.gguf_file import Type


def _as_tuple(on: Any) -> Any:
    if isinstance(on, str):
        return on if on == "all" else (on,)
    if not isinstance(on, list | tuple) or not all(isinstance(name, str) for name in on):
        raise ValueError(f'{on!r} names no checkpoints; give "all" or a list of names')
    return on


OnCheckpoints = Annotated[Literal["all"] | tuple[str, ...], BeforeValidator(_as_tuple)]


class EvalSpec(PluginEntry):
    """Measure some or all checkpoints with a suite."""

    PACKAGE: ClassVar[str] = "evaluation.suites"
    NOUN: ClassVar[str] = "suite"

    suite: str
    name: str = Field(default="", pattern=NAME_OR_DEFAULT)
    """Name of the stage; default: the suite's. Needed when a suite is asked twice."""
    on: OnCheckpoints = "all"
    """"all", or one or more names of checkpoints: dense and those of the steps."""

    @property
    def label(self) -> str:
        """Name of this evaluation in stage names."""
        return self.name or self.suite

    @property
    def compares(self) -> bool:
        """Whether the suite measures a model against the dense one."""
        return bool(getattr(self.module, "COMPARES", False))


class ProfileSpec(SpecPart):
    """Latency, memory and size, each compressed model timed turn and turn about with the dense one.

    Options may stand beside `on`, `preset` above all, or under `settings`, where they are written out.
    """

    on: OnCheckpoints = "all"
    settings: ProfileConfig = ProfileConfig()

    @model_validator(mode="before")
    @classmethod
    def _gather_settings(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(data.get("settings", {}), dict):
            return data
        options = set(ProfileConfig.model_fields)
        beside = {
            key: value
            for key, value in data.items()
            if key in options or (key not in cls.model_fields and registry.did_you_mean(str(key), options))
        }
        if not beside:
            return data
        settings = data.get("settings", {})
        for key in beside.keys() & settings.keys():
            raise ValueError(f"{key} stands both beside and under `settings`; leave one of them out")
        return {key: value for key, value in data.items() if key not in beside} | {"settings": settings | beside}


class MeasureSpec(FileProfileConfig):
    """What is measured of an exported file: size, evaluations, and where llama.cpp is installed its speed with it."""

    evals: tuple[str, ...] | None = None
    """Names of evaluations of this run that are made of the file's weights as well; without it those of the suite
    perplexity."""

    @property
    def timing(self) -> FileProfileConfig:
        """How llama.cpp is timed."""
        return FileProfileConfig(**self.model_dump(include=set(FileProfileConfig.model_fields)))


class ExportSpec(SpecPart):
    """Write checkpoints for other programs, each as an artifact of its own."""

    format: Literal["gguf"]
    """gguf: one file for llama.cpp. A folder for transformers is in the store already: `slimline export --format hf`
    writes it with its model card."""
    type: Type | Annotated[tuple[Type, ...], Field(min_length=1)] = "f16"
    """Of the matrices of a GGUF file; of a list each makes a file."""
    measure: MeasureSpec | None = Field(default=None, exclude_if=lambda measure: measure is None)
    """Measure the files (`{}`: by default); in results each is called <checkpoint>+<type>, beside the checkpoints."""
    on: Literal["ends"] | OnCheckpoints = "ends"
    """"ends", the last checkpoint of every branch; "all", or one or more names of checkpoints."""

    @property
    def types(self) -> tuple[Type, ...]:
        """One or more."""
        return (self.type,) if isinstance(self.type, str) else self.type


@dataclass(frozen=True)
class ExportedFile:
    """One file that a run writes of one of its checkpoints. evals: those that are made of it."""

    checkpoint: str
    entry: ExportSpec
    type: Type
    evals: tuple[EvalSpec, ...]

    @property
    def name(self) -> str:
        """In results, beside the names of checkpoints."""
        return f"{self.checkpoint}+{self.type}"
