"""Without `save_steps` checkpoints are written in time: seldom enough to cost little, often enough to lose little."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from pruning.training import watching
from tests.pruning.recovery.test_contract import figures, pruned, run
from tests.pruning.recovery.test_lora import same


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


def test_a_minute_or_twenty_times_the_writing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clock = Clock()
    monkeypatch.setattr(watching, "time", clock)
    arguments, state, control = TrainingArguments(str(tmp_path), use_cpu=True), TrainerState(), TrainerControl()
    in_time = watching.SavesInTime()
    clock.now += 500  # what comes before the first step is not training
    in_time.on_train_begin(arguments, state, control)

    def steps(seconds_of_a_step: float, seconds_of_writing: float, number: int) -> list[int]:
        saved = []
        for step in range(1, number + 1):
            clock.now += seconds_of_a_step
            control.should_save = False
            in_time.on_step_end(arguments, state, control)
            if control.should_save:
                clock.now += seconds_of_writing
                in_time.on_save(arguments, state, control)
                saved.append(step)
        return saved

    assert steps(25, 1, 9) == [3, 6, 9]
    assert steps(25, 10, 20) == [3, 11, 19]  # 200 s of training for 10 of writing
    assert steps(25, 0, 20) == [7, 10, 13, 16, 19]


def test_a_short_training_writes_no_checkpoint_and_one_in_time_goes_on_from_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole, resumed = pruned(), pruned()
    expected = figures(run("cpt", whole, tmp_path / "whole", save_steps=None))
    assert not list((tmp_path / "whole").glob("checkpoint-*"))
    monkeypatch.setattr(watching, "_SECONDS", 0.0)
    monkeypatch.setattr(watching, "_TIMES", 0)
    told: list[str] = []

    def interrupt(share: float, message: str) -> None:
        told.append(message)
        if message.startswith("step 4/") and len(told) < 6:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        run("cpt", pruned(), tmp_path / "scratch", save_steps=None, progress=interrupt)
    assert sorted(path.name for path in (tmp_path / "scratch").glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    report = run("cpt", resumed, tmp_path / "scratch", save_steps=None)
    assert figures(report) == expected
    assert same(resumed, whole)
