"""Part `few_shot`: MMLU as the suite runs it, against the same rows run whole."""

from __future__ import annotations

from collections.abc import Sequence
from unittest import mock

from evaluation.inference import loglikelihood as scoring
from evaluation.inference import shared_prefix
from evaluation.inference.shared_prefix import Group
from evaluation.samples import Sample
from evaluation.suites import mmlu
from tests.bench.materials import Materials
from tests.bench.options import Options
from tests.bench.report import Figures, Result, protocol


def run(materials: Materials, options: Options) -> Result:
    """Seconds of rows that are run whole over those of rows that share their examples, turn and turn about by subject;
    and how many questions are answered otherwise."""
    model = materials.model().to(options.device)
    ways = {"shared": shared_prefix.grouped, "whole": whole}
    spent = dict.fromkeys(ways, 0.0)
    samples: dict[str, list[Sample]] = {way: [] for way in ways}

    def measure(way: str, config: mmlu.Config) -> tuple[Sequence[Sample], float]:
        with mock.patch.object(scoring, "grouped", ways[way]):
            result, taken = materials.evaluate(mmlu, model, materials.tokenizer, config, f"{config.subjects}, {way}")
        return result.samples, taken

    measure("shared", mmlu.Config(subjects=options.few_shot_subjects[:1], limit=2))  # first calls pay for later ones
    for number, subject in enumerate(options.few_shot_subjects):
        for way in sorted(ways, reverse=number % 2 == 1):
            found, taken = measure(way, mmlu.Config(subjects=(subject,), limit=options.few_shot_limit))
            samples[way] += found
            spent[way] += taken
    pairs = list(zip(samples["shared"], samples["whole"], strict=True))
    figures: Figures = {
        "few_shot_whole_over_shared": spent["whole"] / spent["shared"],
        "few_shot_seconds": spent["shared"],
        "few_shot_questions": len(pairs),
        "few_shot_answers_that_differ": sum(one.response != other.response for one, other in pairs),
    }
    how = protocol(
        options,
        materials.model_name,
        f"MMLU, five-shot, the first {options.few_shot_limit} questions of {', '.join(options.few_shot_subjects)}",
        "seconds of the suite from its call to its report, both ways one after the other for each subject",
        batches="batches of the suite's own size",
    )
    return Result("few_shot", how, figures)


def whole(sequences: Sequence[tuple[int, ...]], *_: object) -> list[Group]:
    """Stands in for `grouped`: nothing is shared."""
    return [Group(tuple(range(len(sequences))), 0)]
