"""Vocabulary: tokens that a corpus can best do without go, with their rows of embeddings and head; layers stay.

Which tokens: those whose absence makes the corpus longest least, counted with the model's own tokenizer, one after the
other, none before those that are made of it. Special and added tokens, bytes, characters and runs of white space stay,
so that every text that came back from the tokenizer still does. What goes is written with the pieces it was merged of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from pruning.bounds import Count, Real, Seed
from pruning.training.data import PlainText, Texts, TrainingData

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pruning.families import LayerCost, ModelFamily
    from pruning.plan import LayerShape
    from pruning.vocabulary.cut import SmallerVocabulary

VERSION = 1


class Config(BaseModel):
    """The options of a smaller vocabulary; all of them enter the cache key."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sparsity: Real = Field(gt=0, lt=1)
    """Share of the rows of the vocabulary to remove; of a padded one the rows of no token go first."""
    data: Texts = PlainText(dataset="allenai/c4", config="en")
    """The corpus: a preset (c4, fineweb-edu, redpajama, slimpajama), or a mapping that names a data set."""
    num_tokens: Count | None = 10_000_000
    """How many of its tokens are counted, document by document in a seeded order; null: all of them."""
    seed: Seed = 0
    """Of that order."""
    multiple: Count = 64
    """The rows that stay are a multiple of it, the one that comes nearest to the sparsity."""


def needs_statistics(config: Config) -> bool:
    """Never."""
    return False


def order_config(config: Config) -> None:
    """There is no ranking that would serve several sparsities: counting is quick."""
    return


def reads(config: Config) -> tuple[TrainingData, ...]:
    """The corpus."""
    return (config.data,)


def check_model(config: Config, layers: Sequence[LayerShape], cost: LayerCost, family: ModelFamily) -> None:
    """Nothing: whatever its layers are, a model has a vocabulary."""


def check_tokenizer(config: Config, content: Mapping[str, Any], num_rows: int | None) -> None:
    """Raise PruningError for a tokenizer that is no BPE, or has not so many tokens that may go.

    content: its tokenizer.json. num_rows: of the model's embedding, None where that is not known.
    """
    from pruning.vocabulary.selection import rows_after
    from pruning.vocabulary.spelling import spellings
    from pruning.vocabulary.tokenizer import all_tokens, check_content, required_tokens

    check_content(content)
    required = required_tokens(content, spellings(content["model"]))
    rows_after(config.sparsity, num_rows or len(all_tokens(content)), config.multiple, len(required))


def rebuild(
    source: Path,
    out: Path,
    load_tokenizer: Callable[[Path], PreTrainedTokenizerBase],
    texts: Callable[[], Iterator[str]],
    config: Config,
    progress: Callable[[float, str], None] = lambda share, message: None,
) -> SmallerVocabulary:
    """Write the checkpoint in `source` with a smaller vocabulary into `out`, which has its tokenizer already.

    texts: the corpus in the order of the seed, asked for once. Raises PruningError as `check_tokenizer` does, for a
    slow tokenizer or too little text; UnsoundCheckpoint if what was written is not what was cut.
    """
    from pruning.vocabulary.cut import cut_vocabulary

    return cut_vocabulary(
        source, out, load_tokenizer, texts,
        sparsity=config.sparsity, multiple=config.multiple, num_tokens=config.num_tokens, progress=progress,
    )  # fmt: skip
