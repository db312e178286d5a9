"""Images as artifacts of a run: drawn when they are logged, and no run fails for one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from infra.tracking import mlflow_rules as rules

log = logging.getLogger("slimline")


def log_images(log_file: Callable[[str, str | None], None], images: Mapping[str, Callable[[], bytes]]) -> None:
    """Draw each image and log it under its path; one that cannot be drawn costs a warning.

    log_file: takes a local file, and the folder in the run, None for its root.
    """
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
            log_file(str(file), str(place.parent) if place.parent.name else None)
