"""What is thrown at the command line: one case of each kind, drawn by hypothesis."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from flows.spec.load import shipped_specs
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
_LARGE = str(2**31 - 1)
_SMALL, _HUGE = "5.0e-324", "1.0e+308"
#: what planning lets through and only the stages can say something about, by the place in a spec of one stage
_NUMBERS: dict[str, dict[str, tuple[str, ...]]] = {
    _STEPS[0]: {
        "steps.0.sparsity": (_SMALL, "0.0001", "0.94", "0.999999"),
        "steps.0.start_over_end": (_SMALL, "1"),
        "steps.0.end_points": ("[0, 0]", "[0.9, 0.1]", "[0, 1.0e+308]", "[0.1, 0.3]"),
        "steps.0.dampening_frac": (_SMALL, "1.0e+6", _HUGE),
        "steps.0.group_size": ("1", _LARGE),
        "steps.0.protect_first": ("3", "4", _LARGE),
        "steps.0.split": ("ffn", "attention", "auto"),
        "steps.0.name": ("a" * 128, "a" * 5000, "'0'", "x..y"),
        "calibration.num_samples": ("1", "3000", _LARGE),
        "calibration.num_heldout": ("0", _LARGE),
        "calibration.seq_len": ("2", "512"),
        "calibration.seed": (str(2**63 - 1), str(-(2**63))),
        "calibration.join": ("''", '"\\0"', "a" * 5000, "🙂"),
    },
    _STEPS[1]: {
        "steps.0.rank": ("1", "32", "64", _LARGE),
        "steps.0.alpha": (_SMALL, _HUGE),
        "steps.0.learning_rate": (_SMALL, "1.0e+30", _HUGE),
        "steps.0.weight_decay": ("1.0e+30", _HUGE),
        "steps.0.dropout": ("0.999999",),
        "steps.0.warmup_steps": ("0", _LARGE),
        "steps.0.max_length": ("1", "2", _LARGE),
        "steps.0.num_examples": ("1", _LARGE),
        "steps.0.batch_size": (_LARGE, "4"),
        "steps.0.micro_batch_size": ("1",),
        "steps.0.save_steps": ("1", _LARGE),
        "steps.0.seed": (str(2**32 - 1),),
        "steps.0.targets": ("[q]", "[q, q]", "[gate, up, down]"),
    },
    "evals=[{suite: perplexity, dataset: slimline/wikipedia, config: null, windows: [64], max_windows: 2}]": {
        "evals.0.windows": ("[2]", "[2, 3]", "[max]"),
        "evals.0.stride": ("1", "63"),
        "evals.0.max_windows": ("1", _LARGE),
        "evals.0.window_seed": (str(2**63 - 1), str(-(2**63)), "null"),
        "evals.0.split": ("'test[:0]'", "'test[5:2]'", "'test[:1]'", "'test['", "test+test", "'test[:1%]'"),
        "evals.0.join": ("''", '"\\0"'),
        "evals.0.bos": ("none", "per_window", "tokenizer"),
        "evals.0.rolling": ("true",),
        "evals.0.documents": ("separate",),
        "evals.0.normalise": ("[word, byte]", "[word, word]"),
    },
    "evals=[{suite: zero_shot, tasks: [piqa], limit: 2}]": {
        "evals.0.num_fewshot": ("1", "30", "1000000", _LARGE),
        "evals.0.limit": ("1", _LARGE),
        "evals.0.seed": (str(2**63 - 1), str(-(2**63))),
        "evals.0.chat_template": ("true",),
        "evals.0.tasks": ("[lambada_openai]", "[wikitext]", "[mmlu]", "[gsm8k]"),
    },
    "profile={prompt_len: 2, new_tokens: 1, warmup: 0, runs: 1, ratio_seconds: 0}": {
        "profile.settings.prompt_len": ("1", "500", "[1, 2]"),
        "profile.settings.new_tokens": ("2", "510"),
        "profile.settings.batch_size": ("3", _LARGE),
        "profile.settings.ratio_precision": (_SMALL, "0.9999"),
        "profile.settings.seed": (str(2**63 - 1), str(-(2**63))),
        "profile.settings.attn_implementation": ("eager",),
    },
}
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


def odd_numbers(draw: Draw, scratch: Path, tiny: Path) -> Case:
    """A run of one stage, with one or two numbers that make no sense or hardly any."""
    stage = draw(st.sampled_from(sorted(_NUMBERS)))
    places = _NUMBERS[stage]
    chosen = draw(st.lists(st.sampled_from(sorted(places)), min_size=1, max_size=2, unique=True))
    overrides = [f"{place}={draw(st.sampled_from(places[place]))}" for place in chosen]
    base = () if stage.startswith("steps") else ("steps=[]", "calibration=null")
    cheap = [part for part in _CHEAP if not (base and part.startswith("calibration"))]
    return Case(("run", "smoke", *_set(*cheap, *base, stage, *overrides)), "; ".join(overrides)[:300])


KINDS: dict[str, Callable[[Draw, Path, Path], Case]] = {
    "values": odd_values,
    "variables": odd_variables,
    "specs": odd_specs,
    "models": odd_models,
    "data": odd_data,
    "runs": odd_runs,
    "numbers": odd_numbers,
}


@cache
def _places() -> list[str]:
    return places("smoke")


def _set(*overrides: str) -> list[str]:
    return [part for override in overrides for part in ("--set", override)]
