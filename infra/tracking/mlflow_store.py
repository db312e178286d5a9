"""One experiment of an MLflow store, as the tracker needs it. The only importer of mlflow.

Importing mlflow takes 3 to 4 seconds, so it is imported inside functions.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from infra.tracking import mlflow_rules as rules
from infra.tracking.experiment import DESCRIPTION_TAG, Experiment
from infra.tracking.images import log_images
from infra.tracking.records import CheckpointRecord, DataInput, MetricPoint, RunContent, new_points

if TYPE_CHECKING:
    from mlflow import MlflowClient as MlflowClient
    from mlflow.entities import Run as Run

RUN_KEY_TAG = "slimline.run_key"
CONTENT_TAG = "slimline.recorded"
CHANGED_PARAMS_TAG = "slimline.changed_params"
KIND_TAG = "slimline.kind"
LABEL_TAG = "slimline.checkpoint"
CHECKPOINT_KEY_TAG = "slimline.checkpoint_key"
PART_OF_TAG = "slimline.part_of"
"""Of the run of a checkpoint: the key of its run. It must not be `RUN_KEY_TAG`, by which that is found."""

UNDER_WAY = "RUNNING"

_FOLDER_TAG = "slimline.folder"

_PARENT_TAG = "mlflow.parentRunId"
_STATUS = {"completed": "FINISHED", "failed": "FAILED"}
_AT_ONCE = 1000

log = logging.getLogger("slimline")


def load() -> type[MlflowClient]:
    """Import mlflow, which takes seconds; returns its client."""
    # Before the import, which starts the telemetry. Whoever set these variables keeps what they set.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    # MLflow's own 7 retries wait four minutes for a server that is not there; 4 still outlast its restart.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "4")
    from mlflow import MlflowClient

    # it tells the terminal of every table that it makes
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    return MlflowClient  # type: ignore[no-any-return]


def connect(uri: str) -> MlflowClient:
    """A client of the tracking store and model registry at `uri`."""
    return load()(tracking_uri=uri, registry_uri=uri)


def is_outside(error: Exception) -> bool:
    """Whether the store, the server or a missing driver is to blame, rather than this room."""
    if isinstance(error, OSError | ImportError):
        return True
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return isinstance(error, MlflowException | SQLAlchemyError)


class MlflowStore:
    """One experiment: finds runs again by their tags, and brings them what they lack. Whoever uses it has the turn."""

    def __init__(self, client: MlflowClient, experiment: str, files: str | None) -> None:
        """files: where the experiment keeps the files of its runs, if it is made now; None: where MLflow likes."""
        self.client = client
        self.experiment = Experiment(client, experiment, files)

    def find(self, run_key: str) -> Run | None:
        """The run of a run key, if it is there and not deleted."""
        assert "'" not in run_key, f"{run_key!r} is not a key"
        found = self._search(f"tags.`{RUN_KEY_TAG}` = '{run_key}'", most=1)
        return found[0] if found else None

    def run(self, run_key: str, name: str, began_ms: int | None) -> Run:
        """The run of a run key, made if it is not there."""
        found = self.find(run_key)
        return self._named(found, name) if found else self._create(name, {RUN_KEY_TAG: run_key}, began_ms)

    def children(self, parent: Run) -> dict[str, Run]:
        """The runs of the checkpoints of a run, by label; of two with one label the older one."""
        found = self._search(f"tags.`{_PARENT_TAG}` = '{parent.info.run_id}'")
        return {child.data.tags[LABEL_TAG]: child for child in reversed(found) if LABEL_TAG in child.data.tags}

    def child(self, parent: Run, label: str, began_ms: int | None, known: Run | None) -> Run:
        """The run of a checkpoint: the known one, or a new one below the run that it belongs to."""
        if known:
            return self._named(known, label)
        tags = {
            _PARENT_TAG: parent.info.run_id,
            KIND_TAG: "checkpoint",
            LABEL_TAG: label[: rules.MAX_TAG_LENGTH],
            PART_OF_TAG: parent.data.tags[RUN_KEY_TAG],
        }
        return self._create(label, tags, began_ms)

    def put_under_way(self, run: Run) -> None:
        """Say that a run is not recorded and not over, whatever it was before."""
        if CONTENT_TAG in run.data.tags:
            self.client.delete_tag(run.info.run_id, CONTENT_TAG)
        if run.info.status != UNDER_WAY:
            self.client.update_run(run.info.run_id, status=UNDER_WAY)

    def put_below(self, run_key: str, parent: Run) -> None:
        """Show a recorded run below another, if it is there."""
        run = self.find(run_key)
        if run is not None and run.data.tags.get(_PARENT_TAG) != parent.info.run_id:
            self.client.set_tag(run.info.run_id, _PARENT_TAG, parent.info.run_id)

    def write(self, run: Run, content: RunContent, model_id: str | None = None) -> None:
        """Bring a run what of the content it lacks; params keep their first value.

        model_id: of the logged model that the figures (not the points of curves) are about.
        """
        run_id = run.info.run_id
        self._log_params(run, content.params)
        self.log_points(run, content.metrics, partial(self.logged_values, run), model_id)
        for path, text in rules.accepted_keys(content.artifacts).items():
            self.client.log_text(run_id, text, path)
        log_images(partial(self.client.log_artifact, run_id), content.images)
        if content.inputs:
            self._log_inputs(run_id, content.inputs)
        tags = {**content.tags, DESCRIPTION_TAG: content.description} if content.description else content.tags
        self.log_tags(run_id, tags)

    def finish(self, run: Run, content: RunContent, digest: str) -> None:
        """Say that all of a record is there. Written last, so that a record that was killed is done again."""
        self.client.set_terminated(run.info.run_id, _STATUS[content.status], content.ended_ms)
        self.client.set_tag(run.info.run_id, CONTENT_TAG, digest)

    def abandon(self, run: Run) -> None:
        """End a run that nobody goes on with."""
        self.client.set_terminated(run.info.run_id, _STATUS["failed"])

    def log_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set tags, under keys that MLflow accepts."""
        from mlflow.entities import RunTag

        accepted = [RunTag(key, value[: rules.MAX_TAG_LENGTH]) for key, value in rules.accepted_keys(tags).items()]
        for chunk in rules.chunks(accepted, rules.MAX_TAGS_PER_BATCH):
            self.client.log_batch(run_id, tags=chunk)

    def log_points(
        self,
        run: Run,
        points: Sequence[MetricPoint],
        logged: Callable[[str], Mapping[int, str]],
        model_id: str | None = None,
    ) -> list[MetricPoint]:
        """Log what is not `logged` yet; returns that, with the keys in MLflow."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        new = new_points(points, logged)
        metrics = []
        for point in new:
            value = float(point.value)
            # of a logged model MLflow stores NaN as 0, the best perplexity there is
            of_model = None if point.step or math.isnan(value) else model_id
            metrics.append(Metric(point.key, value, point.at_ms or now, point.step, of_model))
        for chunk in rules.chunks(metrics, rules.MAX_METRICS_PER_BATCH):
            self.client.log_batch(run.info.run_id, metrics=chunk)
        return new

    def logged_values(self, run: Run, key: str) -> dict[int, str]:
        """The value logged last at each step of a metric."""
        if key not in run.data.metrics:
            return {}
        history = sorted(self.client.get_metric_history(run.info.run_id, key), key=lambda metric: metric.timestamp)
        return {metric.step: rules.stored(metric.value) for metric in history}

    def logged_model(self, run: Run, checkpoint: CheckpointRecord) -> str:
        """Id of the logged model that stands for a checkpoint, made if it is not there. It holds no weights."""
        from mlflow.entities import LoggedModelOutput, LoggedModelStatus

        run_id, key = run.info.run_id, checkpoint.key
        assert checkpoint.folder is not None, "a checkpoint that lies nowhere is no model"
        for output in run.outputs.model_outputs if run.outputs else ():
            return str(output.model_id)
        model = self.client.create_logged_model(
            self.experiment.id,
            name=rules.accepted_checkpoint_name(checkpoint.label)[: rules.MAX_NAME_LENGTH],
            source_run_id=run_id,
            tags={
                "mlflow.model.isExternal": "true",
                CHECKPOINT_KEY_TAG: key,
                _FOLDER_TAG: checkpoint.folder.absolute().as_uri(),
            },
            params=dict(checkpoint.content.params),
            model_type="checkpoint",
        )
        self.client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
        self.client.log_outputs(run_id, [LoggedModelOutput(model.model_id, 0)])
        return str(model.model_id)

    def register(
        self, run: Run, run_key: str, model: str, checkpoint: CheckpointRecord, model_id: str | None
    ) -> str | None:
        """The version of a registered model that is a checkpoint's folder, made if it is not there. Nothing is copied.

        A server refuses folders, which may be of other machines: there the version is the logged model, `model_id`,
        which says where the checkpoint lies. None if it refuses that as well.
        """
        from mlflow.exceptions import MlflowException

        assert checkpoint.folder is not None, "a checkpoint that lies nowhere is no model"
        folder = checkpoint.folder.absolute().as_uri()
        try:
            self.client.create_registered_model(model)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        for version in self.client.search_model_versions(f"name='{model}'"):
            if folder in (version.source, version.tags.get(_FOLDER_TAG)):
                return str(version.version)
        tags = {RUN_KEY_TAG: run_key, CHECKPOINT_KEY_TAG: checkpoint.key, LABEL_TAG: checkpoint.label}
        make = partial(
            self.client.create_model_version,
            model,
            run_id=run.info.run_id,
            description=checkpoint.label,
            await_creation_for=0,
        )
        try:
            return str(make(folder, tags=tags).version)
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            refusal = error
        if model_id is not None:
            with suppress(MlflowException):
                made = make(f"models:/{model_id}", tags=tags | {_FOLDER_TAG: folder}, model_id=model_id)
                return str(made.version)
        log.warning("the MLflow server does not register %s: %s", folder, refusal.message)
        return None

    def _create(self, name: str, tags: Mapping[str, str], began_ms: int | None) -> Run:
        return self.client.create_run(self.experiment.id, began_ms, dict(tags), name[: rules.MAX_NAME_LENGTH])

    def _named(self, run: Run, name: str) -> Run:
        name = name[: rules.MAX_NAME_LENGTH]
        if run.info.run_name != name:
            self.client.update_run(run.info.run_id, name=name)
        return run

    def _search(self, wanted: str, most: int = _AT_ONCE) -> list[Run]:
        """The runs that are not deleted, the oldest first."""
        found: list[Run] = []
        page = None
        while page != "":
            order = ["attributes.start_time ASC"]
            some = self.client.search_runs(
                [self.experiment.id], wanted, max_results=most, order_by=order, page_token=page
            )
            found += some
            page = "" if most < _AT_ONCE else some.token or ""
        return found

    def _log_params(self, run: Run, params: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        wanted = {key: value[: rules.MAX_PARAM_LENGTH] for key, value in rules.accepted_keys(params).items()}
        kept: Mapping[str, str] = run.data.params
        new = [Param(key, value) for key, value in wanted.items() if key not in kept]
        for chunk in rules.chunks(new, rules.MAX_PARAMS_PER_BATCH):
            self.client.log_batch(run.info.run_id, params=chunk)
        changed = {key: value for key, value in wanted.items() if kept.get(key, value) != value}
        if changed:
            log.warning("MLflow keeps the first value of %s; the new ones are in a tag", ", ".join(sorted(changed)))
            self.log_tags(run.info.run_id, {CHANGED_PARAMS_TAG: json.dumps(changed, sort_keys=True)})
        elif CHANGED_PARAMS_TAG in run.data.tags:
            self.client.delete_tag(run.info.run_id, CHANGED_PARAMS_TAG)

    def _log_inputs(self, run_id: str, inputs: Sequence[DataInput]) -> None:
        """Of one data set that is read for several purposes once, with all of them: MLflow keeps the first."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        purposes: dict[tuple[str, str], dict[str, None]] = {}
        for data in inputs:
            purposes.setdefault((data.name, data.digest), {})[data.context] = None
        unique = {(data.name, data.digest): data for data in reversed(inputs)}
        entries = [
            DatasetInput(
                Dataset(
                    name=data.name[: rules.MAX_DATASET_NAME_LENGTH],
                    digest=data.digest[: rules.MAX_DATASET_DIGEST_LENGTH],
                    source_type="hugging_face" if data.hub else "local",
                    source=json.dumps(dict(data.hub)),
                ),
                [InputTag("mlflow.data.context", ", ".join(purposes[identity]))],
            )
            for identity, data in reversed(unique.items())
        ]
        self.client.log_inputs(run_id, entries)
