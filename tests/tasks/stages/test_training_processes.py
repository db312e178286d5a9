"""A training in two processes is that of one, whole in each (DDP) or in pieces (FSDP2), over gloo: the same curve, the
same weights up to rounding."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import PreTrainedModel

from infra.settings import load_settings
from pruning.checkpoints.save_load import load_checkpoint
from pruning.recovery import RecoveryReport
from pruning.training import watching
from tasks.execution.processes import Reports, run_processes
from tests.pruning.recovery.test_contract import checkpoint, figures, pruned, run

if TYPE_CHECKING:
    from pruning.distributed import ProcessGroup

pytestmark = pytest.mark.slow  # not in `make test-fast`

OPTIONS: dict[str, Any] = {"micro_batch_size": 1, "max_steps": 4, "seed": 0}


class Stopped(Exception):
    """Somebody has had enough."""


@dataclass(frozen=True)
class Job:
    case: str
    source: str
    folder: Path
    options: dict[str, Any]
    stopped_at: int | None = None

    def __call__(self, process_group: ProcessGroup, device: torch.device, reports: Reports) -> None:
        if self.options.get("save_steps", 0) is None:  # the clocks of the two do not agree
            watching._SECONDS, watching._TIMES = (0.0, 0) if process_group.leads else (1e9, 0)
        group = {"device": device, "rank": process_group.rank, "num_processes": process_group.size}
        model, scratch = load_checkpoint(self.source), self.folder / "scratch"
        if self.stopped_at is not None:
            with pytest.raises(Stopped):
                run(self.case, model, scratch, progress=self._stop, **group, **self.options)
            model = load_checkpoint(self.source)
        report = run(self.case, model, scratch, curves=reports.curves, **group, **self.options)
        torch.save(model.state_dict(), self.folder / f"model-{process_group.rank}")
        (self.folder / f"report-{process_group.rank}.json").write_text(report.model_dump_json(), encoding="utf-8")

    def _stop(self, share: float, message: str) -> None:
        if message.startswith(f"step {self.stopped_at}/"):
            raise Stopped


def check_equal(folder: Path, expected: dict[str, Any], alone: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Both processes have what one had; returns its weights."""
    states: list[dict[str, torch.Tensor]] = [torch.load(folder / f"model-{rank}") for rank in range(2)]
    written = [(folder / f"report-{rank}.json").read_text(encoding="utf-8") for rank in range(2)]
    found = [figures(RecoveryReport.model_validate_json(text)) for text in written]
    assert found[0] == found[1]
    for name in ("train_loss", "heldout_loss", "learning_rate", "grad_norm"):
        steps, values = zip(*expected["curves"][name], strict=True)
        own_steps, own_values = zip(*found[0]["curves"][name], strict=True)
        assert own_steps == steps
        assert own_values == pytest.approx(values, rel=1e-4)
    assert found[0]["kept_step"] == expected["kept_step"]
    for key, value in alone.state_dict().items():
        assert torch.equal(states[0][key], states[1][key])
        torch.testing.assert_close(states[0][key], value, atol=2e-4, rtol=1e-3)
    return states[0]


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        # three held-out examples: one process has one less
        ("cpt", {"num_heldout": 3, "keep": "best", "cross_document_attention": True, "gradient_checkpointing": True}),
        pytest.param("distill", {"hidden_weight": 0.1}, marks=pytest.mark.long),
        pytest.param("reconstruct", {}, marks=pytest.mark.long),
    ],
)
def test_pieces_over_two_processes_learn_what_one_learns_stopped_and_resumed(
    case: str, changes: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    options = OPTIONS | changes
    alone, reports = pruned(), Reports(lambda share, message: None, lambda step, values, section="": None)
    expected = figures(run(case, alone, tmp_path / "alone", **options))
    job = Job(case, checkpoint(), tmp_path / "resumed", options | {"sharded": True}, stopped_at=3)
    jobs = [job, replace(job, folder=tmp_path / "whole", stopped_at=None)]
    results = []
    for each in jobs if request.node.get_closest_marker("long") else jobs[:1]:
        each.folder.mkdir()
        run_processes(2, each, load_settings(), reports, what="training", kept="nothing")
        results.append(check_equal(each.folder, expected, alone))
    assert all(torch.equal(value, results[0][key]) for result in results for key, value in result.items())


@pytest.mark.parametrize(
    "case", ["lora", *(pytest.param(case, marks=pytest.mark.long) for case in ("cpt", "distill-cache"))]
)
def test_two_processes_learn_what_one_learns(case: str, tmp_path: Path) -> None:
    options = OPTIONS | {"lora": {"dropout": 0.0}, "cpt": {"save_steps": None}}.get(case, {})
    alone = pruned()
    expected = figures(run(case, alone, tmp_path / "alone", **options))
    shown: list[tuple[int, dict[str, float]]] = []
    job = Job(case, checkpoint(), tmp_path, options)
    reports = Reports(lambda share, message: None, lambda step, values, section: shown.append((step, dict(values))))  # type: ignore[misc]
    run_processes(2, job, load_settings(), reports, what="training", kept="nothing")
    check_equal(tmp_path, expected, alone)
    assert [step for step, values in shown if "train_loss" in values] == [1, 2, 3, 4]
    kept = {path.name for path in (tmp_path / "scratch").glob("checkpoint-*")}
    assert kept == ({"checkpoint-3", "checkpoint-4"} if case == "cpt" else {"checkpoint-2", "checkpoint-4"})
