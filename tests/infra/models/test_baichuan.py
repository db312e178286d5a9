"""A Baichuan-7B comes in as the Llama that it is: the same logits, computed here from the fused weights."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize, silu
from transformers import AutoModelForCausalLM, LlamaForCausalLM, LlamaTokenizer

from infra.errors import SourceInvalid
from infra.models.baichuan import llama_tensors
from infra.models.import_model import describe, import_model, load_tokenizer
from infra.sources.located import Located
from pruning.families import family_of

HIDDEN, HEADS, FFN, LAYERS = 32, 4, 48, 2
EPS = 1e-6
NORMALISING_VOCABULARY = 125696
TEXT = ["The quick brown fox jumps over the lazy dog. 你好，世界。今天天气很好！ if a == 12: return 345"] * 8


def spm(**options: Any) -> bytes:
    """A tiny sentencepiece BPE of Baichuan's kind: byte fallback, digits apart, spaces as they stand."""
    model = io.BytesIO()
    settings = {"add_dummy_prefix": True, "remove_extra_whitespaces": False, "normalization_rule_name": "identity"}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_writer=model, model_type="bpe", vocab_size=330, byte_fallback=True,
        split_digits=True, character_coverage=0.98, hard_vocab_limit=False, minloglevel=2, **settings | options,
    )  # fmt: skip
    return model.getvalue()


def weights(vocab_size: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return 0.3 * torch.randn(shape, generator=generator)

    tensors = {
        "model.embed_tokens.weight": noise(vocab_size, HIDDEN),
        "model.norm.weight": 1 + noise(HIDDEN),
        "lm_head.weight": noise(vocab_size, HIDDEN),
    }
    for layer in (f"model.layers.{index}." for index in range(LAYERS)):
        tensors |= {
            f"{layer}self_attn.W_pack.weight": noise(3 * HIDDEN, HIDDEN),
            f"{layer}self_attn.o_proj.weight": noise(HIDDEN, HIDDEN),
            f"{layer}self_attn.rotary_emb.inv_freq": torch.ones(HIDDEN // HEADS // 2),
            f"{layer}mlp.gate_proj.weight": noise(FFN, HIDDEN),
            f"{layer}mlp.up_proj.weight": noise(FFN, HIDDEN),
            f"{layer}mlp.down_proj.weight": noise(HIDDEN, FFN),
            f"{layer}input_layernorm.weight": 1 + noise(HIDDEN),
            f"{layer}post_attention_layernorm.weight": 1 + noise(HIDDEN),
        }
    return tensors


def baichuan(folder: Path, *, vocab_size: int = 400, shards: int = 1, **config: Any) -> Path:
    """A tiny Baichuan checkpoint as its repository keeps it, safetensors instead of pickles."""
    folder.mkdir()
    values = {
        "architectures": ["BaiChuanForCausalLM"], "auto_map": {"AutoModelForCausalLM": "modeling_baichuan.X"},
        "model_type": "baichuan", "vocab_size": vocab_size, "hidden_size": HIDDEN, "intermediate_size": FFN,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "hidden_act": "silu", "rms_norm_eps": EPS,
        "max_position_embeddings": 64, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
        "pad_token_id": 0, "torch_dtype": "float32", "tokenizer_class": "BaiChuanTokenizer", "z_loss_weight": 0,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(values | config))
    for name in ("modeling_baichuan.py", "tokenization_baichuan.py"):
        (folder / name).write_text("raise SystemExit('executed')")
    tokenizer = {
        "auto_map": {"AutoTokenizer": ["tokenization_baichuan.BaiChuanTokenizer", None]}, "add_bos_token": False,
        "add_eos_token": False, "tokenizer_class": "BaiChuanTokenizer", "model_max_length": 64, "sp_model_kwargs": {},
        "bos_token": {"__type": "AddedToken", "content": "<s>", "single_word": True},
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer.model").write_bytes(spm())
    tensors = weights(vocab_size)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    files = {name: f"model-0000{1 + n % shards}-of-0000{shards}.safetensors" for n, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, folder / file, {"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def at(folder: Path) -> Located:
    return Located(str(folder), "model", folder, None, "local path")


def imported(source: Path, **options: Any) -> Path:
    out = source.with_name("out")
    out.mkdir()
    import_model(at(source), out, options.get("dtype", "auto"))
    return out


def rms_norm(x_LC: torch.Tensor, weight_C: torch.Tensor) -> torch.Tensor:
    return x_LC * torch.rsqrt(x_LC.pow(2).mean(-1, keepdim=True) + EPS) * weight_C


def rotated(x_HLD: torch.Tensor) -> torch.Tensor:
    length, width = x_HLD.shape[1:]
    angles_LD = torch.outer(torch.arange(length), 10000 ** (-torch.arange(0, width, 2) / width)).repeat(1, 2)
    left, right = x_HLD.chunk(2, dim=-1)
    return x_HLD * angles_LD.cos() + torch.cat((-right, left), dim=-1) * angles_LD.sin()


def fused_logits(tensors: dict[str, torch.Tensor], ids_L: torch.Tensor, *, normalised: bool) -> torch.Tensor:
    """The forward of Baichuan-7B, written out with the fused weights."""
    stream_LC = tensors["model.embed_tokens.weight"][ids_L]
    length, width = len(ids_L), HIDDEN // HEADS
    hidden = torch.full((length, length), -math.inf).triu(1)
    for layer in (f"model.layers.{index}." for index in range(LAYERS)):
        normed = rms_norm(stream_LC, tensors[f"{layer}input_layernorm.weight"])
        packed = normed @ tensors[f"{layer}self_attn.W_pack.weight"].T
        q, k, v = packed.unflatten(-1, (3, HEADS, width)).permute(1, 2, 0, 3)
        attention = (rotated(q) @ rotated(k).mT / math.sqrt(width) + hidden).softmax(-1) @ v
        stream_LC = stream_LC + attention.transpose(0, 1).flatten(1) @ tensors[f"{layer}self_attn.o_proj.weight"].T
        normed = rms_norm(stream_LC, tensors[f"{layer}post_attention_layernorm.weight"])
        gate, up, down = (tensors[f"{layer}mlp.{name}_proj.weight"].T for name in ("gate", "up", "down"))
        stream_LC = stream_LC + (silu(normed @ gate) * (normed @ up)) @ down
    head = tensors["lm_head.weight"]
    return rms_norm(stream_LC, tensors["model.norm.weight"]) @ (normalize(head) if normalised else head).T


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("vocab_size", [400, NORMALISING_VOCABULARY])
@torch.no_grad()
def test_the_llama_computes_what_the_baichuan_does(tmp_path: Path, vocab_size: int, shards: int) -> None:
    source = baichuan(tmp_path / "baichuan", vocab_size=vocab_size, shards=shards)
    out = imported(source)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert type(model) is LlamaForCausalLM
    assert family_of(model).name == "llama"
    ids_L = torch.arange(3, 20)
    expected = fused_logits(weights(vocab_size), ids_L, normalised=vocab_size == NORMALISING_VOCABULARY)
    torch.testing.assert_close(model(ids_L[None]).logits[0], expected, atol=1e-5, rtol=1e-5)


def test_the_folder_is_a_plain_llama_without_foreign_code(tmp_path: Path) -> None:
    source = baichuan(tmp_path / "baichuan", shards=2, architectures=["BaichuanForCausalLM"])
    card = describe(at(source))
    out = imported(source)
    assert (card.model_type, card.num_layers, card.max_position_embeddings) == ("llama", LAYERS, 64)
    assert describe(at(out)).model_type == "llama"
    config = json.loads((out / "config.json").read_text())
    assert (config["architectures"], config["num_key_value_heads"]) == (["LlamaForCausalLM"], HEADS)
    assert not {"auto_map", "tokenizer_class", "z_loss_weight"} & set(config)
    assert not list(out.glob("*.py"))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    held = {name: file.name for file in out.glob("*.safetensors") for name in load_file(file)}
    assert index["weight_map"] == held
    assert not [name for name in held if "W_pack" in name or "inv_freq" in name]
    assert index["metadata"]["total_size"] == sum(
        4 * tensor.numel() for file in out.glob("*.safetensors") for tensor in load_file(file).values()
    )


def test_the_cast_comes_before_the_head_is_normalised(tmp_path: Path) -> None:
    out = imported(baichuan(tmp_path / "baichuan", vocab_size=NORMALISING_VOCABULARY), dtype="bfloat16")
    head = load_file(out / "model.safetensors")["lm_head.weight"]
    expected = normalize(weights(NORMALISING_VOCABULARY)["lm_head.weight"].bfloat16().float()).bfloat16()
    assert torch.equal(head, expected)


@pytest.mark.parametrize("prefix", [True, False])
def test_its_tokenizer_is_a_llama_tokenizer_that_gives_the_same_ids(tmp_path: Path, prefix: bool) -> None:
    source = baichuan(tmp_path / "baichuan")
    (source / "tokenizer.model").write_bytes(spm(add_dummy_prefix=prefix))
    out = imported(source)
    own = sentencepiece.SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    tokenizer = load_tokenizer(out)
    assert type(tokenizer) is LlamaTokenizer
    tokenizer.save_pretrained(tmp_path / "again")
    for text in ("The lazy fox", "dog 123\n  two spaces", "今天，é"):
        assert tokenizer(text).input_ids == own.encode(text)  # no BOS: its config says add_bos_token = false
        assert load_tokenizer(tmp_path / "again")(text).input_ids == own.encode(text)
        assert tokenizer.decode(own.encode(text)) == own.decode(own.encode(text))


@pytest.mark.parametrize("options", [{"remove_extra_whitespaces": True}, {"normalization_rule_name": "nfkc"}])
def test_a_tokenizer_that_splits_otherwise_is_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    source = baichuan(tmp_path / "baichuan")
    (source / "tokenizer.model").write_bytes(spm(**options))
    with pytest.raises(SourceInvalid, match=r"tokenizer.model does not split .* as a LlamaTokenizer does"):
        imported(source)


def test_what_is_no_baichuan_7b_is_refused(tmp_path: Path) -> None:
    source = baichuan(tmp_path / "baichuan", hidden_size=5120, num_hidden_layers=40)
    for attempt in (describe, lambda located: import_model(located, tmp_path / "out", "auto")):
        (tmp_path / "out").mkdir(exist_ok=True)
        with pytest.raises(SourceInvalid, match=r"is a Baichuan-13B .*ALiBi.* take Baichuan-7B or Baichuan2-7B"):
            attempt(at(source))
    with pytest.raises(SourceInvalid, match=r"W_pack.weight of shape \(5, 4\) is not the fused q, k, v"):
        llama_tensors("model.layers.0.self_attn.W_pack.weight", torch.ones(5, 4), 8)


def test_missing_tokenizer_and_pickled_weights(tmp_path: Path) -> None:
    source = baichuan(tmp_path / "baichuan")
    (source / "tokenizer.model").unlink()
    with pytest.raises(SourceInvalid, match=r"no tokenizer.model; fetch it from the Baichuan repository"):
        imported(source)
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(SourceInvalid, match=r"only pickled weights \(pytorch_model.bin\)"):
        describe(at(source))
