"""Options that all methods share which train while they prune. Importing it needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from pruning.bounds import Amount, Count, Real
from pruning.errors import PruningError
from pruning.training.adapters import AdapterConfig
from pruning.training.data import RecordData, TextsOrRecords
from pruning.training.options import TextConfig

if TYPE_CHECKING:
    from pruning.allocation.budget import Allocation
    from pruning.families import LayerCost, ModelFamily
    from pruning.plan import LayerShape


class TrainedOptions(TextConfig, AdapterConfig):
    """How much goes from where, what is trained on meanwhile, and the options of every training and of its adapters."""

    sparsity: Real = Field(gt=0, lt=1)
    """Share of all decoder-layer parameters to remove."""
    head_unit: Literal["kv_group", "query_head"] = "kv_group"
    """With grouped kv heads: whole kv groups, or the same number of query heads from every group."""
    protect_first: Amount = 0
    """Layers at the start that are left whole."""
    protect_last: Amount = 0
    """Layers at the end that are left whole."""
    channel_multiple: Count = Field(default=1, le=1024, exclude_if=lambda multiple: multiple == 1)
    """What stays of every FFN is a multiple of this, such as 64 or 128: odd widths lose the fast kernels. What one
    layer is rounded by the next ones make up for."""
    uniform: bool = Field(default=False, exclude_if=lambda uniform: not uniform)
    """Every layer keeps the same heads and channels, in numbers that transformers' own class builds: vLLM, SGLang, TGI
    and llama.cpp load what comes out. No curve then plays a part."""
    data: TextsOrRecords = RecordData()
    """Text (c4, fineweb-edu, redpajama, slimpajama), records (alpaca, stanford-alpaca, gpt4-alpaca), or a mapping that
    names a data set."""
    num_examples: Count | None = None
    """Of records: a seeded subset; null: all."""
    max_length: Count = 256
    """Of records: tokens per example."""

    @model_validator(mode="after")
    def _ends_pruned(self) -> TrainedOptions:
        if self.keep == "best" or self.patience is not None:
            asked = "keep: best" if self.keep == "best" else f"patience: {self.patience}"
            raise PruningError(
                f"{asked} judges by held-out loss, which rises while the model is pruned: leave it out, the weights of "
                "the last step are kept"
            )
        return self

    @property
    def split_(self) -> Literal["equal", "half", "third", "ffn", "attention"] | None:
        """Attention against FFN; None: whatever is worth least."""
        return getattr(self, "split", None)

    @property
    def measure(self) -> Literal["score", "per_parameter"] | None:
        """What one threshold is set on; None if every layer loses the same share."""
        return None

    @property
    def joint(self) -> bool:
        """Whether one threshold is for heads and channels together."""
        return self.measure is not None and self.split_ is None

    @property
    def prompted(self) -> bool:
        """Whether a text stands in front of every record."""
        return False

    def allocation_(self) -> Allocation:
        """How much goes from where."""
        from pruning.allocation.budget import ATTENTION_RATIOS, Allocation

        return Allocation(
            sparsity=self.sparsity,
            curve="uniform",
            attention_ratio=ATTENTION_RATIOS[self.split_ or "equal"],
            protect_first=self.protect_first,
            protect_last=self.protect_last,
            head_unit=self.head_unit,
            channel_multiple=self.channel_multiple,
            uniform=self.uniform,
        )

    def check_layers(self, layers: Sequence[LayerShape], cost: LayerCost, family: ModelFamily) -> None:
        """Raise PruningError if a model of these layers cannot be pruned so."""
        from pruning.allocation.budget import check_head_unit
        from pruning.allocation.schedule import check_grid, check_reach

        check_without_experts(family)
        if family.head_norms_span_heads and self.split_ != "ffn":
            raise PruningError(
                f"in an {family.name} model one norm spans the queries of all heads, and masks on what heads give do "
                "not reach it: set split to ffn, or prune heads by a method that does not train"
            )
        check_head_unit(self.head_unit, layers)
        check_reach(self.allocation_(), layers, cost, joint=self.joint)
        check_grid(self.allocation_(), layers, cost, threshold=self.measure is not None)


def check_without_experts(family: ModelFamily) -> None:
    """Raise PruningError for a family with experts."""
    if family.experts is not None:
        raise PruningError(
            f"methods that train while they prune have no masks for the experts of a {family.name} model: take "
            "slimgpt, wanda_sp, flap, llm_pruner or magnitude"
        )
