"""Finding a spec's model and data sets, once per run: what plans and builds stages asks neither disk nor network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flows.spec.measures import EvalSpec
from flows.spec.run import RunSpec
from flows.spec.steps import PruneStep
from infra.errors import SourceMissing
from infra.sources.find import Sources
from pruning.training.data import data_read
from tasks.stages.evaluate import MISSING

Identity = dict[str, str]
"""What a cache key says of a repository: the commit of the hub, or the hash of what a folder holds."""


@dataclass(frozen=True)
class Identities:
    """The identity of all that a spec reads from outside the store.

    datasets: of calibrations and trainings, by id and revision. evaluations: by label, one for each of the suite's
    needs, in its order. teachers: of recoveries, by id. missing: by id, why a data set that only a task of lm-eval
    reads was not found.
    """

    model: Identity
    datasets: Mapping[tuple[str, str | None], Identity]
    evaluations: Mapping[str, tuple[Identity, ...]]
    teachers: Mapping[str, Identity]
    missing: Mapping[str, SourceMissing]


def locate(spec: RunSpec, sources: Sources) -> Identities:
    """Find everything. Raises SourceMissing for a model, or a data set that the spec names, that is not there, and
    EvaluationError for a suite's options that contradict each other."""
    model = sources.find(spec.model.id, "model", revision=spec.model.revision)
    datasets: dict[tuple[str, str | None], Identity] = {}
    teachers: dict[str, Identity] = {}
    for derivation in spec.derivations:
        step = derivation.step
        read: list[Any] = []
        if not isinstance(step, PruneStep) or step.reads_data:
            read += data_read(step.module, step.config)
        if spec.reads_calibration(derivation):
            calibration = spec.calibration_of(derivation)
            assert calibration is not None, "RunSpec refuses a step that reads calibration windows where there are none"
            read.append(calibration.data)
        for data in read:
            located = sources.find(data.dataset, "dataset", revision=data.revision)
            datasets[data.dataset, data.revision] = located.identity
        if teacher := getattr(step.config, "teacher", None):
            teachers[teacher] = sources.find(teacher, "model").identity
    missing: dict[str, SourceMissing] = {}
    evaluations = {entry.label: _read_by(entry, sources, missing) for entry in spec.evals}
    return Identities(model.identity, datasets, evaluations, teachers, missing)


def _read_by(entry: EvalSpec, sources: Sources, missing: dict[str, SourceMissing]) -> tuple[Identity, ...]:
    """The identities of the data sets that an evaluation reads. One that the spec does not name itself and that is not
    there fails its own stages, and no others: it is added to `missing`."""
    entry.module.check(entry.config)
    named = {value for value in entry.config.model_dump(mode="json").values() if isinstance(value, str)}
    identities: list[Identity] = []
    for need in entry.module.needs(entry.config):
        try:
            identities.append(sources.find(need.repo_id, "dataset", revision=need.revision).identity)
        except SourceMissing as error:
            if need.repo_id in named:
                raise
            missing[need.repo_id] = error
            identities.append({MISSING: need.repo_id})
    return tuple(identities)
