"""The files of a checkpoint folder: which are the weights, what their headers say, and the card made from that.

No torch here.
"""

from __future__ import annotations

import json
import math
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
from infra.models.gguf_header import read_gguf_header
from infra.models.trusted_code import NOTE
from infra.models.vocabulary import added_beyond, writes

#: the file of a small model's weights, and the list of a larger one's
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib")
# What is not carried over: other forms of the weights, anything pickled, any code.
_NOT_COPIED = (*_PICKLED, ".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", ".tflite", ".npz", ".npy", ".py", ".so")
# Names under which slimline itself writes into an artifact: a model must not bring its own.
_OURS = ("manifest.json", NOTE, INDEX)
_CHUNK = 2**24
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# The three spellings of old and new config.json files.
_LAYER_KEYS = ("num_hidden_layers", "n_layer", "num_layers")
_HIDDEN_KEYS = ("hidden_size", "n_embd", "d_model")
_HEADS_KEYS = ("num_attention_heads", "n_head", "num_heads")
_FFN_KEYS = ("intermediate_size", "ffn_dim", "n_inner")


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
    has_chat_template: bool | None = None  # of its tokenizer; None where only the hub knows


def card_of_folder(folder: Path) -> ModelCard:
    """The card of a folder with safetensors or one GGUF file, or of a .gguf file.

    Raises SourceInvalid if it is neither.
    """
    gguf = gguf_file(folder)
    if gguf is not None:
        return _card_of_gguf(gguf)
    files = weight_files(folder)
    headers = [tensor_header(file) for file in files]
    config = read_config(folder)
    tensors = {
        name: _Tensor(file, **entry)
        for file, header in zip(files, headers, strict=True)
        for name, entry in header.items()
    }
    sizes: Counter[str] = Counter()
    for tensor in _parameters(tensors, tied=bool(config.get("tie_word_embeddings"))):
        sizes[tensor.dtype] += math.prod(tensor.shape)
    floating = [name for name, _ in sizes.most_common() if name in _DTYPES]
    card = card_of_config(
        config, str(folder), num_parameters=sizes.total(), size=sum(file.stat().st_size for file in files),
        dtype=_DTYPES[floating[0]] if floating else None,
    )  # fmt: skip
    return card.model_copy(update={"has_chat_template": _has_chat_template(folder)})


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


def _parameters(tensors: Mapping[str, _Tensor], *, tied: bool) -> list[_Tensor]:
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
    return list(counted.values())


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
    """The card from a config.json and what is known of the weights; a Baichuan's is that of the Llama it becomes.

    Raises SourceInvalid if it describes no decoder.
    """
    config = llama_config(config, where) if is_baichuan(config) else config
    layers = next((config[key] for key in _LAYER_KEYS if key in config), None)
    hidden = next((config[key] for key in _HIDDEN_KEYS if key in config), None)
    if "model_type" not in config or not isinstance(layers, int) or not isinstance(hidden, int):
        raise SourceInvalid(
            f"config.json of {where} names no model_type, num_hidden_layers and hidden_size; slimline needs a "
            "decoder-only language model"
        )
    try:
        return ModelCard(
            model_type=config["model_type"], num_layers=layers, hidden_size=hidden,
            num_parameters=num_parameters, bytes=size, dtype=dtype,
            max_position_embeddings=config.get("max_position_embeddings"),
            intermediate_size=next((config[key] for key in _FFN_KEYS if config.get(key)), None),
            attention_size=_attention_size(config, hidden),
        )  # fmt: skip
    except ValidationError as error:
        problem = error.errors()[0]
        raise SourceInvalid(
            f"config.json of {where} has {problem['loc'][0]} = {problem['input']!r}: {problem['msg'].lower()}; fetch "
            "it again"
        ) from error


def _attention_size(config: Mapping[str, Any], hidden: int) -> int | None:
    heads = next((config[key] for key in _HEADS_KEYS if key in config), None)
    if not isinstance(heads, int) or heads < 1:
        return None
    head_dim = config.get("head_dim") or hidden // heads
    return heads * head_dim if isinstance(head_dim, int) else None


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as it stands. Raises SourceInvalid if it is missing or `parsed_config` refuses it."""
    try:
        content = (folder / "config.json").read_bytes()
    except FileNotFoundError:
        raise SourceInvalid(
            f"{folder} holds no config.json; a model folder needs config, tokenizer and safetensors, or one GGUF file"
        ) from None
    return parsed_config(content, f"{folder}/config.json")


def parsed_config(content: bytes, where: str) -> dict[str, Any]:
    """The values of a config.json. Raises SourceInvalid if it is no JSON object, or names its classes wrongly."""
    try:
        config = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise SourceInvalid(f"{where} is not JSON ({error}); fetch it again") from error
    if not isinstance(config, dict):
        raise SourceInvalid(f"{where} is not a JSON object; fetch it again")
    named = config.get("architectures") or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise SourceInvalid(f"{where} has architectures = {named!r}, and not a list of names; fetch it again")
    return config


def gguf_file(folder: Path) -> Path | None:
    """The GGUF file meant by `folder` (it may be one itself), or None if there are safetensors or none at all."""
    if folder.is_file():
        if folder.suffix != ".gguf":
            raise SourceInvalid(
                f"{folder} is no model: give a folder with config.json and safetensors, or a .gguf file"
            )
        return folder
    files = sorted(folder.glob("*.gguf"))
    if not files or any(folder.glob("*.safetensors")):
        return None
    if len(files) > 1:
        raise SourceInvalid(
            f"{folder} has {len(files)} GGUF files ({', '.join(file.name for file in files)}); give the path of one "
            "of them"
        )
    return files[0]


def is_left_behind(file: Path) -> bool:
    """Whether a file of a model's folder does not come along when the model is imported."""
    return file.suffix in _NOT_COPIED or file.name in _OURS


def is_plain(files: Sequence[Path]) -> bool:
    """Whether all tensors in these files are floating point of a width that is computed in: not quantised, whatever a
    config that was left over says."""
    return all(entry["dtype"] in _DTYPES for file in files for entry in tensor_header(file).values())


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a folder, in order.

    Raises SourceInvalid naming a missing shard, or why there are none.
    """
    if (folder / WEIGHTS).is_file():  # which transformers takes first, whatever else lies there
        return (folder / WEIGHTS,)
    index = folder / INDEX
    if index.is_file():
        files = [folder / name for name in _shard_names(index)]
        for file in files:
            if not file.is_file():
                raise SourceInvalid(f"{folder} lacks {file.name}, a shard that its index names; fetch the model again")
        return tuple(files)
    # consolidated.safetensors is Mistral's own second copy; adapter_model.safetensors is a LoRA, no model.
    files = [
        file for file in sorted(folder.glob("*.safetensors")) if not file.name.startswith(("adapter_", "consolidated"))
    ]
    if files:
        return tuple(files)
    raise SourceInvalid(_why_no_weights(folder))


def _shard_names(index: Path) -> list[str]:
    """Names of the shards in an index; SourceInvalid unless they are safetensors files beside it."""
    try:
        names = sorted({str(name) for name in json.loads(index.read_bytes())["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceInvalid(f"{index} is no index of shards ({error!r}); fetch it again") from error
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise SourceInvalid(f"{index} names {name!r}, which is no safetensors file beside it; fetch it again")
    return names


def tensor_header(file: Path) -> dict[str, dict[str, Any]]:
    """Name -> dtype and shape from the head of a safetensors file.

    Raises SourceInvalid if it is cut off or no such file.
    """
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            size = file.stat().st_size
            header: dict[str, dict[str, Any]] = json.loads(stream.read(length if length < size else 0))
        header.pop("__metadata__", None)
        if max((entry["data_offsets"][1] for entry in header.values()), default=0) + 8 + length != size:
            raise ValueError("its size is not what its header says")
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise SourceInvalid(f"{file} is no whole safetensors file ({error}); fetch it again") from error
    return header


def _card_of_gguf(file: Path) -> ModelCard:
    header = read_gguf_header(file)
    architecture = header.values.get("general.architecture")
    heads, head_dim, ffn = (
        header.values.get(f"{architecture}.{name}")
        for name in ("attention.head_count", "attention.key_length", "feed_forward_length")
    )
    try:
        hidden = header.number("embedding_length")
        return ModelCard(
            model_type=str(header.values["general.architecture"]), num_layers=header.number("block_count"),
            hidden_size=hidden, num_parameters=header.num_parameters,
            bytes=file.stat().st_size, dtype=None, max_position_embeddings=header.number("context_length"),
            has_chat_template="tokenizer.chat_template" in header.values,
            intermediate_size=ffn if isinstance(ffn, int) else None,
            attention_size=_attention_size({"num_heads": heads, "head_dim": head_dim}, hidden),
        )  # fmt: skip
    except KeyError as error:
        raise SourceInvalid(
            f"{file} does not say {error} in its header; slimline needs a decoder-only language model"
        ) from error


def _why_no_weights(folder: Path) -> str:
    names = sorted(file.name for file in folder.iterdir())
    pickled = [
        name for name in names if name.endswith(_PICKLED) and not name.startswith(("optimizer", "training_args"))
    ]
    if pickled:
        return (
            f"{folder} has only pickled weights ({pickled[0]}), which can run any code when they are loaded; "
            "convert them to safetensors where you trust them, or take another copy of the model"
        )
    if "adapter_model.safetensors" in names:
        return f"{folder} is a LoRA adapter and not a model; merge it into its base model first"
    return f"{folder} holds no weights (.safetensors or .gguf); a model folder needs config, tokenizer and weights"
