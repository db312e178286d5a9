"""The files that are the truth: whole or not there, and named when they cannot be read."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from contextlib import suppress
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.errors import DiskFull, ResultsUnusable
from infra.filesystem import disk
from infra.log_once import warn_once
from infra.results import files as result_files
from infra.results.rows import FORMAT, KINDS, RUN
from infra.results.store import ResultsStore
from tests.infra.processes import kill_after_line, start
from tests.infra.result_examples import cell_row, figure_row, layer_row, metric_row, night_row, run_row, stage_row


@pytest.fixture(autouse=True)
def _warned_of_nothing() -> None:
    warn_once.cache_clear()


@pytest.fixture
def store(tmp_path: Path) -> ResultsStore:
    return ResultsStore(tmp_path / "results.duckdb")


@pytest.fixture
def other(tmp_path: Path) -> ResultsStore:
    return ResultsStore(tmp_path / "other" / "results.duckdb")


def keys(store: ResultsStore) -> list[str]:
    return [run.run_key for run in store.runs()]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def change(path: Path, column: str, value: object) -> None:
    table = pq.read_table(path)
    index = table.schema.get_field_index(column)
    field = table.schema.field(index)
    pq.write_table(table.set_column(index, field, pa.array([value], field.type)), path)


def test_files_can_be_asked_without_slimline(store: ResultsStore) -> None:
    store.record(run_row(), [stage_row()], [metric_row(), metric_row(task="boolq")])
    store.record_night(night_row(), [cell_row()])
    with duckdb.connect(":memory:") as connection:
        found = connection.execute(
            f"SELECT run.name, metric.task, metric.value FROM "
            f"(SELECT run, unnest(metrics) AS metric FROM '{store.files.folder}/runs/*.parquet')"
        )
        assert found.fetchall() == [("demo", "piqa", 0.5), ("demo", "boolq", 0.5)]
        found = connection.execute(f"SELECT night.name, format FROM '{store.files.folder}/nights/*.parquet'")
        assert found.fetchall() == [("small", FORMAT)]


def test_the_format_is_counted_up_when_rows_change() -> None:
    """Who changes a row gives the new field a default, counts FORMAT up and puts the new digest here."""
    schemas = "\n".join(str(result_files._file_schema(kind)) for kind in KINDS)
    digests = {
        2: "820032811472793e",
        3: "22196f915068467f",
        4: "7258ff0c94b06786",
        5: "91a27d36860d93a4",
        6: "cbaa6610cddab18e",
    }
    assert hashlib.sha256(schemas.encode()).hexdigest()[:16] == digests[FORMAT]


def test_a_file_of_the_format_before_is_read(store: ResultsStore) -> None:
    store.record(run_row(), [stage_row()], [metric_row()])
    store.record_night(night_row(), [cell_row()], [figure_row()])
    for path in store.files.folder.glob("*/*.parquet"):
        as_of_format_2(path)
    store.path.unlink()
    assert (store.runs(), store.metrics()) == ((run_row(),), (metric_row(),))
    assert store.pairs() == store.curves() == ()
    assert store.night_figures("n1") == (figure_row(),)


def as_of_format_2(path: Path) -> None:
    """There were neither pairs nor curves, and figures of nights had no test."""
    (values,) = pq.read_table(path).drop_columns(["digest"]).to_pylist()
    values["format"] = 2
    for table in ("pairs", "curves"):
        values.pop(table, None)
    for figure in values.get("night_figures", ()):
        del figure["test"]
    table = pa.Table.from_pylist([values])
    digest = result_files._digest(table.to_pylist()[0])
    pq.write_table(table.append_column("digest", pa.array([digest])), path)


def test_only_what_our_own_writers_left_is_swept(store: ResultsStore) -> None:
    store.record(run_row())
    folder = store.path.with_suffix("") / "runs"
    left, theirs = folder / f"{'0f' * 16}.writing", folder / "notes-on-these-runs.writing"
    for path in (left, theirs):
        path.touch()
        os.utime(path, (0, 0))
    store.record(run_row(run_key="another-v1-0123456789abcdef"))
    assert not left.exists()
    assert theirs.exists()


def test_a_writer_killed_before_the_rename_leaves_nothing_to_see(store: ResultsStore) -> None:
    store.record(run_row("before"))
    code = """
import os, sys, time
from pathlib import Path
from infra.results.store import ResultsStore
from tests.infra.result_examples import metric_row, run_row
def replace(source, target):
    print(source, flush=True)
    time.sleep(600)
os.replace = replace
ResultsStore(Path(sys.argv[1])).record(run_row("before", status="failed"), metrics=[metric_row("before")])
"""
    unfinished = Path(kill_after_line(start(code, store.path)))
    assert unfinished.exists()
    assert store.runs() == (run_row("before"),)
    assert store.metrics() == ()
    store.record(run_row("after"))
    assert unfinished.exists(), "it might be the file of a living writer"
    os.utime(unfinished, (0, 0))
    store.record(run_row("after"))
    assert not unfinished.exists()
    assert keys(store) == ["before", "after"]


@pytest.mark.parametrize("harm", ["cut", "flipped", "empty", "other"])
def test_a_damaged_file_is_named_and_the_others_are_read(
    harm: str, store: ResultsStore, caplog: pytest.LogCaptureFixture
) -> None:
    for key in "abc":
        store.record(run_row(key), metrics=[metric_row(key, task=f"task{index}") for index in range(50)])
    path = store.export_file("b")
    content = path.read_bytes()
    place = content.index(b"zero_shot")
    harmed = {
        "cut": content[:-100],
        "flipped": content[:place] + b"X" + content[place + 1 :],
        "empty": b"",
        "other": b"no parquet" * 100,
    }
    path.write_bytes(harmed[harm])
    for reader in (store, store, ResultsStore(store.path)):
        assert keys(reader) == ["a", "c"]
        assert len(reader.metrics()) == 100
    with pytest.raises(ResultsUnusable, match=f"^{path} "):
        ResultsStore(store.path).check()
    (warning,) = warnings(caplog)
    assert str(path) in warning
    assert "\n" not in warning
    assert warning.endswith("the other results are complete")
    path.write_bytes(content)
    assert keys(store) == ["a", "b", "c"]
    assert store.check() == f"{store.files.folder}: 3 runs, 0 nights (index: {store.path})"


def test_no_change_of_a_byte_raises_anything_else(store: ResultsStore) -> None:
    store.record(run_row(), [stage_row()], [metric_row()], [layer_row()])
    content = store.export_file("r1").read_bytes()
    for place in range(0, len(content), 29):
        harmed = content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1 :]
        with suppress(ResultsUnusable):
            result_files.decode(harmed, Path("r1.parquet"))


def test_a_file_of_a_newer_slimline_is_skipped_with_a_warning(
    store: ResultsStore, other: ResultsStore, caplog: pytest.LogCaptureFixture
) -> None:
    for key in "ab":
        store.record(run_row(key))
    path = store.export_file("b")
    change(path, "format", FORMAT + 1)
    assert keys(store) == ["a"]
    (warning,) = warnings(caplog)
    assert f"{path} was written by a newer slimline (format {FORMAT + 1}, this one knows {FORMAT}); upgrade" in warning
    with pytest.raises(ResultsUnusable, match="newer slimline"):
        other.add_file(path)


def test_a_file_under_a_wrong_name_is_not_believed(store: ResultsStore, caplog: pytest.LogCaptureFixture) -> None:
    store.record(run_row("a"))
    shutil.copyfile(store.export_file("a"), store.files.path(RUN, "b"))
    assert keys(store) == ["a"]
    assert "b.parquet holds run a" in warnings(caplog)[0]


def test_a_file_that_goes_is_missed(store: ResultsStore, caplog: pytest.LogCaptureFixture) -> None:
    for key in "ab":
        store.record(run_row(key), metrics=[metric_row(key)])
    store.export_file("a").unlink()
    assert keys(store) == ["b"]
    assert store.metrics() == (metric_row("b"),)
    assert warnings(caplog) == [f"1 of the results that were in {store.files.folder} are no longer there"]


def test_a_clock_that_jumps_loses_nothing(store: ResultsStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.record(run_row(), metrics=[metric_row(value=0.25)])
    real = os.replace

    def stamped(source: Path, target: Path) -> None:
        os.utime(source, (0, 0))  # the clock says 1970 whenever a file is written
        real(source, target)

    monkeypatch.setattr(os, "replace", stamped)
    for value in (0.5, 0.75, 0.625):
        store.record(run_row(), metrics=[metric_row(value=value)])
        assert store.metrics() == (metric_row(value=value),)


def test_a_file_that_is_written_over_with_its_date_kept_is_read_anew(
    store: ResultsStore, other: ResultsStore, tmp_path: Path
) -> None:
    for each, value in ((store, 0.25), (other, 0.75)):
        each.record(run_row(), metrics=[metric_row(value=value)])
    file, state = store.export_file("r1"), store.export_file("r1").stat()
    assert store.metrics() == (metric_row(value=0.25),)
    while other.export_file("r1").stat().st_size != state.st_size:  # of a hundred digests one is compressed better
        other.record(run_row(), metrics=[metric_row(value=0.75)])
    file.write_bytes(other.export_file("r1").read_bytes())  # as rsync --inplace does
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_ino) == (state.st_size, state.st_ino)
    assert store.metrics() == (metric_row(value=0.75),)


def test_a_file_goes_from_store_to_store(store: ResultsStore, other: ResultsStore, tmp_path: Path) -> None:
    store.record(run_row(), [stage_row()], [metric_row()], [layer_row()])
    carried = shutil.copyfile(store.export_file("r1"), tmp_path / "carried")
    for _ in range(2):
        assert other.add_file(carried) == "r1"
        assert (other.runs(), other.stages()) == ((run_row(),), (stage_row(),))
        assert (other.metrics(), other.layers()) == ((metric_row(),), (layer_row(),))
    assert other.export_file("r1").read_bytes() == carried.read_bytes()
    with pytest.raises(ResultsUnusable, match="no run 'r2' is recorded"):
        store.export_file("r2")


def test_what_was_recorded_later_is_kept(store: ResultsStore, other: ResultsStore) -> None:
    store.record(run_row(status="failed"))
    other.record(run_row())
    other.add_file(store.export_file("r1"))
    assert other.runs() == (run_row(),)
    store.record(run_row(message="newest"))
    other.add_file(store.export_file("r1"))
    assert other.runs() == (run_row(message="newest"),)
    other.export_file("r1").write_bytes(b"damaged")
    other.add_file(store.export_file("r1"))
    assert other.runs() == (run_row(message="newest"),)


def test_nothing_but_a_results_file_is_taken_in(store: ResultsStore, other: ResultsStore, tmp_path: Path) -> None:
    store.record(run_row())
    path = tmp_path / "foreign.parquet"
    run = run_row().model_dump()
    shutil.copyfile(store.export_file("r1"), path)
    for column, value in {"run": {**run, "run_key": "../../r1"}, "stages": [stage_row("r2").model_dump()]}.items():
        shutil.copyfile(store.export_file("r1"), path)
        change(path, column, value)
        with pytest.raises(ResultsUnusable):
            other.add_file(path)
    pq.write_table(pa.table({"a": [1]}), path)
    with pytest.raises(ResultsUnusable, match="is not a results file or is damaged"):
        other.add_file(path)
    with pytest.raises(ResultsUnusable, match="cannot be read"):
        other.add_file(tmp_path / "none.parquet")
    assert other.runs() == ()
    assert not other.files.folder.exists()


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "results", Path("/proc/no")):
        with pytest.raises(ResultsUnusable, match="SLIMLINE_RESULTS_FOLDER") as caught:
            ResultsStore(tmp_path / "results.duckdb", folder).record(run_row())
        assert str(folder) in str(caught.value)
        assert "\n" not in str(caught.value)
        with pytest.raises(ResultsUnusable, match="SLIMLINE_RESULTS_FOLDER"):
            ResultsStore(tmp_path / "results.duckdb", folder).check()
    with pytest.raises(ResultsUnusable, match="cannot be read"):
        ResultsStore(tmp_path / "results.duckdb", tmp_path / "file").runs()


def test_a_full_disk_is_named_and_the_old_record_stays(store: ResultsStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.record(run_row())

    def full(descriptor: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(disk.os, "fsync", full)
    with pytest.raises(DiskFull, match=str(store.files.folder)):
        store.record(run_row(status="failed"))
    monkeypatch.undo()
    assert store.runs() == (run_row(),)
    assert [path.name for path in (store.files.folder / "runs").iterdir()] == ["r1.parquet"]
