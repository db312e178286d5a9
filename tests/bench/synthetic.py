"""Random Llamas of any size: in memory, or as a checkpoint that is written without ever being in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from tests.bench.options import Shape
from tests.bench.timing import Progress
from tests.tiny import tiny_tokenizer

_LAYERS_PER_SHARD = 4
_BYTES = 4  # float32
_STD = 0.05


def config_of(shape: Shape) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=2048,
        initializer_range=_STD,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        dtype="float32",
        architectures=["LlamaForCausalLM"],
    )


def random_llama(shape: Shape, *, seed: int = 0) -> LlamaForCausalLM:
    """A random model in memory, float32, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config_of(shape)).eval()


def layer_bytes(shape: Shape) -> int:
    """Size of one layer in a checkpoint."""
    return _BYTES * sum(parameter.numel() for parameter in _empty_layer(shape).parameters())


def write_checkpoint(folder: Path, shape: Shape, progress: Progress, *, seed: int = 0) -> int:
    """Write a sharded float32 checkpoint with tokenizer, a shard at a time; returns the bytes of its tensors."""
    folder.mkdir(parents=True)
    config_of(shape).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    starts = range(0, shape.layers, _LAYERS_PER_SHARD)
    count, weight_map, total = len(starts) + 1, {}, 0
    for number, start in enumerate([*starts, None], 1):
        stop = None if start is None else min(start + _LAYERS_PER_SHARD, shape.layers)
        tensors = dict(_outside(shape, seed) if start is None else _layers(shape, range(start, stop or 0), seed))
        name = f"model-{number:05}-of-{count:05}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
        progress(number / count, f"file {number} of {count}")
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    return total


def _empty_layer(shape: Shape) -> nn.Module:
    with torch.device("meta"):
        return LlamaDecoderLayer(config_of(shape), 0)


def _layers(shape: Shape, indices: range, seed: int) -> Iterator[tuple[str, Tensor]]:
    names = {name: parameter.shape for name, parameter in _empty_layer(shape).named_parameters()}
    for index in indices:
        generator = torch.Generator().manual_seed(seed + 1 + index)
        for name, size in names.items():
            yield f"model.layers.{index}.{name}", _random(size, generator)


def _outside(shape: Shape, seed: int) -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    yield "model.embed_tokens.weight", _random(torch.Size((shape.vocab, shape.hidden)), generator)
    yield "model.norm.weight", _random(torch.Size((shape.hidden,)), generator)
    yield "lm_head.weight", _random(torch.Size((shape.vocab, shape.hidden)), generator)


def _random(size: torch.Size, generator: torch.Generator) -> Tensor:
    """Matrices around 0, norms around 1."""
    noise = _STD * torch.randn(size, generator=generator)
    return noise if len(size) > 1 else 1 + noise
