"""What the parts of a spec have in common: frozen, no unknown keys, and plug-ins whose options stand flat in YAML."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import (
    BaseModel,
    ConfigDict,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from flows.spec.validation import first_problem
from infra import registry

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
NAME_OR_DEFAULT = rf"{NAME}|^$"


class SpecPart(BaseModel):
    """Any part of a spec."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class PluginEntry(SpecPart):
    """An entry that names a module and carries that module's own Config, flat in YAML and typed in Python."""

    PACKAGE: ClassVar[str]
    NOUN: ClassVar[str]
    TYPED: ClassVar[frozenset[str]] = frozenset({"config"})
    """Fields that are computed from the options and are no keys of the entry in YAML."""

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

    @property
    def options(self) -> dict[str, Any]:
        """The module's options as they stand in YAML, defaults written out."""
        return dict(self.config.model_dump(mode="json"))

    @classmethod
    def own_keys(cls) -> list[str]:
        """Keys of the entry that are not options of the module."""
        return [name for name in cls.model_fields if name not in cls.TYPED]

    @classmethod
    def typed(cls, config_class: type[BaseModel], options: dict[str, Any]) -> dict[str, Any]:
        """The TYPED fields, from the options. Raises ValueError."""
        return {"config": config_class.model_validate(options)}

    @model_validator(mode="before")
    @classmethod
    def _gather_config(cls, data: Any) -> Any:
        if not isinstance(data, dict) or isinstance(data.get("config"), BaseModel):
            return data
        own = {name: data[name] for name in cls.own_keys() if name in data}
        if not isinstance(own.get(cls.NOUN), str):
            raise ValueError(_no_plugin_name(cls.NOUN, own))
        config_class = registry.load(cls.PACKAGE, own[cls.NOUN], cls.NOUN).Config
        options = {key: value for key, value in data.items() if key not in own}
        try:
            return own | cls.typed(config_class, options)
        except ValueError as error:
            raise ValueError(f"{own[cls.NOUN]}: {sentence(error, config_class, cls.own_keys())}") from error

    @model_serializer(mode="wrap")
    def _flatten(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        own = {key: value for key, value in handler(self).items() if key not in self.TYPED}
        return own | self.options


def sentence(error: ValueError, model: type[BaseModel], also_known: list[str]) -> str:
    """What is wrong, in one sentence; also_known: keys that are allowed beside those of the model."""
    if isinstance(error, ValidationError):
        return first_problem(error, model=model, also_known=also_known)
    return str(error)


def _no_plugin_name(noun: str, own: dict[str, Any]) -> str:
    return f"{noun} = {own[noun]!r}: input should be a name" if noun in own else f"{noun} is missing"
