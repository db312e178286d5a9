"""The benchmarks run, on models so small that their figures say nothing; what must hold at every size is asserted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers import PreTrainedModel

from pruning.allocation.budget import HeadUnit
from pruning.calibration import CalibrationSet
from pruning.checkpoints.save_load import load_checkpoint, save_checkpoint
from pruning.families import family_of
from pruning.methods import slimgpt
from tests.bench import report, transfers
from tests.bench.__main__ import PARTS, main, run_parts
from tests.bench.against_naive import differences, removals
from tests.bench.growth import slope
from tests.bench.materials import Materials
from tests.bench.naive import Naive, Removal, prune_naive_
from tests.bench.options import Growth, Options, ProfileSizes, Shape, Windows, parse_options
from tests.bench.resident import prune
from tests.bench.synthetic import layer_bytes, write_checkpoint
from tests.evaluation.local_data import mmlu_rows, write_data
from tests.pruning.captured import hooked_moments, outputs
from tests.tiny import random_ids, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.slow  # not in `make test-fast`

SENTENCES = ("The quick brown fox jumps over the lazy dog.", "Pruning removes the heads that matter least.")
SHAPE = Shape(hidden=32, intermediate=88, heads=4, layers=4, vocab=320)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_checkpoint(tiny_model("llama", layers=4), tiny_tokenizer(), folder)
    return folder


@pytest.fixture(scope="module")
def mirror(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mirror")
    rows = [{"text": f"{sentence} And again, {number} times over."} for number in range(150) for sentence in SENTENCES]
    write_data(root, "allenai/c4", "en", {"train": rows})
    write_data(root, "Salesforce/wikitext", "wikitext-2-raw-v1", {"test": rows[::3]})
    write_data(root, "cais/mmlu", "virology", {"test": mmlu_rows(12), "dev": mmlu_rows(5)})
    return root


@pytest.fixture
def options(model_folder: Path, mirror: Path, tmp_path: Path) -> Options:
    return Options(
        model=model_folder,
        mirror=str(mirror),
        out=tmp_path / "out",
        scratch=tmp_path / "scratch",
        batch_size=3,
        tokens=Windows(6, 32),
        num_heldout=2,
        naive_tokens=Windows(8, 48),
        stream_tokens=Windows(4, 16),
        stream_gib=12 * layer_bytes(SHAPE) / 2**30,
        stream_shape=SHAPE,
        kill_layers=6,  # half as many: what was pruned once is not pruned again to be compared with
        group_size=3,
        p1_calibration=Windows(6, 32),
        p1_windows=Windows(2, 64),
        ordering_samples=(4, 6),
        ordering_lengths=(32, 48),
        growth=Growth(SHAPE, (2, 4), (32, 64), (Windows(4, 16), Windows(8, 16)), (20, 50), repeats=1),
    )


def run(part: str, options: Options) -> report.Figures:
    run_parts((part,), options)
    assert not options.scratch.exists()
    figures = report.read(options.out)
    section = f"ordering_{options.head_unit}" if options.head_unit else part
    assert "float32" in str(figures[f"{section}_protocol"])
    assert "torch" in str(figures[f"{section}_protocol"])
    return figures


def test_speed(options: Options) -> None:
    figures = run("speed", options)
    for percent in (20, 50):
        seconds, forward = figures[f"speed_prune_{percent}_seconds"], figures["speed_forward_seconds"]
        assert figures[f"prune_over_forward_{percent}"] == pytest.approx(seconds / forward)  # type: ignore[operator]
        assert figures[f"speed_split_{percent}"] in ("ffn", "third", "half", "equal")
    assert "6 x 32 tokens of allenai/c4 en train, 2 windows held out" in str(figures["speed_protocol"])


def test_the_naive_schedule_gives_our_answer(options: Options) -> None:
    figures = run("naive", options)
    for ending in ("", "_50"):
        assert figures[f"naive_kept_differences{ending}"] == 0
        assert figures[f"naive_ppl_difference{ending}"] == pytest.approx(0, abs=1e-3)
        assert figures[f"naive_over_ours{ending}"] > 0  # type: ignore[operator]
        assert figures[f"naive_inversions{ending}"] >= 4  # type: ignore[operator]


@pytest.mark.slow  # two fresh processes that import transformers
@pytest.mark.long
def test_profile(options: Options) -> None:
    sizes = ProfileSizes(prompt_len=8, new_tokens=4, ratio_seconds=0.5)
    figures = run("profile", replace(options, profile=sizes, profile_processes=2))
    for name in ("prefill", "decode"):
        ratios = [figures[f"profile_{name}_ratio_{index}"] for index in (1, 2)]
        assert figures[f"profile_{name}_ratio_spread"] == pytest.approx(max(ratios) / min(ratios) - 1)  # type: ignore[type-var, operator]


def test_few_shot(options: Options) -> None:
    figures = run("few_shot", replace(options, few_shot_limit=9, few_shot_subjects=("virology",)))
    assert figures["few_shot_questions"] == 9
    assert figures["few_shot_answers_that_differ"] == 0
    assert figures["few_shot_whole_over_shared"] > 0  # type: ignore[operator]


def test_few_shot_without_its_data_is_skipped(options: Options) -> None:
    run_parts(("few_shot",), replace(options, few_shot_subjects=("anatomy",)))
    assert "cais/mmlu" in str(report.read(options.out)["few_shot_skipped"])


@pytest.mark.slow
@pytest.mark.long
def test_stream(options: Options) -> None:
    figures = run("stream", options)
    assert figures["stream_layers"] == 12
    assert figures["stream_model_gib"] > 12 * layer_bytes(SHAPE) / 2**30  # type: ignore[operator]
    assert 0 < figures["stream_libraries_gib"] <= figures["stream_peak_gib"]  # type: ignore[operator]
    assert figures["stream_seconds_per_layer_second_half"] > 0  # type: ignore[operator]
    assert 0 < figures["stream_load_check_share"] < 1  # type: ignore[operator]
    assert 0 <= figures["stream_load_check_gib"] < 0.1  # type: ignore[operator]
    assert figures["stream_resume_equal"] is True
    assert 0 < figures["stream_resume_layers_left"] <= options.kill_layers / 2  # type: ignore[operator]


def test_growth(options: Options) -> None:
    figures = run("growth", options)
    assert {key for key in figures if key.endswith("_exponent") and "forward" not in key} == {
        "growth_depth_exponent",
        "growth_width_exponent",
        "growth_tokens_exponent",
    }
    assert {"growth_sparsity_20_over_forward", "growth_sparsity_50_seconds", "growth_width_64_seconds"} <= set(figures)


def test_p1(options: Options) -> None:
    figures = run("p1", options)
    for key in ("p1_dense", "p1_20", "p1_50", "p1_20_equal", "p1_50_equal"):
        assert figures[key] > 1  # type: ignore[operator]
    assert figures["p1_50"] != figures["p1_dense"]
    assert "wikitext-2-raw-v1 test" in str(figures["p1_protocol"])


@pytest.mark.parametrize("head_unit", [None, "query_head"])
def test_ordering(options: Options, head_unit: str | None) -> None:
    options = replace(options, head_unit=head_unit)
    figures = run("ordering", options)
    section = f"ordering_{head_unit}" if head_unit else "ordering"
    names = {"log_increase", "linear_decrease", "uniform", "no_gcd", "no_dgs", "split_default", "samples_4"}
    assert {f"{section}_{name}" for name in names} <= set(figures)
    assert figures[f"{section}_log_increase"] == figures[f"{section}_split_equal"] == figures[f"{section}_samples_6"]
    assert figures[f"{section}_log_increase"] != figures[f"{section}_no_dgs"]


def test_a_part_without_its_data_says_so_and_leaves_older_figures(options: Options, tmp_path: Path) -> None:
    report.record(report.Result("p1", "of last week", {"p1_dense": 27.83}), options.out)
    (tmp_path / "empty").mkdir()
    run_parts(("p1",), Options(**{**vars(options), "mirror": str(tmp_path / "empty")}))
    figures = report.read(options.out)
    assert "it needs C4" in str(figures["p1_skipped"])
    assert (figures["p1_dense"], figures["p1_protocol"]) == (27.83, "of last week")
    assert "Skipped: it needs C4" in (options.out / "bench.md").read_text()


def test_parts_meet_in_one_file_and_replace_only_themselves(tmp_path: Path) -> None:
    report.record(report.Result("p1", "old", {"p1_dense": 1.0, "p1_20": 2.0}), tmp_path)
    report.record(report.Result("ordering", "P", {"ordering_uniform": 3.5}), tmp_path)
    report.record(report.Result("ordering_query_head", "Q", {"ordering_query_head_uniform": 4.5}), tmp_path)
    report.record_skip("p1", "no C4", tmp_path)
    report.record(report.Result("p1", "new", {"p1_dense": 5.0}), tmp_path)
    assert json.loads((tmp_path / "bench.json").read_bytes()) == {
        "ordering_protocol": "P",
        "ordering_uniform": 3.5,
        "ordering_query_head_protocol": "Q",
        "ordering_query_head_uniform": 4.5,
        "p1_protocol": "new",
        "p1_dense": 5.0,
    }
    text = (tmp_path / "bench.md").read_text()
    assert "| ordering_uniform | 3.5 |" in text
    assert "Protocol: new" in text
    assert "old" not in text


@pytest.fixture
def dense() -> PreTrainedModel:
    return tiny_model("llama", layers=2)


def test_naive_weights_are_the_least_squares_of_the_inputs_they_see(dense: PreTrainedModel) -> None:
    """The first linear that is pruned sees the dense model's inputs, whose moments forward hooks give."""
    ids_NL = random_ids(dense, batch=6, length=24)
    linear, name = family_of(dense).o_proj(family_of(dense).layers(dense)[0]), "model.layers.0.self_attn.o_proj"
    H_II, W_OI = hooked_moments(dense, ids_NL)[name], linear.weight.detach().double().clone()
    naive = prune_naive_(dense, ids_NL, [Removal(2, 0, 0), Removal(0, 0, 10)], dampening_frac=0.01, batch_size=4)
    assert naive.inversions == 2 + 2  # two heads; ten channels as 8 + 2
    kept_K = torch.arange(32).reshape(8, 4)[list(naive.kept[0, "attention"])].flatten()
    H_II += 0.01 * H_II.diagonal().mean() * torch.eye(32)
    best_OK = torch.linalg.solve(H_II[kept_K][:, kept_K], (W_OI @ H_II[:, kept_K]).T).T
    assert len(kept_K) == 16
    assert_close(linear.weight[:, kept_K].double(), best_OK, rtol=1e-3, atol=1e-4)
    assert int((linear.weight != 0).any(0).sum()) == 16
    assert len(naive.kept[1, "mlp"]) == 38
    assert outputs(dense)["model.layers.1.mlp.down_proj"].weight[:, list(naive.kept[1, "mlp"])].any()


@pytest.mark.parametrize("unit", ["kv_group", "query_head"])
def test_naive_and_ours_agree_where_heads_go_too(dense: PreTrainedModel, unit: HeadUnit) -> None:
    ids_NL = random_ids(dense, batch=10, length=24)
    config = slimgpt.Config(sparsity=0.3, split="equal", head_unit=unit)
    ours = prune(dense, CalibrationSet(ids_NL, ids_NL[:0], {}), config, Options(batch_size=4), "ours").pruned
    spent = removals(ours.plan)
    assert sum(layer.query_heads if unit == "query_head" else layer.kv_groups for layer in spent) >= 2
    naive = prune_naive_(dense, ids_NL, spent, dampening_frac=config.dampening_frac, batch_size=4)
    assert differences(ours.plan, naive) == 0
    other = {place: tuple(index + 1 for index in kept) for place, kept in naive.kept.items()}
    assert differences(ours.plan, Naive(other, naive.inversions)) > 0


def test_a_synthetic_checkpoint_is_a_checkpoint(tmp_path: Path) -> None:
    size = write_checkpoint(tmp_path / "model", SHAPE, lambda share, message: None)
    model = load_checkpoint(tmp_path / "model")
    assert size == 4 * sum(parameter.numel() for parameter in model.parameters())
    assert float(model.model.layers[3].mlp.down_proj.weight.detach().std()) == pytest.approx(0.05, rel=0.1)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) == 2
    assert bool(torch.isfinite(model(random_ids(model)).logits).all())


def test_the_slope_of_a_power_is_its_exponent() -> None:
    assert slope((2, 4, 8), [3 * 2.0**2, 3 * 4.0**2, 3 * 8.0**2]) == pytest.approx(2)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts, options = parse_options(["speed", "p1", "--tokens", "4x16", "--model", str(tmp_path)], tuple(PARTS))
    assert (parts, options.tokens, options.model) == (("speed", "p1"), Windows(4, 16), tmp_path)
    assert parse_options([], tuple(PARTS)) == (tuple(PARTS), Options())
    for wrong, told in ((["spede"], "unknown part 'spede'"), (["--tokens", "64"], "write it like 64x1024")):
        with pytest.raises(SystemExit):
            main(wrong)
        assert told in capsys.readouterr().err


def test_transfers_are_two_streams_each_way_at_most(tmp_path: Path) -> None:
    options = Options(out=tmp_path)
    figures = transfers.run(Materials(options), options).figures
    for place, most in {"device": 0, "host": 2, "files": 2}.items():
        assert [figures[f"transfers_{place}_streams_{way}"] for way in ("in", "out")] == pytest.approx(
            [most] * 2, abs=0.01
        )
    assert figures["transfers_host_blocking_copies"] == 0
