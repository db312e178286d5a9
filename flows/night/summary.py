"""The page of a night: what ran, what was cached, what failed and why, what got better or worse, which gates hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from flows.night.headlines import distinct, headlines_of_result
from flows.night.outcome import CellOutcome, NightResult
from flows.records.render import markdown_table, markdown_text
from flows.spec.night import NightSpec
from flows.spec.steps import percent
from infra.results.rows import NightFigureRow

#: verdicts that are worth a line each, in this order
_NOTABLE = ("worse", "better", "gone")


def summary(result: NightResult, *, alpha: float, tolerance: float, pages: Mapping[str, str]) -> str:
    """The night as markdown; its first three lines say what got worse, what failed and what is new.

    pages: addresses of the pages of the cells' runs, by run key.
    """
    return "\n\n".join(_parts(result, alpha, tolerance, pages))


def night_title(spec: NightSpec) -> str:
    """What Prefect's pages call it, e.g. "small: slimgpt, equal at 20, 50 %"."""
    sparsities = ", ".join(map(percent, spec.matrix.sparsities))
    return f"{spec.name}: {', '.join(spec.matrix.methods)} at {sparsities} %"


def headline(result: NightResult) -> str:
    """The night in one line."""
    verdicts = Counter(row.verdict for row in distinct(result.figures))
    failed_gates = sum(not gate.passed for gate in result.gates)
    words = [
        f"{len(result.cells) - len(result.failures)} of {len(result.cells)} cells completed",
        f"{len(result.stages)} stages: {result.count('completed')} run, {result.count('cached')} cached, "
        f"{result.count('failed')} failed, {result.count('skipped')} skipped",
        f"{verdicts['better']} figures better, {verdicts['worse']} worse",
    ]
    if result.gates:
        words.append(f"{len(result.gates) - failed_gates} of {len(result.gates)} gates passed")
    return "; ".join(words)


def terminal(result: NightResult) -> str:
    """The night for a terminal: a line per cell, then what is worth a line, then the headline."""
    width = max(len(cell.name) for cell in result.cells)
    lines = [
        f"{cell.name:{width}}  {cell.status:9}  {cell.count('completed')} run, {cell.count('cached')} cached, "
        f"{cell.count('failed')} failed, {cell.count('skipped')} skipped"
        for cell in result.cells
    ]
    notable = [row for verdict in _NOTABLE for row in distinct(result.figures) if row.verdict == verdict]
    lines += [" ".join(part for part in _change(row) if part) for row in notable]
    lines += [f"gate {gate.gate}: {'passed' if gate.passed else 'failed'}" for gate in result.gates]
    before = f"; compared with {result.previous_night_id}" if result.previous_night_id else ""
    return "\n".join([*headlines_of_result(result), "", *lines, "", f"{result.night_id}: {headline(result)}{before}"])


def _parts(result: NightResult, alpha: float, tolerance: float, pages: Mapping[str, str]) -> Iterator[str]:
    # a line each, also where markdown joins lines into one paragraph
    yield "\n".join(f"* {_lead(line)}" for line in headlines_of_result(result))
    good = result.status == "completed" and result.gates_passed
    yield f"# {result.name}: {'good' if good else 'not good'}"
    yield f"{headline(result)}; {result.seconds:.0f} s. Night `{result.night_id}`."
    if result.failures:
        yield "## Failed\n\n" + "\n".join(
            f"* **{cell.name}**: {markdown_text(str(cell.message))}" for cell in result.failures
        )
    if result.gates:
        yield "## Gates\n\n" + markdown_table(
            ("gate", "figures", "outcome"),
            [(f"`{g.gate}`", str(g.num_figures), _outcome(g.problem)) for g in result.gates],
        )
    yield "## Against the last good night\n\n" + "\n\n".join(_changes(result, alpha, tolerance))
    yield "## Cells\n\n" + markdown_table(
        ("cell", "status", "run", "cached", "failed", "skipped", "s", "run key"),
        [_cell(cell, pages) for cell in result.cells],
    )


def _lead(line: str) -> str:
    """Its first word in bold; names and messages are text."""
    word, _, rest = line.partition(":")
    return f"**{word}:**{markdown_text(rest)}"


def _outcome(problem: str | None) -> str:
    return "passed" if problem is None else f"**failed**: {problem}"


def _changes(result: NightResult, alpha: float, tolerance: float) -> Iterator[str]:
    if result.previous_night_id is None:
        yield "There is none: this is the first, and the next is compared with it if it is good."
        return
    figures = distinct(result.figures)
    counts = Counter(row.verdict for row in figures)
    notable = [row for verdict in _NOTABLE for row in figures if row.verdict == verdict]
    if notable:
        heads = ("", "cell", "checkpoint", "figure", "before", "now", "p")
        yield markdown_table(heads, [_change(row) for row in notable])
    tests = Counter(row.test for row in figures)
    yield (
        f"`{result.previous_night_id}`: {counts['same']} figures the same, {counts['noise']} within noise, "
        f"{counts['first']} new. Tests: {tests['mcnemar'] + tests['sign_flip']} paired on the same items (McNemar's "
        f"exact test for right or wrong, else sign flips), {tests['z']} of fewer items or without samples by a "
        f"two-sided z test on standard errors taken as independent; Holm-corrected over the night at level {alpha:g}; "
        f"figures without a standard error by a relative change above {tolerance:.0%}."
    )


def _change(row: NightFigureRow) -> tuple[str, ...]:
    p = "" if row.p_value is None else f"{row.p_value:.1e}"
    now = "-" if row.verdict == "gone" else _value(row.value, row.stderr)
    before = "" if row.before_value is None else _value(row.before_value, row.before_stderr)
    return row.verdict, row.cell, row.checkpoint, f"{row.suite}/{row.task}/{row.metric}", before, now, p


def _value(value: float, stderr: float | None) -> str:
    return f"{value:.4g}" if stderr is None else f"{value:.4g} ± {stderr:.2g}"


def _cell(cell: CellOutcome, pages: Mapping[str, str]) -> tuple[str, ...]:
    counts = (str(cell.count(status)) for status in ("completed", "cached", "failed", "skipped"))
    page = pages.get(cell.run_key or "")
    key = f"`{cell.run_key}`" if cell.run_key else ""
    return cell.name, cell.status, *counts, f"{cell.seconds:.1f}", f"[{key}]({page})" if page else key
