"""What a user asks for: RunSpec, from YAML to frozen, typed values and back. Importing it needs no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from flows.spec.branches import Derivation, derive, ends, tokenizer_origin
from flows.spec.measures import EvalSpec, ExportedFile, ExportSpec, OnCheckpoints, ProfileSpec
from flows.spec.parts import NAME, SpecPart
from flows.spec.start_folder import StartFolder
from flows.spec.steps import PruneStep, Step
from flows.spec.validation import first_problem, refuse_unsafe
from infra import registry
from infra.results.rows import DENSE
from pruning.bounds import Amount, Count, Seed
from tasks.calibration_data import CalibrationData, expanded


class ModelSpec(SpecPart):
    """The model to make small."""

    id: str
    """Hub id (owner/name), looked for in the mirror or on the hub; or a local folder."""
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the weights from here on; auto keeps the checkpoint's own."""
    trust_remote_code: bool = False
    """Run the code that comes with this model's tokenizer. Its modelling code is not run in any case."""


class CalibrationSpec(SpecPart):
    """Text windows that statistics are taken from (random windows of the joined documents, no BOS)."""

    data: Annotated[CalibrationData, BeforeValidator(expanded)]
    """A preset (c4, alpaca, stanford-alpaca, gpt4-alpaca, wikitext2), or a mapping that names a data set."""
    num_samples: Count = 256
    seq_len: Count = Field(default=2048, ge=2)
    num_heldout: Amount = 4
    """Further windows that no statistic sees, for held-out errors and for choices made by measuring."""
    seed: Seed = 0
    join: str = "\n\n"


class RunSpec(SpecPart):
    """One run: a model, calibration text, steps from checkpoint to checkpoint, and what to measure."""

    name: str = Field(pattern=NAME)
    description: str = ""
    model: ModelSpec
    mirror: str | tuple[str, ...] | None = None
    """Where models and data come from: folders laid out <folder>/<owner>/<name>, and the words "offline" and "hub".
    Default: SLIMLINE_MIRROR, else the hub. Not part of any cache key: content is."""
    folder: StartFolder | None = Field(default=None, exclude_if=lambda folder: folder is None)
    """Where relative paths start, noted when a spec that has some is read. Not part of any cache key either."""
    calibration: CalibrationSpec | None = None
    steps: tuple[Step, ...] = ()
    evals: tuple[EvalSpec, ...] = ()
    profile: ProfileSpec | None = None
    exports: tuple[ExportSpec, ...] = Field(default=(), exclude_if=lambda exports: not exports)
    meant_overlaps: tuple[str, ...] = Field(default=(), exclude_if=lambda names: not names)
    """Data sets (as in a step's `data`) that may be trained on although they overlap with what is measured."""

    @property
    def derivations(self) -> tuple[Derivation, ...]:
        """How each checkpoint but the dense one is made: the steps, branch after branch."""
        return derive(self.steps)

    @property
    def checkpoints(self) -> tuple[str, ...]:
        """Names of all checkpoints, the dense one first."""
        return (DENSE, *(derivation.name for derivation in self.derivations))

    def measured(self, on: OnCheckpoints) -> tuple[str, ...]:
        """The checkpoints that an `on:` means."""
        return self.checkpoints if on == "all" else on

    @property
    def files(self) -> tuple[ExportedFile, ...]:
        """What `exports` asks for, file by file."""
        return tuple(
            ExportedFile(name, entry, kind, self._evaluations_of(entry))
            for entry in self.exports
            for name in (ends(self.derivations) if entry.on == "ends" else self.measured(entry.on))
            for kind in entry.types
        )

    def _evaluations_of(self, entry: ExportSpec) -> tuple[EvalSpec, ...]:
        if entry.measure is None:
            return ()
        known = {each.label: each for each in self.evals}
        if entry.measure.evals is None:
            return tuple(each for each in self.evals if each.suite == "perplexity")
        for name in entry.measure.evals:
            if name not in known:
                there = f"there are: {', '.join(known)}" if known else "this run has no evals"
                raise ValueError(
                    f"exports: measure: unknown evaluation {name!r}{registry.did_you_mean(name, known)}; {there}"
                )
        return tuple(known[name] for name in entry.measure.evals)

    def measured_by(self, entry: EvalSpec) -> tuple[str, ...]:
        """The checkpoints that an evaluation measures: the dense one is not compared with itself."""
        return tuple(name for name in self.measured(entry.on) if name != DENSE or not entry.compares)

    def reads_calibration(self, derivation: Derivation) -> bool:
        """Whether a step takes statistics of calibration windows, or trains on them."""
        step = derivation.step
        if isinstance(step, PruneStep):
            return not step.reads_data
        return "calibration" in step.module.NEEDS

    def calibration_of(self, derivation: Derivation) -> CalibrationSpec | None:
        """The run's calibration with what the branch changes in it. Raises ValidationError."""
        if not derivation.changes.calibration:
            return self.calibration
        own = self.calibration.model_dump(mode="json") if self.calibration else {}
        return CalibrationSpec.model_validate(own | derivation.changes.calibration)

    def tokenizer_of(self, name: str) -> str:
        """The checkpoint from which one has its tokenizer: the dense one, or the last on its way with a vocabulary of
        its own. What is trained towards the dense model is trained towards this one."""
        return tokenizer_origin(self.derivations, name)

    _safe = model_validator(mode="before")(refuse_unsafe)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _refuse_duplicates("checkpoint", self.checkpoints, "give one of the steps another `name`")
        _refuse_duplicates("evaluation", [entry.label for entry in self.evals], "give one of them a `name`")
        for entry in self.evals:
            if not self.measured_by(entry):
                raise ValueError(
                    f"evals: {entry.label} compares checkpoints with the dense one, and there is no other to compare; "
                    "add a step, or leave it out"
                )
        named = [entry.on for entry in self.exports if entry.on != "ends"]
        for on in [*(entry.on for entry in self.evals), *([self.profile.on] if self.profile else []), *named]:
            for name in () if on == "all" else on:
                if name not in self.checkpoints:
                    raise ValueError(
                        f"on: unknown checkpoint {name!r}{registry.did_you_mean(name, self.checkpoints)}; "
                        f"this run has: {', '.join(self.checkpoints)}"
                    )
        measured = [file.name for file in self.files if file.entry.measure is not None]
        way_out = "measure each file once, and give a step of that name another one"
        _refuse_duplicates("measured checkpoint or file", [*self.checkpoints, *measured], way_out)
        _refuse_duplicates("variant", [v for step in self.steps for v in getattr(step, "variants", ())], "rename one")
        for derivation in self.derivations:
            self._check_calibration(derivation)
            self._check_teacher(derivation)
        for entry in self.evals:
            self._check_reference(entry)
        return self

    def _check_teacher(self, derivation: Derivation) -> None:
        """What a model learns from a teacher it learns token by token."""
        origin, step = self.tokenizer_of(derivation.source), derivation.step
        if origin == DENSE or "teacher" not in getattr(step.module, "NEEDS", ()):
            return
        if teacher := getattr(step.config, "teacher", None):
            raise ValueError(
                f"{step.plugin} names the teacher {teacher}, and {derivation.source} has the smaller vocabulary of "
                f"{origin}, which no other model has: leave teacher out, or make the vocabulary smaller after it"
            )
        by_name = {each.name: each for each in self.derivations}
        way = by_name[origin]
        while way.rebuilds_vocabulary and way.source in by_name:
            way = by_name[way.source]
        if not way.rebuilds_vocabulary:
            raise ValueError(
                f"{step.plugin} learns from the dense model, and {derivation.source} has the smaller vocabulary of "
                f"{origin}, which was not made of the dense model: put the step {by_name[origin].step.plugin} first, "
                f"or after {step.plugin}"
            )

    def _check_reference(self, entry: EvalSpec) -> None:
        """Probabilities of tokens are compared token by token."""
        if not entry.compares:
            return
        others = [name for name in self.measured_by(entry) if self.tokenizer_of(name) != DENSE]
        if others:
            raise ValueError(
                f"evals: {entry.label} compares {others[0]} with the dense model token by token, and its vocabulary is "
                "a smaller one: name other checkpoints in `on`, or compare by perplexity with `normalise: [byte]`"
            )

    def _check_calibration(self, derivation: Derivation) -> None:
        try:
            calibration = self.calibration_of(derivation)
        except ValidationError as error:
            problem = first_problem(error, model=CalibrationSpec)
            raise ValueError(f"variants.{derivation.variant}.calibration: {problem}") from error
        if calibration is None and isinstance(derivation.step, PruneStep) and not derivation.step.reads_data:
            raise ValueError("steps prune but there is no `calibration`; add one (data, num_samples, seq_len)")
        if calibration is None and self.reads_calibration(derivation):
            raise ValueError(
                f"{derivation.step.plugin} trains on the calibration windows and there is no `calibration`; add one "
                "(data, num_samples, seq_len, num_heldout)"
            )
        check = getattr(derivation.step.module, "check_calibration", None)
        if calibration is not None and check is not None and self.reads_calibration(derivation):
            check(derivation.step.config, calibration.num_heldout)


def _refuse_duplicates(what: str, names: Iterable[str], way_out: str) -> None:
    duplicates = [name for name, count in Counter(names).items() if count > 1]
    if duplicates:
        raise ValueError(f"two {what}s are called {duplicates[0]!r}; {way_out}")
