from __future__ import annotations

import math
import threading
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path

import duckdb
import pytest
from pydantic import ValidationError

from infra.errors import ResultsUnusable
from infra.results.rows import TABLES
from infra.results.store import ResultsStore
from infra.settings import Settings
from tests.infra.processes import finish, start
from tests.infra.result_examples import (
    NOON,
    cell_row,
    curve_row,
    figure_row,
    layer_row,
    metric_row,
    night_row,
    pair_row,
    run_row,
    stage_row,
)

pytestmark = pytest.mark.slow  # not in `make test-fast`


@pytest.fixture
def store(tmp_path: Path) -> ResultsStore:
    return ResultsStore(tmp_path / "new" / "results.duckdb")


def test_rows_come_back_as_they_were(store: ResultsStore) -> None:
    run = run_row(git_revision="abc", message='it\'s "fine"; --', mlflow_run_id="m")
    stages = [stage_row(name="sample"), stage_row(name="prune")]
    metrics = [metric_row(task=f"task{index}", value=index / 3) for index in range(300)]
    layers = [layer_row(layer=layer) for layer in (2, 0, 1)]
    pairs = [pair_row(task=task) for task in ("piqa", "arc")]
    curves = [curve_row(step=step, value=step / 3) for step in (3, 1, 2)]
    store.record(run, stages, metrics, layers, pairs, curves)
    assert store.runs() == (run,)
    assert store.stages("r1") == tuple(stages)
    assert store.stages() == tuple(stages)
    assert store.metrics("r1") == tuple(metrics)
    assert store.layers("r1") == tuple(layers)
    assert store.pairs("r1") == tuple(pairs)
    assert store.curves("r1") == store.curves() == tuple(curves)
    assert store.metrics("other") == store.pairs("other") == store.curves("other") == ()


def test_nights_come_back_by_their_start(store: ResultsStore) -> None:
    later = night_row("n0", started_at=NOON + timedelta(days=1), previous_night_id="n1", gates_passed=False)
    other = night_row("n2", name="other", message="no")
    for night in (later, night_row(), other):
        cells = [cell_row(night.night_id, cell) for cell in ("b", "a")]
        store.record_night(night, cells, [figure_row(night.night_id, task) for task in ("piqa", "arc")])
    assert store.nights() == (night_row(), other, later)
    assert store.nights("small") == (night_row(), later)
    assert store.night_cells("n0") == (cell_row("n0", "b"), cell_row("n0", "a"))
    assert store.night_figures("n1") == (figure_row("n1", "piqa"), figure_row("n1", "arc"))
    assert store.nights("none") == store.night_cells("none") == store.runs() == ()
    store.record_night(night_row(status="failed"))
    assert [night.status for night in store.nights("small")] == ["failed", "completed"]
    assert store.night_cells("n1") == store.night_figures("n1") == ()
    store.record(run_row("n1"))
    assert len(store.nights()) == 3


def test_before_the_first_record_there_is_nothing(store: ResultsStore) -> None:
    assert [store.runs(), store.metrics(), store.stages(), store.layers(), store.nights()] == [()] * 5
    assert not store.path.exists()
    assert not store.files.folder.exists()


def test_odd_numbers_survive(store: ResultsStore) -> None:
    store.record(
        run_row(),
        metrics=[metric_row(value=math.nan), metric_row(value=math.inf)],
        curves=[curve_row(value=math.nan), curve_row(step=2, value=-math.inf)],
    )
    first, second = store.metrics()
    assert math.isnan(first.value)
    assert second.value == math.inf
    assert [str(point.value) for point in store.curves()] == ["nan", "-inf"]


def test_times_are_kept_as_moments(store: ResultsStore) -> None:
    store.record(run_row(started_at=NOON.astimezone(timezone(timedelta(hours=5)))))
    assert store.runs()[0].started_at == NOON
    with duckdb.connect(str(store.path)) as connection:
        assert connection.execute("SELECT started_at FROM runs").fetchall() == [(NOON.replace(tzinfo=None),)]
    with pytest.raises(ValidationError, match="timezone"):
        run_row(started_at=datetime(2025, 6, 1))


def test_json_columns_hold_json(store: ResultsStore) -> None:
    store.record(run_row())
    with duckdb.connect(str(store.path)) as connection:
        assert connection.execute("SELECT spec->'model'->>'id' FROM runs").fetchall() == [("x",)]
    with pytest.raises(ValidationError):
        run_row(spec="{not json")


def test_recording_again_replaces(store: ResultsStore) -> None:
    store.record(run_row("other"), [stage_row("other")], [metric_row("other")], [layer_row("other")])
    more = [metric_row(), metric_row(task="boolq")]
    store.record(run_row(status="failed"), [stage_row()], more, [layer_row()], curves=[curve_row()])
    for value in (0.25, 0.75):
        store.record(run_row(), [stage_row()], [metric_row(value=value)])
    assert [(run.run_key, run.status) for run in store.runs()] == [("other", "completed"), ("r1", "completed")]
    assert store.metrics("r1") == (metric_row(value=0.75),)
    assert store.layers("r1") == store.curves("r1") == ()
    assert len(store.metrics("other")) == len(store.layers("other")) == len(store.stages("other")) == 1


def test_a_row_that_cannot_be_written_leaves_the_old_record(store: ResultsStore) -> None:
    store.record(run_row(), [stage_row()], [metric_row()])
    broken = metric_row().model_copy(update={"num_fewshot": 2**70})
    with pytest.raises(OverflowError):
        store.record(run_row(status="failed"), [], [metric_row(), broken])
    assert store.runs()[0].status == "completed"
    assert store.metrics() == (metric_row(),)


def test_rows_of_another_run_are_our_mistake(store: ResultsStore) -> None:
    with pytest.raises(AssertionError):
        store.record(run_row("r1"), [stage_row("r2")])


@pytest.mark.parametrize("key", ["../r1", "a/b", "", ".r1", "é", "r\n"])
def test_a_key_cannot_lead_out_of_the_folder(key: str, store: ResultsStore) -> None:
    with pytest.raises(ResultsUnusable, match="cannot be the key of a run"):
        store.record(run_row(key))
    with pytest.raises(ResultsUnusable, match="cannot be the key of a run"):
        store.export_file(key)


def test_a_key_may_be_longer_than_the_name_of_a_file(store: ResultsStore) -> None:
    keys = ["r" * 300 + end for end in "ab"]
    for key in keys:
        store.record(run_row(key), metrics=[metric_row(key)])
    assert [run.run_key for run in store.runs()] == keys
    assert store.metrics(keys[1]) == (metric_row(keys[1]),)
    assert store.export_file(keys[0]) != store.export_file(keys[1])


def test_columns_are_the_fields(store: ResultsStore) -> None:
    store.record(run_row())
    with duckdb.connect(str(store.path)) as connection:
        for table, row in TABLES.items():
            columns = [name for name, *_ in connection.execute(f"DESCRIBE {table}").fetchall()]
            assert columns == list(row.model_fields)


def test_the_folder_is_beside_the_index_or_where_the_settings_say(tmp_path: Path) -> None:
    assert ResultsStore(tmp_path / "results.duckdb").files.folder == tmp_path / "results"
    assert ResultsStore(tmp_path / "results").files.folder == tmp_path / "results.files"
    store = ResultsStore.of(Settings(home=tmp_path / "home", results_folder=tmp_path / "shared"))
    store.record(run_row())
    assert store.path == tmp_path / "home" / "results.duckdb"
    assert store.export_file("r1") == tmp_path / "shared" / "runs" / "r1.parquet"


def test_two_machines_share_a_folder(tmp_path: Path) -> None:
    first, second = (ResultsStore(tmp_path / name / "index.duckdb", tmp_path / "shared") for name in "ab")
    first.record(run_row("a"))
    second.record(run_row("b"))
    first.record(run_row("b", status="failed"))
    for store in (first, second):
        assert [(run.run_key, run.status) for run in store.runs()] == [("a", "completed"), ("b", "failed")]


RECORDER = """
import sys
from pathlib import Path
from infra.results.store import ResultsStore
from tests.infra.result_examples import layer_row, metric_row, run_row, stage_row
store, name = ResultsStore(Path(sys.argv[1])), sys.argv[2]
for index in range(int(sys.argv[3])):
    key = f"{name}{index}"
    store.record(run_row(key), [stage_row(key)], [metric_row(key, f"t{i}") for i in range(20)], [layer_row(key)])
    print(key, flush=True)
"""


@pytest.mark.slow
def test_four_processes_record_twenty_runs_each_at_once(
    store: ResultsStore, record_property: pytest.RecordProperty
) -> None:
    started = time.monotonic()
    for child in [start(RECORDER, store.path, name, 20) for name in "abcd"]:
        finish(child)
    record_property("seconds", time.monotonic() - started)
    assert {run.run_key for run in store.runs()} == {f"{name}{index}" for name in "abcd" for index in range(20)}
    assert len(store.runs()) == 80
    assert len(store.metrics()) == 1600


def test_threads_read_and_write_at_once(store: ResultsStore) -> None:
    problems: list[Exception] = []

    def work(name: str) -> None:
        try:
            for index in range(5):
                store.record(run_row(f"{name}{index}"), metrics=[metric_row(f"{name}{index}")])
                ResultsStore(store.path).metrics()
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert len(store.runs()) == len(store.metrics()) == 20


def test_a_killed_process_leaves_whole_runs_only(store: ResultsStore) -> None:
    child = start(RECORDER, store.path, "k", 10_000)
    assert child.stdout is not None
    acknowledged = [child.stdout.readline().strip() for _ in range(5)]
    time.sleep(0.03)
    child.kill()
    rest, _ = child.communicate()
    acknowledged += rest.split()
    recorded = [run.run_key for run in store.runs()]
    assert set(acknowledged) <= set(recorded)
    for key in recorded:
        assert (len(store.stages(key)), len(store.metrics(key)), len(store.layers(key))) == (1, 20, 1)
    store.record(run_row("after"))
