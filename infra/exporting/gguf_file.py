"""A GGUF file (github.com/ggml-org/ggml, docs/gguf.md), written and read one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from infra.errors import SourceInvalid
from infra.exporting.gguf_vocabulary import Vocabulary

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: what matrices are stored as: all that gguf itself quantises to and llama.cpp computes with
Type = Literal["f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "f32"]
#: general.file_type, as llama.cpp counts them
_FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "bf16": 32}
#: values that share a scale, in all types that have one
_BLOCK = 32
#: types in which the head is stored as q8_0, as near to what llama.cpp's own tool keeps of it as any width allows
_COARSE: tuple[Type, ...] = ("q5_1", "q5_0", "q4_1", "q4_0")
_SUFFIXES = (".weight", ".bias")


@dataclass(frozen=True)
class Tensor:
    """name: as transformers calls it. read: the values, float32."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], NDArray[np.float32]]


@dataclass(frozen=True)
class GgufModel:
    """architecture: llama.cpp's word. head_counts, kv_head_counts, channels: of every block; a single number is written
    where all are the same, unless `per_block`. rope_factors: None unless frequencies are divided by them. keys: more of
    "<architecture>.", such as the scaling of positions."""

    architecture: str
    per_block: bool
    head_counts: Sequence[int]
    kv_head_counts: Sequence[int]
    channels: Sequence[int]
    head_dim: int
    hidden_size: int
    context: int
    norm_eps: float
    rope_theta: float
    rope_factors: Sequence[float] | None = None
    keys: Mapping[str, float | int | str] = field(default_factory=dict)


def write_gguf(
    file: Path,
    model: GgufModel,
    tensors: Sequence[Tensor],
    vocabulary: Vocabulary,
    metadata: Mapping[str, Any],
    kind: Type,
    progress: Callable[[int], None] = lambda size: None,
) -> list[str]:
    """Write the file; returns the names of the matrices that no block of the asked type fits, which are f16.

    Matrices are of the asked type, vectors float32. Quantised types share a scale between 32 values of a row: where a
    row is no multiple of that, f16 is taken. With less than 8 bits the head (the embeddings, where they are the head)
    is q8_0: every token's probability hangs on it.

    metadata: further keys with their values (text, numbers, lists of text). progress: told the bytes of every tensor
    that is written. Raises SourceInvalid for a tensor that llama.cpp has no name for, or values that float16 cannot
    hold.
    """
    import gguf

    writer = gguf.GGUFWriter(file, model.architecture)
    _add_model(writer, model, len(vocabulary.tokens))
    _add_vocabulary(writer, vocabulary)
    for key, value in {"general.file_type": _FILE_TYPES[kind], **metadata}.items():
        _add(writer, key, value)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    names = _names(model.architecture, len(model.channels), [tensor.name for tensor in tensors])
    head = "output.weight" if "output.weight" in names.values() else "token_embd.weight"
    others: list[str] = []
    kinds: list[Any] = []
    for tensor in tensors:
        wanted: Type = "q8_0" if kind in _COARSE and names[tensor.name] == head else kind
        chosen = _fitting(tensor, wanted)
        if len(tensor.shape) > 1 and chosen != wanted:
            others.append(tensor.name)
        quantised = gguf.GGMLQuantizationType[chosen.upper()]
        kinds.append(quantised)
        _announce(writer, names[tensor.name], tensor.shape, quantised)
    if model.rope_factors is not None:
        _announce(writer, "rope_freqs.weight", (len(model.rope_factors),), gguf.GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor, quantised in zip(tensors, kinds, strict=True):
        values = _encoded(tensor, quantised)
        writer.write_tensor_data(values)
        progress(values.nbytes)
    if model.rope_factors is not None:
        import numpy as np

        writer.write_tensor_data(np.asarray(model.rope_factors, dtype=np.float32))
    writer.close()
    return others


def read_gguf(file: Path, names: Iterable[str]) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Tensors of a file by the names that transformers has for them, dequantised one after another.

    Raises SourceInvalid for a name that the file has no tensor of.
    """
    import gguf

    reader, wanted = gguf.GGUFReader(file), list(names)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    architecture = str(_value(reader, "general.architecture"))
    found = _names(architecture, int(_value(reader, f"{architecture}.block_count")), wanted)
    for name in wanted:
        if found[name] not in stored:
            raise SourceInvalid(f"{file} has no tensor {found[name]}, which is {name}: write it again")
        tensor = stored[found[name]]
        yield name, gguf.dequantize(tensor.data, tensor.tensor_type)


def _value(reader: Any, key: str) -> Any:
    return reader.get_field(key).contents()


def _names(architecture: str, num_blocks: int, names: Iterable[str]) -> dict[str, str]:
    """llama.cpp's names by transformers'."""
    import gguf

    word = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    known, found = gguf.get_tensor_name_map(word, num_blocks), {}
    for name in names:
        found[name] = known.get_name(name, try_suffixes=_SUFFIXES)
        if found[name] is None:
            raise SourceInvalid(f"llama.cpp's {architecture} has no name for the tensor {name}")
    return found


def _fitting(tensor: Tensor, kind: Type) -> Type:
    if len(tensor.shape) == 1:
        return "f32"
    return "f16" if kind.startswith("q") and tensor.shape[-1] % _BLOCK else kind


def _announce(writer: Any, name: str, shape: tuple[int, ...], quantised: Any) -> None:
    import gguf
    import numpy as np

    size = 1
    for width in shape:
        size *= width
    block, block_bytes = gguf.GGML_QUANT_SIZES[quantised]
    stored = shape if block == 1 else gguf.quant_shape_to_byte_shape(shape, quantised)
    dtype = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16)}.get(quantised.name, np.dtype(np.uint8))
    if quantised.name == "BF16":
        stored = gguf.quant_shape_to_byte_shape(shape, quantised)
    writer.add_tensor_info(name, stored, dtype, size // block * block_bytes, raw_dtype=quantised)


def _encoded(tensor: Tensor, quantised: Any) -> Any:
    import gguf
    import numpy as np

    values = tensor.read()
    assert values.shape == tensor.shape, f"{tensor.name} is {values.shape}, not {tensor.shape}"
    if quantised.name == "F32":
        return values
    if quantised.name == "F16":
        with np.errstate(over="ignore"):
            halves = values.astype(np.float16)
        if not np.isfinite(halves).all():
            raise SourceInvalid(f"{tensor.name} has values that float16 cannot hold: take --type bf16")
        return halves
    return gguf.quantize(values, quantised)


def _add_model(writer: Any, model: GgufModel, vocab_size: int) -> None:
    def each(values: Sequence[int]) -> int | list[int]:
        return list(values) if model.per_block else values[0]

    writer.add_block_count(len(model.channels))
    writer.add_context_length(model.context)
    writer.add_embedding_length(model.hidden_size)
    writer.add_vocab_size(vocab_size)
    writer.add_feed_forward_length(each(model.channels))
    writer.add_head_count(each(model.head_counts))
    writer.add_head_count_kv(each(model.kv_head_counts))
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
    writer.add_layer_norm_rms_eps(model.norm_eps)
    writer.add_rope_dimension_count(model.head_dim)
    writer.add_rope_freq_base(model.rope_theta)
    for key, value in model.keys.items():
        _add(writer, f"{model.architecture}.{key}", value)


def _add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types(list(vocabulary.kinds))
    if vocabulary.merges:
        writer.add_token_merges(list(vocabulary.merges))
    if vocabulary.scores:
        writer.add_token_scores(list(vocabulary.scores))
    for word, index in vocabulary.special.items():
        getattr(writer, f"add_{word}_token_id")(index)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    if vocabulary.add_space_prefix is not None:
        writer.add_add_space_prefix(vocabulary.add_space_prefix)
    if vocabulary.chat_template:
        writer.add_chat_template(vocabulary.chat_template)


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value:
        writer.add_array(key, list(value))
