"""From one checkpoint folder to one with a smaller vocabulary: weights, ids in its configs, tokenizer.

In memory at any time: one weight file. Decoder layers are copied as they lie.

Shapes: V rows of the old vocabulary, K of them kept.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pruning.checkpoints.folder import WEIGHTS, with_own_modelling_file_
from pruning.checkpoints.headers import write_index
from pruning.checkpoints.load_check import check_rows
from pruning.checkpoints.save_load import PLAN_FILE
from pruning.checkpoints.stored_tensors import StoredTensors, stored_tensors
from pruning.errors import PruningError
from pruning.vocabulary import tokenizer as files
from pruning.vocabulary.counts import count_tokens
from pruning.vocabulary.selection import rows_after, select_rows
from pruning.vocabulary.spelling import spellings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GENERATION = "generation_config.json"
#: fields of a generation config with ids of tokens that need not stay
_TOKEN_LISTS = (
    *("bad_words_ids", "begin_suppress_tokens", "force_words_ids", "forced_decoder_ids", "sequence_bias"),
    "suppress_tokens",
)
#: texts of the corpus that are written with both tokenizers and read again
_CHECKED_TEXTS = 64


class SmallerVocabulary(BaseModel):
    """What a smaller vocabulary came to.

    achieved_sparsity: share of the rows that went. num_rows, kept_rows: of embeddings and head, before and after.
    counted_tokens: of the corpus. removed_tokens: how many of these were tokens that have gone. added_tokens: by how
    many the corpus gets longer, at most. layers: none of them lost anything.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    achieved_sparsity: float
    num_rows: int
    kept_rows: int
    counted_tokens: int
    removed_tokens: int
    added_tokens: int
    layers: tuple[()] = ()


def cut_vocabulary(
    source: Path,
    out: Path,
    load_tokenizer: Callable[[Path], PreTrainedTokenizerBase],
    texts: Callable[[], Iterator[str]],
    *,
    sparsity: float,
    multiple: int,
    num_tokens: int | None,
    progress: Callable[[float, str], None] = lambda share, message: None,
) -> SmallerVocabulary:
    """Write the checkpoint in `source` with a smaller vocabulary into `out`, which has its tokenizer already.

    texts: the corpus, read once. What was written is loaded: it must give the logits of the rows that it kept, and of
    the first texts (and some in other scripts) its tokenizer must give back what the old one does. Raises PruningError
    for a tokenizer from which no tokens can be taken, a sparsity that cannot be reached, or too little text;
    UnsoundCheckpoint if what was written is not what was cut.
    """
    stored, before = stored_tensors(source), load_tokenizer(out)
    content = _content(out)
    num_rows = stored.places[f"{stored.family.embeddings_path}.weight"].shape[0]
    generation = _generation(source)
    spelled = spellings(content["model"])
    named = files.named_ids(stored.config.to_dict()) | files.named_ids(generation)
    required = files.required_tokens(content, spelled, (row for row in named if row < num_rows))
    after = rows_after(sparsity, num_rows, multiple, len(required))
    corpus = texts()
    first = list(islice(corpus, _CHECKED_TEXTS))
    counts_V = count_tokens(
        before, chain(first, corpus), num_rows, num_tokens, lambda share, said: progress(0.8 * share, said)
    )
    tokens = frozenset(files.all_tokens(content).values())
    chosen = select_rows(counts_V.tolist(), spelled, required, tokens, after)
    new_ids = {old: new for new, old in enumerate(chosen.kept)}
    progress(0.8, f"{after} of {num_rows} tokens stay")
    _write_weights(stored, out, chosen.kept)
    _write_configs(stored, generation, out, new_ids)
    files.cut_tokenizer_(out, new_ids)
    files.check_tokenizer(before, load_tokenizer(out), new_ids, [*files.PROBES, *first])
    progress(0.9, "loading what was written")
    check_rows(out, source, chosen.kept)
    counted = int(counts_V.sum())
    return SmallerVocabulary(
        achieved_sparsity=1 - after / num_rows,
        num_rows=num_rows,
        kept_rows=after,
        counted_tokens=counted,
        removed_tokens=counted - int(counts_V[list(chosen.kept)].sum()),
        added_tokens=chosen.added_tokens,
    )


def _content(folder: Path) -> dict[str, Any]:
    file = folder / files.FILE
    if not file.is_file():
        raise PruningError(
            f"{folder} has no {files.FILE}, from which tokens can be taken: save the tokenizer as a fast one beside "
            "the model that you import"
        )
    content: dict[str, Any] = json.loads(file.read_bytes())
    files.check_content(content)
    return content


def _generation(folder: Path) -> dict[str, Any]:
    """Its generation config; an empty one if there is none."""
    file = folder / _GENERATION
    values: dict[str, Any] = json.loads(file.read_bytes()) if file.is_file() else {}
    if lists := [name for name in _TOKEN_LISTS if values.get(name)]:
        raise PruningError(
            f"{lists[0]} in the model's {_GENERATION} names tokens, some of which a smaller vocabulary would not have: "
            "take it out of that file and import the model again"
        )
    return values


def _write_weights(stored: StoredTensors, out: Path, kept: Sequence[int]) -> None:
    """Each file under its own name; those with rows of the vocabulary are written, the others copied."""
    family, rows_K = stored.family, torch.tensor(kept)
    names = (f"{family.embeddings_path}.weight", f"{family.head_path}.weight", f"{family.head_path}.bias")
    places = [stored.places[name] for name in names if name in stored.places]
    for file in sorted(stored.files):
        cut = {place.name for place in places if place.file == file}
        if not cut:
            shutil.copyfile(file, out / file.name)
            continue
        try:
            with safe_open(file, framework="pt") as shard:
                tensors = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118 (safe_open is no mapping)
        except (SafetensorError, OSError) as error:
            raise PruningError(f"cannot load the weights in {file}: {error}") from error
        tensors |= {name: tensors[name].index_select(0, rows_K) for name in cut}
        save_file(tensors, out / file.name, metadata={"format": "pt"})
    written = sorted(file.name for file in stored.files)
    if written != [WEIGHTS]:
        write_index(out, written)


def _write_configs(stored: StoredTensors, generation: Mapping[str, Any], out: Path, new_ids: Mapping[int, int]) -> None:
    values = json.loads((stored.folder / "config.json").read_bytes())
    # also those that the class has by default and the file does not say
    ids = {key: value for key, value in stored.config.to_dict().items() if files.named_ids({key: value})}
    _write_json(out / "config.json", values | files.with_new_ids(ids, new_ids) | {"vocab_size": len(new_ids)})
    with_own_modelling_file_(out)
    if generation:
        _write_json(out / _GENERATION, files.with_new_ids(generation, new_ids))
    if (stored.folder / PLAN_FILE).is_file():
        shutil.copyfile(stored.folder / PLAN_FILE, out / PLAN_FILE)


def _write_json(file: Path, values: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
