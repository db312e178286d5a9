"""MLflow: one run per run key with a run per checkpoint below it, continued and never repeated.

A record in which nothing is new is recognised in the sqlite file itself, without mlflow, which takes 3 to 4 seconds to
import and open.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from threading import Event
from typing import TYPE_CHECKING

from infra.errors import TrackingUnusable
from infra.filesystem.locks import flocked
from infra.secrets import redacted
from infra.tracking import mlflow_rules as rules
from infra.tracking.database import check_store, database_of, lock_file, tagged_run
from infra.tracking.mlflow_store import (
    CHECKPOINT_KEY_TAG,
    CONTENT_TAG,
    LABEL_TAG,
    RUN_KEY_TAG,
    UNDER_WAY,
    MlflowStore,
    connect,
    is_outside,
)
from infra.tracking.records import CheckpointRecord, MetricPoint, RunRecord

if TYPE_CHECKING:
    from infra.tracking.mlflow_store import MlflowClient, Run

_SQLITE = "sqlite:///"
_RUN_AGAIN = "correct SLIMLINE_MLFLOW_URI or the server and run again: finished stages are not repeated"
_GOES_ON = "the stage goes on, and its curves are recorded with the run"


class Tracker:
    """Writes runs to the MLflow tracking store and model registry at `uri`.

    A sqlite file is created on first use, with the runs' files in `mlartifacts` beside it. The processes of one host
    take turns: MLflow's creation of a database fails when two do it at once.
    """

    def __init__(self, uri: str, experiment: str = "slimline") -> None:
        self.uri = uri
        self._database = database_of(uri)
        self.experiment = experiment

    def record(self, record: RunRecord, visit_tags: Mapping[str, str] | None = None) -> str:
        """Make the MLflow run of a run key, and the runs of its checkpoints below it, hold all of this, and return the
        id of the former. Raises TrackingUnusable.

        Recorded again: a point whose value is the one logged last at its step is not repeated; a param keeps its first
        value and the new one goes into the tag `slimline.changed_params`; tags, texts and status are replaced. The run
        of a checkpoint is found again by its label, else (it was renamed) by its key; one that was under way and is
        not in the record has failed. `visit_tags` (who recorded this, with which code) are written when anything else
        is new, and alone do not make the record new.
        """
        with self._turn(record.run_key):
            return self._recorded(record) or self._write(record, visit_tags or {})

    def has(self, run_key: str) -> bool:
        """Whether a whole record of that run is there, also an older one with all checkpoints in one MLflow run.

        Raises TrackingUnusable.
        """
        if self._database is not None:
            if not self._database.exists():
                return False
            if tagged_run(self._database, self.experiment, {RUN_KEY_TAG: run_key, CONTENT_TAG: None}):
                return True
        with self._turn(run_key):
            run = self._store().find(run_key)
            return run is not None and CONTENT_TAG in run.data.tags

    def check(self) -> str:
        """What is at the tracking URI, in words. Raises TrackingUnusable."""
        check_store(self.uri)
        if self._database is not None and not self._database.exists():
            return f"{self.uri} will be made by the first run"
        with self._turn("(none yet)"):
            names = [found.name for found in self._client().search_experiments()]
        return f"{redacted(self.uri)} answers, experiments: {', '.join(names)}"

    def _write(self, record: RunRecord, visit_tags: Mapping[str, str]) -> str:
        store, content = self._store(), record.content
        run = store.run(record.run_key, content.name, content.began_ms)
        run_id = str(run.info.run_id)
        if run.data.tags.get(CONTENT_TAG) == record.digest():
            return run_id
        store.experiment.offer_columns(record.columns)
        written = _write_checkpoints(store, run, record, visit_tags)
        for alias, label in record.aliases.items():
            if label in written and (version := written[label].version):
                model, accepted = rules.accepted_model_name(content.name), rules.accepted_alias(alias)
                store.client.set_registered_model_alias(model, accepted, version)
        for run_key in record.above:
            store.put_below(run_key, run)
        told = store.experiment.with_comparison(content.description, [each.run_id for each in written.values()])
        store.write(run, replace(content, description=told))
        store.log_tags(run_id, visit_tags)
        store.finish(run, content, record.digest())
        return run_id

    def _recorded(self, record: RunRecord) -> str | None:
        """Id of the run, if it already holds exactly this; None also whenever the sqlite file cannot tell."""
        if self._database is None:
            return None
        return tagged_run(self._database, self.experiment, {RUN_KEY_TAG: record.run_key, CONTENT_TAG: record.digest()})

    def _client(self) -> MlflowClient:
        if self._database is not None and not self._database.exists():
            # Made aside: a database whose creation was killed half-way is refused by MLflow for ever.
            unfinished = self._database.with_name(f"{self._database.name}.unfinished")
            unfinished.unlink(missing_ok=True)
            connect(f"{_SQLITE}{unfinished}").search_experiments(max_results=1)
            unfinished.replace(self._database)
        return connect(self.uri)

    def _store(self) -> MlflowStore:
        # Without a location MLflow puts the files of a sqlite store into the current directory.
        beside = None if self._database is None else (self._database.parent / "mlartifacts").as_uri()
        return MlflowStore(self._client(), self.experiment, beside)

    @contextmanager
    def _turn(self, run_key: str, way_out: str = _RUN_AGAIN) -> Iterator[None]:
        """The turn of this thread of all threads and processes of the host; what goes wrong in it is named."""
        try:
            with flocked(lock_file(self.uri)):
                yield
        except Exception as error:
            if not is_outside(error):
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            raise TrackingUnusable(
                f"MLflow at {redacted(self.uri)} did not take run {run_key}: {redacted(reason)}; {way_out}"
            ) from error


class LiveRun:
    """The run of a checkpoint while it is made: begun by the first points, with the run that it belongs to if that
    is not there, and both RUNNING until they are recorded.

    Nobody says that a run was killed: it stays RUNNING until the same command, which goes on with it, records it. A
    recorded run that is under way again, since a stage of it is refreshed, is not recorded until it is so anew.
    began_ms: when the run began that the checkpoint belongs to.
    """

    def __init__(self, tracker: Tracker, run_key: str, name: str, label: str, began_ms: int | None = None) -> None:
        self._tracker, self._run_key, self._name, self._label = tracker, run_key, name, label
        self._began_ms = began_ms
        self._child: Run | None = None
        self._logged: dict[str, dict[int, str]] = {}

    def log(self, points: Sequence[MetricPoint], over: Event) -> None:
        """Log points, by the rule of `Tracker.record`; nothing if `over` is set when the turn of this process comes.

        Raises TrackingUnusable; what was logged before that is not repeated by the next call with the same points.
        """
        with self._tracker._turn(self._run_key, _GOES_ON):
            if over.is_set():
                return
            store = self._tracker._store()
            child, self._child = self._child, None  # looked for again after an error: somebody may have deleted it
            if child is None:
                self._logged.clear()
                child = self._begun(store, points)
            for point in store.log_points(child, points, partial(self._logged_values, store, child)):
                self._logged[point.key][point.step] = rules.stored(point.value)
            self._child = child

    def _begun(self, store: MlflowStore, points: Sequence[MetricPoint]) -> Run:
        """The checkpoint's run; it and the run above it are under way and not recorded, whatever they were before."""
        run = store.run(self._run_key, self._name, self._began_ms)
        store.put_under_way(run)
        moments = [point.at_ms for point in points if point.at_ms is not None]
        known = store.children(run).get(self._label)
        child = store.child(run, self._label, min(moments, default=None), known)
        store.put_under_way(child)
        return child

    def _logged_values(self, store: MlflowStore, child: Run, key: str) -> dict[int, str]:
        """Asked of MLflow once, for which only we log these keys."""
        if key not in self._logged:
            self._logged[key] = store.logged_values(child, key)
        return self._logged[key]


@dataclass(frozen=True)
class _Written:
    """The run of a checkpoint, and its version of the registered model, if it has one."""

    run_id: str
    version: str | None


def _write_checkpoints(
    store: MlflowStore, run: Run, record: RunRecord, visit_tags: Mapping[str, str]
) -> dict[str, _Written]:
    """The run of each checkpoint, by label."""
    known = store.children(run)
    own = {checkpoint.label: known.pop(checkpoint.label, None) for checkpoint in record.checkpoints}
    renamed = {child.data.tags.get(CHECKPOINT_KEY_TAG): label for label, child in known.items()}
    written = {}
    for checkpoint in record.checkpoints:
        child = own[checkpoint.label]
        if child is None and checkpoint.key in renamed:
            child = known.pop(renamed.pop(checkpoint.key))
        written[checkpoint.label] = _write_checkpoint(store, run, child, checkpoint, record, visit_tags)
    for child in known.values():
        if child.info.status == UNDER_WAY:
            store.abandon(child)
    return written


def _write_checkpoint(
    store: MlflowStore,
    run: Run,
    known: Run | None,
    checkpoint: CheckpointRecord,
    record: RunRecord,
    visit_tags: Mapping[str, str],
) -> _Written:
    """One checkpoint's run and its version of the registered model."""
    child = store.child(run, checkpoint.label, checkpoint.content.began_ms, known)
    model_id = None if checkpoint.folder is None else store.logged_model(child, checkpoint)
    if child.data.tags.get(CONTENT_TAG) != checkpoint.digest():
        store.write(child, checkpoint.content, model_id)
        tags = {LABEL_TAG: checkpoint.label, CHECKPOINT_KEY_TAG: checkpoint.key}
        store.log_tags(child.info.run_id, tags | dict(visit_tags))
        store.finish(child, checkpoint.content, checkpoint.digest())
    run_id = str(child.info.run_id)
    if checkpoint.folder is None:
        return _Written(run_id, None)
    model = rules.accepted_model_name(record.content.name)
    return _Written(run_id, store.register(child, record.run_key, model, checkpoint, model_id))
