from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from evaluation.errors import EvaluationError
from evaluation.harness import stock_tasks
from evaluation.harness.local_dataset import LocalFolder
from evaluation.harness.stock_tasks import PAPER_TASKS, StockTask, mmlu_tasks, stock_task
from evaluation.suites import mmlu, zero_shot
from tests.evaluation.local_data import arc_rows, write_data

PROJECT = Path(__file__).parents[3]


def test_the_papers_tasks_read_these_splits() -> None:
    needs = [(need.repo_id, need.config, need.split) for need in zero_shot.needs(zero_shot.Config())]
    assert needs == [
        ("aps/super_glue", "boolq", "validation"),
        ("baber/piqa", None, "validation"),
        ("Rowan/hellaswag", None, "validation"),
        ("allenai/winogrande", "winogrande_xl", "validation"),
        ("allenai/ai2_arc", "ARC-Easy", "test"),
        ("allenai/ai2_arc", "ARC-Challenge", "test"),
        ("allenai/openbookqa", "main", "test"),
    ]


def test_fewshot_examples_need_their_split_too() -> None:
    config = zero_shot.Config(tasks=("piqa",), num_fewshot=3)
    assert [need.split for need in zero_shot.needs(config)] == ["validation", "train"]
    assert {need.split for need in mmlu.needs(mmlu.Config())} == {"test", "dev"}
    assert {need.split for need in mmlu.needs(mmlu.Config(num_fewshot=0))} == {"test"}


def test_mmlu_has_57_subjects_and_five_groups() -> None:
    groups = {task.name for task in mmlu_tasks() if task.is_group}
    assert groups == {"mmlu", "mmlu_humanities", "mmlu_social_sciences", "mmlu_stem", "mmlu_other"}
    assert len(mmlu_tasks()) == 57 + 5
    assert len({need.config for need in mmlu.needs(mmlu.Config())}) == 57


def test_known_names_do_not_cost_a_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    def scanned() -> dict[str, Path]:
        raise AssertionError("scanned")

    monkeypatch.setattr(stock_tasks, "_known", scanned)
    zero_shot.check(zero_shot.Config())
    mmlu.check(mmlu.Config())


def test_any_other_stock_task_is_found_with_its_includes() -> None:
    task = stock_task("arc_challenge_mt_da")
    assert (task.repo_id, task.config) == ("LumiOpen/arc_challenge_mt", "da")
    assert stock_task("sciq").needs(0)[0].split == "test"


def test_the_table_agrees_with_the_scan() -> None:
    for name in PAPER_TASKS:
        assert stock_tasks._known()[name] == stock_task(name).path


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("hellaswagg", r"no task 'hellaswagg'; did you mean 'hellaswag'"),
        ("arc_easi", r"'arc_easy'"),
        ("zzzzqqqq", r"no task 'zzzzqqqq'; `lm_eval ls tasks` lists them"),
        ("mmlu", r"'mmlu' is a group"),
        ("humaneval", r"executes code"),
        ("squadv2", r"in Python code"),
        ("niah_single_1", r"in Python code"),
    ],
)
def test_a_task_that_cannot_be_run_is_refused_in_a_sentence(name: str, sentence: str) -> None:
    with pytest.raises(EvaluationError, match=sentence):
        zero_shot.check(zero_shot.Config(tasks=("piqa", name)))


def test_a_task_named_twice_is_refused() -> None:
    with pytest.raises(EvaluationError, match="piqa more than once"):
        zero_shot.check(zero_shot.Config(tasks=("piqa", "sciq", "piqa")))


def test_planning_imports_neither_torch_nor_lm_eval() -> None:
    code = (
        "import sys\n"
        "from evaluation.suites import mmlu, perplexity, zero_shot\n"
        "from evaluation import report\n"
        "from evaluation.profile import config, device, peak_memory\n"
        "device.device_name('cpu')\n"
        "for s in (mmlu, perplexity, zero_shot): s.needs(s.Config()); s.check(s.Config())\n"
        "heavy = {'torch', 'transformers', 'lm_eval', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - start < 5


def arc_task() -> StockTask:
    return stock_task("arc_easy")


def test_a_complete_folder_is_accepted(tmp_path: Path) -> None:
    folder = write_data(tmp_path, "allenai/ai2_arc", "ARC-Easy", {"train": arc_rows(2), "test": arc_rows(3)})
    LocalFolder(folder).require(arc_task(), ["test", "train"])
    assert LocalFolder(folder).splits("ARC-Easy") == {"train", "test"}
    assert LocalFolder(folder).splits(None) == {"train", "test"}, "the only configuration is the default one"


def test_what_is_missing_in_a_folder_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "allenai/ai2_arc"
    with pytest.raises(
        EvaluationError, match=rf"task 'arc_easy' reads allenai/ai2_arc \(ARC-Easy\).*no folder {folder}"
    ):
        LocalFolder(folder).require(arc_task(), ["test"])

    write_data(tmp_path, "allenai/ai2_arc", "ARC-Challenge", {"test": arc_rows(2)})
    with pytest.raises(EvaluationError, match="only the configurations ARC-Challenge"):
        LocalFolder(folder).require(arc_task(), ["test"])

    write_data(tmp_path, "allenai/ai2_arc", "ARC-Easy", {"test": arc_rows(2)})
    with pytest.raises(EvaluationError, match=r"the split 'train' of .*has test"):
        LocalFolder(folder).require(arc_task(), ["test", "train"])

    (folder / "ARC-Easy/test-00000-of-00001.parquet").unlink()
    with pytest.raises(EvaluationError, match=r"the split 'test' of .*has none"):
        LocalFolder(folder).require(arc_task(), ["test"])


README = """---
license: mit
dataset_info:
- config_name: ARC-Challenge
  features: [{name: id, dtype: string}]
- config_name: ARC-Easy
  features: [{name: id, dtype: string}, {name: label, dtype: int64}]
  splits: [{name: train, num_examples: 7}]
configs:
- config_name: ARC-Challenge
  data_files: [{split: test, path: ARC-Challenge/test-*}]
- config_name: ARC-Easy
  data_files: [{split: train, path: ARC-Easy/train-*}, {split: test, path: [ARC-Easy/test-*, more.parquet]}]
---
Text
"""


def test_an_excerpt_offers_what_is_read_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "hub"
    folder.mkdir()
    (folder / "README.md").write_text(README)
    place = LocalFolder(folder).write_excerpt(tmp_path / "excerpt", "ARC-Easy", ["test"])
    assert [path.name for path in place.iterdir()] == ["README.md"]
    header = yaml.safe_load((place / "README.md").read_text().split("---\n")[1])
    files = [{"split": "test", "path": [f"{folder}/ARC-Easy/test-*", f"{folder}/more.parquet"]}]
    assert header == {
        "configs": [{"config_name": "ARC-Easy", "data_files": files}],
        "dataset_info": [
            {
                "config_name": "ARC-Easy",
                "features": [{"name": "id", "dtype": "string"}, {"name": "label", "dtype": "int64"}],
            }
        ],
    }


def test_some_subjects_need_only_their_data() -> None:
    needs = mmlu.needs(mmlu.Config(subjects=("anatomy", "sociology"), num_fewshot=0))
    assert [(need.config, need.split) for need in needs] == [("anatomy", "test"), ("sociology", "test")]
