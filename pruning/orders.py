"""The common currency of all methods: in which order the groups of a site go, and what has been lost at every level.

A method *ranks* (it makes orders), an allocation chooses for each site how many groups of its order go, and they are
removed and repaired. Orders are nested, so one serves every sparsity. Sites are the output linear of an attention
(heads, by kv groups or by query heads), that of an MLP or an expert (channels), the experts of a layer (whole experts),
and the stack of layers itself (whole layers).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from torch import Tensor

Unit = Literal["kv_group", "query_head", "channel", "expert", "layer", "sub_layer"]
"""What goes at once; the order of query heads takes one from every kv group before it takes a second."""


class Order(BaseModel):
    """One site: groups in the order they go, as far as any budget may ask; after `rounds` removals the error (mean
    squared output error per token as Optimal Brain Surgeon predicts it, or the sum of the scores) was `errors`.
    condition: of the Hessian, if there was one. refactorisations: 0; files of earlier versions may say more."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    order: tuple[int, ...]
    rounds: tuple[int, ...]
    errors: tuple[float, ...]
    condition: float | None = None
    refactorisations: int = 0

    @classmethod
    def of_scores(cls, scores: Sequence[float], order: Sequence[int] | None = None) -> Order:
        """Groups by rising score, equal ones by rising index; or in the given order."""
        if order is None:
            order = sorted(range(len(scores)), key=scores.__getitem__)
        errors = tuple(accumulate(scores[group] for group in order))
        return cls(order=tuple(order), rounds=tuple(range(1, len(order) + 1)), errors=errors)

    @property
    def scores(self) -> tuple[float, ...]:
        """What each group of the order costs; groups of one round share what the round cost."""
        rounds, errors = (0, *self.rounds), (0.0, *self.errors)
        return tuple(
            (error - before) / (gone - at)
            for (at, gone), (before, error) in zip(pairwise(rounds), pairwise(errors), strict=True)
            for _ in range(gone - at)
        )

    def bounds(self, count: int) -> tuple[float, float]:
        """Between what the error of removing the first `count` groups must lie: it grows from round to round."""
        return (0.0, *self.errors)[bisect_right(self.rounds, count)], self.errors[bisect_left(self.rounds, count)]


def given_order(groups: Sequence[int]) -> Order:
    """These groups in this order and no more; its errors say nothing."""
    return Order.of_scores([0.0] * (max(groups, default=0) + 1), groups)


class OrderSource(Protocol):
    """Whoever knows what goes first from a site."""

    def load(self, name: str, unit: Unit) -> Order:
        """The order of the site `name`: dotted name of its output linear."""


class Orders:
    """A folder of orders, one file per site and unit, and of what a repair needs to know of a site's inputs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, name: str, unit: Unit) -> Order:
        """The order of the site `name`: dotted name of its output linear, or of the stack of layers."""
        return Order.model_validate_json(self._file(name, unit).read_bytes())

    def save(self, name: str, unit: Unit, order: Order) -> None:
        """Write one order."""
        self._file(name, unit).write_text(order.model_dump_json(), encoding="utf-8")

    def scores(self, name: str, unit: Unit) -> tuple[float, ...]:
        """What each group of a site's order costs, in the order in which they go."""
        return self.load(name, unit).scores

    def load_mean(self, name: str) -> Tensor:
        """Mean of each input of a linear, (I,) float32."""
        from safetensors.torch import load_file

        mean_I: Tensor = load_file(self.folder / f"{name}.safetensors")["mean"]
        return mean_I

    def save_mean(self, name: str, mean_I: Tensor) -> None:
        """Write the mean of each input of a linear."""
        from safetensors.torch import save_file

        save_file({"mean": mean_I.contiguous().cpu()}, self.folder / f"{name}.safetensors")

    def _file(self, name: str, unit: Unit) -> Path:
        return self.folder / f"{name}.{unit}.json"
