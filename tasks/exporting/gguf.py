"""A checkpoint of the store as one GGUF file, which llama.cpp and all programs on it load."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.exporting.publishing import file_aside

if TYPE_CHECKING:
    from infra.exporting.gguf_file import Type
    from infra.models.licence import Licence
    from pruning.checkpoints.llama_cpp import LlamaCppModel, Part


def export_gguf(
    checkpoint: Path,
    out: Path,
    metadata: Mapping[str, Any],
    kind: Type,
    progress: Callable[[int], None] = lambda size: None,
) -> list[str]:
    """Write the checkpoint in the folder `checkpoint` as the file `out`; returns what of it the user should know.

    metadata: keys of GGUF with their values. progress: told the bytes of each tensor that is written. The file is read
    back, headers and sizes, before it is there. Raises PruningError, InfraError.
    """
    from infra.exporting.gguf_file import Tensor, write_gguf
    from infra.exporting.gguf_vocabulary import read_vocabulary
    from infra.models.gguf_header import read_gguf_header
    from pruning.checkpoints.llama_cpp import llama_cpp_model

    model = llama_cpp_model(checkpoint)
    vocabulary = read_vocabulary(checkpoint, int(model.config.vocab_size))
    tensors = [Tensor(part.name, part.shape, partial(_float32, part)) for part in model.parts]
    with file_aside(out) as file:
        others = write_gguf(file, _described(model), tensors, vocabulary, metadata, kind, progress)
        header = read_gguf_header(file)
        assert header.values["general.architecture"] == model.architecture, f"{file} is not what was written"
    notes = list(model.notes)
    if others:
        notes.append(
            f"{len(others)} matrices are f16, since their rows are no multiple of 32 (the first is {others[0]}): "
            "`channel_multiple: 64` in the pruning step makes them so"
        )
    return notes


def gguf_metadata(base: str | None, licence: Licence | None, made: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of a GGUF file; what is not known is left out.

    base: id of the model that it was made from, on the hub. made: how, by the words after "slimline.".
    """
    method = str(made.get("method") or "")
    tags = [each for each in method.split("+") if each]
    values: dict[str, Any] = {
        "general.type": "model",
        "general.tags": [*(["pruned"] if tags else []), *tags, "slimline"],
    }
    values |= {f"slimline.{word}": value for word, value in made.items()}
    if licence is not None:
        values |= {
            "general.license": licence.identifier,
            "general.license.name": licence.name,
            "general.license.link": licence.link,
        }
    if base is not None:
        owner, _, name = base.partition("/")
        values |= {
            "general.base_model.count": 1,
            "general.base_model.0.name": name,
            "general.base_model.0.organization": owner,
            "general.base_model.0.repo_url": f"https://huggingface.co/{base}",
        }
    return {key: value for key, value in values.items() if value is not None}


def _described(model: LlamaCppModel) -> Any:
    from infra.exporting.gguf_file import GgufModel

    keys: dict[str, float | int | str] = {}
    if model.rope_scaling is not None:
        keys = {
            "rope.scaling.type": model.rope_scaling.kind,
            "rope.scaling.factor": model.rope_scaling.factor,
            "rope.scaling.original_context_length": model.rope_scaling.original_context,
        }
    config = model.config
    return GgufModel(
        architecture=model.architecture,
        per_block=model.per_layer,
        head_counts=[shape.num_heads for shape in model.shapes],
        kv_head_counts=[shape.num_kv_heads for shape in model.shapes],
        channels=[shape.intermediate_size for shape in model.shapes],
        head_dim=model.head_dim,
        hidden_size=int(config.hidden_size),
        context=int(config.max_position_embeddings),
        norm_eps=float(config.rms_norm_eps),
        rope_theta=model.rope_theta,
        rope_factors=model.rope_factors,
        keys=keys,
    )


def _float32(part: Part) -> Any:
    return part.read().float().numpy()
