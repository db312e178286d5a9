"""MLflow: one run per run key, continued and never repeated, checkpoints by reference. The only importer of mlflow.

Importing mlflow and opening its store takes 3 to 4 seconds, so this module imports it inside functions, and a record in
which nothing is new is recognised in the sqlite file itself, without mlflow.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sqlite3
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import quote

from infra.errors import TrackingUnusable
from infra.filesystem.locks import flocked
from infra.secrets import redacted
from infra.tracking import mlflow_rules as rules
from infra.tracking.database import check_store, database_of

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

RUN_KEY_TAG = "slimline.run_key"
CONTENT_TAG = "slimline.recorded"
CHANGED_PARAMS_TAG = "slimline.changed_params"

_SQLITE = "sqlite:///"
_MLFLOW_STATUS = {"completed": "FINISHED", "failed": "FAILED"}

log = logging.getLogger("slimline")


@dataclass(frozen=True, slots=True)
class MetricPoint:
    """One value of one metric; `step` counts whatever the metric runs over (training steps, layers)."""

    key: str
    value: float
    step: int = 0


@dataclass(frozen=True, slots=True)
class _Record:
    """The arguments of one `Tracker.record`, whose digest says whether they are recorded already."""

    run_key: str
    name: str
    params: Mapping[str, str]
    metrics: Sequence[MetricPoint]
    tags: Mapping[str, str]
    artifacts: Mapping[str, str]
    checkpoints: Mapping[str, Path]
    status: str

    def digest(self) -> str:
        """sha256 (hex) of the content. Not a cache key: here a metric may be NaN and a path means that very folder."""
        points = [(point.key, point.value, point.step) for point in self.metrics]
        folders = {word: str(folder.absolute()) for word, folder in self.checkpoints.items()}
        mappings = [dict(self.params), dict(self.tags), dict(self.artifacts), folders]
        text = json.dumps([self.run_key, self.name, self.status, points, mappings], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


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
        record = _Record(run_key, name, params, metrics, tags, artifacts, checkpoints, status)
        with self._errors_named(run_key), flocked(self._lock_file()):
            return self._recorded(record) or self._write(record, visit_tags or {})

    def has(self, run_key: str) -> bool:
        """Whether a whole record of that run is there. Raises TrackingUnusable."""
        if self._database is not None and not self._database.exists():
            return False
        with self._errors_named(run_key), flocked(self._lock_file()):
            run = _find(client := self._client(), self._experiment_id(client), run_key)
            return run is not None and CONTENT_TAG in run.data.tags

    def check(self) -> str:
        """What is at the tracking URI, in words. Raises TrackingUnusable."""
        check_store(self.uri)
        if self._database is not None and not self._database.exists():
            return f"{self.uri} will be made by the first run"
        with self._errors_named("(none yet)"), flocked(self._lock_file()):
            names = [found.name for found in self._client().search_experiments()]
        return f"{redacted(self.uri)} answers, experiments: {', '.join(names)}"

    def _write(self, record: _Record, visit_tags: Mapping[str, str]) -> str:
        client = self._client()
        run = _find_or_create(client, self._experiment_id(client), record)
        run_id = str(run.info.run_id)
        if run.data.tags.get(CONTENT_TAG) == record.digest():
            return run_id
        _log_params(client, run, record.params)
        _log_points(client, run, record.metrics)
        for path, text in record.artifacts.items():
            client.log_text(run_id, text, path)
        for word, folder in record.checkpoints.items():
            _register(client, run_id, record.run_key, f"{record.name}-{word}", folder)
        client.set_terminated(run_id, _MLFLOW_STATUS[record.status])
        _log_tags(client, run_id, {**record.tags, **visit_tags})
        # Last, since it says that all of the above is there: a record that was killed in the middle is done again.
        client.set_tag(run_id, CONTENT_TAG, record.digest())
        return run_id

    def _lock_file(self) -> Path:
        if self._database is not None:
            self._database.parent.mkdir(parents=True, exist_ok=True)
            return self._database.with_name(f"{self._database.name}.lock")
        server = hashlib.sha256(self.uri.encode()).hexdigest()[:12]
        return Path(tempfile.gettempdir()) / f"slimline-mlflow-{os.getuid()}-{server}.lock"

    def _recorded(self, record: _Record) -> str | None:
        """Id of the run, if it already holds exactly this; None also whenever the sqlite file cannot tell."""
        if self._database is None or not self._database.exists():
            return None
        query = """
            SELECT runs.run_uuid FROM runs JOIN experiments USING (experiment_id)
            JOIN tags AS k ON k.run_uuid = runs.run_uuid AND k.key = ? AND k.value = ?
            JOIN tags AS c ON c.run_uuid = runs.run_uuid AND c.key = ? AND c.value = ?
            WHERE experiments.name = ? AND runs.lifecycle_stage = 'active' AND experiments.lifecycle_stage = 'active'"""
        values = (RUN_KEY_TAG, record.run_key, CONTENT_TAG, record.digest(), self.experiment)
        try:
            with closing(sqlite3.connect(f"file:{quote(str(self._database))}?mode=ro", uri=True)) as connection:
                row = connection.execute(query, values).fetchone()
        except sqlite3.Error:
            return None  # perhaps other tables than in mlflow 3.17: mlflow itself will look
        return None if row is None else str(row[0])

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
    def _errors_named(self, run_key: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not _is_outside(error):
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            raise TrackingUnusable(
                f"MLflow at {redacted(self.uri)} did not take run {run_key}: {redacted(reason)}; "
                "correct SLIMLINE_MLFLOW_URI or the server and run again: finished stages are not repeated"
            ) from error


def _is_outside(error: Exception) -> bool:
    """Whether the store, the server or a missing driver is to blame, rather than this file."""
    if isinstance(error, OSError | ImportError):
        return True
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return isinstance(error, MlflowException | SQLAlchemyError)


def _connect(uri: str) -> MlflowClient:
    # Before the import, which starts the telemetry. Whoever set these variables keeps what they set.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    # MLflow's own 7 retries wait four minutes for a server that is not there; 4 still outlast its restart.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "4")
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _find_or_create(client: MlflowClient, experiment_id: str, record: _Record) -> Run:
    found = _find(client, experiment_id, record.run_key)
    if found is None:
        return client.create_run(experiment_id, tags={RUN_KEY_TAG: record.run_key}, run_name=record.name)
    if found.info.run_name != record.name:
        client.update_run(found.info.run_id, name=record.name)
    return found


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


def _log_points(client: MlflowClient, run: Run, points: Sequence[MetricPoint]) -> None:
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    wanted: dict[str, dict[int, float]] = {}
    for point in points:
        wanted.setdefault(point.key, {})[point.step] = float(point.value)
    new: list[Metric] = []
    for key, steps in rules.accepted_keys(wanted).items():
        logged = _logged_values(client, run, key)
        fresh = {step: value for step, value in steps.items() if logged.get(step) != rules.stored(value)}
        new += [Metric(key, value, now, step) for step, value in fresh.items()]
    for chunk in rules.chunks(new, rules.MAX_METRICS_PER_BATCH):
        client.log_batch(run.info.run_id, metrics=chunk)


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
