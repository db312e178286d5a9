"""A model family: the names under which a decoder keeps its parts. A row of data, not a class hierarchy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class ModelFamily:
    """Where a decoder-only model of this family keeps its parts.

    `model_types` and `architectures` are the spellings of config.model_type and of the model class: the stock one, then
    ours for uneven layers. Paths start at the model ("model.layers"), sub-module names at the layer or its attention or
    MLP. Per-head norms (q_norm, k_norm of qwen3) have width head_dim, are shared by all heads and are never cut.
    """

    name: str
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    layers_path: str = "model.layers"
    embeddings_path: str = "model.embed_tokens"
    final_norm_path: str = "model.norm"
    rotary_path: str = "model.rotary_emb"
    head_path: str = "lm_head"
    attention_name: str = "self_attn"
    mlp_name: str = "mlp"
    q_name: str = "q_proj"
    k_name: str = "k_proj"
    v_name: str = "v_proj"
    o_name: str = "o_proj"
    gate_name: str = "gate_proj"
    up_name: str = "up_proj"
    down_name: str = "down_proj"
    attention_norm_name: str = "input_layernorm"
    mlp_norm_name: str = "post_attention_layernorm"
    head_norm_names: tuple[str, ...] = ()

    def decoder(self, model: nn.Module) -> nn.Module:
        """The module that holds the layers ("model.model")."""
        return model.get_submodule(self.layers_path.rpartition(".")[0])

    def layers(self, model: nn.Module) -> nn.ModuleList:
        """All decoder layers."""
        return cast("nn.ModuleList", model.get_submodule(self.layers_path))

    def embeddings(self, model: nn.Module) -> nn.Embedding:
        """The input embeddings."""
        return cast("nn.Embedding", model.get_submodule(self.embeddings_path))

    def final_norm(self, model: nn.Module) -> nn.Module:
        """The norm before the head."""
        return model.get_submodule(self.final_norm_path)

    def rotary(self, model: nn.Module) -> nn.Module:
        """The module that computes the rotary cos and sin."""
        return model.get_submodule(self.rotary_path)

    def head(self, model: nn.Module) -> nn.Linear:
        """The linear from hidden states to logits."""
        return cast("nn.Linear", model.get_submodule(self.head_path))

    def attention(self, layer: nn.Module) -> nn.Module:
        """The attention block of a layer."""
        return layer.get_submodule(self.attention_name)

    def mlp(self, layer: nn.Module) -> nn.Module:
        """The MLP block of a layer."""
        return layer.get_submodule(self.mlp_name)

    def attention_norm(self, layer: nn.Module) -> nn.Module:
        """The norm before the attention."""
        return layer.get_submodule(self.attention_norm_name)

    def mlp_norm(self, layer: nn.Module) -> nn.Module:
        """The norm before the MLP."""
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

    def gate_proj(self, layer: nn.Module) -> nn.Linear:
        """hidden -> intermediate."""
        return _linear(self.mlp(layer), self.gate_name)

    def up_proj(self, layer: nn.Module) -> nn.Linear:
        """hidden -> intermediate."""
        return _linear(self.mlp(layer), self.up_name)

    def down_proj(self, layer: nn.Module) -> nn.Linear:
        """intermediate -> hidden."""
        return _linear(self.mlp(layer), self.down_name)

    def linear_names(self) -> tuple[str, ...]:
        """The seven linears of a layer by their own names, in the order q k v o gate up down."""
        return (
            self.q_name,
            self.k_name,
            self.v_name,
            self.o_name,
            self.gate_name,
            self.up_name,
            self.down_name,
        )

    def head_dim(self, model: nn.Module) -> int:
        """Width of one head, from the model's own modules."""
        attention: Any = self.attention(self.layers(model)[0])
        return int(attention.head_dim)


def _linear(block: nn.Module, name: str) -> nn.Linear:
    return cast("nn.Linear", block.get_submodule(name))
