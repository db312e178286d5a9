"""All results of all runs and nights: a parquet file each is the truth, one DuckDB file is the index over them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from infra.errors import ResultsUnusable
from infra.results.files import Record, ResultFiles
from infra.results.index import Answer, ResultIndex
from infra.results.rows import (
    NIGHT,
    RUN,
    CheckpointRow,
    CurveRow,
    LayerRow,
    MetricRow,
    NightCellRow,
    NightFigureRow,
    NightRow,
    PairRow,
    Row,
    RunRow,
    StageRow,
)
from infra.settings import Settings, default_results_folder

R = TypeVar("R", bound=Row)


class ResultsStore:
    """The results in the files below `folder`, with the DuckDB file at `path` as their index; both made when needed.

    `folder` is by default beside the index, with its name less the suffix. It may be shared by machines, each with an
    index of its own. Every method raises ResultsUnusable if the files cannot be used; trouble with the index costs time
    only. `timeout_seconds` is how long to wait while other processes have the index.
    """

    def __init__(self, path: Path, folder: Path | None = None, *, timeout_seconds: float = 1.0) -> None:
        self.path = path
        self.files = ResultFiles(folder or default_results_folder(path))
        self._index = ResultIndex(path, self.files, timeout_seconds)

    @classmethod
    def of(cls, settings: Settings) -> ResultsStore:
        """The store that the settings name."""
        return cls(settings.results_path, settings.results_folder)

    def record(
        self,
        run: RunRow,
        stages: Sequence[StageRow] = (),
        metrics: Sequence[MetricRow] = (),
        layers: Sequence[LayerRow] = (),
        pairs: Sequence[PairRow] = (),
        curves: Sequence[CurveRow] = (),
        checkpoints: Sequence[CheckpointRow] = (),
    ) -> None:
        """Write everything about a run as a whole; what was recorded under its key before is replaced.

        Raises DiskFull or ResultsUnusable, and has changed nothing then.
        """
        rows = {"runs": (run,), "stages": stages, "metrics": metrics, "layers": layers, "pairs": pairs}
        self._record(Record(RUN, {**rows, "curves": curves, "checkpoints": checkpoints}))

    def record_night(
        self, night: NightRow, cells: Sequence[NightCellRow] = (), figures: Sequence[NightFigureRow] = ()
    ) -> None:
        """Write everything about a night, as `record` does about a run."""
        self._record(Record(NIGHT, {"nights": (night,), "night_cells": cells, "night_figures": figures}))

    def runs(self) -> tuple[RunRow, ...]:
        """All runs, in the order in which they were recorded."""
        return self._rows("runs", RunRow)

    def stages(self, run_key: str | None = None) -> tuple[StageRow, ...]:
        """Stages of one run, or of all, in the order given to `record`."""
        return self._rows("stages", StageRow, run_key=run_key)

    def metrics(self, run_key: str | None = None) -> tuple[MetricRow, ...]:
        """Metrics of one run, or of all, in the order given to `record`."""
        return self._rows("metrics", MetricRow, run_key=run_key)

    def layers(self, run_key: str | None = None) -> tuple[LayerRow, ...]:
        """Layers of one run, or of all, in the order given to `record`."""
        return self._rows("layers", LayerRow, run_key=run_key)

    def pairs(self, run_key: str | None = None) -> tuple[PairRow, ...]:
        """Checkpoints of one run, or of all, beside their dense models, in the order given to `record`."""
        return self._rows("pairs", PairRow, run_key=run_key)

    def curves(self, run_key: str | None = None) -> tuple[CurveRow, ...]:
        """Points of the trainings of one run, or of all, in the order given to `record`."""
        return self._rows("curves", CurveRow, run_key=run_key)

    def checkpoints(self, run_key: str | None = None) -> tuple[CheckpointRow, ...]:
        """Checkpoints of one run, or of all, each after the one that it was made from."""
        return self._rows("checkpoints", CheckpointRow, run_key=run_key)

    def select(self, question: str, values: Sequence[object] = ()) -> Answer:
        """The answer to one SQL question over the tables and views, all files taken in; `values` for its "?"s.

        Raises QuestionRefused, with the reason in a sentence, if it is no single SELECT or DuckDB cannot answer it.
        """
        return self._index.select(question, values)

    def nights(self, name: str | None = None) -> tuple[NightRow, ...]:
        """The nights of one name, or all, oldest start first."""
        return tuple(sorted(self._rows("nights", NightRow, name=name), key=lambda night: night.started_at))

    def night_cells(self, night_id: str) -> tuple[NightCellRow, ...]:
        """Cells of one night, in the order given to `record_night`."""
        return self._rows("night_cells", NightCellRow, night_id=night_id)

    def night_figures(self, night_id: str) -> tuple[NightFigureRow, ...]:
        """Figures of one night, in the order given to `record_night`."""
        return self._rows("night_figures", NightFigureRow, night_id=night_id)

    def export_file(self, run_key: str) -> Path:
        """The file with all that is recorded about a run, for `add_file` of another store; not to be changed.

        Raises ResultsUnusable if there is none.
        """
        path = self.files.path(RUN, run_key)
        if not path.exists():
            raise ResultsUnusable(f"no run {run_key!r} is recorded in {self.files.folder}")
        return path

    def add_file(self, path: Path) -> str:
        """Take in a file of another store's `export_file`; returns its key. A later record under that key is kept.

        Raises ResultsUnusable if it is damaged, no results file or of a newer slimline; DiskFull.
        """
        key = self.files.add(path)
        self._index.update()
        return key

    def problems(self) -> tuple[str, ...]:
        """A sentence for each file that cannot be read, whose rows are missing in what the other methods return."""
        self._index.ask("SELECT 1")
        return self.files.problems()

    def check(self) -> str:
        """Where the results are, and how many. Raises ResultsUnusable if the folder or one of its files is unusable."""
        self.files.check_writable()
        counts = f"{len(self.runs())} runs, {len(self.nights())} nights"
        if problems := self.problems():
            raise ResultsUnusable("; ".join(problems))
        return f"{self.files.folder}: {counts} (index: {self.path})"

    def _record(self, record: Record) -> None:
        self.files.write(record)
        self._index.update()

    def _rows(self, table: str, row: type[R], **where: str | None) -> tuple[R, ...]:
        wanted = {column: value for column, value in where.items() if value is not None}
        return tuple(map(row.model_validate, self._index.rows(table, wanted)))
