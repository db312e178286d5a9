"""What is thrown at the command line: one case of each kind, drawn by hypothesis."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from flows.loading import shipped_specs
from infra.settings import PREFIX, Settings
from tests.fuzz.files import broken_data, broken_model, broken_spec
from tests.fuzz.values import EVERYTHING, places, values

Draw = Callable[[st.SearchStrategy[Any]], Any]

_CHEAP = ("evals=[]", "profile=null", "calibration.num_samples=2", "calibration.seq_len=16")
#: what a run does with a model, data and numbers that planning lets through
_STEPS = (
    "steps=[{method: slimgpt, sparsity: 0.2, split: equal}]",
    "steps=[{recovery: lora, data: {dataset: slimline/instructions}, num_examples: 4, max_steps: 1, batch_size: 2,"
    " micro_batch_size: 2, dtype: float32}]",
)
_READERS = ("calibration.data.dataset", "evals.0.dataset", "steps.1.data.dataset")
#: not thrown: what would make folders outside the scratch folder, or look for hours
_OUTSIDE = ("home", "results_db", "results_folder", "remote")


@dataclass(frozen=True)
class Case:
    """A command, the environment variables that it is called with, and what is odd about it."""

    arguments: tuple[str, ...]
    said: str
    variables: dict[str, str] = field(default_factory=dict)


def odd_values(draw: Draw, scratch: Path, tiny: Path) -> Case:
    """One or two values of a spec."""
    changes = draw(st.lists(st.tuples(st.sampled_from(_places()), values), min_size=1, max_size=2))
    overrides = [f"{place}={value}" for place, value in changes]
    return Case(("plan", "smoke", *_set(*EVERYTHING, *overrides)), "; ".join(overrides))


def odd_variables(draw: Draw, scratch: Path, tiny: Path) -> Case:
    """A setting of the machine."""
    name = draw(st.sampled_from([name for name in Settings.model_fields if name not in _OUTSIDE]))
    value = draw(values).replace("\0", "").encode(errors="ignore").decode()
    return Case(("plan", "smoke"), f"{name}={value}", {PREFIX + name.upper(): value})


def odd_specs(draw: Draw, scratch: Path, tiny: Path) -> Case:
    """A YAML file that an editor or a disk has spoiled."""
    text = shipped_specs()[draw(st.sampled_from(("smoke", "demo")))].read_text(encoding="utf-8")
    return Case(("plan", str(scratch / "spec.yaml")), broken_spec(draw, text, scratch / "spec.yaml"))


def odd_models(draw: Draw, scratch: Path, tiny: Path) -> Case:
    """A model folder with a broken file."""
    model, said = broken_model(draw, tiny, scratch / "model")
    return Case(("plan", "smoke", *_set(f"model.id={model}")), said)


def odd_data(draw: Draw, scratch: Path, tiny: Path) -> Case:
    """A data file, broken, for calibration, evaluation or training."""
    data, said = broken_data(draw, scratch / "data")
    return Case(("plan", "smoke", *_set(f"{draw(st.sampled_from(_READERS))}={data}")), said)


def odd_runs(draw: Draw, scratch: Path, tiny: Path) -> Case:
    """A run of a model or of data that planning may let through."""
    steps = draw(st.sampled_from(_STEPS))
    if draw(st.booleans()):
        place, said = broken_model(draw, tiny, scratch / "model")
        override = f"model.id={place}"
    else:
        place, said = broken_data(draw, scratch / "data")
        override = f"{'steps.0' if 'lora' in steps else 'calibration'}.data.dataset={place}"
    return Case(("run", "smoke", *_set(*_CHEAP, steps, override)), f"{said} ({steps[8:15]})")


KINDS: dict[str, Callable[[Draw, Path, Path], Case]] = {
    "values": odd_values,
    "variables": odd_variables,
    "specs": odd_specs,
    "models": odd_models,
    "data": odd_data,
    "runs": odd_runs,
}


@cache
def _places() -> list[str]:
    return places("smoke")


def _set(*overrides: str) -> list[str]:
    return [part for override in overrides for part in ("--set", override)]
