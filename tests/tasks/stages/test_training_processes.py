"""A training in two processes (DDP over gloo) is that of one: the same curve, the same weights up to rounding."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

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


@dataclass(frozen=True)
class Job:
    case: str
    source: str
    folder: Path
    options: dict[str, Any]

    def __call__(self, process_group: ProcessGroup, device: torch.device, reports: Reports) -> None:
        if self.options.get("save_steps", 0) is None:  # the clocks of the two do not agree
            watching._SECONDS, watching._TIMES = (0.0, 0) if process_group.leads else (1e9, 0)
        model = load_checkpoint(self.source)
        report = run(
            self.case,
            model,
            self.folder / "scratch",
            curves=reports.curves,
            device=device,
            rank=process_group.rank,
            num_processes=process_group.size,
            **self.options,
        )
        torch.save(model.state_dict(), self.folder / f"model-{process_group.rank}")
        (self.folder / f"report-{process_group.rank}.json").write_text(report.model_dump_json(), encoding="utf-8")


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
    states = [torch.load(tmp_path / f"model-{rank}") for rank in range(2)]
    written = [(tmp_path / f"report-{rank}.json").read_text(encoding="utf-8") for rank in range(2)]
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
    assert [step for step, values in shown if "train_loss" in values] == [1, 2, 3, 4]
    kept = {path.name for path in (tmp_path / "scratch").glob("checkpoint-*")}
    assert kept == ({"checkpoint-3", "checkpoint-4"} if case == "cpt" else {"checkpoint-2", "checkpoint-4"})
