"""A model family: the names under which a decoder keeps its parts. A row of data, not a class hierarchy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from pruning.families.projection import Projection

if TYPE_CHECKING:
    from torch import nn


#: what the width of an expert has to be a multiple of, so that grouped matrix products, transformers' default for
#: experts, can compute it: torch wants rows of whole 16 bytes. modeling_slimline has the same number
EXPERT_MULTIPLE = 8


@dataclass(frozen=True)
class Requirement:
    """What the config of a model must say for the family to be prunable. holds: of the config. reason: a clause that
    follows "cannot prune X: "; it names the field and the way out.
    """

    holds: Callable[[Any], bool]
    reason: str


@dataclass(frozen=True)
class ExpertNames:
    """Where a mixture of experts keeps its parts, in the module that stands in the place of the MLP.

    is_sparse: of config and number of a layer, whether it has experts; the others have an MLP. ..._field: names in the
    config: channels of each expert, how many experts, to how many of them a token goes. dense_field: the list of
    the layers that have an MLP. published_...: what checkpoints call block, and gate, up and down of each expert, which
    they keep one by one.
    """

    is_sparse: Callable[[Any, int], bool]
    size_field: str
    published_block: str
    published_parts: tuple[str, str, str]
    module_name: str = "experts"
    router_name: str = "gate"
    num_experts_field: str = "num_local_experts"
    per_token_field: str = "num_experts_per_tok"
    dense_field: str | None = None


@dataclass(frozen=True)
class ModelFamily:
    """Where a decoder-only model of this family keeps its parts.

    `model_types` and `architectures` are the spellings of config.model_type and of the model class: the stock one, then
    ours for uneven layers. Paths start at the model ("model.layers"), sub-module names at the layer or its attention or
    MLP; `..._field` are names in the config.

    q_name ... down_name: roles of the same name are rows of one fused linear, in the order q k v or gate up.
    mlp_name: "" where the layer itself holds the linears of the MLP; `activation_name` then names the activation there.
    gate_name: None for an MLP without a gate. rotary_path: None where positions are learned with the embeddings.
    kv_heads_field: None where every query head has a kv head of its own. stock_head_dim: the stock class takes the
    width of a head from the config; False where it divides hidden_size by the number of heads, so that it cannot
    describe pruned heads. heads_divide_hidden: the stock class takes only numbers of heads that divide hidden_size,
    although it takes the width of a head from the config. per_layer_fields: lists in the config with an entry for each
    layer. llama_cpp: what llama.cpp calls the architecture if all layers are equal, None: no GGUF files of the family
    are written. computes_as_llama: a Llama's layer with other biases, so that llama.cpp's `deci` computes layers that
    differ.

    On the way to a sub-layer: attention_norm_name, mlp_norm_name; None where it reads the residual stream itself.
    parallel_residual: attention and MLP both read the stream as it was before the layer, else the MLP reads it after
    the attention. On the way from its output linear to the stream: ..._output_norm_name, and
    residual_multiplier_name, the layer's attribute by which the output is multiplied. norm_offset: what such a norm
    adds to its weight; norm_epsilon_name: its attribute. On the way from the head: the logits are divided by one field
    of the config, or held below another.

    experts: of a family whose layers have experts in the place of the MLP, or some of them; gate_name, up_name and
    down_name are then of the other layers.

    head_norm_names: norms of queries and keys, of width head_dim, shared by all heads and never cut; or with
    head_norms_span_heads one norm over all of them, which is cut along with the heads.
    """

    name: str
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    layers_path: str = "model.layers"
    embeddings_path: str = "model.embed_tokens"
    final_norm_path: str = "model.norm"
    rotary_path: str | None = "model.rotary_emb"
    head_path: str = "lm_head"
    attention_name: str = "self_attn"
    mlp_name: str = "mlp"
    q_name: str = "q_proj"
    k_name: str = "k_proj"
    v_name: str = "v_proj"
    o_name: str = "o_proj"
    gate_name: str | None = "gate_proj"
    up_name: str = "up_proj"
    down_name: str = "down_proj"
    activation_name: str = ""
    attention_norm_name: str | None = "input_layernorm"
    mlp_norm_name: str | None = "post_attention_layernorm"
    attention_output_norm_name: str | None = None
    mlp_output_norm_name: str | None = None
    norm_offset: float = 0.0
    norm_epsilon_name: str = "variance_epsilon"
    residual_multiplier_name: str | None = None
    logits_divisor_field: str | None = None
    logits_cap_field: str | None = None
    head_norm_names: tuple[str, ...] = ()
    head_norms_span_heads: bool = False
    heads_field: str = "num_attention_heads"
    kv_heads_field: str | None = "num_key_value_heads"
    intermediate_field: str = "intermediate_size"
    per_layer_fields: tuple[str, ...] = ("layer_types",)
    stock_head_dim: bool = True
    heads_divide_hidden: bool = False
    parallel_residual: bool = False
    llama_cpp: str | None = None
    computes_as_llama: bool = False
    experts: ExpertNames | None = None
    requirements: tuple[Requirement, ...] = ()

    def decoder(self, model: nn.Module) -> nn.Module:
        """The module that holds the layers ("model.model")."""
        return model.get_submodule(self.layers_path.rpartition(".")[0])

    def layers(self, model: nn.Module) -> nn.ModuleList:
        """The decoder layers, first to last."""
        return cast("nn.ModuleList", model.get_submodule(self.layers_path))

    def embeddings(self, model: nn.Module) -> nn.Embedding:
        """token ids -> hidden."""
        return cast("nn.Embedding", model.get_submodule(self.embeddings_path))

    def final_norm(self, model: nn.Module) -> nn.Module:
        """The norm before the head."""
        return model.get_submodule(self.final_norm_path)

    def rotary(self, model: nn.Module) -> nn.Module | None:
        """The module that computes the rotary cos and sin, if the family has one."""
        return None if self.rotary_path is None else model.get_submodule(self.rotary_path)

    def head(self, model: nn.Module) -> nn.Linear:
        """The linear from hidden states to logits."""
        return cast("nn.Linear", model.get_submodule(self.head_path))

    def attention(self, layer: nn.Module) -> nn.Module:
        """The module that holds q, k, v and o."""
        return layer.get_submodule(self.attention_name)

    def mlp(self, layer: nn.Module) -> nn.Module:
        """The module that holds the linears of the MLP: the MLP block of a layer, or the layer itself."""
        return layer.get_submodule(self.mlp_name)

    def head_norms(self, layer: nn.Module) -> tuple[nn.Module, ...]:
        """The norms of the queries and of the keys, if there are any."""
        return tuple(self.attention(layer).get_submodule(name) for name in self.head_norm_names)

    def o_proj(self, layer: nn.Module) -> nn.Linear:
        """num_heads * head_dim -> hidden."""
        return _linear(self.attention(layer), self.o_name)

    def down_proj(self, layer: nn.Module) -> nn.Linear:
        """intermediate -> hidden, of a layer without experts."""
        return _linear(self.mlp(layer), self.down_name)

    def linears(self, layer: nn.Module) -> dict[str, nn.Linear]:
        """The linear of each role, in the order q k v o (gate) up down; a fused one comes once for each of its own.
        Of a layer with experts q k v o alone: see families.experts for the others."""
        blocks = dict.fromkeys("qkvo", self.attention(layer))
        if not self.has_experts(layer):
            blocks |= dict.fromkeys(("gate", "up", "down"), self.mlp(layer))
        return {role: _linear(blocks[role], name) for role, name in self.linear_names().items() if role in blocks}

    def has_experts(self, layer: nn.Module) -> bool:
        """Whether a layer has experts in the place of the MLP."""
        return self.experts is not None and hasattr(self.mlp(layer), self.experts.module_name)

    def linear_names(self) -> dict[str, str]:
        """The linears of a layer by their own names, in the order q k v o (gate) up down, keyed so."""
        names = {"q": self.q_name, "k": self.k_name, "v": self.v_name, "o": self.o_name}
        gate = {} if self.gate_name is None else {"gate": self.gate_name}
        return names | gate | {"up": self.up_name, "down": self.down_name}

    def fused_roles(self) -> tuple[tuple[str, ...], ...]:
        """The roles that are rows of one linear together: ("q", "k", "v"), ("gate", "up"), or none."""
        names = self.linear_names()
        together = {name: tuple(role for role in names if names[role] == name) for name in names.values()}
        return tuple(roles for roles in together.values() if len(roles) > 1)

    def projections(self, layer: nn.Module) -> dict[str, Projection]:
        """The rows that each role has: all of its linear, or a part of a fused one; keyed as `linears`.

        q has as many rows as o has inputs, k and v share the rest; gate and up have half each.
        """
        linears = self.linears(layer)
        found = {role: Projection(linear, 0, linear.out_features) for role, linear in linears.items()}
        for roles in (roles for roles in self.fused_roles() if roles[0] in linears):
            linear, start = linears[roles[0]], 0
            query = linears["o"].in_features if "q" in roles else 0
            others = (linear.out_features - query) // sum(role != "q" for role in roles)
            for role in roles:
                stop = start + (query if role == "q" else others)
                found[role] = Projection(linear, start, stop)
                start = stop
        return found

    def head_dim(self, model: nn.Module) -> int:
        """Width of one head, from the model's own modules."""
        return self.head_dim_of(self.layers(model)[0])

    def stock_heads(self, hidden_size: int, head_dim: int) -> tuple[int, ...] | None:
        """The numbers of query heads that the stock class can be built with; None: any."""
        if not self.stock_head_dim:
            return (hidden_size // head_dim,)
        if not self.heads_divide_hidden:
            return None
        return tuple(count for count in range(1, hidden_size + 1) if hidden_size % count == 0)

    def head_dim_of(self, layer: nn.Module) -> int:
        """Width of one head of a layer."""
        attention: Any = self.attention(layer)
        return int(attention.head_dim)


def _linear(block: nn.Module, name: str) -> nn.Linear:
    return cast("nn.Linear", block.get_submodule(name))
