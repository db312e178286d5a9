"""How the checkpoints of a run are made, for the record."""

from __future__ import annotations

from typing import Any

from flows.spec.branches import Derivation
from flows.spec.run import RunSpec
from flows.spec.steps import PruneStep
from infra.results.lineage import Made


def lineage(spec: RunSpec) -> tuple[Made, ...]:
    """The checkpoints but the dense one, each after the one that it is made from."""
    return tuple(_made(derivation, spec) for derivation in spec.derivations)


def _made(derivation: Derivation, spec: RunSpec) -> Made:
    step, of_layers = derivation.step, not derivation.rebuilds_vocabulary
    options: dict[str, Any] = step.config.model_dump(mode="json")
    calibration = spec.calibration_of(derivation) if spec.reads_calibration(derivation) else None
    if calibration is not None:
        options["calibration"] = calibration.model_dump(mode="json")
    return Made(
        name=derivation.name,
        source=derivation.source,
        action="prune" if isinstance(step, PruneStep) else "recover",
        plugin=step.plugin,
        options=options,
        sparsity=options.get("sparsity") if isinstance(step, PruneStep) and of_layers else None,
        variant=derivation.variant,
        of_layers=of_layers,
    )
