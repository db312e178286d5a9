"""Evaluations in the formats of other tools, read back by those or by a strict parser."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.errors import SpecError
from flows.records.export.write import export_run, safe_name
from infra.results.rows import MetricRow
from infra.results.store import ResultsStore
from tests.infra.result_examples import checkpoints, measured, pruned, repaired, run_row

ZERO_SHOT = json.dumps(
    {
        **{"lm_eval": "0.4.13", "limit": 40, "bootstrap_iters": 1000, "chat_template": None, "dtype": "torch.float32"},
        **{"seeds": {"fewshot": 1234, "python": 0, "numpy": 7, "torch": 9}},
        **{"versions": {"lm-eval": "0.4.13", "transformers": "5.23.0"}},
        **{
            "data_identity": [{"repo_id": "baber/piqa", "content": "a"}, {"repo_id": "allenai/ai2_arc", "content": "b"}]
        },
    }
)
WINDOWS = json.dumps(
    {
        **{"max_windows": None, "dtype": "torch.float32", "split": "test", "config": "wikitext-2-raw-v1"},
        "data_identity": [{"repo_id": "Salesforce/wikitext", "content": "c"}],
    }
)
ODD = "größe/<script>alert(1)</script> 50%_x.."


def figures(key: str, checkpoint: str, ppl: float) -> list[MetricRow]:
    shots = {"num_fewshot": 0, "num_examples": 40, "task_version": "1.0", "protocol": ZERO_SHOT}
    return [
        measured(key, checkpoint, "zero_shot/piqa/acc", 0.725, stderr=0.07, **shots),
        measured(key, checkpoint, "zero_shot/gsm8k/exact_match,strict-match", 0.5, **shots),
        measured(
            key, checkpoint, "perplexity/wikitext2/ppl@128", ppl, stderr=math.nan, protocol=WINDOWS, num_examples=6
        ),
        measured(key, checkpoint, "short/wikitext2/ppl@64", 3.5, protocol=WINDOWS, num_examples=6),
        measured(key, checkpoint, "profile/profile/num_parameters", 1e8),
    ]


@pytest.fixture
def store(tmp_path: Path) -> ResultsStore:
    small = pruned(0.2)
    again = repaired(small)
    found = ResultsStore(tmp_path / "results.duckdb")
    metrics = [
        *figures("r1", "dense", 12.5),
        *figures("r1", small.name, math.inf),
        *figures("r1", again.name, math.nan),
    ]
    found.record(run_row(name=ODD), metrics=metrics, checkpoints=checkpoints("r1", small, again, model="org/tiny"))
    return found


def refuse(word: str) -> Any:
    raise AssertionError(f"{word} is no JSON")


def exported(store: ResultsStore, form: str, folder: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Of each checkpoint the file and its content, which a strict parser reads."""
    (run,) = store.runs()
    files = export_run(store, run, form, folder)
    assert sorted(files) == sorted(path for path in folder.rglob("*") if path.is_file())
    read = [json.loads(file.read_text(encoding="utf-8"), parse_constant=refuse) for file in files]
    return dict(zip(("dense", "slimgpt-20", "slimgpt-20+lora"), zip(files, read, strict=True), strict=True))


def test_lm_eval_reads_what_looks_like_its_own(store: ResultsStore, tmp_path: Path) -> None:
    from lm_eval.utils import get_latest_filename, get_results_filenames, make_table, sanitize_model_name

    found = exported(store, "lm-eval", tmp_path / "out")
    for name, (file, read) in found.items():
        assert get_results_filenames([str(file)]) == [str(file)]
        assert get_latest_filename([str(file)]) == str(file)
        assert read["model_name"] == f"{ODD}/{name}"
        assert file.parent == tmp_path / "out" / read["model_name_sanitized"]
        assert read["model_name_sanitized"] == sanitize_model_name(read["model_name"])
        table = make_table(read)
        for line in ("|piqa ", "|perplexity/wikitext2", "|short/wikitext2", "strict-match", "|±  |0.0700|"):
            assert line in table
    dense, broken = found["dense"][1], found["slimgpt-20"][1]
    assert dense["results"]["piqa"] == {"alias": "piqa", "sample_len": 40, "acc,none": 0.725, "acc_stderr,none": 0.07}
    assert dense["results"]["gsm8k"]["exact_match,strict-match"] == 0.5
    assert dense["results"]["gsm8k"]["exact_match_stderr,strict-match"] == "N/A"
    assert broken["results"]["perplexity/wikitext2"]["ppl@128,none"] == "Infinity"
    assert found["slimgpt-20+lora"][1]["results"]["perplexity/wikitext2"]["ppl@128,none"] == "NaN"
    assert dense["n-samples"] == {
        **{task: {"original": None, "effective": 40} for task in ("piqa", "gsm8k")},
        **{task: {"original": 6, "effective": 6} for task in ("perplexity/wikitext2", "short/wikitext2")},
    }
    assert (dense["n-shot"], dense["versions"]) == ({"piqa": 0, "gsm8k": 0}, {"piqa": 1.0, "gsm8k": 1.0})
    assert dense["higher_is_better"]["piqa"] == {"acc": True}
    assert dense["higher_is_better"]["short/wikitext2"] == {"ppl@64": False}
    assert dense["configs"]["short/wikitext2"]["dataset_path"] == "Salesforce/wikitext"
    assert "dataset_path" not in dense["configs"]["piqa"], "which of the two it is nobody wrote down"
    wanted = {"random_seed": 0, "numpy_seed": 7, "torch_seed": 9, "fewshot_seed": 1234, "limit": 40}
    assert {key: dense["config"][key] for key in wanted} == wanted
    assert dense["lm_eval_version"] == "0.4.13"
    assert broken["slimline"]["base_model"] == "org/tiny"
    assert broken["slimline"]["method"] == "slimgpt"


def only_strings(values: dict[str, Any]) -> bool:
    return all(isinstance(value, str) for value in values.values())


def test_every_eval_ever_says_what_its_schema_asks_for(store: ResultsStore, tmp_path: Path) -> None:
    """Required keys, types and closed lists of eval.schema.json 0.3.0, restated here."""
    found = exported(store, "every-eval-ever", tmp_path / "out")
    top = {"schema_version", "evaluation_id", "evaluation_timestamp", "retrieved_timestamp", "source_metadata"}
    top |= {"eval_library", "model_info", "evaluation_results"}
    for _, read in found.values():
        assert set(read) == top, "it takes no other keys"
        assert read["retrieved_timestamp"].isdigit()
        source, model = read["source_metadata"], read["model_info"]
        assert source["source_type"] == "evaluation_run"
        assert source["source_organization_name"]
        assert set(model) >= {"name", "id", "additional_details"}
        assert {"deployment_type", "model_availability"} <= set(model["additional_details"])
        for details in (source, model, read["eval_library"]):
            assert only_strings(details["additional_details"])
        for result in read["evaluation_results"]:
            assert isinstance(result["score_details"]["score"], int | float)
            metric = result["metric_config"]
            assert isinstance(metric["lower_is_better"], bool)
            assert {"min_score", "max_score"} <= set(metric)
            assert set(result["source_data"]) >= {"dataset_name", "source_type"}
            assert only_strings(result["generation_config"]["additional_details"])
    dense, broken, lost = (found[name][1] for name in found)
    assert dense["model_info"]["id"] == "org/tiny"
    assert dense["source_metadata"]["evaluator_relationship"] == "third_party"
    assert broken["source_metadata"]["evaluator_relationship"] == "first_party"
    assert broken["model_info"]["additional_details"]["sparsity"] == "0.2"
    results = {result["evaluation_result_id"]: result for result in dense["evaluation_results"]}
    ppl = results["perplexity/wikitext2/ppl@128"]
    assert ppl["metric_config"]["metric_parameters"] == {"window": 128}
    assert ppl["metric_config"]["max_score"] == "Infinity"
    assert ppl["score_details"] == {"score": 12.5, "uncertainty": {"num_samples": 6}}, "NaN is no standard error"
    assert ppl["source_data"]["hf_repo"] == "Salesforce/wikitext"
    assert results["zero_shot/piqa/acc"]["source_data"] == {"dataset_name": "piqa", "source_type": "other"}
    assert results["zero_shot/piqa/acc"]["score_details"]["uncertainty"]["standard_error"] == {"value": 0.07}
    assert len(broken["evaluation_results"]) == 3
    assert broken["source_metadata"]["additional_details"]["not_finite"] == "perplexity/wikitext2/ppl@128 inf"
    assert lost["source_metadata"]["additional_details"]["not_finite"] == "perplexity/wikitext2/ppl@128 nan"


@pytest.mark.parametrize("form", ["lm-eval", "every-eval-ever"])
def test_the_same_again_takes_the_place_of_the_first(form: str, store: ResultsStore, tmp_path: Path) -> None:
    assert set(exported(store, form, tmp_path / "out")) == set(exported(store, form, tmp_path / "out"))


def test_names_stay_in_the_folder_and_apart(store: ResultsStore, tmp_path: Path) -> None:
    names = ["a/b", "a:b", "A__b", "..", ".", "", "ö" * 300, "x\ty", "../../etc", "-"]
    made = [pruned(0.2, name=name) for name in names]
    rows = [measured("r2", each.name, "zero_shot/piqa/acc", 0.5) for each in made]
    store.record(run_row("r2", name=".."), metrics=rows, checkpoints=checkpoints("r2", *made))
    run = next(run for run in store.runs() if run.run_key == "r2")
    files = export_run(store, run, "lm-eval", tmp_path / "out")
    assert len({str(file).casefold() for file in files}) == len(names)
    assert all(file.is_file() and file.parent.parent == tmp_path / "out" for file in files)
    assert len(safe_name("ö" * 300).encode()) <= 120
    assert safe_name("..").strip(".")


@pytest.mark.parametrize(
    "prepare, words",
    [
        (lambda store, folder: store.record(run_row("r3", name="bare")), "run r3 evaluated nothing that could be"),
        (lambda store, folder: folder.write_text("x"), "cannot be written"),
    ],
)
def test_what_cannot_be_exported_is_said(
    prepare: Callable[[ResultsStore, Path], None], words: str, store: ResultsStore, tmp_path: Path
) -> None:
    prepare(store, tmp_path / "out")
    run = sorted(store.runs(), key=lambda row: row.run_key)[-1]
    with pytest.raises(SpecError, match=words):
        export_run(store, run, "lm-eval", tmp_path / "out")
