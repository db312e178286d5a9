"""Baichuan-7B as the Llama that it is: q, k and v unpacked, the head of Baichuan2 normalised, a stock tokenizer.

Baichuan is not in transformers; its repositories bring code of their own, which is never run. The 7B differs from a
Llama only in one fused linear for q, k and v (`W_pack`); Baichuan2-7B also normalises the rows of its head whenever it
computes logits. The 13B have no rotary positions (ALiBi) and fit no Llama.

No torch here until a tensor comes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.errors import SourceInvalid

if TYPE_CHECKING:
    import torch

_ARCHITECTURES = {"BaiChuanForCausalLM", "BaichuanForCausalLM"}
_PACKED = "self_attn.W_pack.weight"
# what a Llama config needs of a Baichuan's; everything else is of Baichuan's own code
_KEPT = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act",
    "rms_norm_eps", "initializer_range", "max_position_embeddings", "tie_word_embeddings", "use_cache",
    "bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype",
)  # fmt: skip
_HIDDEN_SIZE_13B = 5120
# Baichuan2's config does not say that its head is normalised; its larger vocabulary is what tells it from Baichuan-7B
_VOCAB_SIZE_2 = 125696
_PROBES = ("The capital of France is Paris.", "if a  ==  12:\n    return 345", "你好，世界。今天天气很好！", "Ａ１ é ﬁ")


def is_baichuan(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is a Baichuan's."""
    return config.get("model_type") == "baichuan" or bool(_ARCHITECTURES & set(config.get("architectures") or ()))


def llama_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The config.json of a Baichuan-7B as a Llama's. Raises SourceInvalid for a 13B."""
    if config.get("hidden_size") == _HIDDEN_SIZE_13B:
        raise SourceInvalid(
            f"{where} is a Baichuan-13B (hidden_size {_HIDDEN_SIZE_13B}): it has ALiBi instead of rotary positions and "
            "is no Llama, so slimline cannot prune it; take Baichuan-7B or Baichuan2-7B"
        )
    kept = {name: config[name] for name in _KEPT if name in config}
    if "model_max_length" in config:  # some versions name the length as a tokenizer does
        kept.setdefault("max_position_embeddings", config["model_max_length"])
    return kept | {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_key_value_heads": config.get("num_attention_heads"),
        "rope_theta": 10000.0,  # fixed in Baichuan's code
        "attention_bias": False,
        "mlp_bias": False,
    }


def llama_names(name: str) -> list[str]:
    """The tensors that one of Baichuan's becomes: three for W_pack, none for a rotary table, else itself."""
    if name.endswith(_PACKED):
        layer = name.removesuffix(_PACKED)
        return [f"{layer}self_attn.{part}_proj.weight" for part in "qkv"]
    return [] if name.endswith("rotary_emb.inv_freq") else [name]


def llama_tensors(name: str, tensor: torch.Tensor, vocab_size: int) -> dict[str, torch.Tensor]:
    """The tensors that one of Baichuan's becomes, each in storage of its own; W_pack holds the rows of q, k, v in turn.

    Raises SourceInvalid for a W_pack that is not (3 * hidden, hidden).
    """
    names = llama_names(name)
    if len(names) == 3:
        if tensor.dim() != 2 or tensor.shape[0] != 3 * tensor.shape[1]:
            raise SourceInvalid(f"{name} of shape {tuple(tensor.shape)} is not the fused q, k, v of a Baichuan-7B")
        return {part: rows.clone() for part, rows in zip(names, tensor.chunk(3), strict=True)}
    if name == "lm_head.weight" and vocab_size == _VOCAB_SIZE_2:
        from torch.nn.functional import normalize

        tensor = normalize(tensor.float()).to(tensor.dtype)
    return dict.fromkeys(names, tensor)


def make_llama_tokenizer_(folder: Path) -> None:
    """Let the tokenizer of an imported Baichuan load as the stock LlamaTokenizer, and drop Baichuan's own code.

    Raises SourceInvalid if there is no tokenizer.model.
    """
    model = folder / "tokenizer.model"
    if not model.is_file():
        raise SourceInvalid(f"{folder} has no tokenizer.model; fetch it from the Baichuan repository it came from")
    for code in folder.glob("*.py"):
        code.unlink()
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_bytes()) if path.is_file() else {"add_bos_token": False, "add_eos_token": False}
    config.pop("auto_map", None)
    first: str = _sentencepiece(model).encode("a", out_type=str)[0]
    # whether a space is put before a text, so that its first word is split like the others
    config |= {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": first.startswith("▁")}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check_llama_tokenizer(folder: Path, tokenizer: Any) -> None:
    """Raise SourceInvalid unless the stock tokenizer gives a few texts the ids that Baichuan's own gives them."""
    own = _sentencepiece(folder / "tokenizer.model")
    for text in _PROBES:
        if tokenizer(text, add_special_tokens=False).input_ids != own.encode(text):
            raise SourceInvalid(
                f"{folder}/tokenizer.model does not split {text!r} as a LlamaTokenizer does, so the model would read "
                "other tokens than it was trained on; take a copy of the model with a Llama's tokenizer"
            )


def _sentencepiece(model: Path) -> Any:
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=str(model))
