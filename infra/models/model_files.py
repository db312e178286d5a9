"""The files of a model's folder: its config, which files are weights and what their headers say. No torch here."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from infra.errors import SourceInvalid
from infra.models.trusted_code import NOTE

#: the file of a small model's weights, and the list of a larger one's
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib")
# What is not carried over: other forms of the weights, anything pickled, any code.
_NOT_COPIED = (*_PICKLED, ".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", ".tflite", ".npz", ".npy", ".py", ".so")
#: floating types by their names in safetensors
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Names under which slimline itself writes into an artifact: a model must not bring its own.
_OURS = ("manifest.json", NOTE, INDEX)


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
    return all(entry["dtype"] in DTYPES for file in files for entry in tensor_header(file).values())


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
