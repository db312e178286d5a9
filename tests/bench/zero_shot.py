"""Part `zero_shot`: the seven tasks of the papers against bare forward passes over the same tokens, in one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from unittest import mock

import torch
from transformers import PreTrainedModel

from evaluation.inference import loglikelihood as scoring
from evaluation.inference.loglikelihood import Row, Score
from evaluation.suites import zero_shot
from tests.bench.materials import Materials
from tests.bench.options import Options
from tests.bench.report import Figures, Result, protocol
from tests.bench.timing import seconds


@dataclass
class Clock:
    """Runs each batch once plainly and once as the suite does it, turn and turn about, so that a slow spell of the
    machine strikes both. Stands in for the suite's own work on a batch."""

    device: str
    work: Callable[[PreTrainedModel, Sequence[Row]], list[tuple[Score, ...]]]
    forward: float = 0.0
    scored: float = 0.0
    batches: int = 0
    rows: int = 0
    tokens: int = 0
    padded: int = 0
    lost: float = field(default=0.0, repr=False)

    def __call__(self, model: PreTrainedModel, rows: Sequence[Row]) -> list[tuple[Score, ...]]:
        begun = time.perf_counter()
        forward_first = self.batches % 2 == 0
        if forward_first:
            self._forward(model, rows)
        found, spent = seconds(lambda: self.work(model, rows), self.device)
        if not forward_first:
            self._forward(model, rows)
        self.scored += spent
        self.batches += 1
        self.rows += len(rows)
        self.tokens += sum(len(row.input_ids) for row in rows)
        # what this object itself adds to the suite's time
        self.lost += time.perf_counter() - begun - spent
        return found

    def _forward(self, model: PreTrainedModel, rows: Sequence[Row]) -> None:
        """A plain call over the same padded tokens."""
        longest = max(len(row.input_ids) for row in rows)
        ids_BL = torch.tensor([[*row.input_ids, *[0] * (longest - len(row.input_ids))] for row in rows])
        ids_BL = ids_BL.to(self.device)
        self.padded += ids_BL.numel()

        @torch.no_grad()
        def call() -> None:
            model(input_ids=ids_BL, use_cache=False)

        self.forward += seconds(call, self.device)[1]


def run(materials: Materials, options: Options) -> Result:
    """Seconds of the whole suite (loading of data, prompts, tokens, scores, standard errors) over those of the forward
    passes of its batches."""
    model = materials.model().to(options.device)
    config = zero_shot.Config(limit=options.zero_shot_limit)
    warm = Clock(options.device, scoring.score_rows)
    with mock.patch.object(scoring, "score_rows", warm):  # first calls pay for what later ones find ready, lm-eval too
        warm_up = zero_shot.Config(tasks=("piqa",), limit=4)
        materials.evaluate(zero_shot, model, materials.tokenizer, warm_up, "warm-up")
    clock = Clock(options.device, scoring.score_rows)
    with mock.patch.object(scoring, "score_rows", clock):
        _, whole = materials.evaluate(zero_shot, model, materials.tokenizer, config, "the seven tasks")
    suite = whole - clock.lost
    figures: Figures = {
        "zero_shot_ratio": suite / clock.forward,
        "zero_shot_seconds": suite,
        "zero_shot_forward_seconds": clock.forward,
        "zero_shot_scoring_seconds": clock.scored,
        "zero_shot_other_seconds": suite - clock.scored,
        "zero_shot_rows": clock.rows,
        "zero_shot_tokens": clock.tokens,
        "zero_shot_padding_share": 1 - clock.tokens / clock.padded,
        "zero_shot_limit": options.zero_shot_limit,
    }
    how = protocol(
        options,
        materials.model_name,
        f"{', '.join(config.tasks)}, zero-shot, the first {options.zero_shot_limit} documents of each",
        "the suite's seconds from its call to its report, with the loading of data and without the import of lm-eval; "
        "forward: model(input_ids) of the same batches with all logits and no cache, before or after each in turn",
        batches="batches of the suite's own size",
    )
    return Result("zero_shot", how, figures)
