"""From the steps as they are written to the tree of checkpoints that they stand for.

A prune step with several sparsities or variants begins a branch for each, and all steps after it are applied to every
branch. What branches have in common runs once: equal stages have equal keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from flows.spec.steps import Choice, PruneStep, RecoverStep, Variant
from infra.results.rows import DENSE


@dataclass(frozen=True)
class Derivation:
    """How one checkpoint of a run is made from another (`source`), by a step with one value for every option."""

    name: str
    source: str
    step: PruneStep | RecoverStep
    variant: str = ""
    changes: Variant = field(default_factory=Variant)
    """What the variant changes in the step and in the run's calibration."""

    @property
    def rebuilds_vocabulary(self) -> bool:
        """Whether the checkpoint has another tokenizer than its source."""
        return isinstance(self.step, PruneStep) and self.step.rebuilds_vocabulary


def derive(steps: Sequence[PruneStep | RecoverStep]) -> tuple[Derivation, ...]:
    """All checkpoints but the dense one, branch after branch, each after the one that it is made from."""
    return tuple(_grow(steps, DENSE, (), None))


def ends(derivations: Sequence[Derivation]) -> tuple[str, ...]:
    """The last checkpoint of every branch."""
    sources = {derivation.source for derivation in derivations}
    return tuple(each.name for each in derivations if each.name not in sources) or (DENSE,)


def tokenizer_origin(derivations: Sequence[Derivation], name: str) -> str:
    """The checkpoint whose tokenizer the one of that name has: the last on its way that a step gave another vocabulary,
    else the dense one."""
    by_name = {derivation.name: derivation for derivation in derivations}
    while name in by_name and not by_name[name].rebuilds_vocabulary:
        name = by_name[name].source
    return name


def _grow(
    steps: Sequence[PruneStep | RecoverStep], source: str, branch: tuple[str, ...], pruned: Choice | None
) -> Iterator[Derivation]:
    """branch: the labels of all choices that led to `source`. pruned: the last of them, whose calibration windows a
    recovery may train on."""
    if not steps:
        return
    step, *later = steps
    if isinstance(step, RecoverStep):
        name = "-".join([step.name, *branch]) if step.name else f"{source}+{step.recovery}"
        changes = Variant(calibration=pruned.changes.calibration) if pruned else Variant()
        yield Derivation(name, source, step, pruned.variant if pruned else "", changes)
        yield from _grow(later, name, branch, pruned)
        return
    for choice in step.choices:
        labels = branch + choice.labels
        name = "-".join([step.name, *labels]) if step.name else _default_name(choice, source, branch)
        yield Derivation(name, source, choice.step, choice.variant, choice.changes)
        yield from _grow(later, name, labels, choice)


def _default_name(choice: Choice, source: str, branch: tuple[str, ...]) -> str:
    """E.g. "slimgpt-20", "no-gcd" or "no-gcd-20"; below a branch that of the checkpoint before it comes first."""
    step = choice.step
    own = "-".join(choice.labels) if choice.variant else f"{step.method}-{step.amount}"
    return f"{source}+{own}" if branch else own
