"""The figures that `slimline figure` knows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from flows.errors import SpecError
from flows.records.figures import blocks, calibration, history, kept, layers, pareto, training
from flows.records.figures.inputs import Recorded
from infra.figures.panels import Drawing
from infra.registry import did_you_mean

_SLIMGPT, _SHORTENED = "SlimGPT, arXiv 2412.18110", "Shortened LLaMA, arXiv 2402.02834"


@dataclass(frozen=True)
class KnownFigure:
    """One figure. build: what is drawn, None if nothing recorded belongs into it. fill: what fills it."""

    title: str
    build: Callable[[Recorded], Drawing | None]
    fill: str


FIGURES: Mapping[str, KnownFigure] = {
    "slimgpt-2": KnownFigure(
        f"Error of the FFN output, layer by layer ({_SLIMGPT}, figure 2)", layers.output_errors,
        "slimline run llama-7b-slimgpt-figure2, or on two cores slimline run smollm2-135m-p1",
    ),
    "slimgpt-3": KnownFigure(
        f"Size of the calibration set ({_SLIMGPT}, figure 3)", calibration.calibration_size,
        "slimline run llama-7b-slimgpt-figure3, or on two cores slimline run smollm2-135m-figures",
    ),
    "slimgpt-4": KnownFigure(
        f"How much of every layer is removed ({_SLIMGPT}, figure 4)", layers.sparsities,
        "slimline run llama-7b-slimgpt-figure4, or on two cores slimline run smollm2-135m-ablation",
    ),
    "slimgpt-5": KnownFigure(
        f"Loss while tuning ({_SLIMGPT}, figure 5)", training.losses,
        "slimline run llama-7b-slimgpt, or on two cores slimline run demo or smollm2-135m-tuning",
    ),
    "pareto": KnownFigure(
        "Perplexity and accuracy against parameters, latency and memory, with the Pareto front",
        pareto.quality_by_cost, "slimline run demo, or any spec with evals; a profile adds latency and memory",
    ),
    "kept": KnownFigure(
        "Which heads and channels are kept", kept.kept, "slimline run smollm2-135m-p1, or any spec that prunes",
    ),
    "blocks": KnownFigure(
        f"Importance of layers for depth pruning ({_SHORTENED})", blocks.importance,
        "slimline nightly smollm2-135m-comparison, or any spec with the method shortened",
    ),
    "history": KnownFigure(
        "Figures of a night, night after night, regressions marked", history.over_nights,
        "slimline nightly smollm2-135m, or any other night",
    ),
}  # fmt: skip


def build_figure(recorded: Recorded, name: str) -> Drawing:
    """The figure of that name.

    Raises SpecError for an unknown figure (with the nearest), an unknown run, and if nothing recorded belongs into it,
    with what would fill it.
    """
    if name not in FIGURES:
        raise SpecError(f"no figure {name!r}{did_you_mean(name, FIGURES)}; there are: {', '.join(FIGURES)}")
    known = FIGURES[name]
    drawing = known.build(recorded)
    if drawing is None:
        where = f"{', '.join(recorded.runs)} has" if recorded.runs else "the store has"
        raise SpecError(f"{where} nothing for {name} ({known.title}) yet; what fills it: {known.fill}")
    return drawing
