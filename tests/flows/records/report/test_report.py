"""The tables of the papers from a store: what stands in which, what may stand beside it, and in which form."""

from __future__ import annotations

import csv
import io
import json
import math
from datetime import timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from flows.errors import SpecError
from flows.records.report.build import Section, build_report
from flows.records.report.draw import draw
from flows.records.report.papers import TABLES
from infra.results.lineage import Made
from infra.results.rows import MetricRow
from infra.results.store import ResultsStore
from tests.infra.result_examples import NOON, checkpoints, measured, pruned, repaired, run_row

#: as SlimGPT measures perplexity
PROTOCOL = {
    **{"dataset": "Salesforce/wikitext", "config": "wikitext-2-raw-v1", "split": "test", "join": "\n\n"},
    **{"documents": "joined", "rolling": False, "max_windows": None, "bos": "once", "limit": None},
    **{
        "versions": {"torch": "2.13"},
        "data_identity": [{"repo_id": "Salesforce/wikitext", "content": "0123456789abcdef"}],
    },
}
PPL = "perplexity/wikitext-2-raw-v1/ppl@128"
WINDOWS = {"calibration": {"data": {"dataset": "allenai/c4"}, "num_samples": 32, "seq_len": 512, "seed": 7}}
ODD = "Größe & <script>alert(1)</script> 50%_x"


@pytest.fixture
def store(tmp_path: Path) -> ResultsStore:
    return ResultsStore(tmp_path / "results.duckdb")


def ppl(key: str, checkpoint: str, value: float, **changes: Any) -> MetricRow:
    protocol = json.dumps(PROTOCOL | changes)
    return measured(key, checkpoint, PPL, value, stderr=0.5, protocol=protocol, checkpoint_key=f"key-{checkpoint}")


def add(
    store: ResultsStore,
    key: str,
    *made: Made,
    metrics: list[MetricRow],
    model: str = "org/tiny",
    minutes: int = 0,
    name: str = "",
) -> None:
    run = run_row(key, name=name or key, finished_at=NOON + timedelta(minutes=minutes))
    store.record(run, metrics=metrics, checkpoints=checkpoints(key, *made, model=model))


def shown(section: Section, *names: str) -> list[tuple[str, ...]]:
    return [tuple({**line.labels, **line.cells}.get(name, "") for name in names) for line in section.lines]


def test_a_row_for_each_checkpoint_whatever_run_it_is_of(store: ResultsStore) -> None:
    one, two = pruned(0.2, **WINDOWS), pruned(0.5, **WINDOWS)
    add(store, "r1", one, metrics=[ppl("r1", "dense", 12.0), ppl("r1", one.name, 20.0)], name=ODD)
    mended = repaired(two)
    figures = [ppl("r2", "dense", 99.0), ppl("r2", two.name, math.inf), ppl("r2", mended.name, math.nan)]
    add(store, "r2", two, mended, metrics=figures, minutes=1)
    (section,) = build_report(store, "slimgpt-1").sections
    assert section.title == "org/tiny"
    assert shown(section, "method", "sparsity", "recovery", "calibration", "wikitext-2-raw-v1 ppl@128") == [
        ("dense", "", "", "", "99.00 ± 0.50"),
        ("slimgpt", "20 %", "", "allenai/c4 32 x 512, seed 7", "20.00 ± 0.50"),
        ("slimgpt", "50 %", "", "allenai/c4 32 x 512, seed 7", "inf ± 0.50"),
        ("slimgpt", "50 %", "lora", "allenai/c4 32 x 512, seed 7", "nan ± 0.50"),
    ]
    notes = "\n".join(section.notes)
    for told in ('id "org/tiny"', "num_samples 32", 'bos "once"', "torch 2.13", f"runs: {ODD}, r2"):
        assert told in notes
    assert "Salesforce/wikitext content 0123456789ab" in notes


def test_figures_of_two_protocols_have_a_column_each(store: ResultsStore) -> None:
    one = pruned(0.2)
    add(store, "r1", one, metrics=[ppl("r1", one.name, 20.0)])
    add(store, "r2", pruned(0.5), metrics=[ppl("r2", "slimgpt-50", 30.0, bos="none", versions={"torch": "3"})])
    (section,) = build_report(store, "slimgpt-1").sections
    columns = ("wikitext-2-raw-v1 ppl@128 [1]", "wikitext-2-raw-v1 ppl@128 [2]")
    assert section.figures == columns
    assert {tuple(map(bool, cells)) for cells in shown(section, *columns)} == {(True, False), (False, True)}
    told = [note for note in section.notes if note.startswith("wikitext-2-raw-v1 ppl@128 [")]
    assert sorted('bos "none"' in note for note in told) == [False, True]


def test_published_figures_stand_beside_the_same_model_and_protocol_only(store: ResultsStore) -> None:
    one = pruned(0.25)
    add(store, "r1", one, metrics=[ppl("r1", one.name, 19.5)], model="huggyllama/llama-7b")
    add(store, "r2", one, metrics=[ppl("r2", one.name, 9.5)], model="org/tiny", name="tiny")
    report = build_report(store, "slimgpt-1", ["r1"])
    (section,) = report.sections
    lines = shown(section, "method", "sparsity", "recovery", "source", "wikitext-2-raw-v1 ppl@128")
    assert ("slimgpt", "25 %", "", "measured", "19.50 ± 0.50") in lines
    assert ("slimgpt", "25 %", "", "published", "19.11") in lines
    assert ("dense", "", "", "published", "12.63") in lines
    assert "not measured by slimline" in report.notes[0]
    (section,) = build_report(store, "slimgpt-1", ["tiny"]).sections
    assert "source" not in section.labels
    add(store, "r3", one, metrics=[ppl("r3", one.name, 19.5, max_windows=8)], model="huggyllama/llama-7b", name="part")
    report = build_report(store, "slimgpt-1", ["part"])
    assert "source" not in report.sections[0].labels
    assert "none of them of a model and protocol above" in report.notes[0]


def test_an_ablation_has_what_differs_in_its_options_only(store: ResultsStore) -> None:
    made = [
        pruned(0.5, name="full", curve="log", grouped_cholesky=True, group_size=None),
        pruned(0.5, name="no-gcd", curve="log", grouped_cholesky=False, group_size=None),
        pruned(0.5, name="no-dgs", curve="log", grouped_cholesky=True, group_size=128),
        pruned(0.5, name="flat", curve="uniform", grouped_cholesky=True, group_size=None),
        pruned(0.2, name="less", curve="log", grouped_cholesky=True, group_size=None),
    ]
    add(store, "r1", *made, repaired(made[0]), metrics=[ppl("r1", each.name, 30.0) for each in made])
    (section,) = build_report(store, "slimgpt-5").sections
    assert [line.checkpoint_key for line in section.lines] == ["key-no-gcd", "key-full", "key-no-dgs"]
    assert [line.labels["options"] for line in section.lines] == [
        "grouped_cholesky=false",
        "grouped_cholesky=true",
        "grouped_cholesky=true, group_size=128",
    ]
    (section,) = build_report(store, "slimgpt-6").sections
    assert shown(section, "options") == [("curve=log",), ("curve=uniform",)]
    with pytest.raises(SpecError, match=r"nothing for slimgpt-14 .*slimline run llama-7b-slimgpt-table14"):
        build_report(store, "slimgpt-14")


def test_calibration_sets_are_compared(store: ResultsStore) -> None:
    made = [pruned(0.5, name=data, calibration={"data": {"dataset": data}, "seed": 0}) for data in ("c4", "alpaca")]
    add(store, "r1", *made, metrics=[ppl("r1", each.name, 30.0) for each in made])
    (section,) = build_report(store, "slimgpt-14").sections
    assert [cells[0].split(" ")[0] for cells in shown(section, "calibration")] == ["c4", "alpaca"]


def test_depth_pruning_is_retrained_or_not(store: ResultsStore) -> None:
    bare = Made("short", "dense", "prune", "shortened", {"layers": 6, "criterion": "ppl"})
    other = Made("taylor", "dense", "prune", "shortened", {"layers": 6, "criterion": "taylor"})
    trained = Made("short+cpt", "short", "recover", "cpt")
    metrics = [ppl("r1", name, 20.0) for name in ("dense", "short", "taylor", "short+cpt")]
    metrics.append(measured("r1", "short", "zero_shot/average/acc", 0.6183, num_fewshot=0))
    add(store, "r1", bare, other, trained, metrics=metrics)
    (criteria,) = build_report(store, "shortened-criteria").sections
    assert shown(criteria, "sparsity", "options", "zero-shot average") == [
        ("", "", ""),
        ("6 layers", "criterion=ppl", "0.618"),
        ("6 layers", "criterion=taylor", ""),
    ]
    assert criteria.figures[-1] == "zero-shot average"
    (retrained,) = build_report(store, "shortened-retraining").sections
    assert sorted(shown(retrained, "recovery")) == [("",), ("",), ("",), ("cpt",)]


def test_speed_stands_with_its_device(store: ResultsStore) -> None:
    figures = [
        measured(
            "r1", "slimgpt-20", f"profile/profile/{metric}", value, protocol='{"device_name": "H200", "batch_size": 1}'
        )
        for metric, value in {"latency_ms_p50": 12.5, "num_parameters": 2e6, "peak_memory_gib": 1.25}.items()
    ]
    add(store, "r1", pruned(), metrics=figures)
    (section,) = build_report(store, "slimgpt-4").sections
    assert section.figures == ("latency ms", "parameters (M)", "peak memory GiB")
    assert 'latency ms, peak memory GiB: batch_size 1, device_name "H200"' in section.notes


@pytest.mark.parametrize(
    "name, suite, metric, tasks, headings",
    [
        (
            *("slimgpt-mmlu", "mmlu", "acc"),
            ("mmlu_stem", "mmlu_other", "mmlu", "mmlu_anatomy"),
            ("STEM", "Other", "MMLU average"),
        ),
        (
            *("slimgpt-longbench", "longbench", "score"),
            ("few_shot", "longbench_qasper", "single_doc_qa", "average"),
            ("Few-shot", "Single-Doc QA", "LongBench average"),
        ),
    ],
)
def test_categories_have_columns_and_single_tasks_have_none(
    name: str, suite: str, metric: str, tasks: tuple[str, ...], headings: tuple[str, ...], store: ResultsStore
) -> None:
    names = ("dense", "slimgpt-20")
    figures = [measured("r1", each, f"{suite}/{task}/{metric}", 0.25) for each in names for task in tasks]
    add(store, "r1", pruned(), metrics=[*figures, ppl("r1", "slimgpt-20", 20.0)])
    (section,) = build_report(store, name).sections
    assert section.figures == headings
    assert shown(section, headings[-1]) == [("0.250",), ("0.250",)]


@pytest.mark.parametrize("name", TABLES)
def test_an_empty_table_says_what_fills_it(name: str, store: ResultsStore) -> None:
    for _ in range(2):
        with pytest.raises(SpecError, match=f"nothing for {name} .*; what fills it: slimline (run|nightly) "):
            build_report(store, name)
        add(store, "r1", metrics=[ppl("r1", "dense", 12.0)])  # of the dense model alone there is nothing to say


def test_unknown_names_are_refused_with_the_nearest(store: ResultsStore) -> None:
    add(store, "r1", pruned(), metrics=[ppl("r1", "slimgpt-20", 20.0)])
    with pytest.raises(SpecError, match="no table 'slimgpt-7'; did you mean 'slimgpt-"):
        build_report(store, "slimgpt-7")
    with pytest.raises(SpecError, match="no run 'r2'"):
        build_report(store, "slimgpt-1", ["r2"])


class Texts(HTMLParser):
    """What a reader sees, and every tag."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_forms_show_odd_names_as_they_are(store: ResultsStore) -> None:
    odd = pruned(0.2, name=ODD)
    add(store, "r1", odd, metrics=[ppl("r1", odd.name, math.inf)], model=ODD, name=ODD)
    report = build_report(store, "slimgpt-1")
    page = Texts()
    page.feed(draw(report, "html"))
    assert "script" not in page.tags
    assert {"table", "caption", "th"} <= set(page.tags)
    assert page.text.count(ODD) >= 2
    markdown = draw(report, "markdown")
    assert "<script" not in markdown
    assert "&lt;script>" in markdown
    latex = draw(report, "latex")
    assert r"Größe \& \textless{}script\textgreater{}alert(1)" in latex
    assert r"50\%\_x" in latex
    assert latex.count(r"\begin{table}") == latex.count(r"\end{table}") == 1
    (line,) = csv.DictReader(io.StringIO(draw(report, "csv")))
    assert (line["model"], line["checkpoint"], line["figure"], line["value"]) == (ODD, ODD, PPL, "Infinity")
    assert json.loads(line["protocol"])["bos"] == "once"
