from __future__ import annotations

import math
import threading
import time
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import duckdb
import pytest
from pydantic import ValidationError

from infra.errors import ResultsUnusable
from infra.results import MIGRATIONS, TABLES, LayerRow, MetricRow, ResultsStore, RunRow, StageRow
from tests.infra.processes import finish, kill_after_line, start

NOON = datetime(2025, 6, 1, 12, 0, 0, 123456, tzinfo=UTC)


@pytest.fixture
def store(tmp_path: Path) -> ResultsStore:
    return ResultsStore(tmp_path / "new" / "results.duckdb")


def run_row(key: str = "r1", **changes: object) -> RunRow:
    fields: dict[str, object] = {
        "run_key": key,
        "name": "demo",
        "spec": '{"model":  {"id": "x"}}',
        "status": "completed",
        "started_at": NOON,
        "finished_at": NOON + timedelta(minutes=1),
        "slimline_version": "0.1",
    }
    return RunRow.model_validate(fields | changes)


def stage_row(key: str = "r1", name: str = "prune") -> StageRow:
    return StageRow(run_key=key, name=name, stage_key=f"{name}-v1-0", kind="prune", status="cached")


def metric_row(key: str = "r1", task: str = "piqa", value: float = 0.5) -> MetricRow:
    return MetricRow(run_key=key, checkpoint="dense", checkpoint_key="c", stage_key="s", suite="zero_shot", task=task,
                     metric="acc", value=value, stderr=0.01, num_fewshot=0, protocol='{"limit": null}')  # fmt: skip


def layer_row(key: str = "r1", layer: int = 0) -> LayerRow:
    return LayerRow(run_key=key, stage_key="s", layer=layer, sub_layer="mlp", kept=3, total=4, sparsity=0.25)


def test_rows_come_back_as_they_were(store: ResultsStore) -> None:
    run = run_row(git_revision="abc", message='it\'s "fine"; --', mlflow_run_id="m")
    stages = [stage_row(name="sample"), stage_row(name="prune")]
    metrics = [metric_row(task=f"task{index}", value=index / 3) for index in range(300)]
    layers = [layer_row(layer=layer) for layer in (2, 0, 1)]
    store.record(run, stages, metrics, layers)
    assert store.runs() == (run,)
    assert store.stages("r1") == tuple(stages)
    assert store.stages() == tuple(stages)
    assert store.metrics("r1") == tuple(metrics)
    assert store.layers("r1") == tuple(layers)
    assert store.metrics("other") == ()


def test_before_the_first_record_there_is_nothing(store: ResultsStore) -> None:
    assert [store.runs(), store.metrics(), store.stages(), store.layers()] == [(), (), (), ()]
    assert not store.path.exists()


def test_odd_numbers_survive(store: ResultsStore) -> None:
    store.record(run_row(), metrics=[metric_row(value=math.nan), metric_row(value=math.inf)])
    first, second = store.metrics()
    assert math.isnan(first.value)
    assert second.value == math.inf


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
    store.record(run_row(status="failed"), [stage_row()], [metric_row(), metric_row(task="boolq")], [layer_row()])
    for _ in range(2):
        store.record(run_row(), [stage_row()], [metric_row(value=0.75)])
    assert [(run.run_key, run.status) for run in store.runs()] == [("other", "completed"), ("r1", "completed")]
    assert store.metrics("r1") == (metric_row(value=0.75),)
    assert store.layers("r1") == ()
    assert len(store.metrics("other")) == len(store.layers("other")) == len(store.stages("other")) == 1


def test_a_row_that_cannot_be_written_leaves_the_old_record(store: ResultsStore) -> None:
    store.record(run_row(), [stage_row()], [metric_row()])
    broken = metric_row().model_copy(update={"num_fewshot": 2**40})
    with pytest.raises(ResultsUnusable):
        store.record(run_row(status="failed"), [], [metric_row(), broken])
    assert store.runs()[0].status == "completed"
    assert store.metrics() == (metric_row(),)


def test_rows_of_another_run_are_our_mistake(store: ResultsStore) -> None:
    with pytest.raises(AssertionError):
        store.record(run_row("r1"), [stage_row("r2")])


def test_columns_are_the_fields(store: ResultsStore) -> None:
    store.record(run_row())
    with duckdb.connect(str(store.path)) as connection:
        for table, row in TABLES.items():
            columns = [name for name, *_ in connection.execute(f"DESCRIBE {table}").fetchall()]
            assert columns == list(row.model_fields)


RECORDER = """
import sys
from pathlib import Path
from infra.results import ResultsStore
from tests.infra.test_results import layer_row, metric_row, run_row, stage_row
store, name = ResultsStore(Path(sys.argv[1])), sys.argv[2]
for index in range(int(sys.argv[3])):
    key = f"{name}{index}"
    store.record(run_row(key), [stage_row(key)], [metric_row(key, f"t{i}") for i in range(20)], [layer_row(key)])
    print(key, flush=True)
"""


def test_four_processes_record_ten_runs_each_at_once(store: ResultsStore) -> None:
    for child in [start(RECORDER, store.path, name, 10) for name in "abcd"]:
        finish(child)
    assert {run.run_key for run in store.runs()} == {f"{name}{index}" for name in "abcd" for index in range(10)}
    assert len(store.runs()) == 40
    assert len(store.metrics()) == 800


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


def test_a_kill_inside_the_transaction_leaves_no_partial_run(store: ResultsStore) -> None:
    store.record(run_row("before"))
    code = """
import sys, time
from pathlib import Path
import infra.results as results
from tests.infra.test_results import metric_row, run_row
real = results._insert
def slow(connection, table, rows):
    real(connection, table, rows)
    if table == "metrics":
        print("half", flush=True)
        time.sleep(600)
results._insert = slow
results.ResultsStore(Path(sys.argv[1])).record(run_row("partial"), metrics=[metric_row("partial")])
"""
    assert kill_after_line(start(code, store.path)) == "half"
    assert [run.run_key for run in store.runs()] == ["before"]
    assert store.metrics() == ()


def add_note(connection: duckdb.DuckDBPyConnection) -> None:
    connection.execute("ALTER TABLE runs ADD COLUMN note VARCHAR DEFAULT 'old'")


def versions(path: Path) -> list[int]:
    with duckdb.connect(str(path)) as connection:
        found = connection.execute("SELECT version FROM schema_version ORDER BY version").fetchall()
    return [version for (version,) in found]


@pytest.mark.parametrize("first", ["read", "write"])
def test_an_old_file_is_migrated_once(store: ResultsStore, first: str) -> None:
    store.record(run_row("old"), metrics=[metric_row("old")])
    assert versions(store.path) == [1]
    newer = ResultsStore(store.path, migrations=(*MIGRATIONS, add_note))
    for _ in range(2):
        newer.record(run_row("new")) if first == "write" else newer.runs()
    assert versions(store.path) == [1, 2]
    with duckdb.connect(str(store.path)) as connection:
        assert connection.execute("SELECT note FROM runs WHERE run_key = 'old'").fetchall() == [("old",)]
    assert newer.metrics("old") == (metric_row("old"),)


def test_a_failed_migration_changes_nothing(store: ResultsStore) -> None:
    def broken(connection: duckdb.DuckDBPyConnection) -> None:
        add_note(connection)
        connection.execute("SELECT nonsense")

    store.record(run_row())
    with pytest.raises(ResultsUnusable):
        ResultsStore(store.path, migrations=(*MIGRATIONS, broken)).record(run_row("new"))
    assert versions(store.path) == [1]
    assert store.runs() == (run_row(),)
    ResultsStore(store.path, migrations=(*MIGRATIONS, add_note)).record(run_row("new"))


def test_a_file_of_a_newer_slimline_is_refused(store: ResultsStore) -> None:
    ResultsStore(store.path, migrations=(*MIGRATIONS, add_note)).record(run_row())
    for use in (store.runs, lambda: store.record(run_row())):
        with pytest.raises(ResultsUnusable, match=r"newer slimline \(schema 2, this one knows 1\); upgrade"):
            use()


def test_unusable_files_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "corrupt.duckdb").write_bytes(b"not a database" * 1000)
    (tmp_path / "empty.duckdb").touch()
    (tmp_path / "folder.duckdb").mkdir()
    (tmp_path / "file").touch()
    for path in ("corrupt.duckdb", "empty.duckdb", "folder.duckdb", "file/results.duckdb", "/proc/no/r.duckdb"):
        store = ResultsStore(tmp_path / path)
        with pytest.raises(ResultsUnusable, match=r"cannot be used: .*SLIMLINE_RESULTS_DB") as caught:
            store.record(run_row())
        assert str(store.path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_damaged_block_is_one_sentence(store: ResultsStore) -> None:
    store.record(run_row(), metrics=[metric_row(task=f"t{index}") for index in range(500)])
    content = bytearray(store.path.read_bytes())
    content[4096:] = bytes(len(content) - 4096)
    store.path.write_bytes(content)
    with pytest.raises(ResultsUnusable, match="cannot be used"):
        store.runs()


def test_a_file_that_stays_in_use_is_named_with_its_user(store: ResultsStore) -> None:
    store.record(run_row())
    code = "import duckdb, sys, time; c = duckdb.connect(sys.argv[1]); print('open', flush=True); time.sleep(600)"
    user = start(code, store.path)
    assert user.stdout is not None
    user.stdout.readline()
    try:
        with pytest.raises(ResultsUnusable, match=rf"in use for 0 s; close the program .*PID {user.pid}"):
            ResultsStore(store.path, timeout_seconds=0.3).record(run_row())
    finally:
        user.kill()
        user.communicate()
    store.record(run_row())
