"""A night: a matrix of models, methods, sparsities and recoveries, what to measure, and which figures must hold."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, JsonValue, ValidationError, model_validator

from flows.spec.measures import EvalSpec, ProfileSpec
from flows.spec.parts import NAME, SpecPart
from flows.spec.run import CalibrationSpec, ModelSpec, RunSpec
from flows.spec.start_folder import StartFolder
from flows.spec.steps import percent
from flows.spec.validation import first_problem, refuse_unsafe
from infra.registry import did_you_mean

#: the recovery that is none: the pruned checkpoint is measured as it is
NONE = "none"
_AXES = ("model", "method", "sparsity", "recovery")


def _named_by(noun: str) -> BeforeValidator:
    """A list of names or of mappings, or a mapping from names, as a mapping from names to options."""

    def named(entries: Any) -> Any:
        if isinstance(entries, dict):
            return {str(name): _options(noun, str(name), entry) for name, entry in entries.items()}
        if not isinstance(entries, list | tuple):
            return entries
        pairs = [_pair(noun, entry) for entry in entries]
        names = [name for name, _ in pairs]
        duplicate = next((name for name in names if names.count(name) > 1), None)
        if duplicate is not None:
            raise ValueError(
                f"two entries are called {duplicate!r}; write a mapping from names of your own to the entries"
            )
        return dict(pairs)

    return BeforeValidator(named)


def _pair(noun: str, entry: Any) -> tuple[str, Any]:
    if isinstance(entry, str):
        return entry.rpartition("/")[2], _options(noun, entry, {})
    if isinstance(entry, dict) and isinstance(entry.get(noun), str):
        return entry[noun].rpartition("/")[2], entry
    raise ValueError(f"{entry!r} names no {noun}; write its name, or a mapping with the key `{noun}`")


def _options(noun: str, name: str, entry: Any) -> Any:
    """Options without the plug-in's name belong to the plug-in that the entry is called after."""
    if isinstance(entry, list | tuple) and noun == "recovery":
        if not entry:
            raise ValueError(f"{name}: an empty list trains nothing; name a recovery, or write {NONE}: {{}}")
        for step in entry:
            if not isinstance(step, dict) or noun not in step:
                raise ValueError(f"{name}: {step!r} is no step; write a mapping with the key `{noun}`")
        return tuple(entry)
    if not isinstance(entry, dict | None) or (noun == "recovery" and name == NONE):
        return entry or {}
    return entry if entry and noun in entry else {noun: name} | (entry or {})


Name = Annotated[str, Field(pattern=NAME)]
Entries = dict[Name, dict[str, JsonValue]]
Sequences = dict[Name, dict[str, JsonValue] | tuple[dict[str, JsonValue], ...]]


class Matrix(SpecPart):
    """Every combination of these is a cell, but for those that `exclude` names."""

    models: Annotated[dict[Name, ModelSpec], _named_by("id")] = Field(min_length=1)
    methods: Annotated[Entries, _named_by("method")] = Field(min_length=1)
    sparsities: tuple[float, ...] = Field(min_length=1)
    recoveries: Annotated[Sequences, _named_by("recovery")] = Field(default={NONE: {}}, min_length=1)
    """Each may be a list of recoveries, one after the other."""
    exclude: tuple[dict[str, JsonValue], ...] = ()
    """Combinations left out: {model: a, recovery: b} leaves out every cell with both."""

    @property
    def combinations(self) -> tuple[tuple[str, str, float, str], ...]:
        """(model, method, sparsity, recovery) of every cell, models outermost."""
        every = itertools.product(self.models, self.methods, self.sparsities, self.recoveries)
        return tuple(one for one in every if not any(_matches(rule, one) for rule in self.exclude))

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for sparsity in self.sparsities:
            if self.sparsities.count(sparsity) > 1:
                raise ValueError(f"sparsities: {sparsity:g} is there twice; give each value once")
        if self.recoveries.get(NONE):
            raise ValueError(f"recoveries: {NONE!r} means no recovery and takes no options; give it another name")
        known: dict[str, list[Any]] = {
            "model": list(self.models),
            "method": list(self.methods),
            "sparsity": list(self.sparsities),
            "recovery": list(self.recoveries),
        }
        for rule in self.exclude:
            for axis, value in rule.items():
                if axis not in known:
                    raise ValueError(
                        f"exclude: unknown axis {axis!r}{did_you_mean(axis, _AXES)}; known: {', '.join(_AXES)}"
                    )
                if value not in known[axis]:
                    names = [str(name) for name in known[axis]]
                    raise ValueError(f"exclude: there is no {axis} {value!r}{did_you_mean(str(value), names)}")
        if not self.combinations:
            raise ValueError("exclude leaves no cell; drop one of its entries")
        return self


def _matches(rule: dict[str, JsonValue], combination: tuple[str, str, float, str]) -> bool:
    return all(dict(zip(_AXES, combination, strict=True))[axis] == value for axis, value in rule.items())


class Gate(SpecPart):
    """A demand on figures. All patterns are shell patterns; a gate that matches no figure fails: it guards nothing."""

    metric: str = Field(min_length=1)
    """Of "suite/task/metric", e.g. "perplexity/*/ppl@2048", "zero_shot/*/acc"."""
    cells: str = "*"
    checkpoint: str = "*"
    at_most: float | None = None
    at_least: float | None = None
    not_worse: bool = False
    """The figure must not be worse than in the last good night beyond noise."""
    max_loss: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Relative: 0.02 lets a figure be 2 % worse than in the last good night, noise or not."""

    @property
    def words(self) -> str:
        """E.g. "perplexity/* at_most 70 and not_worse": the gate in tables and in the results store."""
        demands = [
            f"{name} {value:g}"
            for name in ("at_most", "at_least", "max_loss")
            if (value := getattr(self, name)) is not None
        ]
        return f"{self.metric} {' and '.join(demands + ['not_worse'] * self.not_worse)}"

    def guards(self, *, cell: str, checkpoint: str, figure: str) -> bool:
        """Whether it demands something of the figure ("suite/task/metric")."""
        patterns = ((cell, self.cells), (checkpoint, self.checkpoint), (figure, self.metric))
        return all(fnmatchcase(text, pattern) for text, pattern in patterns)

    @model_validator(mode="after")
    def _demands_something(self) -> Self:
        if not self.not_worse and (self.at_most, self.at_least, self.max_loss) == (None, None, None):
            raise ValueError(
                f"the gate on {self.metric!r} demands nothing; give at_most, at_least, not_worse or max_loss"
            )
        return self


@dataclass(frozen=True)
class Cell:
    """One combination of the matrix and the run that it stands for."""

    name: str
    spec: RunSpec


class NightSpec(SpecPart):
    """A night: one run per cell of the matrix, and the gates that its figures must pass."""

    name: str = Field(pattern=NAME)
    description: str = ""
    mirror: str | tuple[str, ...] | None = None
    folder: StartFolder | None = Field(default=None, exclude_if=lambda folder: folder is None)
    calibration: CalibrationSpec
    matrix: Matrix
    evals: tuple[EvalSpec, ...] = ()
    profile: ProfileSpec | None = None
    meant_overlaps: tuple[str, ...] = Field(default=(), exclude_if=lambda names: not names)
    """Data sets (as in a recovery's `data`) that may be trained on although they overlap with what is measured."""
    gates: tuple[Gate, ...] = ()
    alpha: float = Field(default=0.05, gt=0, lt=1)
    """Chance that any of a night's tested differences is called one although there is none (z test, Holm)."""
    tolerance: float = Field(default=0.1, ge=0, allow_inf_nan=False)
    """Relative change beyond which a figure without standard error (time, memory) counts as changed."""

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        """The runs, each called `<night>-<model>-<method>-<sparsity>-<recovery>`, made when the night is validated."""
        cells = []
        for model, method, sparsity, recovery in self.matrix.combinations:
            name = f"{model}-{method}-{percent(sparsity)}-{recovery}"
            steps: list[Any] = [
                {**self.matrix.methods[method], "sparsity": sparsity, "name": f"{method}-{percent(sparsity)}"}
            ]
            entry = self.matrix.recoveries[recovery]
            steps += entry if isinstance(entry, tuple) else [entry] if entry else []
            raw = {
                "name": f"{self.name}-{name}",
                "model": self.matrix.models[model],
                "mirror": self.mirror,
                "folder": self.folder,
                "calibration": self.calibration,
                "steps": steps,
                "evals": self.evals,
                "profile": self.profile,
                "meant_overlaps": self.meant_overlaps,
            }
            try:
                cells.append(Cell(name, RunSpec.model_validate(raw)))
            except ValidationError as error:
                raise ValueError(f"cell {name}: {first_problem(error, model=RunSpec)}") from error
        return tuple(cells)

    _safe = model_validator(mode="before")(refuse_unsafe)

    @model_validator(mode="after")
    def _valid_cells(self) -> Self:
        _ = self.cells
        return self
