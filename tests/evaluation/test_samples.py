"""Samples: what was written is what is read."""

from __future__ import annotations

from pathlib import Path

import duckdb
import pytest
from pyarrow import ArrowInvalid

from evaluation.samples import Sample, read_samples, write_samples

SAMPLES = (
    Sample("piqa", 0, "a1", {"acc": 1.0, "acc_norm": 0.0}, prompt="Q: why?\nA:", target=" so", response=" so"),
    Sample("wikitext-2-raw-v1", 7, "b2", {"ppl@128": 3.25}, weight=127.0),
)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    write_samples(SAMPLES, tmp_path / "samples.parquet")
    assert read_samples(tmp_path / "samples.parquet") == SAMPLES


def test_no_samples_are_a_file_too(tmp_path: Path) -> None:
    write_samples((), tmp_path / "samples.parquet")
    assert read_samples(tmp_path / "samples.parquet") == ()


def test_duckdb_reads_the_scores_by_name(tmp_path: Path) -> None:
    write_samples(SAMPLES, tmp_path / "samples.parquet")
    rows = duckdb.sql(f"SELECT task, scores['acc'] FROM '{tmp_path / 'samples.parquet'}' ORDER BY task").fetchall()
    assert rows == [("piqa", 1.0), ("wikitext-2-raw-v1", None)]


def test_what_is_no_parquet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "samples.parquet").write_text("nothing")
    with pytest.raises(ArrowInvalid):
        read_samples(tmp_path / "samples.parquet")
