"""A checkpoint as llama.cpp computes with it: which of its architectures, which layers, and every tensor in its order.

Equal layers are the family's own architecture there. Different ones are `deci` (Nvidia's Nemotron models), the one that
reads heads, kv heads and FFN width of each layer; it computes what a Llama does, with biases where there are some, so
that it serves the families that compute the same. Read in llama.cpp's sources: src/models/deci.cpp and llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from pruning.checkpoints.meta_model import meta_model
from pruning.checkpoints.stored_tensors import StoredTensors, stored_tensors
from pruning.errors import PruningError
from pruning.families import FAMILIES, ModelFamily
from pruning.modeling import config_shapes
from pruning.plan import LayerShape

DECI = "deci"
#: architectures that turn neighbouring values of a head by one angle; transformers turns values half a head apart
_NEIGHBOURS = ("llama", DECI)
_ACTIVATIONS = {"gemma": ("gelu_pytorch_tanh", "gelu")}
_NO_CHANNELS = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")

Turn = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Part:
    """One tensor under the name that it has in the model, its layer renumbered. read: the values.

    source: its name in the checkpoint, None of what is only there for llama.cpp. back: from its values to those of the
    checkpoint, the other way round from `read`.
    """

    name: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    source: str | None
    back: Turn


@dataclass(frozen=True)
class RopeScaling:
    """How positions are stretched: "linear" or "yarn" by `factor` from `original_context`."""

    kind: str
    factor: float
    original_context: int


@dataclass(frozen=True)
class LlamaCppModel:
    """architecture: llama.cpp's word. shapes: of its layers, which may be fewer than the checkpoint's: what has neither
    heads nor channels computes nothing. rope_factors: by what the frequencies of each pair are divided, None: by 1.
    notes: sentences about what is not as in the checkpoint."""

    architecture: str
    config: Any
    head_dim: int
    shapes: tuple[LayerShape, ...]
    rope_theta: float
    rope_scaling: RopeScaling | None
    rope_factors: tuple[float, ...] | None
    parts: tuple[Part, ...]
    dtype: torch.dtype
    notes: tuple[str, ...] = ()

    @property
    def per_layer(self) -> bool:
        """Whether the architecture takes widths layer by layer."""
        return self.architecture == DECI


def llama_cpp_model(folder: Path) -> LlamaCppModel:
    """What llama.cpp is to be given of the checkpoint in a folder; weights are read when they are asked for.

    Raises PruningError, with the way out, for a family or a detail that llama.cpp does not compute so.
    """
    stored = stored_tensors(folder)
    config, family = stored.config, stored.family
    all_shapes = config_shapes(config)
    kept = tuple(index for index, shape in enumerate(all_shapes) if shape.num_heads or shape.intermediate_size)
    shapes = tuple(all_shapes[index] for index in kept)
    architecture = _architecture(stored, shapes)
    _check_computed(config, family, architecture)
    head_dim = int(config.head_dim)
    theta, scaling, factors = _rope(stored, architecture, head_dim)
    parts, filled = _parts(stored, kept, architecture, head_dim)
    return LlamaCppModel(
        architecture, config, head_dim, filled, theta, scaling, factors, parts, stored.dtype,
        tuple(_notes(config, architecture, shapes, len(all_shapes))),
    )  # fmt: skip


def check_family(family: ModelFamily) -> str:
    """llama.cpp's architecture for equal layers. Raises PruningError for a family that has none here."""
    if family.llama_cpp is None:
        known = ", ".join(each.name for each in FAMILIES if each.llama_cpp)
        raise PruningError(
            f"GGUF files of the family {family.name} are not written, of {known} they are: take the Hugging Face folder"
        )
    return family.llama_cpp


def _architecture(stored: StoredTensors, shapes: tuple[LayerShape, ...]) -> str:
    family, config = stored.family, stored.config
    stock = check_family(family)
    even = len(set(shapes)) == 1 and shapes[0].num_heads and shapes[0].intermediate_size
    biased = bool(getattr(config, "output_bias", False))
    # its qwen2 takes the width of all heads for the hidden size
    whole = stock != "qwen2" or shapes[0].num_heads * config.head_dim == config.hidden_size
    if even and whole and not (biased and stock != "llama"):
        return stock
    if family.computes_as_llama:
        return DECI
    why = "its output linears have biases" if even else "its layers differ"
    known = ", ".join(each.name for each in FAMILIES if each.computes_as_llama)
    raise PruningError(
        f"{why}, and llama.cpp's {stock} takes equal layers without them (only {known} have an architecture there that "
        "does): prune with `uniform: true`, or export it as hf"
    )


def _check_computed(config: Any, family: ModelFamily, architecture: str) -> None:
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation not in _ACTIVATIONS.get(architecture, ("silu",)):
        raise PruningError(f"llama.cpp's {architecture} does not compute the activation {activation}: export it as hf")
    if architecture == "gemma" and not config.tie_word_embeddings:
        raise PruningError("its head is not tied to the embeddings, as llama.cpp's gemma has it: export it as hf")
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", False) and window:
        raise PruningError(
            f"its layers look back {window} tokens only (use_sliding_window), which llama.cpp's {architecture} does "
            "not compute: export it as hf"
        )


def _notes(config: Any, architecture: str, shapes: tuple[LayerShape, ...], all_layers: int) -> list[str]:
    notes = []
    if len(shapes) < all_layers:
        notes.append(f"{all_layers - len(shapes)} layers with neither heads nor channels are left out: they do nothing")
    if without := sum(shape.intermediate_size == 0 for shape in shapes):
        notes.append(
            f"{without} layers without an FFN get a single channel of zeros: llama.cpp would skip their attention too"
        )
    window = getattr(config, "sliding_window", None)
    if window and window < config.max_position_embeddings and not hasattr(config, "use_sliding_window"):
        notes.append(f"beyond {window} tokens llama.cpp's {architecture} attends to all of them, the model to the last")
    return notes


def _rope(
    stored: StoredTensors, architecture: str, head_dim: int
) -> tuple[float, RopeScaling | None, tuple[float, ...] | None]:
    config = stored.config
    rope = dict(config.rope_parameters)
    kind, theta = rope.get("rope_type", "default"), float(rope["rope_theta"])
    if kind == "default":
        return theta, None, None
    original = int(rope.get("original_max_position_embeddings") or config.max_position_embeddings)
    if kind == "linear":
        return theta, RopeScaling("linear", float(rope["factor"]), original), None
    if kind == "llama3" and architecture in _NEIGHBOURS:
        rotary = stored.family.rotary(meta_model(stored.model_class, config))
        assert rotary is not None, "families with rope_parameters have one"
        frequencies = cast("Tensor", rotary.inv_freq)
        plain = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        return theta, None, tuple((plain / frequencies.double()).tolist())
    plain_yarn = not any(rope.get(name) for name in ("attention_factor", "mscale", "mscale_all_dim"))
    if kind == "yarn" and plain_yarn:
        return theta, RopeScaling("yarn", float(rope["factor"]), original), None
    raise PruningError(
        f"positions of type {kind} are not written for llama.cpp's {architecture}: export it as hf, or import the "
        "model with rope_type default if you stay within the original context"
    )


def _parts(
    stored: StoredTensors, kept: tuple[int, ...], architecture: str, head_dim: int
) -> tuple[tuple[Part, ...], tuple[LayerShape, ...]]:
    """All tensors, and the layers' shapes with the channels that were added."""
    prefix, shapes = f"{stored.family.layers_path}.", config_shapes(stored.config)
    parts = [
        _part(stored, name, name, architecture, head_dim, LayerShape(num_heads=0, num_kv_heads=0, intermediate_size=0))
        for name in stored.places
        if not name.startswith(prefix)
    ]
    filled: list[LayerShape] = []
    for number, index in enumerate(kept):
        shape = shapes[index]
        for name in stored.places:
            inner = name.removeprefix(f"{prefix}{index}.")
            if inner == name or _skipped(inner, shape, stored, name):
                continue
            target = f"{prefix}{number}.{inner}"
            if not shape.intermediate_size and inner.endswith(_NO_CHANNELS):
                parts.append(_one_channel(stored, name, target))
            else:
                parts.append(_part(stored, name, target, architecture, head_dim, shape))
        filled.append(shape.model_copy(update={"intermediate_size": max(1, shape.intermediate_size)}))
    return tuple(parts), tuple(filled)


def _skipped(inner: str, shape: LayerShape, stored: StoredTensors, name: str) -> bool:
    """Whether a tensor belongs to an attention that is not there."""
    if shape.num_heads or not inner.startswith((f"{stored.family.attention_name}.", "input_layernorm")):
        return False
    if inner.endswith("o_proj.bias") and bool(stored.read([name])[name].any()):
        raise PruningError(
            f"{name} adds a bias where there is no attention, which llama.cpp does not compute: export it as hf"
        )
    return True


def _part(stored: StoredTensors, name: str, target: str, architecture: str, head_dim: int, shape: LayerShape) -> Part:
    place = stored.places[name]
    there, back = _both_ways(name, architecture, shape)
    return Part(target, tuple(place.shape), lambda: there(stored.read([name])[name]), name, back)


def _both_ways(name: str, architecture: str, shape: LayerShape) -> tuple[Turn, Turn]:
    """From the values in the checkpoint to llama.cpp's, and back."""
    heads = {".q_proj.": shape.num_heads, ".k_proj.": shape.num_kv_heads}
    for linear, count in heads.items():
        if architecture in _NEIGHBOURS and linear in name:
            return partial(neighbouring, heads=count), partial(half_apart, heads=count)
    if architecture == "gemma" and name.endswith("norm.weight"):
        return lambda values: values + 1, lambda values: values - 1  # transformers adds it when it computes
    return _as_it_is, _as_it_is


def _as_it_is(values: Tensor) -> Tensor:
    return values


def _one_channel(stored: StoredTensors, name: str, target: str) -> Part:
    rows, columns = stored.places[name].shape
    shape = (rows, 1) if columns == 0 else (1, columns)
    return Part(target, shape, partial(torch.zeros, shape, dtype=stored.dtype), None, _as_it_is)


def neighbouring(rows_Fx: Tensor, heads: int) -> Tensor:
    """Rows of q or k (weight or bias) such that what was half a head apart lies side by side, head by head."""
    width = rows_Fx.shape[0] // heads
    halves = rows_Fx.reshape(heads, 2, width // 2, *rows_Fx.shape[1:])
    return halves.transpose(1, 2).reshape(rows_Fx.shape).contiguous()


def half_apart(rows_Fx: Tensor, heads: int) -> Tensor:
    """What `neighbouring` was given."""
    width = rows_Fx.shape[0] // heads
    pairs = rows_Fx.reshape(heads, width // 2, 2, *rows_Fx.shape[1:])
    return pairs.transpose(1, 2).reshape(rows_Fx.shape).contiguous()
