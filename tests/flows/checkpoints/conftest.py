"""A home with recorded runs whose checkpoints are tiny models: nothing was run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer

from evaluation.samples import Sample
from flows.errors import USER_ERRORS
from infra.artifacts.store import ArtifactRef
from pruning.checkpoints.save_load import save_checkpoint
from pruning.checkpoints.surgery import shrink_
from pruning.families import shapes
from pruning.plan import LayerPlan, LayerShape, PruningPlan
from tests.flows.recorded_runs import Evaluation, Records
from tests.tiny import random_plan, tiny_model, tiny_tokenizer

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
TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}assistant:"


@dataclass(frozen=True)
class Kinds:
    """The plans by which the checkpoints of the run `kinds` were cut, and the family they are of."""

    family: str
    plans: dict[str, PruningPlan]


def uniform_plan(source: tuple[LayerShape, ...], head_dim: int) -> PruningPlan:
    """Half of the kv groups and two thirds of the channels, alike in all layers."""
    layers = []
    for index, shape in enumerate(source):
        kv_heads = tuple(range(shape.num_kv_heads // 2))
        layers.append(
            LayerPlan(
                layer=index,
                kept_query_heads=tuple(range(len(kv_heads) * shape.num_groups)),
                kept_kv_heads=kv_heads,
                kept_channels=tuple(range(index, index + 2 * shape.intermediate_size // 3)),
            )
        )
    return PruningPlan(source=source, head_dim=head_dim, layers=tuple(layers))


def depth_plan(source: tuple[LayerShape, ...], head_dim: int) -> PruningPlan:
    """Without the second layer."""
    full = PruningPlan.full(source, head_dim)
    return full.model_copy(update={"layers": (full.layers[0], *full.layers[2:])})


def put(home: Records, key: str, family: str, plan: Callable[..., PruningPlan] | None, **config: Any) -> None:
    """A checkpoint in the store, dense or cut."""
    model, cut = tiny_model(family, **config), None
    if plan is not None:
        cut = plan(shapes(model), model.model.layers[0].self_attn.head_dim)
        shrink_(model, cut)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    with home.store.writing(ArtifactRef(kind="checkpoint", key=key), request={}, versions={}) as folder:
        save_checkpoint(model, tokenizer, folder, cut)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Records:
    """The run `tiny` with dense, slimgpt-20 (uneven) and tuned (of the same weights)."""
    home = Records(tmp_path_factory.mktemp("exported") / "home")
    items = [Sample("piqa", item, f"{item}", {"acc": float(item % 3 > 0)}) for item in range(20)]
    names = ("dense", "slimgpt-20", "tuned")
    home.add("tiny", {name: [Evaluation(items, protocol=PROTOCOL)] for name in names}, spec=SPEC)
    for name in names:
        put(home, f"prune-{name}", "llama", None if name == "dense" else random_plan)
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
