"""README.md of an exported checkpoint: the hub's metadata, what was removed, how, what it is worth, how to load it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import yaml

from flows.checkpoints.loading import loading_lines
from flows.checkpoints.public import public, repository, short_name
from flows.records.render import markdown_table
from flows.records.tables import in_one_line, protocol_lines, table_rows, with_sizes
from infra.results.rows import DENSE
from tasks.recording.images import read_plan

if TYPE_CHECKING:
    from flows.checkpoints.find import Found
    from infra.models.licence import Licence
    from infra.results.rows import MetricRow
    from pruning.plan import PruningPlan

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}
_STEP = re.compile(r"steps\.(\d+)\.(.*)")


@dataclass(frozen=True)
class Card:
    """What the card is made of.

    metrics: all of the run.
    """

    found: Found
    licence: Licence | None
    metrics: Sequence[MetricRow]

    @property
    def config(self) -> dict[str, Any]:
        """config.json of the checkpoint."""
        return dict(json.loads((self.found.folder / "config.json").read_bytes()))

    @property
    def plan(self) -> PruningPlan | None:
        """What is kept of the dense model; None for the dense one itself."""
        return read_plan(self.found.folder) if (self.found.folder / "plan.json").is_file() else None


def model_card(card: Card) -> str:
    """The whole text. Names neither a folder of this machine nor a secret."""
    parts = [f"---\n{yaml.safe_dump(public(metadata(card)), sort_keys=False, allow_unicode=True)}---"]
    parts += [f"# {_title(card)}", *_what_it_is(card)]
    for heading, lines in (
        ("What was removed", _removed(card)),
        ("How it was made", _made(card)),
        ("What it is worth", _worth(card)),
        ("How to load it", loading_lines(uneven="auto_map" in card.config)),
        ("Limits", _limits(card)),
    ):
        if text := "\n".join(lines):
            parts.append(f"## {heading}\n\n{text}")
    head, *rest = parts
    return "\n\n".join([head, *map(public, rest)]) + "\n"


def metadata(card: Card) -> dict[str, Any]:
    """The YAML head, as the hub reads it. A licence or a base model that is not known is left out, not guessed."""
    row = card.found.row
    values: dict[str, Any] = dict(card.licence.metadata) if card.licence else {}
    values |= {"library_name": "transformers", "pipeline_tag": "text-generation"}
    base = repository(row.model)
    if base is not None:
        # the hub has no word for pruned: it knows adapter, merge, quantized and finetune
        values |= {"base_model": base, "base_model_relation": "finetune"}
    if datasets := sorted(_datasets(card)):
        values["datasets"] = datasets
    plugins = [name for names in (row.method, row.recovery) for name in (names or "").split("+") if name]
    pruned = ["pruned", "structured-pruning"] if row.method else []
    values["tags"] = [*pruned, *dict.fromkeys(plugins), "slimline"]
    return values


def _title(card: Card) -> str:
    row, made = card.found.row, ""
    if row.method:
        amount = "" if row.total_sparsity is None else f", {100 * row.total_sparsity:g} %"
        made = f" pruned by {row.method}{amount}"
    recovered = f", then {row.recovery}" if row.recovery else ""
    return f"{short_name(row.model)}{made}{recovered}"


def _what_it_is(card: Card) -> Iterator[str]:
    row, dense = card.found.row, card.found.dense_row
    base = repository(row.model)
    name = f"[{base}](https://huggingface.co/{base})" if base else short_name(row.model)
    yield f"Made from {name} by slimline, run `{card.found.run.run_key}`, checkpoint `{row.checkpoint}`."
    facts = []
    if row.num_parameters is not None:
        before = f" of {dense.num_parameters:,}" if dense and dense.num_parameters else ""
        facts.append(f"{row.num_parameters:,}{before} parameters")
    if row.num_decoder_parameters and dense and dense.num_decoder_parameters:
        share = 1 - row.num_decoder_parameters / dense.num_decoder_parameters
        if share:  # not of a smaller vocabulary
            facts.append(f"{share:.1%} of the parameters in decoder layers removed")
    if (plan := card.plan) is not None:
        item = _BYTES.get(str(card.config.get("dtype")), 2)
        was, now = (
            2 * item * plan.head_dim * sum(shape.num_kv_heads for shape in shapes) / 1024
            for shapes in (plan.source, plan.shapes)
        )
        facts.append(f"KV cache {now:.1f} of {was:.1f} KiB per token in {card.config.get('dtype')}")
    if facts:
        yield "; ".join(facts) + "."
    if card.licence is None:
        yield "Licence: that of the base model, which the files it was imported from do not state; see its page."


def _removed(card: Card) -> Iterator[str]:
    """A row for neighbours that keep the same."""
    plan = card.plan
    if plan is None:
        return
    kept = {layer.layer: layer.shape for layer in plan.layers}
    lines = []
    for (before, after), group in groupby(enumerate(plan.source), key=lambda pair: (pair[1], kept.get(pair[0]))):
        numbers = [index for index, _ in group]
        layers = f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"
        if after is None:
            lines.append([layers, "removed", "removed", "removed"])
            continue
        pairs = (
            (after.num_heads, before.num_heads),
            (after.num_kv_heads, before.num_kv_heads),
            (after.intermediate_size, before.intermediate_size),
        )
        of = f" in {after.num_experts} of {before.num_experts} experts" if before.num_experts else ""
        lines.append([layers, *(f"{now} of {was}{of * (pair == 2)}" for pair, (now, was) in enumerate(pairs))])
    yield markdown_table(["layers of the base model", "query heads", "kv heads", "FFN channels"], lines)


def _made(card: Card) -> Iterator[str]:
    """A line per step, with every option that has a value."""
    steps: dict[int, dict[str, Any]] = {}
    for path, value in json.loads(card.found.row.config).items():
        if step := _STEP.fullmatch(path):
            steps.setdefault(int(step[1]), {})[step[2]] = value
    for number in sorted(steps):
        options = dict(steps[number])
        calibration = {
            name.removeprefix("calibration."): options.pop(name)
            for name in list(options)
            if name.startswith("calibration.")
        }
        word = "method" if "method" in options else "recovery"
        yield f"{number + 1}. **{options.pop(word)}**: {in_one_line(options)}"
        if calibration:
            yield f"   calibration set: {in_one_line(calibration)}"


def _worth(card: Card) -> Iterator[str]:
    """The figures of this checkpoint beside those of the dense one, then how they were taken."""
    name = card.found.row.checkpoint
    names = list(dict.fromkeys([DENSE, name]))
    metrics = [row for row in card.metrics if row.checkpoint in names]
    rows = {row["checkpoint"]: row for row in table_rows(with_sizes(metrics, card.found.checkpoints))}
    shown = [each for each in names if each in rows]
    if name not in shown:
        yield "The run measured nothing of this checkpoint."
        return
    headings = [heading for heading in rows[name] if heading != "checkpoint" and rows[name][heading]]
    lines = [[heading, *(rows[each].get(heading, "") for each in shown)] for heading in headings]
    yield markdown_table(["figure (± one standard error)", *shown], lines)
    yield ""
    spec = {"calibration": card.found.spec.get("calibration")} if card.found.row.method else {}
    yield from (f"* {line}" for line in protocol_lines(metrics, spec))


def _limits(card: Card) -> Iterator[str]:
    yield "* Figures are those of the protocol beside them, and of no other; nothing else was measured."
    if card.found.row.method and not card.found.row.recovery:
        yield "* Nothing was trained after pruning: a short recovery usually brings much of the loss back."
    yield "* What the base model must not be used for, and what it gets wrong, holds for this one too."
    if "auto_map" in card.config:
        yield (
            "* Its layers differ in width: programs that build all layers equal refuse it or build another model; "
            "`uniform: true` in the pruning step makes one that they load."
        )


def _datasets(card: Card) -> Iterable[str]:
    """Ids of the data sets that it was calibrated or trained on, as far as the hub knows them."""
    for value in json.loads(card.found.row.config).values():
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, Mapping) and isinstance(part.get("dataset"), str):
                found = repository(part["dataset"])
                if found is not None:
                    yield found
