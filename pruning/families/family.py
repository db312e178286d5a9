"""A model family: the names under which a decoder keeps its parts. A row of data, not a class hierarchy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Requirement:
    """What the config of a model must say for the family to be prunable. holds: of the config. reason: a clause that
    follows "cannot prune X: "; it names the field and the way out.
    """

    holds: Callable[[Any], bool]
    reason: str


@dataclass(frozen=True)
class ModelFamily:
    """Where a decoder-only model of this family keeps its parts.

    `model_types` and `architectures` are the spellings of config.model_type and of the model class: the stock one, then
    ours for uneven layers. Paths start at the model ("model.layers"), sub-module names at the layer or its attention or
    MLP; `..._field` are names in the config. Per-head norms (q_norm, k_norm of qwen3) have width head_dim, are shared
    by all heads and are never cut.

    mlp_name: "" where the layer itself holds the linears of the MLP; `activation_name` then names the activation there.
    gate_name: None for an MLP without a gate. rotary_path: None where positions are learned with the embeddings.
    kv_heads_field: None where every query head has a kv head of its own. stock_head_dim: the stock class takes the
    width of a head from the config; False where it divides hidden_size by the number of heads, so that it cannot
    describe pruned heads. heads_divide_hidden: the stock class takes only numbers of heads that divide hidden_size,
    although it takes the width of a head from the config. parallel_residual: attention and MLP both read the residual
    stream as it was before the layer, else the MLP reads it after the attention. llama_cpp: what llama.cpp calls the
    architecture if all layers are equal, None: no GGUF files of the family are written. computes_as_llama: a Llama's
    layer with other biases, so that llama.cpp's `deci` computes layers that differ.
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
    attention_norm_name: str = "input_layernorm"
    mlp_norm_name: str = "post_attention_layernorm"
    head_norm_names: tuple[str, ...] = ()
    heads_field: str = "num_attention_heads"
    kv_heads_field: str | None = "num_key_value_heads"
    intermediate_field: str = "intermediate_size"
    stock_head_dim: bool = True
    heads_divide_hidden: bool = False
    parallel_residual: bool = False
    llama_cpp: str | None = None
    computes_as_llama: bool = False
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

    def attention_norm(self, layer: nn.Module) -> nn.Module:
        """The norm before the attention."""
        return layer.get_submodule(self.attention_norm_name)

    def mlp_norm(self, layer: nn.Module) -> nn.Module:
        """The norm before the MLP; for a parallel residual the same as before the attention."""
        return layer.get_submodule(self.mlp_norm_name)

    def q_proj(self, layer: nn.Module) -> nn.Linear:
        """hidden -> num_heads * head_dim."""
        return _linear(self.attention(layer), self.q_name)

    def k_proj(self, layer: nn.Module) -> nn.Linear:
        """hidden -> num_kv_heads * head_dim."""
        return _linear(self.attention(layer), self.k_name)

    def v_proj(self, layer: nn.Module) -> nn.Linear:
        """hidden -> num_kv_heads * head_dim."""
        return _linear(self.attention(layer), self.v_name)

    def o_proj(self, layer: nn.Module) -> nn.Linear:
        """num_heads * head_dim -> hidden."""
        return _linear(self.attention(layer), self.o_name)

    def gate_proj(self, layer: nn.Module) -> nn.Linear | None:
        """hidden -> intermediate; None for an MLP without a gate."""
        return None if self.gate_name is None else _linear(self.mlp(layer), self.gate_name)

    def up_proj(self, layer: nn.Module) -> nn.Linear:
        """hidden -> intermediate."""
        return _linear(self.mlp(layer), self.up_name)

    def down_proj(self, layer: nn.Module) -> nn.Linear:
        """intermediate -> hidden."""
        return _linear(self.mlp(layer), self.down_name)

    def channel_linears(self, layer: nn.Module) -> tuple[nn.Linear, ...]:
        """The linears whose rows are the MLP channels: gate (if there is one) and up."""
        gate, up = self.gate_proj(layer), self.up_proj(layer)
        return (up,) if gate is None else (gate, up)

    def linears(self, layer: nn.Module) -> dict[str, nn.Linear]:
        """All linears of a layer, in the order q k v o (gate) up down, keyed so."""
        blocks = {role: self.attention(layer) for role in "qkvo"} | dict.fromkeys(
            ("gate", "up", "down"), self.mlp(layer)
        )
        return {role: _linear(blocks[role], name) for role, name in self.linear_names().items()}

    def linear_names(self) -> dict[str, str]:
        """The linears of a layer by their own names, in the order q k v o (gate) up down, keyed so."""
        names = {"q": self.q_name, "k": self.k_name, "v": self.v_name, "o": self.o_name}
        gate = {} if self.gate_name is None else {"gate": self.gate_name}
        return names | gate | {"up": self.up_name, "down": self.down_name}

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
