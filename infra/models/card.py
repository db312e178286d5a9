"""What a model is, from the headers of its files. No torch here."""

from __future__ import annotations

import json
import math
import re
import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from infra.errors import SourceInvalid
from infra.models.baichuan import is_baichuan, llama_config
from infra.models.gemma3 import is_multimodal_gemma3, text_config, text_names
from infra.models.gguf_header import read_gguf_header
from infra.models.model_files import DTYPES, gguf_file, read_config, tensor_header, weight_files
from infra.models.vocabulary import added_beyond, writes

_CHUNK = 2**24
_IN_LAYER = re.compile(r"\.layers\.\d+\.")
# the spellings of old and new config.json files
_LAYER_KEYS = ("num_hidden_layers", "n_layer", "num_layers")
_HIDDEN_KEYS = ("hidden_size", "n_embd", "d_model")
_HEADS_KEYS = ("num_attention_heads", "n_head", "num_heads")
_KV_HEADS_KEYS = ("num_key_value_heads", "n_head_kv")
_FFN_KEYS = ("intermediate_size", "ffn_dim", "n_inner")
_EXPERTS_KEYS = ("num_local_experts", "num_experts")
# architectures of GGUF that transformers calls otherwise
_GGUF_TYPES = {"gemma3": "gemma3_text"}


class ModelCard(BaseModel):
    """What a model is, from its headers.

    `num_parameters` counts tied embeddings once; `bytes` is the size of the weight files.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model_type: str
    num_layers: int
    hidden_size: int
    num_parameters: int | None
    bytes: int
    dtype: str | None  # the floating type most weights have; None for GGUF and where only the hub knows
    max_position_embeddings: int | None = None  # None where the config does not say
    intermediate_size: int | None = None  # of the FFN, the same
    attention_size: int | None = None  # inputs of o_proj: query heads x head_dim, which need not be hidden_size
    num_heads: int | None = None  # None where layers differ, too
    num_kv_heads: int | None = None
    num_experts: int = 0  # in the place of every FFN, each as wide as intermediate_size; 0 where some layers have none
    has_chat_template: bool | None = None  # of its tokenizer; None where only the hub knows
    vocab_size: int | None = None  # rows of its embeddings; None where the config does not say


def card_of_folder(folder: Path) -> ModelCard:
    """The card of a folder with safetensors or one GGUF file, or of a .gguf file.

    Raises SourceInvalid if it is neither.
    """
    gguf = gguf_file(folder)
    if gguf is not None:
        return _card_of_gguf(gguf)
    config, files = read_config(folder), weight_files(folder)
    sizes: Counter[str] = Counter()
    tensors = _tensors(files)
    if is_multimodal_gemma3(config):
        tensors = {text: tensor for name, tensor in tensors.items() for text in text_names(name)}
    for tensor in _parameters(tensors, tied=bool(config.get("tie_word_embeddings"))).values():
        sizes[tensor.dtype] += math.prod(tensor.shape)
    floating = [name for name, _ in sizes.most_common() if name in DTYPES]
    card = card_of_config(
        config, str(folder), num_parameters=sizes.total(), size=sum(file.stat().st_size for file in files),
        dtype=DTYPES[floating[0]] if floating else None,
    )  # fmt: skip
    return card.model_copy(update={"has_chat_template": _has_chat_template(folder)})


def parameters_of_folder(folder: Path) -> tuple[int, int]:
    """Parameters of a safetensors checkpoint, and those of them that are in decoder layers; tied embeddings count once.

    Raises SourceInvalid if it is none.
    """
    tied = bool(read_config(folder).get("tie_word_embeddings"))
    sizes = {
        name: math.prod(tensor.shape) for name, tensor in _parameters(_tensors(weight_files(folder)), tied=tied).items()
    }
    return sum(sizes.values()), sum(size for name, size in sizes.items() if _IN_LAYER.search(name))


@dataclass(frozen=True)
class _Tensor:
    """One entry of a safetensors file's head."""

    file: Path
    dtype: str
    shape: list[int]
    data_offsets: list[int]

    def chunks(self) -> Iterator[bytes]:
        """The bytes of the tensor, a part at a time."""
        start, stop = self.data_offsets
        with self.file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            stream.seek(8 + length + start)
            for at in range(start, stop, _CHUNK):
                yield stream.read(min(_CHUNK, stop - at))


def _tensors(files: Sequence[Path]) -> dict[str, _Tensor]:
    return {name: _Tensor(file, **entry) for file in files for name, entry in tensor_header(file).items()}


def _parameters(tensors: Mapping[str, _Tensor], *, tied: bool) -> dict[str, _Tensor]:
    """What counts of the tensors of a checkpoint: neither rotary tables nor a copy of tied embeddings.

    What the model is for sure only pruning/checkpoints/stored_tensors.py decides, which knows its class; an imported
    checkpoint has nothing left that does not count.
    """
    counted = {name: tensor for name, tensor in tensors.items() if "rotary_emb." not in name}
    head = counted.get("lm_head.weight")
    embeddings = next((tensor for name, tensor in counted.items() if name.endswith("embed_tokens.weight")), None)
    if tied and head and embeddings and head.shape == embeddings.shape and head.dtype == embeddings.dtype:
        pairs = zip(head.chunks(), embeddings.chunks(), strict=True)
        if all(one == other for one, other in pairs):
            del counted["lm_head.weight"]
    return counted


def _has_chat_template(folder: Path) -> bool:
    """A file of its own, or a key of the tokenizer's configuration: as transformers looks for it. One that writes
    tokens without an embedding is left out when the model is imported."""
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in sorted(folder.glob("chat_template.j*"))]
    with suppress(OSError, ValueError, AttributeError):
        texts.append(json.loads((folder / "tokenizer_config.json").read_bytes()).get("chat_template") or "")
    beyond = added_beyond(folder, read_config(folder).get("vocab_size")) if any(texts) else {}
    return any(texts) and not any(writes(text, beyond) for text in texts)


def card_of_config(
    config: Mapping[str, Any], where: str, *, num_parameters: int | None, size: int, dtype: str | None
) -> ModelCard:
    """The card from a config.json and what is known of the weights; a Baichuan's is that of the Llama it becomes,
    and a multimodal Gemma-3's that of its text model.

    Raises SourceInvalid if it describes no decoder.
    """
    config = llama_config(config, where) if is_baichuan(config) else config
    config = text_config(config) if is_multimodal_gemma3(config) else config
    layers = next((config[key] for key in _LAYER_KEYS if key in config), None)
    hidden = next((config[key] for key in _HIDDEN_KEYS if key in config), None)
    heads = next((config[key] for key in _HEADS_KEYS if key in config), None)
    if "model_type" not in config or not isinstance(layers, int) or not isinstance(hidden, int):
        raise SourceInvalid(
            f"config.json of {where} names no model_type, num_hidden_layers and hidden_size; slimline needs a "
            "decoder-only language model"
        )
    even = not config.get("per_layer_config")
    experts, ffn = _experts(config), next((config[key] for key in _FFN_KEYS if config.get(key)), None)
    if experts:
        ffn = config.get("moe_intermediate_size", ffn)
    try:
        return ModelCard(
            model_type=config["model_type"], num_layers=layers, hidden_size=hidden,
            num_parameters=num_parameters, bytes=size, dtype=dtype,
            max_position_embeddings=config.get("max_position_embeddings"),
            intermediate_size=ffn, num_experts=experts, vocab_size=config.get("vocab_size"),
            attention_size=_attention_size(heads, config.get("head_dim"), hidden),
            num_heads=heads if even and isinstance(heads, int) else None,
            num_kv_heads=next((config[key] for key in _KV_HEADS_KEYS if config.get(key)), heads) if even else None,
        )  # fmt: skip
    except ValidationError as error:
        problem = error.errors()[0]
        raise SourceInvalid(
            f"config.json of {where} has {problem['loc'][0]} = {problem['input']!r}: {problem['msg'].lower()}; fetch "
            "it again"
        ) from error


def _experts(config: Mapping[str, Any]) -> int:
    """Of every layer; 0 where there are none, or some layers have an FFN."""
    mixed = config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1
    return 0 if mixed else next((config[key] for key in _EXPERTS_KEYS if isinstance(config.get(key), int)), 0)


def _attention_size(heads: Any, head_dim: Any, hidden: int) -> int | None:
    size = heads * head_dim if isinstance(head_dim, int) and isinstance(heads, int) else hidden
    return size if isinstance(heads, int) else None


def _card_of_gguf(file: Path) -> ModelCard:
    header = read_gguf_header(file)
    try:
        hidden, architecture = header.number("embedding_length"), str(header.values["general.architecture"])
        return ModelCard(
            model_type=_GGUF_TYPES.get(architecture, architecture), num_layers=header.number("block_count"),
            hidden_size=hidden, num_parameters=header.num_parameters, bytes=file.stat().st_size, dtype=None,
            max_position_embeddings=header.number("context_length"),
            has_chat_template="tokenizer.chat_template" in header.values,
            intermediate_size=header.number_or_none("feed_forward_length"),
            num_heads=header.number_or_none("attention.head_count"),
            num_kv_heads=header.number_or_none("attention.head_count_kv"),
            attention_size=_attention_size(
                header.number_or_none("attention.head_count"), header.number_or_none("attention.key_length"), hidden
            ),
        )  # fmt: skip
    except KeyError as error:
        raise SourceInvalid(
            f"{file} does not say {error} in its header; slimline needs a decoder-only language model"
        ) from error
