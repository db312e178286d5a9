"""Data folders as a mirror holds them, a few rows each, for lm-eval's stock tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from evaluation.suite import TextNeed

Rows = Sequence[Mapping[str, Any]]


def write_data(root: Path, repo_id: str, config: str, splits: Mapping[str, Rows]) -> Path:
    """Add a configuration to the folder of `repo_id`: one parquet file per split, declared in the README."""
    folder = root / repo_id
    (folder / config).mkdir(parents=True, exist_ok=True)
    readme = folder / "README.md"
    header = yaml.safe_load(readme.read_text().split("---\n")[1]) if readme.is_file() else {"configs": []}
    files = []
    for split, rows in splits.items():
        path = f"{config}/{split}-00000-of-00001.parquet"
        pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), folder / path)
        files.append({"split": split, "path": path})
    header["configs"].append({"config_name": config, "data_files": files})
    readme.write_text(f"---\n{yaml.safe_dump(header)}---\n# {repo_id}\n")
    return folder


def piqa_rows(count: int) -> Rows:
    return [
        {
            "goal": f"How do you open box {i}?",
            "sol1": f"lift the lid {i} times",
            "sol2": f"paint it in {i} colours and wait",
            "label": i % 2,
        }
        for i in range(count)
    ]


def arc_rows(count: int) -> Rows:
    return [
        {
            "id": f"q{i}",
            "question": f"Which animal has {i} legs?",
            "choices": {"text": ["a fox", "a brown dog", "a spider", "nothing"], "label": ["A", "B", "C", "D"]},
            "answerKey": "ABCD"[i % 4],
        }
        for i in range(count)
    ]


def hellaswag_rows(count: int) -> Rows:
    return [
        {
            "ctx_a": f"The dog number {i} runs.",
            "ctx_b": "it then",
            "activity_label": "Running",
            "endings": ["jumps over the fox.", "sleeps.", "answers the question.", "prunes a tree."],
            "label": str(i % 4),
        }
        for i in range(count)
    ]


def winogrande_rows(count: int) -> Rows:
    return [
        {
            "sentence": f"The fox saw dog {i} because _ was awake.",
            "option1": "the fox",
            "option2": "the lazy dog",
            "answer": str(1 + i % 2),
        }
        for i in range(count)
    ]


def mmlu_rows(count: int) -> Rows:
    return [
        {"question": f"What is {i} plus one?", "choices": ["1", "2", "3", "4"], "answer": i % 4} for i in range(count)
    ]


class LocalData:
    """A SuiteData over one root folder and given texts."""

    def __init__(self, root: Path, texts: Sequence[str] = ()) -> None:
        self.root = root
        self.given = list(texts)
        self.asked: list[str] = []

    def texts(self, need: TextNeed) -> list[str]:
        self.asked.append(f"{need.dataset}/{need.config}/{need.split}/{need.text_field}")
        return self.given

    def folder(self, repo_id: str) -> Path | None:
        return self.root / repo_id

    def check(self, repo_id: str, excerpt: Path, config: str | None, splits: Sequence[str]) -> None:
        """Whatever can be found is taken for readable."""
