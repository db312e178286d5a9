"""What a figure is the average of: one row per document, question or window, kept as parquet for error analysis and for
paired tests against another model on the same items."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

_SCHEMA = pa.schema(
    [
        pa.field("task", pa.string(), nullable=False),
        pa.field("item", pa.int64(), nullable=False),
        pa.field("item_hash", pa.string(), nullable=False),
        pa.field("scores", pa.map_(pa.string(), pa.float64()), nullable=False),
        pa.field("weight", pa.float64(), nullable=False),
        pa.field("prompt", pa.string()),
        pa.field("target", pa.string()),
        pa.field("response", pa.string()),
    ]
)


@dataclass(frozen=True)
class Sample:
    """One item of a task and how a model did on it.

    item: its number in the task's data, the same in every run. item_hash: of its content (with prompt and few-shot
    examples), so that only what was asked alike is paired. scores: by the name of the report's metric; of a perplexity
    the mean negative log-likelihood in nats over the `weight` tokens of the window. prompt, target, response: as text;
    of a multiple choice the response is the choice taken.
    """

    task: str
    item: int
    item_hash: str
    scores: Mapping[str, float] = field(hash=False)
    weight: float = 1.0
    prompt: str | None = None
    target: str | None = None
    response: str | None = None


def write_samples(samples: Iterable[Sample], path: Path) -> None:
    """Write one parquet file, zstd-compressed, its rows in the order given."""
    table = pa.Table.from_pylist([asdict(sample) for sample in samples], schema=_SCHEMA)
    pq.write_table(table, path, compression="zstd")


_TEXTS = ("prompt", "target", "response")


def read_samples(path: Path, *, texts: bool = True) -> tuple[Sample, ...]:
    """The samples of a file that `write_samples` wrote, with prompts, targets and responses or without them.

    Raises OSError or pyarrow.ArrowInvalid for anything else.
    """
    names = [name for name in _SCHEMA.names if texts or name not in _TEXTS]
    rows = pq.read_table(path, schema=_SCHEMA, columns=names).to_pylist()
    return tuple(Sample(**{**row, "scores": dict(row["scores"])}) for row in rows)
