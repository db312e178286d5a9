"""Data folders of a mirror, with and without a README: what the check says is what can be loaded and scored."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from evaluation.errors import EvaluationError
from evaluation.harness.local_dataset import LocalFolder
from evaluation.harness.stock_tasks import stock_task
from evaluation.suite import SuiteResult
from evaluation.suites import mmlu, zero_shot
from tests.evaluation.local_data import (
    LocalData,
    Rows,
    arc_rows,
    hellaswag_rows,
    mmlu_rows,
    piqa_rows,
    winogrande_rows,
    write_data,
)


def put(folder: Path, files: Mapping[str, Rows], header: Mapping[str, Any] | None = None) -> Path:
    """Parquet or JSON lines under these names, and a README if it has a header."""
    for name, rows in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if header is not None:
        (folder / "README.md").write_text(f"---\n{yaml.safe_dump(header)}---\n")
    return folder


def boolq_rows(count: int) -> Rows:
    return [{"question": f"is {i} even", "passage": f"{i} is here.", "idx": i, "label": i % 2} for i in range(count)]


def loaded(folder: LocalFolder, place: Path, config: str | None, splits: list[str]) -> dict[str, list[Any]]:
    """The first column of each split, loaded as lm-eval does it."""
    excerpt = folder.write_excerpt(place / "excerpt", config, splits)
    found = datasets.load_dataset(str(excerpt), config, cache_dir=str(place / "cache"))
    return {split: list(rows[rows.column_names[0]]) for split, rows in found.items()}


def numbers(*values: int) -> Rows:
    return [{"n": value} for value in values]


SHARD = "-00000-of-00001.parquet"


@pytest.mark.parametrize(
    ("config", "files", "offered"),
    [
        (None, {f"train{SHARD}": [1], "test.parquet": [2]}, {"train": [1], "test": [2]}),
        (None, {f"data/train{SHARD}": [1], f"data/extra{SHARD}": [2]}, {"train": [1], "extra": [2]}),
        (None, {"val.parquet": [1]}, {"validation": [1]}),
        (None, {"validation/0000.parquet": [1], "validation/0001.parquet": [2]}, {"validation": [1, 2]}),
        (None, {"plain/validation/0000.parquet": [1]}, {"validation": [1]}),
        (None, {"only.parquet": [1]}, {"train": [1]}),
        (None, {f"dev{SHARD}": [1]}, {"dev": [1], "validation": [1]}),
        (None, {f"dev{SHARD}": [1], f"validation{SHARD}": [2], f"val{SHARD}": [3]}, {"dev": [1], "validation": [2, 3]}),
        (None, {"dev/0.parquet": [1], "valid/0.parquet": [2]}, {"dev": [1], "validation": [2]}),
        (None, {f"data/dev{SHARD}": [1], f"data/validation{SHARD}": [2]}, {"dev": [1], "validation": [2]}),
        ("one", {f"one/test{SHARD}": [1], f"two/test{SHARD}": [2]}, {"test": [1]}),
        ("one", {"one/test/0000.parquet": [1], "two/test/0000.parquet": [2]}, {"test": [1]}),
        ("one", {f"one/dev{SHARD}": [1], f"one/test{SHARD}": [2]}, {"dev": [1], "validation": [1], "test": [2]}),
        ("one", {f"data/test{SHARD}": [1]}, {"test": [1]}),
        ("one", {"test.jsonl": [1], "notes.md": [9], ".hidden/test.jsonl": [9]}, {"test": [1]}),
        ("one", {"test/a.parquet": [1], "test/notes.json": [9]}, {"test": [1]}),
    ],
)
def test_without_a_readme_names_tell_the_splits(
    tmp_path: Path, config: str | None, files: dict[str, list[int]], offered: dict[str, list[int]]
) -> None:
    folder = LocalFolder(put(tmp_path / "hub", {name: numbers(*values) for name, values in files.items()}))
    assert folder.splits(config) == set(offered)
    for split, values in offered.items():
        assert loaded(folder, tmp_path / split, config, [split]) == {split: values}


def test_names_are_read_as_datasets_reads_them(tmp_path: Path) -> None:
    """Apart from dev, which `datasets` knows only as a part of validation."""
    files = {f"my.{word}_1.parquet": numbers(n) for n, word in enumerate(("training", "valid", "evaluation", "test"))}
    put(tmp_path / "hub", files)
    plain = datasets.load_dataset(str(tmp_path / "hub"), cache_dir=str(tmp_path / "plain"))
    splits = ["train", "validation", "test"]
    assert loaded(LocalFolder(tmp_path / "hub"), tmp_path, None, splits) == {s: list(plain[s]["n"]) for s in splits}


def test_a_readme_without_configurations_leaves_it_to_the_names(tmp_path: Path) -> None:
    info = {"features": [{"name": "n", "dtype": "float32"}]}
    header = {"license": "mit", "dataset_info": [{"config_name": "one", **info}]}
    folder = LocalFolder(put(tmp_path / "hub", {f"one/test{SHARD}": numbers(1)}, header))
    excerpt = folder.write_excerpt(tmp_path / "excerpt", "one", ["test"])
    assert datasets.load_dataset_builder(str(excerpt), "one").info.features["n"].dtype == "float32"


@pytest.mark.parametrize(
    ("entry", "offered"),
    [
        ({"data_dir": "x"}, {"train": [1], "validation": [2]}),
        ({"data_dir": "x", "data_files": "train*"}, {"train": [1]}),
        ({"data_files": [{"split": "dev", "path": ["x/valid.parquet", "y/*"]}]}, {"dev": [2, 3, 4]}),
        ({"data_files": ["y/b.parquet", "y/a.parquet"]}, {"train": [4, 3]}),
        ({"data_files": ["y/a.parquet", "y/missing.parquet"]}, {}),
        ({"data_files": "nothing/*"}, {}),
        ({"data_dir": "nothing"}, {}),
        ({"data_files": "https://example.org/train.parquet"}, {}),
    ],
)
def test_a_readme_tells_the_splits(tmp_path: Path, entry: dict[str, Any], offered: dict[str, list[int]]) -> None:
    files = {"train.parquet": [9], "x/train.parquet": [1], "x/valid.parquet": [2]}
    files |= {"y/a.parquet": [3], "y/b.parquet": [4]}
    header = {"configs": [{"config_name": "one", **entry}]}
    folder = LocalFolder(put(tmp_path / "hub", {name: numbers(*values) for name, values in files.items()}, header))
    assert folder.splits("one") == set(offered)
    if offered:
        assert loaded(folder, tmp_path, "one", list(offered)) == offered
        plain = datasets.load_dataset(str(tmp_path / "hub"), "one", cache_dir=str(tmp_path / "plain"))
        assert {split: list(rows["n"]) for split, rows in plain.items()} == offered


def test_a_file_of_its_own_may_tell_the_configurations(tmp_path: Path) -> None:
    put(tmp_path / "hub", {"x.parquet": numbers(1), "y.parquet": numbers(2)}, {"configs": [{"config_name": "two"}]})
    header = {"configs": [{"config_name": "one", "data_files": "y.parquet"}]}
    (tmp_path / "hub/.huggingface.yaml").write_text(yaml.safe_dump(header))
    assert loaded(LocalFolder(tmp_path / "hub"), tmp_path, "one", ["train"]) == {"train": [2]}
    assert LocalFolder(tmp_path / "hub").splits("two") == set()


def test_names_that_are_patterns_too_are_taken_literally(tmp_path: Path) -> None:
    folder = LocalFolder(put(tmp_path / "hub [1] *", {"test-a[2].parquet": numbers(1), "test-a2.parquet": numbers(2)}))
    assert loaded(folder, tmp_path, None, ["test"]) == {"test": [2, 1]}
    header = {"configs": [{"config_name": "one", "data_files": "test-*"}]}
    put(tmp_path / "hub [1] *", {}, header)
    assert loaded(LocalFolder(folder.path), tmp_path / "readme", "one", ["train"]) == {"train": [2, 1]}


@pytest.mark.parametrize("header", [None, {"license": "mit"}])
def test_the_files_of_another_configuration_are_not_read(tmp_path: Path, header: dict[str, Any] | None) -> None:
    put(tmp_path, {f"ARC-Challenge/test{SHARD}": arc_rows(2)}, header)
    folder = LocalFolder(tmp_path)
    assert folder.splits("ARC-Easy") == set()
    with pytest.raises(EvaluationError, match=rf"{tmp_path} has only the configurations ARC-Challenge"):
        folder.require(stock_task("arc_easy"), ["test"])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("---\nconfigs: [{\n---\n", "begins with YAML that cannot be read"),
        ("---\nsince: 2024-13-45\n---\n", "begins with YAML that cannot be read: month must be"),
        ("---\nconfigs: [{data_files: x}]\n---\n", "config_name"),
        ("---\nconfigs: 3\n---\n", "config_name"),
        ("---\nconfigs: [{config_name: one, data_files: [{split: test}]}]\n---", "data_files"),
    ],
)
def test_a_readme_that_cannot_be_understood_is_named(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "README.md").write_text(text)
    with pytest.raises(EvaluationError, match=rf"{tmp_path}.*{sentence}"):
        LocalFolder(tmp_path).splits("one")


def test_an_error_names_the_folder_and_not_a_link_to_it(tmp_path: Path) -> None:
    (tmp_path / "mirror").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "mirror")
    with pytest.raises(EvaluationError, match=rf"the split 'test' of .*{tmp_path}/mirror has none"):
        LocalFolder(tmp_path / "link").require(stock_task("arc_easy"), ["test"])


@pytest.mark.parametrize("files", ['"*.csv"', '["a.csv", "b.csv"]'])
def test_a_readme_that_lists_bare_files_means_train(tmp_path: Path, files: str) -> None:
    (tmp_path / "a.csv").touch()
    (tmp_path / "b.csv").touch()
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n- config_name: x\n  data_files: {files}\n---\n")
    assert LocalFolder(tmp_path).splits("x") == {"train"}


def scored(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, root: Path, **given: Any) -> SuiteResult:
    return zero_shot.evaluate(model, tokenizer, LocalData(root), zero_shot.Config(**given))


LAYOUTS = [
    ("arc_easy", {f"ARC-Easy/test{SHARD}": arc_rows(4), f"ARC-Challenge/test{SHARD}": arc_rows(9)}),
    ("arc_easy", {"ARC-Easy/test/0000.parquet": arc_rows(4)}),
    ("boolq", {f"boolq/validation{SHARD}": boolq_rows(4)}),
    ("boolq", {f"data/validation{SHARD}": boolq_rows(4)}),
    ("winogrande", {"winogrande_xl/validation.jsonl": winogrande_rows(4)}),
    ("openbookqa", {f"main/test{SHARD}": [{"question_stem": "a fox is", **row} for row in arc_rows(4)]}),
    ("piqa", {f"dev{SHARD}": piqa_rows(4)}),
    ("piqa", {"val.parquet": piqa_rows(4)}),
    ("piqa", {"validation/0000.parquet": piqa_rows(4)}),
    ("hellaswag", {"default/validation/0000.parquet": hellaswag_rows(4)}),
]


@pytest.mark.parametrize(("task", "files"), LAYOUTS)
def test_a_task_is_scored_on_a_folder_without_a_readme(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, task: str, files: dict[str, Rows]
) -> None:
    put(tmp_path / stock_task(task).repo_id, files)
    report = scored(model, tokenizer, tmp_path, tasks=(task,)).report
    assert {metric.num_examples for metric in report.metrics} == {4}


def test_a_task_is_scored_on_a_readme_that_names_a_folder(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    header = {"configs": [{"config_name": "plain_text", "data_dir": "x"}]}
    put(tmp_path / "baber/piqa", {f"x/validation{SHARD}": piqa_rows(4)}, header)
    assert scored(model, tokenizer, tmp_path, tasks=("piqa",)).report.metrics[0].num_examples == 4


@pytest.mark.parametrize("header", [None, {"configs": [{"config_name": "default", "data_dir": "gu"}]}])
def test_a_task_that_names_its_files_finds_them(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, header: dict[str, Any] | None
) -> None:
    rows = [{"premise": f"a fox is {i}", "hypothesis": "a dog is", "label": i % 3} for i in range(4)]
    files = {f"gu/{split}/0000.parquet": rows for split in ("train", "validation", "test")}
    put(tmp_path / "Divyanshu/indicxnli", files, header)
    assert scored(model, tokenizer, tmp_path, tasks=("indicxnli_gu",)).report.metrics[0].num_examples == 4


@pytest.mark.parametrize("name", ["{subject}/{split}-00000-of-00001.parquet", "{subject}/{split}/0000.parquet"])
def test_mmlu_without_its_readme_has_the_figures_of_mmlu_with_it(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, name: str
) -> None:
    splits = {"test": mmlu_rows(6), "dev": mmlu_rows(5), "validation": mmlu_rows(9)[5:]}
    for subject in ("anatomy", "astronomy"):
        write_data(tmp_path / "with", "cais/mmlu", subject, splits)
        named = {name.format(subject=subject, split=split): rows for split, rows in splits.items()}
        put(tmp_path / "without/cais/mmlu", named)
    config = mmlu.Config(subjects=("anatomy", "astronomy"))
    with_it, without = (
        mmlu.evaluate(model, tokenizer, LocalData(tmp_path / place), config) for place in ("with", "without")
    )
    assert without.report.metrics == with_it.report.metrics
    assert without.samples == with_it.samples
