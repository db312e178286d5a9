"""A smaller vocabulary: same logits, same texts, in every family and with every kind of BPE."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from pruning.checkpoints.save_load import load_checkpoint, load_plan, save_checkpoint
from pruning.checkpoints.surgery import shrink_
from pruning.errors import PruningError
from pruning.families import family_of, shapes
from pruning.methods import vocabulary
from pruning.vocabulary.cut import SmallerVocabulary
from pruning.vocabulary.spelling import spellings
from pruning.vocabulary.tokenizer import required_tokens
from tests.pruning.captured import logits
from tests.tiny import random_plan, sentencepiece_tokenizer, tiny_model, tiny_tokenizer

CORPUS = (
    "Below is an instruction that describes a task. Write a response that answers the question.",
    "What is the capital of France? The capital of France is Paris, and the 2 others are not.",
)
CONFIG: dict[str, Any] = {"sparsity": 0.1, "multiple": 8, "num_tokens": None}
CHAT = "{{ '<|im_start|>' }}{% for message in messages %}{{ message['content'] }}{% endfor %}"


def load(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with further tokens behind its vocabulary, as Llama 3 and Qwen have them."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "pad_token": "<|pad|>"})
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    tokenizer.chat_template = CHAT
    return tokenizer


def smaller(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: Any,
    *,
    texts: Sequence[str] = CORPUS,
    shard: str = "5GB",
    **options: Any,
) -> tuple[SmallerVocabulary, Path]:
    """Of a model with its tokenizer, in two folders below."""
    source, out = folder / "source", folder / "out"
    save_checkpoint(model, tokenizer, source, max_shard_size=shard)
    return again(source, out, texts, **options), out


def again(source: Path, out: Path, texts: Sequence[str] = CORPUS, **options: Any) -> SmallerVocabulary:
    load(source).save_pretrained(out)

    def corpus() -> Iterator[str]:
        return iter(texts)

    return vocabulary.rebuild(source, out, load, corpus, vocabulary.Config(**(CONFIG | options)))


def rows_of(before: Any, after: Any) -> torch.Tensor:
    """By new id the old one."""
    old, new = before.get_vocab(), after.get_vocab()
    assert sorted(new.values()) == list(range(len(new)))
    return torch.tensor([old[token] for token in sorted(new, key=new.__getitem__)])


@pytest.mark.parametrize(
    "family, config",
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {}),
        ("phi", {}),  # its head has a bias
        ("opt", {"tie_word_embeddings": True}),
        ("mixtral", {}),
    ],
)
def test_logits_are_those_of_the_rows_that_stay(family: str, config: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model(family, layers=1, **config)
    report, out = smaller(tmp_path, model, tiny_tokenizer())
    found = load_checkpoint(out)
    assert report.kept_rows == found.config.vocab_size == 288
    assert report.achieved_sparsity == pytest.approx(0.1)
    family_ = family_of(found)
    assert family_.embeddings(found).weight.shape[0] == family_.head(found).weight.shape[0] == 288
    assert found.config.tie_word_embeddings == bool(config)
    rows_V = rows_of(tiny_tokenizer(), load(out))
    ids = torch.arange(0, 288, 13)[None]
    torch.testing.assert_close(logits(found, ids), logits(model, rows_V[ids])[..., rows_V], atol=1e-5, rtol=1e-5)
    assert SmallerVocabulary.model_validate_json(report.model_dump_json()) == report


def test_shards_uneven_layers_plan_and_ids_come_along(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer()
    end, pad = tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.pad_token_id
    model = tiny_model("llama", vocab_size=len(tokenizer), eos_token_id=[1, end], pad_token_id=pad)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=[1, end], pad_token_id=pad)
    plan = random_plan(shapes(model), family_of(model).head_dim(model))
    shrink_(model, plan)
    source = tmp_path / "source"
    save_checkpoint(model, tokenizer, source, plan, max_shard_size="40KB")
    files = sorted(path.name for path in source.glob("*.safetensors"))
    assert len(files) > 2
    again(source, tmp_path / "out")
    out, found = tmp_path / "out", load(tmp_path / "out")
    assert sorted(path.name for path in out.glob("*.safetensors")) == files
    assert load_plan(out) == plan
    assert (out / "modeling_slimline.py").is_file()
    small = load_checkpoint(out)
    ends = [1, found.convert_tokens_to_ids("<|im_end|>")]
    assert ends[1] < end
    for config in (small.config, small.generation_config):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, ends, found.pad_token_id)
    assert (found.bos_token, found.eos_token, found.pad_token) == ("<s>", "</s>", "<|pad|>")
    assert found.chat_template == CHAT
    asked = found.apply_chat_template([{"role": "user", "content": "Hi <think>"}], tokenize=False)
    assert found.convert_ids_to_tokens(found(asked).input_ids)[:2] == ["<s>", "<|im_start|>"]
    assert "<think>" in found.convert_ids_to_tokens(found(asked).input_ids)
    assert found("a", "b").input_ids == tokenizer("a", "b").input_ids  # templates, whose ids came first and stay


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, Any]]:
    """Of each kind the one before and the one after."""
    pairs = []
    for name, make in (("bytes", chat_tokenizer), ("sentencepiece", sentencepiece_tokenizer)):
        folder, tokenizer = tmp_path_factory.mktemp(name), make()
        _, out = smaller(folder, tiny_model("llama", layers=1, vocab_size=len(tokenizer)), tokenizer, multiple=1)
        pairs.append((load(folder / "source"), load(out)))
    return pairs


@settings(max_examples=60, deadline=None)
@given(
    text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.sampled_from([*CORPUS, "<s>▁ ", "<think>"])
)
def test_every_text_comes_back_as_before(text: str, tokenizers: list[tuple[Any, Any]]) -> None:
    for before, after in tokenizers:
        was, now = (each.decode(each(text, add_special_tokens=False).input_ids) for each in (before, after))
        assert now == was


def test_what_the_corpus_needs_is_split_as_before(tokenizers: list[tuple[Any, Any]]) -> None:
    for before, after in tokenizers:
        gone = before.get_vocab().keys() - after.get_vocab().keys()
        assert len(gone) == round(0.1 * len(before))
        words = " ".join(CORPUS).split()
        kept = [word for word in words if not gone & set(before.tokenize(word))]
        assert len(kept) > len(words) / 2
        assert all(before.tokenize(word) == after.tokenize(word) for word in kept)


def test_rows_of_a_padded_embedding_go_first_and_stay_last(tmp_path: Path) -> None:
    model = tiny_model("llama", layers=1, vocab_size=384)
    report, out = smaller(tmp_path, model, tiny_tokenizer(), sparsity=0.1, multiple=64)
    assert (report.num_rows, report.kept_rows, report.removed_tokens, report.added_tokens) == (384, 320, 0, 0)
    assert load(out).get_vocab() == tiny_tokenizer().get_vocab()
    few = tiny_model("llama", layers=1, vocab_size=400)
    report, out = smaller(tmp_path / "few", few, tiny_tokenizer(), sparsity=0.1, multiple=8)
    assert len(load(out)) == 320
    assert load_checkpoint(out).config.vocab_size == 360


def test_the_corpus_and_the_options_decide_which_tokens_stay(tmp_path: Path) -> None:
    model, texts = tiny_model("llama", layers=1), list(CORPUS)
    kept, other = {}, ["heads and channels that matter learn to do their work"] * 3
    for name, corpus, number in (("one", texts * 500, 40), ("other", other, None)):
        report, out = smaller(tmp_path / name, model, tiny_tokenizer(), texts=corpus, num_tokens=number)
        kept[name] = load(out).get_vocab().keys()
        assert number is None or number <= report.counted_tokens < 2 * number
    assert kept["one"] != kept["other"]
    with pytest.raises(PruningError, match=r"the text has \d+ tokens, fewer than num_tokens 9000: lower it"):
        smaller(tmp_path / "short", model, tiny_tokenizer(), texts=texts, num_tokens=9000)
    with pytest.raises(PruningError, match="no tokens to count"):
        smaller(tmp_path / "none", model, tiny_tokenizer(), texts=[""])


def content_of(tokenizer: Any, **changes: Any) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return content | {"model": content["model"] | changes}


def test_white_space_stays_whatever_the_corpus_says() -> None:
    """Counted in documents, nothing says what stands between them."""
    model = {"type": "BPE", "vocab": {"Ġ": 0, "Ċ": 1, "a": 2, "ĊĊ": 3, "ĠĊ": 4, "Ġa": 5}}
    model["merges"] = [["Ċ", "Ċ"], ["Ġ", "Ċ"], ["Ġ", "a"]]
    assert required_tokens({"model": model}, spellings(model)) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize(
    "content, sparsity, words",
    [
        ({"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}, 0.2, "the tokenizer is a Unigram, and .* BPE alone"),
        ({"model": {"type": "WordPiece", "vocab": {}}}, 0.2, "is a WordPiece"),
        (
            content_of(tiny_tokenizer(), end_of_word_suffix="</w>"),
            0.2,
            "marks pieces of words .end_of_word_suffix '</w>'",
        ),
        (content_of(tiny_tokenizer()), 0.5, "leave 160 of a vocabulary of 320, of which 258 must stay"),
    ],
)
def test_what_no_tokens_can_be_taken_from_is_known_before_work(content: Any, sparsity: float, words: str) -> None:
    with pytest.raises(PruningError, match=words):
        vocabulary.check_tokenizer(vocabulary.Config(sparsity=sparsity, multiple=8), content, None)


def test_what_only_the_files_tell_is_refused_in_a_sentence(tmp_path: Path) -> None:
    model = tiny_model("llama", layers=1)
    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -2.0)], unk_id=0))
    wrapped = PreTrainedTokenizerFast(tokenizer_object=unigram, unk_token="<unk>")
    with pytest.raises(PruningError, match="is a Unigram"):
        smaller(tmp_path / "unigram", model, wrapped)
    source = tmp_path / "lists"
    save_checkpoint(model, tiny_tokenizer(), source)
    generation = json.loads((source / "generation_config.json").read_text(encoding="utf-8"))
    generation["suppress_tokens"] = [300]
    (source / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    with pytest.raises(PruningError, match=r"suppress_tokens in the model's generation_config\.json names tokens"):
        again(source, tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out").mkdir()
    with pytest.raises(PruningError, match=r"has no tokenizer\.json"):
        vocabulary.rebuild(
            source, tmp_path / "out", lambda folder: tiny_tokenizer(), lambda: iter(CORPUS), vocabulary.Config(**CONFIG)
        )
