"""What a spec may ask of an allocation that does more than follow a curve. Importing it needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, Self

from pydantic import BaseModel, Field, model_validator

from pruning.bounds import Count, Real, Seed

#: options that mean nothing elsewhere: of the curve that is followed, or is the start of a search; of the curve alone,
#: for the others measure anew what goes, and where; of the knapsack; of the search
_OF_THE_CURVE = ("curve", "start_over_end", "end_points", "split")
_OF_CURVES_ALONE = ("propagate_error", "uniform")
_OF_THE_KNAPSACK = ("steps", "labels", "step_samples")
_OF_THE_SEARCH = ("start", "search", "forwards", "levels", "level_size", "search_seed")


class AllocationOptions(BaseModel):
    """How a sparsity is distributed over sites. Subclasses have the options of curves."""

    allocation: Literal["curve", "knapsack", "searched"] = Field(
        default="curve", exclude_if=lambda name: name == "curve"
    )
    """curve: each layer's ratio as `curve` says (the paper). knapsack: one budget for all heads and channels, up to
    whole sub-layers and layers, spent where the loss rises least (OBS errors weighted by squared gradients of the loss,
    not in the paper); it chooses the split by itself. searched: from what either gives, moves between sites at the same
    size, judged by the KL to the dense logits on the held-out calibration windows (not in the paper)."""
    steps: Count = Field(default=5, le=1000, exclude_if=lambda steps: steps == 5)
    """Of the knapsack: how often Hessians and gradients are measured anew on what is left; each takes 4 forwards."""
    labels: Literal["text", "sampled"] = Field(default="text", exclude_if=lambda labels: labels == "text")
    """Of the knapsack's gradients: the tokens of the text (empirical Fisher information), or tokens that the model
    draws (true Fisher information)."""
    step_samples: Count | None = Field(default=None, exclude_if=lambda samples: samples is None)
    """Of the knapsack: the first so many calibration windows are all that the steps look at, before the last refit from
    all; default: all. Three tokens per FFN channel will do to choose by."""
    start: Literal["knapsack", "curve"] = Field(default="knapsack", exclude_if=lambda start: start == "knapsack")
    """Of the search: where it begins."""
    search: Literal["coordinate", "evolution"] = Field(
        default="coordinate", exclude_if=lambda search: search == "coordinate"
    )
    """Of the search. coordinate: between attention and FFN, between earlier and later layers, then between ever fewer
    sites, as long as the KL falls. evolution: mutations of the best so far, of which a quarter of the windows chooses
    those that all judge (after EvoPress)."""
    forwards: Count = Field(default=60, exclude_if=lambda forwards: forwards == 60)
    """Of the search: forwards that the whole pruning may take. The knapsack takes 4 a step, the curve one for each
    split that is tried, three go for the dense model, the levels and the last refit, and each candidate takes one, of
    the held-out windows."""
    levels: Count = Field(default=2, le=16, exclude_if=lambda levels: levels == 2)
    """Of the search: levels that each site has on either side of its start; their weights lie on disk meanwhile."""
    level_size: Real = Field(default=0.1, gt=0, le=0.5, exclude_if=lambda share: share == 0.1)
    """Of the search: what one level is, as a share of an FFN's channels; rounded to whole head units."""
    search_seed: Seed = Field(default=0, exclude_if=lambda seed: seed == 0)
    """Of the search: of what is drawn at random."""

    @model_validator(mode="after")
    def _one_allocation(self) -> Self:
        for names, way_out in self._idle():
            for name in names:
                value = getattr(self, name)
                if value != type(self).model_fields[name].default:
                    where = f" and start {self.start}" if way_out.startswith("start") else ""
                    raise ValueError(
                        f"{name} {value!r} plays no part with allocation {self.allocation}{where}: leave it out, or "
                        f"set {way_out}"
                    )
        return self

    @property
    def steps_first(self) -> bool:
        """Whether steps of a knapsack say what goes, at first or for good."""
        return self.allocation == "knapsack" or (self.allocation == "searched" and self.start == "knapsack")

    def _idle(self) -> Iterator[tuple[Sequence[str], str]]:
        """Options that say nothing here, and where they would."""
        if self.allocation != "searched":
            yield _OF_THE_SEARCH, "allocation to searched"
        if self.allocation == "searched":
            yield _OF_CURVES_ALONE, "allocation to curve"
            yield (_OF_THE_CURVE, "start to curve") if self.steps_first else (_OF_THE_KNAPSACK, "start to knapsack")
        elif self.allocation == "knapsack":
            yield (*_OF_THE_CURVE, *_OF_CURVES_ALONE), "allocation to curve"
        else:
            yield _OF_THE_KNAPSACK, "allocation to knapsack"
