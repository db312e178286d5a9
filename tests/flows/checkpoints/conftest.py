"""A home with recorded runs whose checkpoints are tiny models: nothing was run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from evaluation.samples import Sample
from flows.errors import USER_ERRORS
from infra.artifacts.store import ArtifactRef
from tests.flows.recorded_runs import Evaluation, Records
from tests.tasks.exporting.kinds import write_checkpoint

BASE = "someone/Tiny-Llama"
SPEC: dict[str, Any] = {
    "model": {"id": BASE},
    "mirror": None,
    "calibration": {"data": {"dataset": "allenai/c4"}, "num_samples": 8, "seq_len": 64, "seed": 0},
    "steps": [
        {"method": "slimgpt", "sparsity": 0.2},
        {
            "recovery": "lora",
            "name": "tuned",
            "data": {"dataset": "yahma/alpaca-cleaned", "folder": "/srv/secret/place/texts"},
        },
    ],
}
PROTOCOL = {"limit": 20, "split": "validation", "data_identity": [{"repo_id": "baber/piqa", "content": "abc"}]}


def put(home: Records, key: str, kind: str) -> None:
    """A checkpoint in the store, dense or cut."""
    with home.store.writing(ArtifactRef(kind="checkpoint", key=key), request={}, versions={}) as folder:
        write_checkpoint(folder, "llama", kind)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Records:
    """The run `tiny` with dense, slimgpt-20 (uneven) and tuned (of the same weights)."""
    home = Records(tmp_path_factory.mktemp("exported") / "home")
    items = [Sample("piqa", item, f"{item}", {"acc": float(item % 3 > 0)}) for item in range(20)]
    names = ("dense", "slimgpt-20", "tuned")
    home.add("tiny", {name: [Evaluation(items, protocol=PROTOCOL)] for name in names}, spec=SPEC)
    for name in names:
        put(home, f"prune-{name}", "dense" if name == "dense" else "uneven")
    dense = home.store.path(ArtifactRef(kind="checkpoint", key="prune-dense"))
    head = {"license": "other", "license_name": "tiny", "license_link": "LICENSE"}
    (dense / "README.md").write_text(f"---\n{json.dumps(head)}\n---\n# Tiny\n", encoding="utf-8")
    (dense / "LICENSE").write_text("Do as you like.\n", encoding="utf-8")
    home.add("branches", {name: [] for name in ("dense", "slimgpt-20", "slimgpt-50")}, spec=SPEC | {
        "steps": [{"method": "slimgpt", "sparsity": [0.2, 0.5]}]
    })  # fmt: skip
    return home


Command = Callable[..., str]


@pytest.fixture
def command(recorded: Records, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """The command line in this process: what it prints, or the sentence that it fails with."""
    from flows.__main__ import app

    monkeypatch.setattr("flows.commands.app.prepare_environment", lambda settings: None)
    for name, value in recorded.environment.items():
        monkeypatch.setenv(name, value)

    def run(*arguments: str | Path) -> str:
        try:
            typer.main.get_command(app).main([str(word) for word in arguments], standalone_mode=False)
        except USER_ERRORS as error:
            return f"{capsys.readouterr().out}REFUSED {error}"
        return capsys.readouterr().out

    return run
