"""What pruning did to the layers: the same figures while it goes on and in the record."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from infra.tracking.records import LAYERS

if TYPE_CHECKING:
    from pruning.walk.state import LayerEntry
    from tasks.execution.curves import Curves


def relative(error: float | None, output_energy: float | None) -> float | None:
    """An output error in proportion to the output itself; None if it was not measured."""
    return None if error is None else error / (output_energy or 1.0)


def layer_figures(sub_layer: str, error: float | None, score: float | None) -> dict[str, float]:
    """Of one sub-layer by their names in MLflow, where the layer is the step. error: relative."""
    figures = {f"{sub_layer}_error": error, f"{sub_layer}_score": score}
    return {name: value for name, value in figures.items() if value is not None}


def shown_in(curves: Curves) -> Callable[[LayerEntry], None]:
    """What shows each finished layer, to be called with its entry."""

    def show(entry: LayerEntry) -> None:
        for report in entry.reports:
            error = relative(report.measured_error, report.output_energy)
            if figures := layer_figures(report.sub_layer, error, report.score):
                curves(report.layer, figures, LAYERS)

    return show
