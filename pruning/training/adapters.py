"""Low-rank adapters on a model's linears and experts, merged into them afterwards (LoRA: arXiv 2106.09685; rsLoRA:
2312.03732; DoRA: 2402.09353). The only importer of peft."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pruning.bounds import Count, Real
from pruning.errors import PruningError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from pruning.families import ModelFamily

log = logging.getLogger("slimline")

Target = Literal["q", "k", "v", "o", "gate", "up", "down", "experts"]
ADAPTER_FOLDER = "adapter"


class AdapterConfig(BaseModel):
    """What is adapted. alpha: the adapters' output is scaled by alpha / rank, or with rslora by alpha / sqrt(rank).
    dora: magnitude and direction of each weight are learned apart.

    The target experts is gate, up and down of all experts, an adapter of this rank each; gate, up and down are those of
    MLPs alone.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    targets: tuple[Target, ...] = Field(("q", "k", "v", "o", "gate", "up", "down"), min_length=1)
    rank: Count = 8
    alpha: Real = Field(16.0, gt=0)
    dropout: Real = Field(0.05, ge=0, lt=1)
    rslora: bool = False
    dora: bool = False

    @model_validator(mode="after")
    def _experts_are_plain(self) -> Self:
        # the adapted weight itself is computed, not the adapter's output: there is nothing to drop out
        asked = [name for name in ("dropout", "dora") if getattr(self, name)]
        if "experts" in self.targets and asked:
            raise ValueError(
                f"{asked[0]} = {getattr(self, asked[0])}: adapters on experts know none; set {asked[0]} to "
                f"{0 if asked[0] == 'dropout' else 'false'}, or leave experts out of targets"
            )
        return self


def check_rank(config: AdapterConfig, hidden_size: int) -> None:
    """Raise PruningError for adapters that are larger than what they adapt."""
    if config.rank > hidden_size:
        raise PruningError(
            f"rank {config.rank} is more than the {hidden_size} that the model's layers are wide, where nothing is "
            "left to learn; lower it"
        )


def num_parameters(
    config: AdapterConfig, num_all: int, num_layers: int, hidden_size: int, intermediate_size: int
) -> int:
    """Of all adapters of a model of these widths (of experts, of one), at most. num_all: its parameters."""
    sides = dict.fromkeys(("q", "k", "v", "o"), 2 * hidden_size)
    linears = [target for target in config.targets if target != "experts"]
    widths = (sides.get(target, hidden_size + intermediate_size) for target in linears)
    found = num_layers * config.rank * sum(widths)
    if "experts" in config.targets:  # of a matrix (a, b) its adapter has rank * (1 / a + 1 / b) of the parameters
        found += config.rank * (num_all // hidden_size + num_all // max(1, intermediate_size))
    return found


@contextmanager
def merged_adapters(model: PreTrainedModel, config: AdapterConfig, beside: Path | None = None) -> Iterator[nn.Module]:
    """Adapters on the model: merged into it at the end, or taken off again if the training fails.

    beside: a folder in which the adapters are kept, as peft writes them. Raises PruningError for weights that are not
    finite, or targets that the model does not have.
    """
    from peft import LoraConfig, get_peft_model

    with training_state(model):
        lora = LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            use_rslora=config.rslora,
            use_dora=config.dora,
            target_modules=target_names(model, config) or None,
            target_parameters=expert_names(model, config) or None,
            bias="none",
            task_type="CAUSAL_LM",
        )
        adapted: Any = get_peft_model(model, lora)
        # with a name (or None, which is replaced by one) peft asks the hub for that model's config at every checkpoint
        adapted.peft_config["default"].base_model_name_or_path = ""
        try:
            yield adapted
            check_finite(adapted)
            if beside is not None:
                _save(adapted, beside / ADAPTER_FOLDER)
        except BaseException:
            adapted.unload()
            raise
        adapted.merge_and_unload()


@dataclass(frozen=True)
class LowRank:
    """An adapter as it is now: the linear is weight_OI + scaling * b_OR @ a_RI."""

    weight_OI: Tensor
    a_RI: nn.Parameter
    b_OR: nn.Parameter
    scaling: float


def low_rank(linear: nn.Module) -> LowRank | None:
    """The adapter of a linear while `merged_adapters` lasts, None if it has none."""
    peft: Any = linear
    if not hasattr(peft, "lora_A"):
        return None
    a_RI, b_OR = (getattr(peft, side)["default"].weight for side in ("lora_A", "lora_B"))
    return LowRank(peft.base_layer.weight, a_RI, b_OR, float(peft.scaling["default"]))


def _save(adapted: Any, folder: Path) -> None:
    """As peft writes them, but the same bytes every time, and without its model card, which says nothing."""
    adapted.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    config = folder / "adapter_config.json"
    values = json.loads(config.read_text(encoding="utf-8"))
    for kind in ("target_modules", "target_parameters"):  # sets
        values[kind] = values.get(kind) and sorted(values[kind])
    config.write_text(json.dumps(values, indent=2, sort_keys=True), encoding="utf-8")


@contextmanager
def training_state(model: PreTrainedModel) -> Iterator[None]:
    """What training switches on a model (frozen weights, mode, KV cache, checkpointing) is put back."""
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    training, use_cache, attributes = model.training, model.config.use_cache, set(vars(model))
    try:
        yield
    finally:
        if model.is_activation_checkpointing:
            model.activation_checkpointing_disable()
        for name in vars(model).keys() - attributes:  # accelerate's own forward above all
            delattr(model, name)
        model.train(training)
        model.config.use_cache = use_cache
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable[name])


def check_finite(model: nn.Module) -> None:
    """Raise PruningError naming a trained weight that is not finite."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not parameter.isfinite().all():
            raise PruningError(f"after training, {name} is not finite: lower learning_rate or train in float32")


def check_targets(config: AdapterConfig, family: ModelFamily) -> None:
    """Raise PruningError for targets that are some of the parts of one linear, which is adapted as a whole, and for
    experts where there are none."""
    if "experts" in config.targets and family.experts is None:
        raise PruningError(f"a {family.name} model has no experts to adapt: leave experts out of targets")
    for roles in family.fused_roles():
        asked = [role for role in roles if role in config.targets]
        if asked and len(asked) < len(roles):
            raise PruningError(
                f"the targets {', '.join(asked)} are parts of one linear in a {family.name} model "
                f"({family.linear_names()[roles[0]]}: {', '.join(roles)}), which is adapted as a whole: name all of "
                "them, or none"
            )


def target_names(model: PreTrainedModel, config: AdapterConfig) -> list[str]:
    """Dotted names of the linears to adapt; a family may have no gate, a pruned MLP no channels. Experts, whose weights
    are no linears, have `expert_names`; where they are left as they are, a warning says so.

    Raises PruningError for a part of a fused linear, which is adapted as a whole, or if no target has weights left.
    """
    from pruning.families import family_of

    family = family_of(model)
    names = family.linear_names()
    check_targets(config, family)
    wanted = {names[target] for target in config.targets if target in names}
    found = [
        f"{family.layers_path}.{name}"
        for name, module in family.layers(model).named_modules()
        if name.rpartition(".")[2] in wanted and next(module.parameters()).numel()
    ]
    if "experts" in config.targets:
        return found
    if not found:
        raise PruningError(
            f"the targets {config.targets} have no weights left in this model"
            f"{', whose experts are not adapted' if family.experts else ''}: name others"
        )
    if family.experts is not None and {"gate", "up", "down"} & set(config.targets):
        log.warning(
            "adapters leave the experts of a %s model as they are: they sit on its linears alone; add experts to "
            "targets, with dropout: 0, to train those too",
            family.name,
        )
    return found


def expert_names(model: PreTrainedModel, config: AdapterConfig) -> list[str]:
    """Dotted names of the weights of all experts of a layer, if they are to be adapted."""
    from pruning.families import family_of
    from pruning.families.experts import experts_of

    family = family_of(model)
    if "experts" not in config.targets:
        return []
    adapted = [found.module for layer in family.layers(model) if (found := experts_of(family, layer)) is not None]
    return [
        f"{name}.{weight}"
        for name, module in model.named_modules()
        if any(module is each for each in adapted)
        for weight in ("gate_up_proj", "down_proj")
    ]
