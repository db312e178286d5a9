"""The experiment of the runs: made as its users expect it, with a view of all checkpoints. Imports no mlflow."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from infra.tracking import mlflow_rules as rules
from infra.tracking import saved_view

DESCRIPTION_TAG = "mlflow.note.content"

_KIND_TAG = "mlflow.experimentKind"
_KIND = "custom_model_development"
"""Opens the experiment in the pages for model training, not in those for traces."""
_ABOUT = "A run per spec, with a run per checkpoint below it."


class Experiment:
    """One experiment of an MLflow store, made or brought back if it is not there; what a user chose for it stays."""

    def __init__(self, client: Any, name: str, files: str | None) -> None:
        """client: an MlflowClient. files: where it keeps the files of its runs, if it is made now; None: where MLflow
        likes."""
        self._client = client
        found = client.get_experiment_by_name(name)
        if found is None:
            self._tags: dict[str, str] = {_KIND_TAG: _KIND}
            self.id = str(client.create_experiment(name, artifact_location=files, tags=self._tags))
        else:
            self._tags, self.id = dict(found.tags), str(found.experiment_id)
            if found.lifecycle_stage == "deleted":
                client.restore_experiment(self.id)
        if _KIND_TAG not in self._tags:  # made by an older slimline
            self._set(_KIND_TAG, _KIND)
        told = f"{_ABOUT} [All checkpoints in one table]({saved_view.address(self.id)})"
        known = self._tags.get(DESCRIPTION_TAG, _ABOUT)
        if known != told and known.startswith(_ABOUT):
            self._set(DESCRIPTION_TAG, told)

    def offer_columns(self, metrics: Sequence[str]) -> None:
        """Give the view of all checkpoints columns for these metrics."""
        view = saved_view.widened(self._tags.get(saved_view.TAG), metrics, int(time.time() * 1000))
        if view is not None:
            self._set(saved_view.TAG, view)

    def with_comparison(self, description: str, run_ids: Sequence[str]) -> str:
        """A description with a link to the page that compares these runs before it, if there is room for that."""
        linked = f"[Compare the checkpoints]({saved_view.comparison(self.id, run_ids)})\n\n{description}".strip()
        return linked if len(run_ids) > 1 and len(linked) <= rules.MAX_TAG_LENGTH else description

    def _set(self, key: str, value: str) -> None:
        self._client.set_experiment_tag(self.id, key, value)
        self._tags[key] = value
