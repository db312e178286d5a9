"""No leak: what a run trains on is compared with what it measures on, by source and by words.

Training on rows that are measured afterwards makes figures that say nothing. In a run this is a warning, before work
and beside the figures; in a night, which nobody watches, an error, unless the spec names the data set in
`meant_overlaps`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from evaluation.suite import TextNeed
from flows.errors import SpecError
from flows.run.graph import Stage, StageGraph
from flows.spec.branches import Derivation
from flows.spec.measures import EvalSpec
from flows.spec.run import RunSpec
from flows.spec.steps import PruneStep
from infra.sources.find import Sources, TextData
from infra.sources.shared_rows import Overlap, Reading, SharedRows
from tasks.execution.stage import importing
from tasks.requests import EvaluateRequest, PruneRequest, RecoverRequest

if TYPE_CHECKING:
    from infra.sources.data_files import DataFiles
    from tasks.execution.context import RunContext

log = logging.getLogger("slimline")


class Leak(BaseModel):
    """A step that trains on what an evaluation measures afterwards. step: the method or recovery. checkpoints: those
    that were trained so, and files of them, that the evaluation measures."""

    model_config = ConfigDict(frozen=True)

    step: str
    trained: Reading
    evaluation: str
    checkpoints: tuple[str, ...]
    overlap: Overlap

    def touches(self, stage: Stage) -> bool:
        """Whether the figures of an evaluation are in doubt."""
        return stage.label == self.evaluation and stage.checkpoint in self.checkpoints

    @property
    def sentence(self) -> str:
        """What leaks where."""
        trains, overlap = f"{self.step} trains on {self.trained.words}", self.overlap
        if overlap.same_rows:
            return f"{trains}, and {self.evaluation} measures rows of it: {overlap.measured}"
        return (
            f"{trains}, and {self.evaluation} measures {overlap.measured}: 13 words in a row of {overlap.num_shared:,} "
            f"of {overlap.num_measured:,} sampled texts are in {overlap.num_trained:,} sampled texts of the training "
            f"data ({_cut(overlap.example)!r})"
        )


def check_leaks(graph: StageGraph, missing: Sequence[Stage], run_context: RunContext) -> None:
    """Warn of every leak of a run, if any of its missing stages trains or measures; in a night see `refuse_leaks`."""
    if run_context.part_of is not None:
        refuse_leaks(graph.spec, missing, run_context.sources)
    elif _at_stake(missing):
        for leak in find_leaks(graph.spec, run_context.sources):
            log.warning("%s", leak.sentence)


def refuse_leaks(spec: RunSpec, missing: Sequence[Stage], sources: Sources) -> None:
    """Raise SpecError, with the ways out, for the first leak, if any missing stage trains or measures."""
    for leak in find_leaks(spec, sources) if _at_stake(missing) else ():
        raise SpecError(
            f"{leak.sentence}; train on other data, measure another split, or say in the spec that it is meant: "
            f"meant_overlaps: [{leak.trained.data.dataset}]"
        )


def _at_stake(missing: Sequence[Stage]) -> bool:
    return any(isinstance(stage.request, PruneRequest | RecoverRequest | EvaluateRequest) for stage in missing)


def trains(spec: RunSpec) -> bool:
    """Whether any of its steps trains."""
    return bool(_trainings(spec))


def find_leaks(spec: RunSpec, sources: Sources, *, look: bool = True) -> tuple[Leak, ...]:
    """Every leak that the spec does not say is meant. look: read samples of what was not compared before, which takes
    seconds; otherwise only what is known is said. Data that cannot be read is another check's matter."""
    comparison = SharedRows(sources, lambda reading, data: _files(reading, data, sources))
    leaks = []
    for (step, trained), checkpoints in _trainings(spec).items():
        if trained.data.dataset in spec.meant_overlaps:
            continue
        for entry in spec.evals:
            named = {name: name for name in spec.measured_by(entry)}
            named |= {file.name: file.checkpoint for file in spec.files if entry in file.evals}
            measured = tuple(name for name, checkpoint in named.items() if checkpoint in checkpoints)
            for readings in _measured(entry) if measured else ():
                if overlap := _between(comparison, trained, readings, look):
                    leaks.append(
                        Leak(step=step, trained=trained, evaluation=entry.label, checkpoints=measured, overlap=overlap)
                    )
    return tuple(leaks)


def _between(comparison: SharedRows, trained: Reading, readings: Sequence[Reading], look: bool) -> Overlap | None:
    try:
        with importing:  # of `datasets`, which fails while a stage of another cell imports transformers
            return comparison.between(trained, readings, look=look)
    except Exception as error:  # as many as there are formats, hubs and file systems; who needs the data says so
        log.debug("whether %s and %s overlap is not known: %s", trained.words, readings[0].words, error)
        return None


def _trainings(spec: RunSpec) -> dict[tuple[str, Reading], list[str]]:
    """What each kind of step trains on, with the names of all checkpoints that follow from such a training."""
    by_name = {derivation.name: derivation for derivation in spec.derivations}
    found: dict[tuple[str, Reading], list[str]] = {}
    for derivation in spec.derivations:
        for ancestor in _line(derivation, by_name):
            for reading in _trained_on(ancestor, by_name, spec):
                names = found.setdefault((ancestor.step.plugin, reading), [])
                if derivation.name not in names:
                    names.append(derivation.name)
    return found


def _line(derivation: Derivation, by_name: dict[str, Derivation]) -> Iterator[Derivation]:
    """The derivation, what it is made from, and so on up to the dense checkpoint."""
    following: Derivation | None = derivation
    while following is not None:
        yield following
        following = by_name.get(following.source)


def _trained_on(derivation: Derivation, by_name: dict[str, Derivation], spec: RunSpec) -> Iterator[Reading]:
    """What a step trains on: its own data sets, or the calibration of the prunings before it."""
    module, config = derivation.step.module, derivation.step.config
    if isinstance(derivation.step, PruneStep) and not derivation.step.trains:
        return
    for data in module.reads(config):
        yield _reading(data, data.columns)
    if isinstance(derivation.step, PruneStep) or "calibration" not in module.NEEDS:
        return
    for ancestor in _line(derivation, by_name):
        if isinstance(ancestor.step, PruneStep) and (calibration := spec.calibration_of(ancestor)) is not None:
            yield _reading(calibration.data, calibration.data.columns)


def _measured(entry: EvalSpec) -> list[list[Reading]]:
    """What an evaluation scores, data set by data set; what few-shot examples are drawn from is no part of it."""
    need = getattr(entry.config, "texts", None)
    if isinstance(need, TextNeed):
        return [[_reading(need, (need.text_field,))]]
    if hasattr(entry.module, "definitions"):
        tasks = [task for task in entry.module.definitions(entry.config) if not task.is_group]
        named = [(task.repo_id, task.config, task.eval_split, None) for task in tasks]
    else:
        needs = entry.module.needs(entry.config)
        named = [(need.repo_id, need.config, need.split, need.revision) for need in needs]
    groups: dict[str, dict[Reading, None]] = {}
    for repo_id, config, split, revision in named:
        data = TextData(dataset=repo_id, config=config, split=split, revision=revision)
        groups.setdefault(repo_id, {})[Reading(data=data)] = None
    return [list(readings) for readings in groups.values()]


def _reading(data: Any, columns: Sequence[str]) -> Reading:
    """Of anything that names a data set as TextData does, with whatever else it says."""
    named = {name: getattr(data, name) for name in ("dataset", "config", "split", "revision", "data_files")}
    return Reading(data=TextData(**named), columns=tuple(columns))


def _files(reading: Reading, data: TextData, sources: Sources) -> DataFiles:
    """The files of a split. Those of a task in a local folder are found as its suite finds them: by the names in it
    where no README names them."""
    folder = None if reading.columns is not None else sources.folder(data.dataset)
    if folder is None:
        return sources.files(data)
    from evaluation.harness.local_dataset import LocalFolder  # imports datasets

    with TemporaryDirectory(prefix="slimline-look-") as scratch:
        excerpt = LocalFolder(folder).write_excerpt(Path(scratch, "data"), data.config, [data.split])
        return sources.named_files(data.dataset, excerpt, data.config, data.split)


def _cut(text: str, most: int = 80) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."
