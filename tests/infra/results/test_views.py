"""The views of the index: what any DuckDB client sees, whoever wrote the rows."""

from __future__ import annotations

import json
import math
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.errors import QuestionRefused
from infra.results import files as result_files
from infra.results.lineage import Made
from infra.results.rows import RUN, StageRow
from infra.results.store import ResultsStore
from tests.infra.result_examples import (
    NOON,
    checkpoints,
    figure_row,
    measured,
    night_row,
    pruned,
    repaired,
    run_row,
)

#: of a spec and of a checkpoint, as a user might name them
ODD = "Größe/<script>alert(1)</script> 'x'"
PPL = "perplexity/wikitext-2-raw-v1/ppl@1024"


@pytest.fixture
def store(tmp_path: Path) -> ResultsStore:
    return ResultsStore(tmp_path / "results.duckdb")


def rows(store: ResultsStore, question: str) -> list[dict[str, Any]]:
    found = store.select(question)
    return [dict(zip(found.columns, row, strict=True)) for row in found.rows]


def sized(made: tuple[Any, ...], sizes: dict[str, int]) -> list[Any]:
    return [
        row.model_copy(
            update={"num_parameters": 10 + sizes[row.checkpoint], "num_decoder_parameters": sizes[row.checkpoint]}
        )
        for row in made
    ]


def add(
    store: ResultsStore, key: str, *metrics: Any, made: tuple[Made, ...] = (pruned(),), minutes: int = 0, **run: Any
) -> None:
    row = run_row(key, finished_at=NOON + timedelta(minutes=minutes), **run)
    store.record(row, metrics=metrics, checkpoints=checkpoints(key, *made))


def test_the_leaderboard_has_the_newest_run_of_each_spec(store: ResultsStore) -> None:
    repair = repaired(pruned())
    made = checkpoints("new", pruned(), repair)
    figures = [
        measured("new", "dense", PPL, 27.5),
        measured("new", "slimgpt-20", PPL, math.inf),
        measured("new", "slimgpt-20", "heldout/c4/ppl@1024", 60.0),
        measured("new", "slimgpt-20", "zero_shot/piqa/acc", 0.5, num_fewshot=0),
        measured("new", "slimgpt-20", "zero_shot/boolq/acc", 0.75, num_fewshot=0),
        measured("new", "slimgpt-20", "mmlu/mmlu_stem/acc", 0.1, num_fewshot=0),
        measured("new", "slimgpt-20", "profile/profile/latency_ms_p50", 12.0),
        measured("new", "slimgpt-20", "profile/profile b8 p12 n128/latency_ms_p50", 99.0),
        measured("new", repair.name, PPL, math.nan),
        measured("new", repair.name, "zero_shot/average/acc", 0.9, num_fewshot=0),
    ]
    add(store, "old", measured("old", "slimgpt-20", PPL, 1.0), name=ODD)
    sizes = {"dense": 100, "slimgpt-20": 80, repair.name: 80}
    later = NOON + timedelta(hours=1)
    store.record(run_row("new", name=ODD, finished_at=later), metrics=figures, checkpoints=sized(made, sizes))
    add(store, "other", name="other")
    found = [row for row in rows(store, "FROM leaderboard") if row["spec"] == ODD]
    assert [(row["checkpoint"], row["method"], row["recovery"]) for row in found] == [
        ("dense", None, None),
        ("slimgpt-20", "slimgpt", None),
        (repair.name, "slimgpt", "lora"),
    ]
    dense, small, mended = found
    assert {row["run_key"] for row in found} == {"new"}
    assert (dense["sparsity"], small["sparsity"], small["sparsity_asked"]) == (0, pytest.approx(0.2), 0.2)
    assert (small["num_parameters"], small["num_decoder_parameters"]) == (90, 80)
    assert (small["ppl"], small["ppl_of"]) == (math.inf, PPL)
    assert small["perplexities"] == {PPL: math.inf, "heldout/c4/ppl@1024": 60.0}
    assert (small["zero_shot_avg"], small["zero_shot_tasks"]) == (0.625, 2)
    assert (small["latency_ms"], dense["latency_ms"]) == (12.0, None)
    assert math.isnan(mended["ppl"])
    assert mended["zero_shot_avg"] == 0.9


def test_what_was_measured_follows_the_rows_of_its_run(store: ResultsStore) -> None:
    question = "SELECT run_key, checkpoint, ppl, perplexities FROM measured ORDER BY ALL"
    add(store, "r1", measured("r1", "dense", PPL, 10.0), name="one")
    add(store, "r2", measured("r2", "dense", PPL, 20.0), name="two")
    add(store, "r2", measured("r2", "dense", PPL, 30.0), name="two")
    both = [("r1", "dense", 10.0, {PPL: 10.0}), ("r2", "dense", 30.0, {PPL: 30.0})]
    assert list(store.select(question).rows) == both
    with duckdb.connect(str(store.path)) as connection:
        connection.execute("DROP TABLE measured; UPDATE schema_version SET views = 'of another slimline'")
    assert list(store.select(question).rows) == both, "made anew from the rows that there are"
    store.files.path(RUN, "r2").unlink()
    assert list(store.select(question).rows) == both[:1]


def test_a_size_that_was_not_recorded_is_that_of_any_profile(store: ResultsStore) -> None:
    add(store, "r1", measured("r1", "slimgpt-20", "profile/profile/num_parameters", 90.0), name="profiled")
    add(store, "r2", name="measured elsewhere")
    found = rows(store, "SELECT spec, num_parameters FROM leaderboard WHERE checkpoint = 'slimgpt-20' ORDER BY spec")
    assert [row["num_parameters"] for row in found] == [90, 90]


def test_the_front_has_what_nobody_beats_under_the_same_protocol(store: ResultsStore) -> None:
    made = tuple(pruned(sparsity) for sparsity in (0.2, 0.3, 0.4, 0.5, 0.6))
    sizes = {"dense": 100, "slimgpt-20": 80, "slimgpt-30": 70, "slimgpt-40": 60, "slimgpt-50": 50, "slimgpt-60": 40}
    ppl = {
        "dense": 10.0,
        "slimgpt-20": 15.0,
        "slimgpt-30": 30.0,
        "slimgpt-40": 25.0,
        "slimgpt-50": 25.0,
        "slimgpt-60": math.nan,
    }
    figures = [
        measured("r1", name, PPL, value, protocol='{"bos": "once", "versions": {"a": 1}}')
        for name, value in ppl.items()
    ]
    store.record(run_row("r1"), metrics=figures, checkpoints=sized(checkpoints("r1", *made), sizes))
    front = [row["checkpoint"] for row in rows(store, "FROM pareto")]
    assert front == ["slimgpt-50", "slimgpt-20", "dense"], "of two as good the smaller; NaN is not good"
    # another protocol is another front; the same with other versions is not
    better = [
        measured("r2", "slimgpt-20", PPL, 1.0, protocol='{"bos": "none"}'),
        measured(
            "r2", "slimgpt-30", PPL, 9.0, protocol='{"bos": "once", "versions": {"a": 2}}', checkpoint_key="another"
        ),
    ]
    rows_2 = [row.model_copy(update={"checkpoint_key": "another"}) if row.checkpoint == "slimgpt-30" else row
              for row in sized(checkpoints("r2", *made), sizes)]  # fmt: skip
    store.record(run_row("r2", name="two"), metrics=better, checkpoints=rows_2)
    found = rows(store, f"SELECT spec, checkpoint FROM pareto('size/num_parameters', '{PPL}')")
    assert sorted((row["spec"], row["checkpoint"]) for row in found) == [
        ("demo", "slimgpt-50"),
        ("two", "slimgpt-20"),
        ("two", "slimgpt-30"),
    ]
    assert rows(store, "FROM pareto('none', 'such')") == []


def test_sizes_within_half_a_percent_are_one_size_on_the_front(store: ResultsStore) -> None:
    made = (pruned(0.2), pruned(0.3), pruned(0.5))
    sizes = {"dense": 1000, "slimgpt-20": 800, "slimgpt-30": 790, "slimgpt-50": 797}
    ppl = {"dense": 10.0, "slimgpt-20": 15.0, "slimgpt-30": 30.0, "slimgpt-50": 40.0}
    figures = [measured("r1", name, PPL, value) for name, value in ppl.items()]
    rows_of_sizes = [
        row.model_copy(update={"num_parameters": sizes[row.checkpoint]}) for row in checkpoints("r1", *made)
    ]
    store.record(run_row("r1"), metrics=figures, checkpoints=rows_of_sizes)
    front = [row["checkpoint"] for row in rows(store, "FROM pareto")]
    assert front == ["slimgpt-30", "slimgpt-20", "dense"], "797 is 800 and worse; 790 is smaller"


def test_of_accuracy_more_is_better(store: ResultsStore) -> None:
    made = (pruned(0.2), pruned(0.5))
    accuracy = {"dense": 0.7, "slimgpt-20": 0.4, "slimgpt-50": 0.5}
    figures = [measured("r1", name, "zero_shot/average/acc", value) for name, value in accuracy.items()]
    sizes = {"dense": 100, "slimgpt-20": 80, "slimgpt-50": 50}
    store.record(run_row("r1"), metrics=figures, checkpoints=sized(checkpoints("r1", *made), sizes))
    found = rows(store, "FROM pareto('size/num_decoder_parameters', 'zero_shot/*/acc')")
    assert [(row["checkpoint"], row["size"], row["quality"]) for row in found] == [
        ("slimgpt-50", 50, 0.5),
        ("dense", 100, 0.7),
    ]


def test_the_history_has_a_figure_of_each_night(store: ResultsStore) -> None:
    for day, value in enumerate((0.5, 0.25)):
        night = night_row(f"n{day}", name=ODD, started_at=NOON + timedelta(days=day))
        store.record_night(night, figures=[figure_row(f"n{day}").model_copy(update={"value": value})])
    found = rows(store, "SELECT night, started_at, value, verdict FROM history")
    assert [(row["night"], row["value"]) for row in found] == [(ODD, 0.5), (ODD, 0.25)]
    assert found[1]["started_at"] - found[0]["started_at"] == timedelta(days=1)


def test_the_lineage_tells_the_way_and_what_it_took(store: ResultsStore) -> None:
    made = (pruned(), repaired(pruned()))
    names = ("dense", made[0].name, made[1].name)
    stages = [
        StageRow(run_key="r1", name=name, stage_key=f"key-{name}", kind="checkpoint", status="cached", seconds=seconds)
        for name, seconds in zip(names, (1.0, 20.0, None), strict=True)
    ]
    store.record(run_row("r1"), stages, checkpoints=checkpoints("r1", *made))
    found = rows(store, "FROM lineage")
    assert [
        (row["checkpoint"], row["source"], row["plugin"], row["seconds"], row["total_seconds"]) for row in found
    ] == [
        ("dense", None, None, 1.0, 1.0),
        ("slimgpt-20", "dense", "slimgpt", 20.0, 21.0),
        ("slimgpt-20+lora", "slimgpt-20", "lora", None, None),
    ]
    assert found[-1]["path"] == list(names)


def test_two_steps_remove_from_what_the_first_left(store: ResultsStore) -> None:
    first = pruned(0.5)
    second = Made("both", first.name, "prune", "shortened", {"sparsity": 0.2}, 0.2)
    counted = Made("counted", "both", "prune", "shortened", {"layers": 3})
    dense, one, two, three = checkpoints("r1", first, second, counted)
    assert [row.total_sparsity for row in (dense, one, two, three)] == [None, 0.5, 0.6, None]
    assert (two.method, two.source_key) == ("slimgpt+shortened", one.checkpoint_key)
    assert json.loads(two.config) == {
        **{"model.id": "tiny", "model.dtype": "float32"},
        **{
            "steps.0.method": "slimgpt",
            "steps.0.sparsity": 0.5,
            "steps.1.method": "shortened",
            "steps.1.sparsity": 0.2,
        },
    }


def test_ablations_differ_in_exactly_one_option(store: ResultsStore) -> None:
    news, c4 = (
        {"calibration": {"data": {"dataset": "news"}, "seed": 0}},
        {"calibration": {"data": {"dataset": "c4"}, "seed": 0}},
    )
    made = (
        pruned(name="a", curve="uniform", gcd=None, **news),
        pruned(name="b", curve="log", gcd=None, **news),
        pruned(name="c", curve="log", gcd=True, **news),
        pruned(name="d", curve="log", gcd=True, **c4),
        repaired(pruned(name="d")),
    )
    add(store, "r1", made=made)
    add(store, "r2", made=made, name="the same checkpoints again")
    found = rows(store, "FROM ablations ORDER BY checkpoint")
    assert [
        (row["field"], row["value"], row["other_value"], row["checkpoint"], row["other_checkpoint"]) for row in found
    ] == [
        ("steps.0.curve", '"uniform"', '"log"', "a", "b"),
        ("steps.0.gcd", "null", "true", "b", "c"),
        ("steps.0.calibration.data", '{"dataset":"news"}', '{"dataset":"c4"}', "c", "d"),
    ]


def test_published_figures_are_never_among_ours(store: ResultsStore) -> None:
    add(store, "r1")
    found = rows(store, "FROM published WHERE metric = 'ppl@128' AND method = 'slimgpt' AND sparsity = 0.5")
    assert sorted({row["value"] for row in found if row["recovery"] is None}) == [
        38.83,
        46.57,
        54.94,
        123.0,
        381.0,
        933.0,
    ]
    assert rows(store, "FROM leaderboard WHERE model LIKE 'LLaMA%'") == []


def test_an_index_with_other_views_gets_ours(store: ResultsStore) -> None:
    add(store, "r1")
    with duckdb.connect(str(store.path)) as connection:
        connection.execute("DROP VIEW leaderboard; UPDATE schema_version SET views = 'of another slimline'")
    assert len(rows(store, "FROM leaderboard")) == 2
    with duckdb.connect(str(store.path), read_only=True) as connection:
        assert connection.execute("SELECT count(*) FROM leaderboard").fetchall() == [(2,)]


def test_checkpoints_of_format_5_follow_from_its_spec(store: ResultsStore) -> None:
    steps = [
        {
            "method": "slimgpt",
            "name": "",
            "sparsity": [0.2, 0.5],
            "variants": {"log": {}, "flat": {"curve": "uniform"}},
        },
        {"recovery": "lora", "name": ""},
    ]
    spec = json.dumps({"model": {"id": "tiny"}, "calibration": {"seed": 1}, "steps": steps})
    names = ("dense", "log-20", "log-20+lora", "flat-50")
    store.record(run_row("r1", spec=spec), metrics=[measured("r1", name, PPL, 1.0) for name in names])
    (path,) = store.files.folder.glob("runs/*.parquet")
    as_of_format_5(path)
    store.path.unlink()
    found = store.checkpoints()
    assert [(row.checkpoint, row.source, row.variant, row.total_sparsity) for row in found] == [
        ("dense", None, None, None),
        ("log-20", "dense", "log", 0.2),
        ("log-20+lora", "log-20", "log", 0.2),
        ("flat-50", "dense", "flat", 0.5),
    ]
    assert json.loads(found[-1].config)["steps.0.curve"] == "uniform"
    assert json.loads(found[-1].config)["steps.0.calibration.seed"] == 1


def as_of_format_5(path: Path) -> None:
    (values,) = pq.read_table(path).drop_columns(["digest", "checkpoints"]).to_pylist()
    values["format"] = 5
    table = pa.Table.from_pylist([values])
    digest = result_files._digest(table.to_pylist()[0])
    pq.write_table(table.append_column("digest", pa.array([digest])), path)


@pytest.mark.parametrize(
    "question, reason",
    [
        ("DELETE FROM runs", "results are only read: DELETE is not allowed"),
        ("COPY runs TO 'x.csv'", "results are only read: COPY is not allowed"),
        ("EXPLAIN ANALYZE DELETE FROM runs", "results are only read: EXPLAIN is not allowed"),
        ("ATTACH 'x.duckdb'", "results are only read: ATTACH is not allowed"),
        ("SELECT 1; DELETE FROM runs", "one question at a time: that is 2 statements"),
        ("", "one question at a time: that is 0 statements"),
        ("SELEKT 1", "DuckDB cannot read that: Parser Error"),
        ("SELECT nothing FROM runs", "DuckDB cannot answer that: Binder Error"),
        (
            "FROM leaderbord",
            "DuckDB cannot answer that: Catalog Error: Table with name leaderbord does not exist! "
            'Did you mean "leaderboard"? (all tables: slimline help results-schema)',
        ),
        ("SELECT 1 FROM nowhere", "DuckDB cannot answer that: Catalog Error"),
        ("SELECT nextval('numbers')", "DuckDB cannot answer that"),
        ("SELECT CAST('x' AS INTEGER)", "DuckDB cannot answer that: Conversion Error"),
    ],
)
def test_only_one_select_is_answered(store: ResultsStore, question: str, reason: str) -> None:
    add(store, "r1")
    before = store.path.stat().st_ino
    with pytest.raises(QuestionRefused) as refused:
        store.select(question)
    assert str(refused.value).startswith(reason)
    assert "\n" not in str(refused.value)
    assert store.path.stat().st_ino == before, "a question is no reason to make the index anew"
    assert not list(store.path.parent.glob("*.damaged"))
    assert [row.run_key for row in store.runs()] == ["r1"]


def test_an_empty_store_is_asked_in_vain(store: ResultsStore) -> None:
    for view in ("leaderboard", "pareto", "history", "lineage", "ablations", "runs"):
        assert store.select(f"FROM {view}").rows == ()


def test_questions_do_not_stop_a_run_from_being_recorded(store: ResultsStore) -> None:
    add(store, "r1")
    with duckdb.connect(str(store.path), read_only=True):  # somebody asks, for hours
        add(store, "r2", name="recorded meanwhile")
        assert [row["spec"] for row in rows(store, "SELECT DISTINCT spec FROM leaderboard ORDER BY spec")] == [
            "demo",
            "recorded meanwhile",
        ]


def test_many_ask_while_one_writes(store: ResultsStore) -> None:
    add(store, "r0")
    problems: list[BaseException] = []

    def ask() -> None:
        try:
            for _ in range(5):
                assert store.select("SELECT count(*) FROM leaderboard").rows[0][0] >= 2
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in range(5):
        add(store, f"r{number}", name=f"spec {number}")
    for thread in threads:
        thread.join()
    assert problems == []
