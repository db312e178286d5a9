"""GGUF files: read back tensor by tensor, and run by llama.cpp where its wheel is installed (xllamacpp)."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

from flows.commands.checkpoints.export import GgufType
from infra.errors import InfraError
from infra.exporting.gguf_file import Type
from infra.models.gguf_header import read_gguf_header
from pruning.checkpoints.llama_cpp import neighbouring
from pruning.checkpoints.save_load import load_checkpoint, save_checkpoint
from pruning.checkpoints.surgery import shrink_
from pruning.errors import PruningError
from pruning.families import shapes
from pruning.methods import vocabulary
from pruning.plan import PruningPlan
from tasks.exporting.gguf import export_gguf
from tests.tasks.exporting.kinds import TEMPLATE, write_checkpoint
from tests.tiny import VOCAB_SIZE, random_plan, rope_model, sentencepiece_tokenizer, tiny_model, tiny_tokenizer

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
}  # fmt: skip
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
FILE_TYPES = {
    **{"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16"},
    **{kind: f"MOSTLY_{kind.upper()}" for kind in ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0")},
}
PROMPTS = [[0, 34, 77, 120, 200, 55], [0, 5, 9, 300], [0, 17]]


def exported(
    tmp_path: Path, family: str, kind: str, stored: Type = "f32", **config: Any
) -> tuple[PreTrainedModel, Path]:
    tied = {"tie_word_embeddings": family == "gemma"}  # llama.cpp knows no other Gemma
    model = write_checkpoint(tmp_path / "checkpoint", family, kind, **tied, **config)
    export_gguf(tmp_path / "checkpoint", tmp_path / "model.gguf", {"slimline.run": "a"}, stored)
    return model, tmp_path / "model.gguf"


def gguf_name(name: str) -> str:
    module, _, leaf = name.rpartition(".")
    if module in OUTSIDE:
        return f"{OUTSIDE[module]}.{leaf}"
    _, _, index, inner = module.split(".", 3)
    return f"blk.{index}.{NAMES[inner]}.{leaf}"


@pytest.mark.parametrize(
    "family, kind, architecture",
    [
        ("llama", "uneven", "deci"),
        ("llama", "uniform", "llama"),
        ("qwen2", "uneven", "deci"),
        ("gemma", "depth", "gemma"),
    ],
)
def test_every_tensor_is_read_back(family: str, kind: str, architecture: str, tmp_path: Path) -> None:
    model, file = exported(tmp_path, family, kind)
    reader = gguf.GGUFReader(file)
    found = {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in reader.tensors}
    expected: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        expected[gguf_name(name)] = tensor + 1 if family == "gemma" and "norm" in name else tensor
    for index, shape in enumerate(shapes(model)):
        for letter, heads in (("q", shape.num_heads), ("k", shape.num_kv_heads)):
            for leaf in ("weight", "bias"):
                name = f"blk.{index}.attn_{letter}.{leaf}"
                if architecture in ("deci", "llama") and name in expected:
                    expected[name] = neighbouring(expected[name], heads)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, msg=name)
    header = read_gguf_header(file).values
    assert header["general.architecture"] == architecture
    assert header["slimline.run"] == "a"
    assert header["tokenizer.chat_template"] == TEMPLATE
    tokens = reader.get_field("tokenizer.ggml.tokens")
    assert tokens is not None
    assert tokens.contents()[:2] == ["<s>", "</s>"]
    assert len(tokens.contents()) == VOCAB_SIZE
    widths = reader.get_field(f"{architecture}.feed_forward_length")
    assert widths is not None
    per_layer = [shape.intermediate_size for shape in shapes(model)]
    assert widths.contents() == (per_layer if architecture == "deci" else per_layer[0])


#: bytes of a value, and the largest part of a block's largest value that one of its values is off
ROOM: dict[Type, tuple[float, float]] = {
    "f32": (4, 0), "f16": (2, 2**-10), "bf16": (2, 2**-7), "q8_0": (34 / 32, 1 / 127), "q5_1": (24 / 32, 1 / 15),
    "q5_0": (22 / 32, 1 / 8), "q4_1": (20 / 32, 1 / 7), "q4_0": (18 / 32, 1 / 4),
}  # fmt: skip


def test_types_take_the_room_that_they_promise(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "checkpoint", "llama", "dense", hidden=64, intermediate=96)
    weight = model.get_submodule("model.layers.1.mlp.up_proj").weight.detach().numpy()
    assert ROOM.keys() == set(get_args(Type)) == {each.value for each in GgufType}
    for stored, (size, error) in ROOM.items():
        file = tmp_path / f"{stored}.gguf"
        assert export_gguf(tmp_path / "checkpoint", file, {}, stored) == []
        tensors = {each.name: each for each in gguf.GGUFReader(file).tensors if len(each.shape) > 1}
        head = tensors.pop("output.weight")
        assert int(head.n_bytes) == max(size, 34 / 32) * int(head.n_elements)
        assert {int(each.n_bytes) / int(each.n_elements) for each in tensors.values()} == {size}
        near = gguf.dequantize(tensors["blk.1.ffn_up.weight"].data, tensors["blk.1.ffn_up.weight"].tensor_type)
        assert abs(near - weight).max() <= abs(weight).max() * error
        assert read_gguf_header(file).values["general.file_type"] == gguf.LlamaFileType[FILE_TYPES[stored]]


def test_where_embeddings_are_the_head_they_are_stored_like_it(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint", "llama", "dense", hidden=64, intermediate=96, tie_word_embeddings=True)
    assert export_gguf(tmp_path / "checkpoint", tmp_path / "model.gguf", {}, "q4_0") == []
    kinds = {each.name: each.tensor_type.name for each in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert kinds["token_embd.weight"] == "Q8_0"
    assert kinds["blk.0.attn_q.weight"] == "Q4_0"
    assert "output.weight" not in kinds


def test_rows_that_no_block_fits_stay_f16_and_are_told(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint", "llama", "uneven")
    (note,) = export_gguf(tmp_path / "checkpoint", tmp_path / "model.gguf", {}, "q8_0")
    assert "are f16, since their rows are no multiple of 32" in note
    assert "channel_multiple: 64" in note


@pytest.mark.parametrize(
    "family, kind, config, sentence",
    [
        ("qwen3", "uneven", {}, "its layers differ, and llama.cpp's qwen3 takes equal layers"),
        ("gemma", "uneven", {}, "prune with `uniform: true`, or export it as hf"),
        ("phi", "dense", {}, "GGUF files of the family phi are not written"),
        ("opt", "dense", {}, "GGUF files of the family opt are not written"),
        ("gemma", "dense", {"tie_word_embeddings": False}, "its head is not tied to the embeddings"),
        ("llama", "dense", {"hidden_act": "relu"}, "does not compute the activation relu"),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused(
    family: str, kind: str, config: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path / "checkpoint", family, kind, **config)
    with pytest.raises(PruningError) as refused:
        export_gguf(tmp_path / "checkpoint", tmp_path / "model.gguf", {}, "f16")
    assert sentence in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_values_that_float16_cannot_hold_are_refused(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "checkpoint", "llama", "dense")
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.up_proj").weight[3, 5] = 1e5
    model.save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(InfraError, match=r"layers\.1\.mlp\.up_proj\.weight has values .* take --type bf16"):
        export_gguf(tmp_path / "checkpoint", tmp_path / "model.gguf", {}, "f16")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def unreadable_ids() -> list[int]:
    """Tokens that are no text by themselves: llama.cpp tells no ids of pieces of letters."""
    texts = [tiny_tokenizer().decode([index]) for index in range(VOCAB_SIZE)]
    return [0, 1, *(index for index, text in enumerate(texts) if not (text.isascii() and text.isprintable()))]


def llama_cpp_server(file: Path, *, exact: bool = False) -> Any:
    """exact: with its cache in float32."""
    import xllamacpp as llama_cpp

    params = llama_cpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = str(file), 256, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.warmup = params.fit_params = False
    params.verbosity = 0
    params.flash_attn_type = llama_cpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if exact:
        params.cache_type_k = params.cache_type_v = llama_cpp.ggml_type.GGML_TYPE_F32
    return llama_cpp.Server(params)


def generated(file: Path, prompts: Sequence[Any], count: int, unreadable: Sequence[int]) -> list[list[int]]:
    """Ids of the greedy continuation of each prompt (ids or text) by llama.cpp. unreadable: tokens not to be taken."""
    server = llama_cpp_server(file, exact=True)
    asked = {"max_tokens": count, "temperature": 0.0, "top_k": 1, "ignore_eos": True, "logprobs": 1}
    asked["logit_bias"] = [[index, False] for index in unreadable]
    answers = [server.handle_completions(asked | {"prompt": prompt}) for prompt in prompts]
    return [[each["id"] for each in answer["choices"][0]["logprobs"]["content"]] for answer in answers]


def continued(
    model: PreTrainedModel, prompts: Sequence[list[int]], count: int, unreadable: Sequence[int]
) -> list[list[int]]:
    """The same by transformers."""
    options: dict[str, Any] = {"suppress_tokens": list(unreadable), "max_new_tokens": count, "do_sample": False}
    options["eos_token_id"] = None
    return [model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist() for ids in prompts]


def check_alike(model: PreTrainedModel, file: Path, prompts: Sequence[Any], count: int) -> None:
    ids = [tiny_tokenizer()(prompt).input_ids if isinstance(prompt, str) else prompt for prompt in prompts]
    unreadable = unreadable_ids()
    found = generated(file, prompts, count, unreadable)
    assert found == continued(model, ids, count, unreadable)
    assert [len(each) for each in found] == [count] * len(prompts)


needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="llama.cpp's wheel is not installed: pip install xllamacpp"
)


@needs_llama_cpp
@pytest.mark.parametrize(
    "family, kind",
    [
        *(("llama", kind) for kind in ("dense", "uneven", "halves", "uniform", "depth")),
        *(("mistral", "uneven"), ("qwen2", "uneven"), ("qwen2", "uniform"), ("qwen3", "uniform"), ("gemma", "uniform")),
    ],
)
def test_llama_cpp_goes_on_as_transformers_does(family: str, kind: str, tmp_path: Path) -> None:
    model, file = exported(tmp_path, family, kind)
    check_alike(model, file, PROMPTS, 12)


@needs_llama_cpp
def test_biases_of_output_linears_come_along(tmp_path: Path) -> None:
    """As FLAP adds them, also where no channel of an MLP is left."""
    model = tiny_model("llama", layers=4)
    plan = random_plan(shapes(model), 4, seed=3).model_copy(update={"output_bias": True})
    empty = plan.layers[1].model_copy(update={"kept_channels": ()})
    plan = plan.model_copy(update={"layers": (plan.layers[0], empty, *plan.layers[2:])})
    shrink_(model, plan)
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.bias", "down_proj.bias")):
            parameter.data.normal_(generator=torch.Generator().manual_seed(len(name)))
    save_checkpoint(model, tiny_tokenizer(), tmp_path / "checkpoint", plan)
    notes = export_gguf(tmp_path / "checkpoint", tmp_path / "model.gguf", {}, "f32")
    assert "1 layers without an FFN" in notes[0]
    check_alike(model, tmp_path / "model.gguf", PROMPTS, 8)


@needs_llama_cpp
@pytest.mark.parametrize("rope_type", ["linear", "llama3", "yarn"])
def test_positions_are_stretched_alike(rope_type: str, tmp_path: Path) -> None:
    model = rope_model("llama", rope_type)
    model.save_pretrained(tmp_path / "checkpoint")
    tiny_tokenizer().save_pretrained(tmp_path / "checkpoint")
    export_gguf(tmp_path / "checkpoint", tmp_path / "model.gguf", {}, "f32")
    prompts = [[0, *range(20, 33)]]
    check_alike(model, tmp_path / "model.gguf", prompts, 2)


@needs_llama_cpp
def test_llama_cpp_splits_texts_as_the_tokenizer_does(tmp_path: Path) -> None:
    model, file = exported(tmp_path, "llama", "uneven")
    texts = ["The quick brown fox, 345 times", "What is  é — 你好?\n\nIt's"]
    check_alike(model, file, texts, 6)


@needs_llama_cpp
def test_sentencepiece_splits_alike(tmp_path: Path) -> None:
    tokenizer = sentencepiece_tokenizer(TEXTS)
    model = tiny_model("llama", vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2)
    model.save_pretrained(tmp_path / "checkpoint")
    tokenizer.save_pretrained(tmp_path / "checkpoint")
    export_gguf(tmp_path / "checkpoint", tmp_path / "model.gguf", {}, "f32")
    texts = [*TEXTS, "What  is é — 你好?\nThe end"]
    unreadable = [i for i in range(len(tokenizer)) if not tokenizer.decode([i]).isprintable() or i < 3]
    unreadable += [index for token, index in tokenizer.get_vocab().items() if token.startswith("<0x")]
    ids = [tokenizer(text).input_ids for text in texts]
    found = generated(tmp_path / "model.gguf", texts, 4, unreadable)
    assert found == continued(model, ids, 4, unreadable)


@needs_llama_cpp
@pytest.mark.parametrize("make", [tiny_tokenizer, sentencepiece_tokenizer])
def test_a_smaller_vocabulary_splits_alike(make: Any, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    save_checkpoint(tiny_model("llama", vocab_size=len(make())), make(), source)
    make().save_pretrained(out)
    asked = vocabulary.Config(sparsity=0.1, multiple=1, num_tokens=None)
    vocabulary.rebuild(source, out, AutoTokenizer.from_pretrained, lambda: iter(TEXTS), asked)
    export_gguf(out, tmp_path / "model.gguf", {}, "f32")
    model, tokenizer = load_checkpoint(out), AutoTokenizer.from_pretrained(out)
    assert len(tokenizer) == round(0.9 * len(make()))
    written = [tokenizer.decode([index]) for index in range(len(tokenizer))]
    unreadable = [i for i, text in enumerate(written) if i < 3 or not (text.isascii() and text.isprintable())]
    unreadable += [index for token, index in tokenizer.get_vocab().items() if token.startswith("<0x")]
    ids = [tokenizer(text).input_ids for text in TEXTS]
    assert generated(tmp_path / "model.gguf", TEXTS, 4, unreadable) == continued(model, ids, 4, unreadable)


TEXTS = [
    "The capital of France is",
    "Once upon a time, there was a",
    "def fibonacci(n):\n",
    "Water boils at",
    "The three most important things in life are",
]


@needs_llama_cpp
@pytest.mark.slow
def test_a_real_model_with_uneven_layers_says_the_same(offline_root: Path, tmp_path: Path) -> None:
    """SmolLM2-135M in float16, greedy, 20 tokens of five prompts."""
    from infra.models.import_model import hand_on_tokenizer, import_model, load_tokenizer
    from infra.offline.default import OfflineDefault
    from infra.sources.find import Sources

    sources = Sources((), OfflineDefault(offline_root), False, home=tmp_path)
    dense, pruned = tmp_path / "dense", tmp_path / "pruned"
    dense.mkdir()
    import_model(sources.find("HuggingFaceTB/SmolLM2-135M-Instruct", "model"), dense, "float16")
    model = load_checkpoint(dense, dtype=torch.float32)
    full = PruningPlan.full(shapes(model), 64)
    cut = [
        kept.model_copy(update={"kept_channels": kept.kept_channels[40 * (kept.layer % 3) :]}) for kept in full.layers
    ]
    plan = PruningPlan(source=full.source, head_dim=64, layers=tuple(cut))
    shrink_(model, plan)
    save_checkpoint(model.half(), None, pruned, plan)
    hand_on_tokenizer(dense, pruned)
    export_gguf(pruned, tmp_path / "model.gguf", {}, "f16")
    tokenizer = load_tokenizer(pruned)
    server, model = llama_cpp_server(tmp_path / "model.gguf"), load_checkpoint(pruned, dtype=torch.float32)
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt").input_ids
        written = model.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :]
        answer = server.handle_completions({"prompt": text, "max_tokens": 20, "temperature": 0.0, "top_k": 1})
        assert answer["choices"][0]["text"] == tokenizer.decode(written, skip_special_tokens=True)
