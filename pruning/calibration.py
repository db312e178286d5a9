"""Calibration tokens: SparseGPT-style random windows of a text corpus (arXiv 2301.00774, section 4).

Shapes: N samples, L tokens per sample.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pruning.errors import PruningError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: documents are drawn until this many times the asked tokens are there, so that a huge corpus is not tokenised whole
_OVERSAMPLING = 8
_DOCUMENTS_PER_CALL = 256


@dataclass(frozen=True)
class CalibrationSet:
    """Token windows and where they came from.

    input_ids_NL: (num_samples, seq_len) int64, what statistics are taken from. heldout_ids_ML: (num_heldout, seq_len)
    int64, windows that no statistic sees, to judge by. source: the protocol (data set, seed, join, ...), for reports.
    """

    input_ids_NL: Tensor
    heldout_ids_ML: Tensor
    source: Mapping[str, str | int]

    def save(self, folder: Path) -> None:
        """Write calibration.safetensors and source.json into an existing folder."""
        tensors = {"input_ids": self.input_ids_NL.contiguous(), "heldout_ids": self.heldout_ids_ML.contiguous()}
        save_file(tensors, folder / "calibration.safetensors")
        (folder / "source.json").write_text(json.dumps(dict(self.source), indent=2, sort_keys=True), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> CalibrationSet:
        """Read what `save` wrote."""
        tensors = load_file(folder / "calibration.safetensors")
        return cls(
            tensors["input_ids"],
            tensors["heldout_ids"],
            json.loads((folder / "source.json").read_text(encoding="utf-8")),
        )


def sample_windows(
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    *,
    num_samples: int,
    seq_len: int,
    seed: int,
    num_heldout: int = 0,
    join: str = "\n\n",
    source: Mapping[str, str | int] | None = None,
) -> CalibrationSet:
    """Draw `num_samples` windows of `seq_len` tokens at random places of the joined documents; no BOS.

    `num_heldout` further windows are cut from the end of the text, which the others then leave alone.
    A large corpus is thinned first: documents in seeded random order until there are 8 times the tokens asked for.
    Raises PruningError when the whole corpus has fewer than (num_samples + num_heldout) * seq_len tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    wanted = (num_samples + num_heldout) * seq_len
    ids_T = _tokens(tokenizer, documents, join, enough=_OVERSAMPLING * wanted, generator=generator)
    if len(ids_T) < wanted:
        named = f" of {source['dataset']}" if source and "dataset" in source else ""
        raise PruningError(
            f"the calibration text{named} has {len(ids_T)} tokens, fewer than the ({num_samples} + {num_heldout} held "
            f"out) x {seq_len} = {wanted} asked for; lower num_samples or seq_len, or name a larger data set"
        )
    ids_T, heldout_T = ids_T.tensor_split([len(ids_T) - num_heldout * seq_len])
    starts_N = torch.randint(0, len(ids_T) - seq_len + 1, (num_samples,), generator=generator)
    windows = [ids_T[start : start + seq_len] for start in starts_N.tolist()]
    protocol: dict[str, str | int] = {
        **(source or {}),
        "num_samples": num_samples,
        "num_heldout": num_heldout,
        "seq_len": seq_len,
        "seed": seed,
        "join": join,
        "bos": "none",
    }
    return CalibrationSet(torch.stack(windows), heldout_T.reshape(num_heldout, seq_len), protocol)


def _tokens(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], join: str, *, enough: int, generator: torch.Generator
) -> Tensor:
    order = torch.randperm(len(documents), generator=generator).tolist()
    ids: list[int] = []
    for start in range(0, len(order), _DOCUMENTS_PER_CALL):
        # each document carries its own separator, so pieces tokenise alike wherever a call starts
        texts = [documents[index] + join for index in order[start : start + _DOCUMENTS_PER_CALL]]
        for piece in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
            ids += piece
        if len(ids) >= enough:
            break
    return torch.tensor(ids, dtype=torch.int64)
