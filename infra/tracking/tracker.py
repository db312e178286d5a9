"""MLflow: one run per run key, continued and never repeated, checkpoints by reference. The only importer of mlflow.

Importing mlflow and opening its store takes 3 to 4 seconds, so this module imports it inside functions, and a record in
which nothing is new is recognised in the sqlite file itself, without mlflow.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Literal

from infra.errors import TrackingUnusable
from infra.filesystem.locks import flocked
from infra.secrets import redacted
from infra.tracking import mlflow_rules as rules
from infra.tracking.database import check_store, database_of, lock_file, tagged_run
from infra.tracking.records import MetricPoint, RunRecord, new_points

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

RUN_KEY_TAG = "slimline.run_key"
CONTENT_TAG = "slimline.recorded"
CHANGED_PARAMS_TAG = "slimline.changed_params"

_SQLITE = "sqlite:///"
_MLFLOW_STATUS = {"completed": "FINISHED", "failed": "FAILED"}
_UNDER_WAY = "RUNNING"
_RUN_AGAIN = "correct SLIMLINE_MLFLOW_URI or the server and run again: finished stages are not repeated"
_GOES_ON = "the training goes on, and its curves are recorded with the run"

log = logging.getLogger("slimline")


class Tracker:
    """Writes runs to the MLflow tracking store and model registry at `uri`.

    A sqlite file is created on first use, with the runs' files in `mlartifacts` beside it. The processes of one host
    take turns: MLflow's creation of a database fails when two do it at once.
    """

    def __init__(self, uri: str, experiment: str = "slimline") -> None:
        self.uri = uri
        self._database = database_of(uri)
        self.experiment = experiment

    def record(
        self,
        *,
        run_key: str,
        name: str,
        params: Mapping[str, str],
        metrics: Sequence[MetricPoint],
        tags: Mapping[str, str],
        artifacts: Mapping[str, str],
        checkpoints: Mapping[str, Path],
        status: Literal["completed", "failed"],
        visit_tags: Mapping[str, str] | None = None,
    ) -> str:
        """Make the MLflow run of `run_key` hold all of this, and return its id. Raises TrackingUnusable.

        Recorded again: a point whose value is the one logged last at its step is not repeated; a param keeps its first
        value and the new one goes into the tag `slimline.changed_params`; tags, texts and status are replaced.
        `artifacts` maps a path in the run to a text. `checkpoints` maps a word to a folder, which is registered where
        it lies as a version of the model `<name>-<word>`, once. `visit_tags` (whose run it was that recorded this) are
        written when anything else is new, and alone do not make the record new.
        """
        record = RunRecord(run_key, name, params, metrics, tags, artifacts, checkpoints, status)
        with self._turn(run_key):
            return self._recorded(record) or self._write(record, visit_tags or {})

    def has(self, run_key: str) -> bool:
        """Whether a whole record of that run is there. Raises TrackingUnusable."""
        if self._database is not None and not self._database.exists():
            return False
        with self._turn(run_key):
            run = _find(client := self._client(), self._experiment_id(client), run_key)
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
        client = self._client()
        run = _find_or_create(client, self._experiment_id(client), record.run_key, record.name)
        run_id = str(run.info.run_id)
        if run.data.tags.get(CONTENT_TAG) == record.digest():
            return run_id
        _log_params(client, run, record.params)
        _log_points(client, run, record.metrics, partial(_logged_values, client, run))
        for path, text in record.artifacts.items():
            client.log_text(run_id, text, path)
        for word, folder in record.checkpoints.items():
            _register(client, run_id, record.run_key, f"{record.name}-{word}", folder)
        client.set_terminated(run_id, _MLFLOW_STATUS[record.status])
        _log_tags(client, run_id, {**record.tags, **visit_tags})
        # Last, since it says that all of the above is there: a record that was killed in the middle is done again.
        client.set_tag(run_id, CONTENT_TAG, record.digest())
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
            _connect(f"{_SQLITE}{unfinished}").search_experiments(max_results=1)
            unfinished.replace(self._database)
        return _connect(self.uri)

    def _experiment_id(self, client: MlflowClient) -> str:
        found = client.get_experiment_by_name(self.experiment)
        if found is None:
            # Without a location MLflow puts the files of a sqlite store into the current directory.
            beside = None if self._database is None else (self._database.parent / "mlartifacts").as_uri()
            return str(client.create_experiment(self.experiment, artifact_location=beside))
        if found.lifecycle_stage == "deleted":
            client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)

    @contextmanager
    def _turn(self, run_key: str, way_out: str = _RUN_AGAIN) -> Iterator[None]:
        """The turn of this thread of all threads and processes of the host; what goes wrong in it is named."""
        try:
            with flocked(lock_file(self.uri)):
                yield
        except Exception as error:
            if not _is_outside(error):
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            raise TrackingUnusable(
                f"MLflow at {redacted(self.uri)} did not take run {run_key}: {redacted(reason)}; {way_out}"
            ) from error


class LiveRun:
    """The run of a run key while it is under way: made by the first points, and RUNNING until it is recorded.

    Nobody says that a run was killed: it stays RUNNING until the same command, which goes on with it, records it. A
    recorded run that is under way again, since a stage of it is refreshed, is not recorded until it is so anew.
    """

    def __init__(self, tracker: Tracker, run_key: str, name: str) -> None:
        self._tracker, self._run_key, self._name = tracker, run_key, name
        self._run: Run | None = None
        self._logged: dict[str, dict[int, str]] = {}

    def log(self, points: Sequence[MetricPoint], over: Event) -> None:
        """Log points, by the rule of `Tracker.record`; nothing if `over` is set when the turn of this process comes.

        Raises TrackingUnusable; what was logged before that is not repeated by the next call with the same points.
        """
        with self._tracker._turn(self._run_key, _GOES_ON):
            if over.is_set():
                return
            client = self._tracker._client()
            run, self._run = self._run, None  # looked for again after an error: somebody may have deleted it
            if run is None:
                self._logged.clear()
                run = _begun(client, self._tracker._experiment_id(client), self._run_key, self._name)
            for point in _log_points(client, run, points, partial(self._logged_values, client, run)):
                self._logged[point.key][point.step] = rules.stored(point.value)
            self._run = run

    def _logged_values(self, client: MlflowClient, run: Run, key: str) -> dict[int, str]:
        """Asked of MLflow once, for which only we log these keys."""
        if key not in self._logged:
            self._logged[key] = _logged_values(client, run, key)
        return self._logged[key]


def load() -> type[MlflowClient]:
    """Import mlflow, which takes seconds; returns its client."""
    # Before the import, which starts the telemetry. Whoever set these variables keeps what they set.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    # MLflow's own 7 retries wait four minutes for a server that is not there; 4 still outlast its restart.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "4")
    from mlflow import MlflowClient

    return MlflowClient  # type: ignore[no-any-return]


def _is_outside(error: Exception) -> bool:
    """Whether the store, the server or a missing driver is to blame, rather than this file."""
    if isinstance(error, OSError | ImportError):
        return True
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return isinstance(error, MlflowException | SQLAlchemyError)


def _connect(uri: str) -> MlflowClient:
    return load()(tracking_uri=uri, registry_uri=uri)


def _find_or_create(client: MlflowClient, experiment_id: str, run_key: str, name: str) -> Run:
    found = _find(client, experiment_id, run_key)
    if found is None:
        return client.create_run(experiment_id, tags={RUN_KEY_TAG: run_key}, run_name=name)
    if found.info.run_name != name:
        client.update_run(found.info.run_id, name=name)
    return found


def _begun(client: MlflowClient, experiment_id: str, run_key: str, name: str) -> Run:
    """The run, under way and not recorded, whatever it was before."""
    run = _find_or_create(client, experiment_id, run_key, name)
    if CONTENT_TAG in run.data.tags:
        client.delete_tag(run.info.run_id, CONTENT_TAG)
    if run.info.status != _UNDER_WAY:
        client.update_run(run.info.run_id, status=_UNDER_WAY)
    return run


def _find(client: MlflowClient, experiment_id: str, run_key: str) -> Run | None:
    assert "'" not in run_key, f"{run_key!r} is not a key"
    wanted = f"tags.`{RUN_KEY_TAG}` = '{run_key}'"
    found = client.search_runs([experiment_id], wanted, max_results=1, order_by=["attributes.start_time ASC"])
    return found[0] if found else None


def _log_params(client: MlflowClient, run: Run, params: Mapping[str, str]) -> None:
    from mlflow.entities import Param

    wanted = {key: value[: rules.MAX_PARAM_LENGTH] for key, value in rules.accepted_keys(params).items()}
    kept: Mapping[str, str] = run.data.params
    new = [Param(key, value) for key, value in wanted.items() if key not in kept]
    for chunk in rules.chunks(new, rules.MAX_PARAMS_PER_BATCH):
        client.log_batch(run.info.run_id, params=chunk)
    changed = {key: value for key, value in wanted.items() if kept.get(key, value) != value}
    if changed:
        log.warning("MLflow keeps the first value of %s; the new ones are in a tag", ", ".join(sorted(changed)))
        _log_tags(client, run.info.run_id, {CHANGED_PARAMS_TAG: json.dumps(changed, sort_keys=True)})
    elif CHANGED_PARAMS_TAG in run.data.tags:
        client.delete_tag(run.info.run_id, CHANGED_PARAMS_TAG)


def _log_tags(client: MlflowClient, run_id: str, tags: Mapping[str, str]) -> None:
    from mlflow.entities import RunTag

    accepted = [RunTag(key, value[: rules.MAX_TAG_LENGTH]) for key, value in rules.accepted_keys(tags).items()]
    for chunk in rules.chunks(accepted, rules.MAX_TAGS_PER_BATCH):
        client.log_batch(run_id, tags=chunk)


def _log_points(
    client: MlflowClient, run: Run, points: Sequence[MetricPoint], logged: Callable[[str], Mapping[int, str]]
) -> list[MetricPoint]:
    """Log what is not `logged` yet; returns that, with the keys in MLflow."""
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    new = new_points(points, logged)
    metrics = [Metric(point.key, float(point.value), point.at_ms or now, point.step) for point in new]
    for chunk in rules.chunks(metrics, rules.MAX_METRICS_PER_BATCH):
        client.log_batch(run.info.run_id, metrics=chunk)
    return new


def _logged_values(client: MlflowClient, run: Run, key: str) -> dict[int, str]:
    """The value logged last at each step of a metric."""
    if key not in run.data.metrics:
        return {}
    history = sorted(client.get_metric_history(run.info.run_id, key), key=lambda metric: metric.timestamp)
    return {metric.step: rules.stored(metric.value) for metric in history}


def _register(client: MlflowClient, run_id: str, run_key: str, name: str, folder: Path) -> None:
    """Make `folder` a version of the registered model `name`, unless it is one already. Nothing is copied."""
    from mlflow.exceptions import MlflowException

    model, source = rules.accepted_model_name(name), folder.absolute().as_uri()
    client.set_tag(run_id, f"slimline.checkpoint.{model}", source)
    try:
        client.create_registered_model(model)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    if any(version.source == source for version in client.search_model_versions(f"name='{model}'")):
        return
    tags = {RUN_KEY_TAG: run_key, "slimline.checkpoint_key": folder.name}
    try:
        client.create_model_version(model, source, run_id=run_id, tags=tags, await_creation_for=0)
    except MlflowException as error:
        # A server refuses folders of other machines as a source. The run's tag still says where the checkpoint is.
        if error.error_code != "INVALID_PARAMETER_VALUE":
            raise
        log.warning("the MLflow server does not register %s: %s", source, error.message)
