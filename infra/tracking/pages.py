"""Where a browser finds a run in MLflow's pages."""

from __future__ import annotations

#: where `slimline ui` shows the pages of a store that is a file
_LOCAL = "http://127.0.0.1:5000"


def address_of_run(tracking_uri: str, mlflow_run_id: str) -> str:
    """The address of the page of a run: at the server, or at `slimline ui` with its default port."""
    server = tracking_uri.rstrip("/") if tracking_uri.startswith(("http://", "https://")) else _LOCAL
    return f"{server}/#/runs/{mlflow_run_id}"
