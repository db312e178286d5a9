"""Images as artifacts of a run: drawn when they are logged, and no run fails for one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from infra.tracking import mlflow_rules as rules

if TYPE_CHECKING:
    from mlflow import MlflowClient as MlflowClient

log = logging.getLogger("slimline")


def log_images(client: MlflowClient, run_id: str, images: Mapping[str, Callable[[], bytes]]) -> None:
    """Draw each image and log it under its path; one that cannot be drawn costs a warning."""
    for path, draw in rules.accepted_keys(images).items():
        try:
            content = draw()
        except Exception as error:
            log.warning("MLflow gets no %s: %s: %s", path, type(error).__name__, error)
            continue
        place = PurePosixPath(path)
        with TemporaryDirectory() as folder:
            file = Path(folder) / place.name
            file.write_bytes(content)
            client.log_artifact(run_id, str(file), str(place.parent) if place.parent.name else None)
