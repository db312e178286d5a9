"""The steps of a spec: to prune, in one or several sparsities and variants, and to recover."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    Tag,
    field_validator,
    model_serializer,
    model_validator,
)

from flows.spec.parts import NAME, NAME_OR_DEFAULT, PluginEntry, SpecPart, sentence
from pruning.methods import asked_number
from tasks.calibration_data import PRESETS


class Variant(SpecPart):
    """What one branch of a step does otherwise: options of the method, flat, and parts of the run's calibration."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, JsonValue]

    calibration: dict[str, JsonValue] = Field(default_factory=dict)
    """Replaces those keys of the run's `calibration`; `data` is replaced whole."""

    @field_validator("calibration")
    @classmethod
    def _written_out(cls, calibration: dict[str, JsonValue]) -> dict[str, JsonValue]:
        preset = calibration.get("data")
        if not isinstance(preset, str) or preset not in PRESETS:
            return calibration
        return calibration | {"data": dict(PRESETS[preset])}

    @property
    def options(self) -> dict[str, JsonValue]:
        """The options that differ from those of the step."""
        return self.__pydantic_extra__

    @model_serializer(mode="plain")
    def _flatten(self) -> dict[str, JsonValue]:
        return self.options | ({"calibration": self.calibration} if self.calibration else {})


def _named(variants: Any) -> Any:
    """Numbers may be names, and a name without options is a variant that changes nothing."""
    if not isinstance(variants, dict):
        return variants
    return {
        str(name) if type(name) is int else name: {} if options is None else options
        for name, options in variants.items()
    }


Variants = Annotated[dict[Annotated[str, Field(pattern=NAME)], Variant], BeforeValidator(_named)]


class PruneStep(PluginEntry):
    """Make the checkpoint smaller by a pruning method: one new checkpoint per sparsity and variant."""

    PACKAGE: ClassVar[str] = "pruning.methods"
    NOUN: ClassVar[str] = "method"
    TYPED: ClassVar[frozenset[str]] = frozenset({"config", "sparsities"})

    method: str
    name: str = Field(default="", pattern=NAME_OR_DEFAULT)
    """Name of the resulting checkpoint in tables; default: method and sparsity, as in "slimgpt-20"."""
    variants: Variants = Field(default_factory=dict)
    """Further branches by name, each with the options that it changes; they take the place of the step as it is."""
    sparsities: tuple[float, ...]
    """All values of the option `sparsity`, which may be a list; `config` has the first. Empty where a number of
    layers or experts is asked for instead."""

    @property
    def options(self) -> dict[str, Any]:
        """The method's options as they stand in YAML."""
        several = {"sparsity": list(self.sparsities)} if len(self.sparsities) > 1 else {}
        return super().options | several

    @property
    def reads_data(self) -> bool:
        """Whether the method reads data sets of its own, instead of looking at calibration windows."""
        return hasattr(self.module, "reads")

    @property
    def trains(self) -> bool:
        """Whether the method trains on its data while it prunes."""
        return hasattr(self.module, "train")

    @property
    def rebuilds_vocabulary(self) -> bool:
        """Whether the method leaves the layers as they are and gives the model another tokenizer."""
        return hasattr(self.module, "rebuild")

    @property
    def amount(self) -> str:
        """How much goes, as it stands in names: "20" per cent, or "6-layers"."""
        if self.sparsities:
            return percent(self.sparsities[0])
        return str(asked_number(self.config.model_dump())).replace(" ", "-")

    @property
    def choices(self) -> tuple[Choice, ...]:
        """The step once per variant and sparsity, in the order in which they are written. Raises ValueError."""
        variants = self.variants or {"": Variant()}
        return tuple(choice for name in variants for choice in self._choices(name, variants[name]))

    @classmethod
    def typed(cls, config_class: type[BaseModel], options: dict[str, Any]) -> dict[str, Any]:
        """One Config for each sparsity that the options give must be valid."""
        configs = _configs(config_class, options)
        return {"config": configs[0], "sparsities": _sparsities(configs)}

    def _choices(self, variant: str, changes: Variant) -> Iterator[Choice]:
        configs = _configs(self.module.Config, self.options | changes.options)
        for config in configs:
            step = PruneStep(method=self.method, config=config, sparsities=_sparsities((config,)))
            labels = [variant] if variant else []
            if len(configs) > 1:
                labels.append(step.amount)
            yield Choice(step, tuple(labels), variant, changes)

    @model_validator(mode="after")
    def _valid_variants(self) -> Self:
        for name, changes in self.variants.items():
            try:
                list(self._choices(name, changes))
            except ValueError as error:
                problem = sentence(error, self.module.Config, ["calibration"])
                raise ValueError(f"{self.method}: variants.{name}: {problem}") from error
        return self


class RecoverStep(PluginEntry):
    """Repair the checkpoint by training."""

    PACKAGE: ClassVar[str] = "pruning.recovery"
    NOUN: ClassVar[str] = "recovery"

    recovery: str
    name: str = Field(default="", pattern=NAME_OR_DEFAULT)
    """Name of the resulting checkpoint in tables; default: that of the checkpoint before it + the recovery."""


@dataclass(frozen=True)
class Choice:
    """One single-valued form of a prune step. labels: what tells it from the others, () if there are none."""

    step: PruneStep
    labels: tuple[str, ...]
    variant: str
    changes: Variant


def _sparsities(configs: Sequence[Any]) -> tuple[float, ...]:
    return tuple(config.sparsity for config in configs if config.sparsity is not None)


def percent(sparsity: float) -> str:
    """As it stands in names: "20", "12.5"."""
    return f"{100 * sparsity:g}"


def _configs(config_class: type[BaseModel], options: dict[str, Any]) -> tuple[Any, ...]:
    """A Config per value of `sparsity`. Raises ValueError."""
    values = options.get("sparsity")
    if not isinstance(values, list | tuple):
        return (config_class.model_validate(options),)
    if not values:
        raise ValueError("sparsity = []: an empty list asks for nothing; give at least one value")
    configs: list[Any] = [config_class.model_validate(options | {"sparsity": value}) for value in values]
    asked = [config.sparsity for config in configs]
    for value in asked:
        if asked.count(value) > 1:
            raise ValueError(f"sparsity = {asked}: {value:g} is there twice; give each value once")
    return tuple(configs)


def _kind_of_step(data: Any) -> str:
    keys = data if isinstance(data, dict) else {type(data).NOUN: None} if isinstance(data, PluginEntry) else {}
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
