"""A run per checkpoint below that of its run: with the same names of metrics, found again, never doubled."""

from __future__ import annotations

import math
import shutil
import sys
from pathlib import Path

import pytest

from infra.tracking.mlflow_store import KIND_TAG, LABEL_TAG, RUN_KEY_TAG
from infra.tracking.records import DataInput, MetricPoint, RunContent, RunRecord
from infra.tracking.tracker import Tracker
from tests.infra.processes import finish, start
from tests.infra.tracking.test_tracker import checkpoint, children, client, experiment_id, only_run, record

pytestmark = pytest.mark.slow  # not in `make test-fast`

PPL = "perplexity/wikitext2/ppl_2048"
ODD = ["slimgpt-20", "a/b c", "größe ☃", "<script>alert('1')</script>", 'it\'s "quoted"; --', "x" * 400, ".", "%_"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, blank_mlflow: Path) -> str:
    path = tmp_path_factory.mktemp("checkpoints") / "mlflow.db"
    shutil.copyfile(blank_mlflow, path)
    return f"sqlite:///{path}"


@pytest.fixture
def tracker(shared: str, request: pytest.FixtureRequest) -> Tracker:
    return Tracker(shared, experiment=str(request.node.name))


def ppl(value: float) -> list[MetricPoint]:
    return [MetricPoint("perplexity/wikitext2/ppl@2048", value)]


def test_checkpoints_share_their_columns(tracker: Tracker) -> None:
    values = {"dense": 12.5, "slimgpt-20": math.inf, "slimgpt-20+lora": math.nan}
    amounts = {"dense": "0", "slimgpt-20": "0.2", "slimgpt-20+lora": "0.2"}
    found = [checkpoint(name, metrics=ppl(value), params={"sparsity": amounts[name]}) for name, value in values.items()]
    record(tracker, checkpoints=found)
    runs = children(tracker)
    assert {name: run.data.metrics[PPL] for name, run in runs.items() if name != "slimgpt-20+lora"} == {
        "dense": 12.5,
        "slimgpt-20": sys.float_info.max,  # as the sqlite store keeps infinity
    }
    assert math.isnan(runs["slimgpt-20+lora"].data.metrics[PPL])
    assert {name: run.data.params for name, run in runs.items()} == {n: {"sparsity": a} for n, a in amounts.items()}
    assert only_run(tracker).data.metrics == {}
    one = client(tracker).search_runs([experiment_id(tracker)], f"metrics.`{PPL}` < 13 AND params.sparsity = '0'")
    assert [run.info.run_name for run in one] == ["dense"]
    every = client(tracker).search_runs([experiment_id(tracker)], "tags.\"slimline.kind\" = 'checkpoint'")
    assert len(every) == 3, "as the help says"


def test_recording_again_makes_no_second_one(tracker: Tracker) -> None:
    """Also when something is new in one of them, and the others are left as they are."""
    both = [checkpoint("dense", metrics=ppl(10.0)), checkpoint("slimgpt-20", metrics=ppl(20.0))]
    record(tracker, checkpoints=both)
    before = children(tracker)
    record(tracker, checkpoints=both, tags={"t": "new"})
    record(tracker, checkpoints=[both[0], checkpoint("slimgpt-20", metrics=ppl(19.0))])
    after = children(tracker)
    assert {name: run.info.run_id for name, run in after.items()} == {n: r.info.run_id for n, r in before.items()}
    assert after["dense"].info.end_time == before["dense"].info.end_time
    assert after["slimgpt-20"].data.metrics[PPL] == 19.0
    points = client(tracker).get_metric_history(after["slimgpt-20"].info.run_id, PPL)
    assert [point.value for point in points] == [20.0, 19.0]
    assert len(client(tracker).get_metric_history(after["dense"].info.run_id, PPL)) == 1


def test_odd_names_stay_what_they_are_and_are_found_again(tracker: Tracker, tmp_path: Path) -> None:
    for tag in ("a", "b"):
        found = []
        for index, name in enumerate(ODD):
            folder = tmp_path / f"prune-v1-{index}"
            folder.mkdir(exist_ok=True)
            texts = {f"reports/{name}.json": name}
            found.append(checkpoint(name, folder, metrics=ppl(index), tags={"t": tag}, artifacts=texts))
        record(tracker, checkpoints=found, tags={"t": tag})
    runs = client(tracker).search_runs([experiment_id(tracker)], f"tags.`{LABEL_TAG}` != ''")
    assert sorted(run.data.tags[LABEL_TAG] for run in runs) == sorted(ODD)
    assert {run.info.run_name for run in runs} == {name[:250] for name in ODD}
    assert {run.data.tags["t"] for run in runs} == {"b"}
    models = client(tracker).search_logged_models([experiment_id(tracker)])
    assert len(models) == len(ODD)
    assert {model.tags["slimline.folder"] for model in models} == {
        (tmp_path / f"prune-v1-{index}").as_uri() for index in range(len(ODD))
    }


def test_a_renamed_checkpoint_is_known_by_its_key(tracker: Tracker) -> None:
    record(tracker, checkpoints=[checkpoint("small", key="prune-v1-0"), checkpoint("other", key="prune-v1-1")])
    before = children(tracker)["small"].info.run_id
    record(tracker, checkpoints=[checkpoint("tiny", key="prune-v1-0"), checkpoint("other", key="prune-v1-1")])
    assert set(children(tracker)) == {"tiny", "other"}
    assert children(tracker)["tiny"].info.run_id == before


def test_two_names_of_one_artifact_have_a_run_each(tracker: Tracker) -> None:
    for tag in ("a", "b"):
        record(tracker, checkpoints=[checkpoint(name, key="prune-v1-0") for name in ("one", "two")], tags={"t": tag})
    assert set(children(tracker)) == {"one", "two"}


def test_a_deleted_one_is_made_again(tracker: Tracker) -> None:
    record(tracker, checkpoints=[checkpoint("dense", metrics=ppl(10.0))])
    client(tracker).delete_run(children(tracker)["dense"].info.run_id)
    record(tracker, checkpoints=[checkpoint("dense", metrics=ppl(10.0))], tags={"t": "new"})
    assert children(tracker)["dense"].data.metrics == {PPL: 10.0}


def test_moments_are_those_of_the_stages(tracker: Tracker) -> None:
    record(tracker, checkpoints=[checkpoint("dense", began_ms=1_000_000, ended_ms=1_500_000)])
    info = children(tracker)["dense"].info
    assert (info.start_time, info.end_time) == (1_000_000, 1_500_000)
    record(tracker, checkpoints=[checkpoint("dense", began_ms=7, ended_ms=9)])
    assert children(tracker)["dense"].info.end_time == 1_500_000, "moments alone are nothing new"


def test_data_sets_are_inputs_once_with_all_purposes(tracker: Tracker) -> None:
    hub = {"path": "allenai/c4", "split": "train"}
    inputs = [
        DataInput("allenai/c4", "c" * 64, "calibration", hub),
        DataInput("allenai/c4", "c" * 64, "evaluation", hub),
        DataInput("local data", "d" * 64, "evaluation"),
    ]
    for tag in ("a", "b"):
        record(tracker, checkpoints=[checkpoint("dense", inputs=inputs, tags={"t": tag})])
    found = children(tracker)["dense"].inputs.dataset_inputs
    told = {(each.dataset.name, each.dataset.digest, each.dataset.source_type, each.tags[0].value) for each in found}
    assert told == {
        ("allenai/c4", "c" * 36, "hugging_face", "calibration, evaluation"),
        ("local data", "d" * 36, "local", "evaluation"),
    }


def test_checkpoints_are_models_by_reference_with_aliases(tracker: Tracker, tmp_path: Path) -> None:
    folders = [tmp_path / f"prune-v1-{index}" for index in range(2)]
    for folder in folders:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(bytes(100))
    both = [
        checkpoint("slimgpt-20", folders[0], metrics=ppl(20.0)),
        checkpoint("flap-20", folders[1], metrics=ppl(math.nan)),
    ]
    name = f"aliases {tmp_path.name}"
    record(tracker, name=name, checkpoints=both, aliases={"best-12.5pct": "slimgpt-20", "last-good": "flap-20"})
    record(tracker, name=name, checkpoints=both, aliases={"best-12.5pct": "flap-20", "last-good": "nobody"})
    model = name.replace(" ", "-")
    for alias in ("best-12_5pct", "last-good"):
        version = client(tracker).get_model_version_by_alias(model, alias)
        assert (version.source, version.description) == (folders[1].as_uri(), "flap-20")
    models = client(tracker).search_logged_models([experiment_id(tracker)])
    slim, flap = (next(found for found in models if found.name == name) for name in ("slimgpt-20", "flap-20"))
    assert len(models) == 2
    assert not flap.metrics, "MLflow would keep NaN as 0"
    assert [(metric.key, metric.value) for metric in slim.metrics] == [(PPL, 20.0)]
    assert str(slim.status) == "READY"
    runs = children(tracker)
    assert [output.model_id for output in runs["slimgpt-20"].outputs.model_outputs] == [slim.model_id]
    database = Path(tracker.uri.removeprefix("sqlite:///"))
    assert not list(database.parent.rglob("*.safetensors"))


def test_the_experiment_opens_in_the_pages_for_model_training(tracker: Tracker) -> None:
    client(tracker).create_experiment(tracker.experiment)  # as an older slimline did
    record(tracker)
    kind = "mlflow.experimentKind"
    assert client(tracker).get_experiment(experiment_id(tracker)).tags[kind] == "custom_model_development"
    client(tracker).set_experiment_tag(experiment_id(tracker), kind, "finetuning")
    record(tracker, tags={"t": "new"})
    assert client(tracker).get_experiment(experiment_id(tracker)).tags[kind] == "finetuning"


def test_a_record_of_an_older_slimline_is_kept_and_continued(tracker: Tracker) -> None:
    """Its figures were in one run, with the checkpoints in the names of the metrics."""
    tag = {RUN_KEY_TAG: "run-v1-0", "slimline.recorded": "of then"}
    experiment = client(tracker).create_experiment(tracker.experiment)
    old = client(tracker).create_run(experiment, tags=tag, run_name="demo")
    client(tracker).log_metric(old.info.run_id, "dense/perplexity/wikitext2/ppl_2048", 10.0)
    client(tracker).log_param(old.info.run_id, "steps.0.sparsity", "0.2")
    assert tracker.has("run-v1-0")
    assert record(tracker, checkpoints=[checkpoint("dense", metrics=ppl(10.0))]) == old.info.run_id
    assert only_run(tracker).data.metrics == {"dense/perplexity/wikitext2/ppl_2048": 10.0}
    assert only_run(tracker).data.params == {"steps.0.sparsity": "0.2"}
    assert children(tracker)["dense"].data.metrics == {PPL: 10.0}


def test_runs_are_shown_below_a_night(tracker: Tracker) -> None:
    cells = [record(tracker, f"run-v1-{name}", checkpoints=[checkpoint("dense")]) for name in "ab"]
    content = RunContent("night", tags={KIND_TAG: "night"}, description="# good")
    above = ["run-v1-a", "run-v1-b", "run-v1-nobody"]
    nights = [tracker.record(RunRecord(f"night-{name}", content, above=above)) for name in ("first", "second")]
    for cell in cells:
        assert client(tracker).get_run(cell).data.tags["mlflow.parentRunId"] == nights[1]
    assert client(tracker).get_run(nights[0]).data.tags["mlflow.note.content"] == "# good"
    record(tracker, "run-v1-a", checkpoints=[checkpoint("dense")], tags={"t": "new"})
    assert client(tracker).get_run(cells[0]).data.tags["mlflow.parentRunId"] == nights[1]
    assert len(client(tracker).search_runs([experiment_id(tracker)])) == 6


RACER = """
import sys
from infra.tracking.records import MetricPoint
from infra.tracking.tracker import Tracker
from tests.infra.tracking.test_tracker import checkpoint, record
tracker = Tracker(sys.argv[1], sys.argv[2])
found = [checkpoint(name, metrics=[MetricPoint("ppl", 1.0)]) for name in ("dense", "slimgpt-20")]
print(record(tracker, checkpoints=found), record(tracker, "run-v1-" + sys.argv[3], checkpoints=found))
"""


def test_two_processes_at_once_make_no_second_one(tracker: Tracker) -> None:
    started = [start(RACER, tracker.uri, tracker.experiment, name) for name in "ab"]
    ids = [finish(child).split() for child in started]
    assert ids[0][0] == ids[1][0]
    runs = client(tracker).search_runs([experiment_id(tracker)])
    below: dict[str, list[str]] = {}
    for run in runs:
        if "mlflow.parentRunId" in run.data.tags:
            below.setdefault(run.data.tags["mlflow.parentRunId"], []).append(run.info.run_name)
            assert len(client(tracker).get_metric_history(run.info.run_id, "ppl")) == 1
    assert {parent: sorted(names) for parent, names in below.items()} == {
        run_id: ["dense", "slimgpt-20"] for run_id in {*ids[0], *ids[1]}
    }


def test_images_are_drawn_when_they_are_logged_and_fail_no_run(
    tracker: Tracker, caplog: pytest.LogCaptureFixture
) -> None:
    drawn = []

    def draw() -> bytes:
        drawn.append(1)
        return b"\x89PNG"

    def broken() -> bytes:
        raise RuntimeError("no such font")

    images = {"figures/kept.png": draw, "figures/größe <b>.png": broken}
    one = checkpoint("slimgpt-20", images=images)
    assert one.digest() != checkpoint("slimgpt-20").digest()
    for _ in range(2):
        record(tracker, checkpoints=[one])
    assert drawn == [1], "a record that is there already is not drawn again"
    assert "RuntimeError: no such font" in caplog.text
    run = children(tracker)["slimgpt-20"]
    assert run.info.status == "FINISHED"
    (found,) = client(tracker).list_artifacts(run.info.run_id, "figures")
    path = client(tracker).download_artifacts(run.info.run_id, found.path)
    assert (found.path, Path(path).read_bytes()) == ("figures/kept.png", b"\x89PNG")
