"""Answers written by a model: what lm-eval's `generate_until` requests ask for.

Prompts are cut to fit (`evaluation.inference.prompts`), put into batches longest first and padded on the left. An
answer ends at the first stop string, at the end-of-sequence token or after `max_gen_toks` tokens; it is that of
lm-eval's own path with a batch of one row, to the rounding of the kernels, whatever the batch. Layers of unequal widths
need nothing special: each keeps its own cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from evaluation.inference.batches import batched, rows_per_batch, run_batches
from evaluation.inference.global_state import quiet_logger, torch_seed
from evaluation.inference.options import EvalOptions
from evaluation.inference.prompts import LENGTH_KEYS, PromptRule, fit_prompt, max_gen_toks

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SEED = 1234


@dataclass(frozen=True)
class Response:
    """text: the answer. prompt: what was asked after cutting. truncated: whether it was cut."""

    text: str
    prompt: str
    truncated: bool


@dataclass(frozen=True)
class Row:
    """One prompt to continue. options: for the model's `generate`. seed: of a sampled answer."""

    input_ids: tuple[int, ...]
    max_gen_toks: int
    stops: tuple[str, ...]
    options: Mapping[str, Any]
    seed: int

    @property
    def settings(self) -> str:
        """Equal for rows that may share a batch. A sampled answer has none beside it, for it would depend on them."""
        alone = self.seed if self.options["do_sample"] else None
        return repr((self.max_gen_toks, self.stops, sorted(self.options.items()), alone))


def generate_until(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[tuple[str, Mapping[str, Any]]],
    rule: PromptRule,
    options: EvalOptions = EvalOptions(),
) -> list[Response]:
    """The answers to pairs of prompt and generation settings (lm-eval's: `until`, `max_gen_toks`, `do_sample`,
    `temperature`, ... and whatever else the model's `generate` takes), in order.

    Sampled answers are drawn with a seed for each, so that they depend on neither batches nor processes; threads of a
    process write them one after the other. Not to be called in a critical section of `global_state`.
    Raises EvaluationError if an answer leaves no room for a prompt.
    """
    rows, prompts = [], []
    for number, (text, settings) in enumerate(requests):
        generation = _options(settings)
        length = max_gen_toks(settings)
        prompt = fit_prompt(tokenizer, text, rule, max_gen_toks=length)
        prompts.append(prompt)
        rows.append(Row(prompt.input_ids, length, _stops(settings, tokenizer), generation, _SEED + number))
    work, message = partial(continue_rows, tokenizer=tokenizer), f"{{}} of {len(rows)} answers written"
    written = run_batches(model, work, rows, _batches(model, rows, options), options, message=message)
    return [
        Response(_until(str(tokenizer.decode(ids, skip_special_tokens=True)), row.stops), prompt.text, prompt.truncated)
        for ids, row, prompt in zip(written, rows, prompts, strict=True)
    ]


def _pad_id(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """A token to pad with. It is masked, but embedded all the same, and lm-eval may have added one to the tokenizer."""
    rows = model.get_input_embeddings().weight.shape[0]
    tokens = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((int(token) for token in tokens if token is not None and token < rows), 0)


def continue_rows(
    model: PreTrainedModel, rows: Sequence[Row], *, tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    """Per row the new token ids up to its end: work for `batches.run_batches`. The rows have the same settings."""
    first = rows[0]
    longest = max(len(row.input_ids) for row in rows)
    pad = _pad_id(model, tokenizer)
    pads = [longest - len(row.input_ids) for row in rows]
    ids_BL = torch.tensor([[pad] * missing + [*row.input_ids] for row, missing in zip(rows, pads, strict=True)])
    mask_BL = torch.tensor([[0] * missing + [1] * (longest - missing) for missing in pads])
    ends = _Ends(tokenizer, first.stops, _eos_ids(model), longest, len(rows))
    # transformers remarks on what a model's own generation settings leave unused
    with _own_seed(model, first), quiet_logger("transformers.generation"):
        output_BN = model.generate(
            input_ids=ids_BL.to(model.device),
            attention_mask=mask_BL.to(model.device),
            max_new_tokens=first.max_gen_toks,
            stopping_criteria=StoppingCriteriaList([ends]),
            pad_token_id=pad,
            use_cache=True,
            **first.options,
        )
    written = output_BN[:, longest:].tolist()
    return [ids[:end] for ids, end in zip(written, ends.lengths, strict=True)]


class _Ends(StoppingCriteria):  # type: ignore[misc]
    """Notes for each row after how many new tokens it ended: by a stop string or by a token that ends a sequence.

    A stop string is looked for in the text of the last tokens, two more than it has itself, for it can be written with
    other tokens than a tokenizer would take.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str], eos_ids: Sequence[int], start: int, rows: int
    ) -> None:
        self._tokenizer, self._stops, self._eos_ids, self._start = tokenizer, stops, frozenset(eos_ids), start
        lengths = [len(tokenizer.encode(stop, add_special_tokens=False)) for stop in stops]
        self._window = max(lengths, default=0) + 2
        self.lengths: list[int | None] = [None] * rows

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        written_BN = input_ids[:, self._start :]
        count = written_BN.shape[1]
        for row, ids in enumerate(written_BN[:, -self._window :].tolist()):
            if self.lengths[row] is None and self._ended(ids):
                self.lengths[row] = count
        return torch.tensor([length is not None for length in self.lengths], device=input_ids.device)

    def _ended(self, ids: Sequence[int]) -> bool:
        if ids[-1] in self._eos_ids:
            return True
        text = self._tokenizer.decode(ids) if self._stops else ""
        return any(stop in text for stop in self._stops)


def _batches(model: PreTrainedModel, rows: Sequence[Row], options: EvalOptions) -> list[list[int]]:
    """Rows of the same settings in batches, the group of the longest rows first."""
    groups: dict[str, dict[int, int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(row.settings, {})[index] = len(row.input_ids) + row.max_gen_toks
    ordered = sorted(groups.values(), key=lambda lengths: -max(lengths.values()))
    return [batch for lengths in ordered for batch in batched(lengths, partial(rows_per_batch, model, options=options))]


def _options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What `generate` is given: without `do_sample` a temperature above 0 samples, and greedy decoding has none."""
    options = {key: value for key, value in settings.items() if key not in ("until", *LENGTH_KEYS)}
    temperature = float(options.pop("temperature", None) or 0.0)
    if options.get("do_sample") is None:
        options["do_sample"] = temperature > 0.0
    return options | {"temperature": temperature} if options["do_sample"] else options


def _stops(settings: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    until = settings.get("until") or []
    strings = [until] if isinstance(until, str) else [*until]
    eos = [] if tokenizer.eos_token_id is None else [str(tokenizer.decode([tokenizer.eos_token_id]))]
    return tuple(dict.fromkeys(stop for stop in (*strings, *eos) if stop))


def _until(text: str, stops: Sequence[str]) -> str:
    """The text before the stop strings; cut by one after the other, as lm-eval does: they may overlap."""
    for stop in stops:
        text = text.split(stop, 1)[0]
    return text


def _eos_ids(model: PreTrainedModel) -> tuple[int, ...]:
    eos = model.generation_config.eos_token_id if model.generation_config is not None else None
    return tuple(eos) if isinstance(eos, list | tuple) else () if eos is None else (int(eos),)


def _own_seed(model: PreTrainedModel, row: Row) -> AbstractContextManager[None]:
    """Draws by the row's seed inside, on every device of the model; the generators as before outside."""
    if not row.options["do_sample"]:
        return nullcontext()
    devices = dict.fromkeys(tensor.device for tensor in model.parameters())
    return torch_seed(row.seed, [device for device in devices if device.type == "cuda"])
