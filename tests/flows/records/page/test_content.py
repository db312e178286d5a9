"""The content of a page and its file, without a browser."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from evaluation.samples import Sample
from flows.__main__ import main
from flows.errors import SpecError
from flows.night.headlines import headlines_of_record
from flows.records.compare import ComparisonRequest, compare_checkpoints
from flows.records.page.content import Page, build_page
from flows.records.page.document import page_html
from flows.records.page.encode import run_url
from flows.records.page.nights import read_night
from infra.artifacts.store import ArtifactStore
from infra.results.store import ResultsStore
from tests.flows.recorded_runs import Evaluation, Records
from tests.flows.records.page.stores import ODD, fill_odd


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ResultsStore:
    odd = ResultsStore(tmp_path_factory.mktemp("odd") / "results.duckdb")
    fill_odd(odd)
    return odd


def page_of(store: ResultsStore, runs: Sequence[str] = (), uri: str = "sqlite:///mlflow.db") -> Page:
    return build_page(store, ArtifactStore(store.path.parent / "store"), tracking_uri=uri, runs=runs)


def column(page: Page, heading: str) -> dict[str, Any]:
    (found,) = [each for each in page.data["columns"] if each["heading"] == heading]
    return dict(found)


def test_every_checkpoint_of_the_newest_runs_stands_there_once(store: ResultsStore) -> None:
    data = page_of(store).data
    assert data["checkpoints"]["name"] == ["dense", "slimgpt-20", "slimgpt-20+lora", ODD, "slimgpt-20"]
    assert data["checkpoints"]["runs"] == [[0, 1], [0], [0], [0], [1]]
    assert data["runs"]["key"] == ["r1", "r2"]
    assert data["ways"]["source"] == [-1, 0, 1, 0, 0]


def test_figures_of_two_protocols_have_columns_of_their_own(store: ResultsStore) -> None:
    page = page_of(store)
    assert column(page, "wikitext-2-raw-v1 ppl@1024 [1]")["values"] == [27.832468013579, 47.5, "NaN", "Infinity", None]
    assert column(page, "wikitext-2-raw-v1 ppl@1024 [2]")["values"] == [None, None, None, None, 44.0]
    assert column(page, "wikitext-2-raw-v1 ppl@1024 [1]")["texts"] == ["27.83 ± 2.40", "47.50 ± 5.25", "nan", "inf", ""]
    assert [line for line in page.protocol if "max_windows 4" in line and "[2]" in line]
    assert column(page, "removed")["texts"] == ["0 %", "20 %", "20 %", "50 %", ""]
    assert column(page, "zero-shot mean (1 tasks)")["values"] == [0.7, 0.65, 0.66, None, None]
    assert column(page, "macs_64_tokens")["texts"][1] == "8.748e+09"


def test_recorded_pairs_are_judged_as_compare_does(store: ResultsStore) -> None:
    page = page_of(store)
    ((checkpoint, reference, rows, problems, _),) = [each for each in page.data["verdicts"] if each[4]]
    assert (checkpoint, reference, problems) == (1, 0, [])
    named = {page.data["columns"][row[0]]["heading"]: row[5] for row in rows}
    assert named == {"wikitext-2-raw-v1 ppl@1024 [1]": "worse", "piqa acc": "noise"}
    (others,) = [each[3] for each in page.data["verdicts"] if each[:2] == [2, 1]]
    assert "no longer in the store" in others[0]


def test_what_is_kept_of_the_layers_is_that_of_the_pruned_source(store: ResultsStore) -> None:
    plans = page_of(store).data["plans"]
    assert plans == [None, [[3, 2, 1], [3, 3, 3], [12, 12, 12], [16, 16, 16]], plans[1], None, None]


def test_a_run_that_is_not_the_newest_of_its_name_can_be_named(store: ResultsStore) -> None:
    data = page_of(store, ["r0"]).data
    assert data["checkpoints"]["name"] == ["dense", "slimgpt-90"]
    assert page_of(store, [ODD]).data["runs"]["key"] == ["r1"]
    with pytest.raises(SpecError, match="no run 'anothr'; did you mean 'another'"):
        page_of(store, ["anothr"])


def test_an_empty_store_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"no results in .* yet; run a spec first"):
        page_of(ResultsStore(tmp_path / "results.duckdb"))


def test_no_text_ends_the_element_that_it_stands_in(store: ResultsStore) -> None:
    html = page_html(page_of(store, ["r1"]))
    assert ODD not in html
    assert len(re.findall("<script", html)) == 3 + html.count('"<script')  # ours, and what Plotly has in its strings
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, flags=re.DOTALL)
    assert json.loads(found)["checkpoints"]["name"][3] == ODD
    assert not set("<>&\u2028") & set(found)
    assert "Run Größe/&lt;script&gt;" in html
    assert "{{" not in html.partition("<script>")[0]


def test_the_policy_allows_two_scripts_and_no_connection(store: ResultsStore) -> None:
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page_html(page_of(store)))
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert policy.count("sha256-") == 2
    assert "unsafe-eval" not in policy
    assert "connect-src" not in policy


@pytest.mark.parametrize(
    "uri, url",
    [
        ("sqlite:///x/mlflow.db", None),
        ("http://mlflow:5000", "http://mlflow:5000/#/runs/0123abcd"),
        ("https://me:secret@host/base/", "https://host/base/#/runs/0123abcd"),
    ],
)
def test_a_server_has_a_page_of_the_run(store: ResultsStore, uri: str, url: str | None) -> None:
    assert page_of(store, uri=uri).data["runs"]["mlflow"] == [url, None]
    assert run_url("http://mlflow:5000", None) is None


def test_a_night_begins_with_its_three_lines(store: ResultsStore) -> None:
    row = store.nights("small")[-1]
    lines = headlines_of_record(row, store.night_cells("n2"), store.night_figures("n2"))
    night = read_night(store, row, lines)
    page = build_page(store, ArtifactStore(store.path.parent / "store"), tracking_uri="", night=night)
    assert page.title == "Night small"
    assert [line.split(":")[0] for line in page.lines] == ["Worse", "Failed", "New"]
    assert [change[:4] for change in page.data["night"]["changes"]] == [["worse", ODD, "dense", "zero_shot/piqa/acc"]]
    assert [point[4] for point in page.data["night"]["points"]] == ["first", "same", "worse"]
    html = page_html(page)
    assert html.index("Worse: 1 of 1 figure") < html.index('id="table"')


def answers(task: str, wrong: int) -> Evaluation:
    return Evaluation([Sample(task, item, f"{task}{item}", {"acc": float(item >= wrong)}) for item in range(60)])


def test_checkpoints_of_a_small_page_are_tested_against_each_other(tmp_path: Path) -> None:
    records = Records(tmp_path / "home")
    spec = {"model": {"id": "tiny"}, "steps": [{"method": "slimgpt", "sparsity": [0.2, 0.5]}]}
    measured = {"dense": [answers("piqa", 5)], "slimgpt-20": [answers("piqa", 8)], "slimgpt-50": [answers("piqa", 40)]}
    records.add("demo", measured, spec=spec)
    page = build_page(records.results, records.store, tracking_uri="")
    found = {(each[0], each[1]): each for each in page.data["verdicts"]}
    assert set(found) == {(1, 0), (2, 0), (2, 1)}
    request = ComparisonRequest("demo:slimgpt-50", "demo:slimgpt-20")
    (figure,) = compare_checkpoints(request, records.results, records.store).rows
    ((_, difference, _, _, p, verdict, items, lost, gained),) = found[2, 1][2]
    assert (difference, verdict, items, lost, gained) == (-0.533, "worse", 60, 32, 0)
    assert (figure.verdict, figure.row.flips_lost) == (verdict, lost)
    assert p == float(f"{figure.row.p_value:.3g}")
    assert not found[2, 1][4]


def test_warnings_name_the_checkpoints_that_they_make_doubtful(tmp_path: Path) -> None:
    records = Records(tmp_path / "home")
    leaking = Evaluation([Sample("piqa", 0, "a", {"acc": 1.0})], protocol={"leaks": ["it was trained on piqa"]})
    records.add("demo", {"dense": [leaking], "slimgpt-20": [leaking]},
                spec={"model": {"id": "tiny"}, "steps": [{"method": "slimgpt", "sparsity": 0.2}]})  # fmt: skip
    page = build_page(records.results, records.store, tracking_uri="")
    assert "warning: it was trained on piqa [dense, slimgpt-20]" in page.protocol


@pytest.mark.parametrize(
    "words, sentence",
    [
        (
            ["slimgpt-1", "--html", "o.html"],
            "--html writes a page of all checkpoints, without a table; slimgpt-1 as HTML",
        ),
        (["--html", "o.html", "--out", "x.html"], "leave --out out"),
        (["--html", "missing/o.html"], "--html missing/o.html cannot be written"),
        (["--night", "small"], "--night small is of the page of checkpoints: give --html FILE as well"),
        (["--html", "o.html", "--night", "smal"], "no night 'smal'; did you mean 'small'"),
        (["--html", "o.html", "--run", "anothr"], "no run 'anothr'; did you mean 'another'"),
    ],
)
def test_what_cannot_be_written_is_refused_in_a_sentence(
    store: ResultsStore,
    words: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLIMLINE_HOME", str(store.path.parent))
    monkeypatch.setattr("sys.argv", ["slimline", "report", *words])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "o.html").exists()


def test_the_command_writes_the_page(
    store: ResultsStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLIMLINE_HOME", str(store.path.parent))
    monkeypatch.setattr("sys.argv", ["slimline", "report", "--html", str(tmp_path / "o.html"), "--night", "small"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code in (None, 0)
    assert capsys.readouterr().out.endswith("o.html\n")
    assert "Night small" in (tmp_path / "o.html").read_text(encoding="utf-8")


def test_numbers_that_json_cannot_hold_are_words(store: ResultsStore) -> None:
    text = json.dumps(page_of(store).data, allow_nan=False)
    assert math.isinf(float(json.loads(text)["columns"][4]["values"][3]))


def test_a_page_that_would_be_too_large_says_what_it_leaves_out(
    store: ResultsStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("columns.MOST_FIGURES", "checkpoints.MOST_LAYERS", "significance.MOST_PAIRS"):
        monkeypatch.setattr(f"flows.records.page.{name}", 1)
    page = page_of(store)
    assert page.data["plans"] is page.data["verdicts"] is None
    headings = {each["heading"] for each in page.data["columns"]}
    assert headings >= {"wikitext-2-raw-v1 ppl@1024 [1]", "latency ms", "parameters (M)"}
    assert "piqa acc" not in headings
    assert (
        "Left out of a page this large: figures that are not in the table, layers kept, significance." in page.notes[0]
    )
