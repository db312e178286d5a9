"""Results as tables and as data."""

from __future__ import annotations

import csv
import io
import json
import math

import pytest

from flows.records.tables import aligned, protocol_lines, render, table_rows, warnings_of, with_sizes
from infra.results.rows import CheckpointRow, MetricRow


def row(checkpoint: str, suite: str, task: str, metric: str, value: float, **more: object) -> MetricRow:
    values = {"run_key": "run-x-v1-0", "checkpoint_key": "c", "stage_key": "s", "protocol": '{"limit": 10}'} | more
    return MetricRow(checkpoint=checkpoint, suite=suite, task=task, metric=metric, value=value, **values)


ROWS = [
    row("dense", "perplexity", "wikitext", "ppl@128", 27.8041, stderr=0.5, protocol='{"bos": "once", "join": "a,b"}'),
    row("pruned", "perplexity", "wikitext", "ppl@128", 1234.5, protocol='{"bos": "once", "join": "a,b"}'),
    row("dense", "zero_shot", "piqa", "acc_norm", 0.71, stderr=0.011),
    row("dense", "zero_shot", "piqa", "acc", 0.7, stderr=0.01),
    row("dense", "zero_shot", "drop", "f1", 0.25),
    row("dense", "profile", "profile", "num_parameters", 134_515_008, protocol='{"runs": 5}'),
    row("dense", "profile", "profile", "num_decoder_parameters", 106_203_456),
    row("dense", "profile", "profile", "prefill_ms_p50", 12.345),
    row("dense", "profile", "profile", "prefill_ms_p90", 99.0),
    row("pruned", "profile", "profile", "tokens_per_s", 4321.7),
    row("pruned", "profile", "profile", "decode_ratio", 0.875),
]


def test_one_row_per_checkpoint_and_the_size_first() -> None:
    rows = table_rows(ROWS)
    assert [cells["checkpoint"] for cells in rows] == ["dense", "pruned"]
    assert list(rows[0]) == [
        "checkpoint",
        "parameters (M)",
        "decoder (M)",
        "wikitext ppl@128",
        "piqa acc",
        "drop f1",
        "prefill ms",
        "tokens/s",
        "decode / dense",
    ]
    assert list(rows[0]) == list(rows[1])


def test_checkpoints_that_are_not_profiled_have_their_sizes_too() -> None:
    sizes = [("dense", 10, 8), ("pruned", 9_500_000, 7_250_000), ("unmeasured", 1, 1), ("unknown", None, None)]
    checkpoints = [
        CheckpointRow(
            run_key="run-x-v1-0", checkpoint=name, checkpoint_key=f"key-{name}", action="prune", model="m", config="{}",
            num_parameters=total, num_decoder_parameters=decoder,
        )
        for name, total, decoder in sizes
    ]  # fmt: skip
    rows = table_rows(with_sizes(ROWS, checkpoints))
    assert [cells["checkpoint"] for cells in rows] == ["dense", "pruned"]
    assert [cells["parameters (M)"] for cells in rows] == ["134.52", "9.50"], "what was profiled stands as it is"
    assert [cells["decoder (M)"] for cells in rows] == ["106.20", "7.25"]
    assert list(rows[0]) == list(table_rows(ROWS)[0])


def test_dense_stands_first_whatever_was_measured_first() -> None:
    rows = [
        row("tuned", "agreement", "text", "kl", 0.1),
        row("pruned", "zero_shot", "piqa", "acc", 0.5),
        row("tuned", "zero_shot", "piqa", "acc", 0.6),
        row("dense", "perplexity", "text", "ppl@64", 20.0),
    ]
    assert [cells["checkpoint"] for cells in table_rows(rows)] == ["dense", "pruned", "tuned"]


def test_cells_have_digits_and_errors() -> None:
    dense, pruned = table_rows(ROWS)
    assert dense["wikitext ppl@128"] == "27.80 ± 0.50"
    assert pruned["wikitext ppl@128"] == "1234.50"
    assert dense["piqa acc"] == "0.700 ± 0.010"
    assert dense["parameters (M)"] == "134.52"
    assert dense["prefill ms"] == "12.35" or dense["prefill ms"] == "12.34"
    assert pruned["tokens/s"] == "4322"
    assert pruned["decode / dense"] == "0.88"
    assert pruned["piqa acc"] == ""


def test_a_grid_point_has_figures_of_its_own() -> None:
    large = "profile b256 p12 n512"
    rows = [
        row("dense", "profile", "profile", "num_parameters", 1e6),
        row("dense", "profile", large, "attention_macs", 3.0),
        row("dense", "profile", large, "out_of_memory", 1.0),
        row("dense", "zero_shot", "piqa", "acc", 0.7),
        row("pruned", "profile", "profile b1 p12 n512", "prefill_ms_p50", 5.0),
        row("pruned", "profile", "profile b1 p12 n512", "latency_ms_p50", 5.0),
        row("pruned", "profile", large, "latency_ratio", 0.75),
        row("pruned", "profile", large, "tokens_per_s", 12.0),
    ]
    dense, pruned = table_rows(rows)
    assert list(dense) == [
        "checkpoint",
        "parameters (M)",
        "piqa acc",
        "tokens/s b256 p12 n512",
        "latency / dense b256 p12 n512",
        "out of memory b256 p12 n512",
        "latency ms b1 p12 n512",
    ]
    assert dense["out of memory b256 p12 n512"] == "yes"
    assert pruned["out of memory b256 p12 n512"] == ""


def test_a_ratio_has_its_error() -> None:
    (pruned,) = table_rows([row("pruned", "profile", "profile", "decode_ratio", 0.8754, stderr=0.0061)])
    assert pruned["decode / dense"] == "0.875 ± 0.006"


@pytest.mark.parametrize(
    "metrics, shown", [(("acc_norm", "acc"), "acc"), (("f1", "exact_match"), "exact_match"), (("score",), "score")]
)
def test_one_metric_of_a_task_is_shown(metrics: tuple[str, ...], shown: str) -> None:
    rows = table_rows([row("dense", "suite", "task", metric, 0.5) for metric in metrics])
    assert list(rows[0]) == ["checkpoint", f"task {shown}"]


def test_a_metric_nobody_knows_is_shown_too() -> None:
    rows = table_rows([row("dense", "suite", "task", "rouge_l", 0.5), row("dense", "suite", "task", "acc", 0.25)])
    assert rows == [{"checkpoint": "dense", "task rouge_l": "0.500", "task acc": "0.250"}]


def test_one_task_asked_by_two_suites_keeps_both_figures() -> None:
    rows = table_rows(
        [row("dense", "few", "piqa", "acc", 0.5), row("dense", "many", "piqa", "acc", 0.75)],
    )
    shown = [value for cells in rows for value in cells.values()]
    assert "0.500" in shown
    assert "0.750" in shown


def test_the_text_table_is_aligned() -> None:
    lines = aligned(table_rows(ROWS)).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split() == ["dense", "pruned"]
    assert lines[4].split() == ["piqa", "acc", "0.700", "±", "0.010", "-"]


def test_markdown_has_a_rectangle() -> None:
    lines = render(ROWS, "markdown").splitlines()
    assert len(lines) == 2 + 2
    assert {line.count("|") for line in lines} == {10}
    assert lines[0].startswith("| checkpoint | parameters (M) |")


def test_a_bar_in_a_name_is_no_column_of_markdown() -> None:
    lines = render([row("dense", "perplexity", "my|texts", "ppl@64", 20.0)], "markdown").splitlines()
    assert lines[0] == "| checkpoint | my\\|texts ppl@64 |"


def test_json_is_everything_with_its_protocol() -> None:
    data = json.loads(render(ROWS, "json"))
    assert len(data) == len(ROWS)
    assert data[0]["protocol"] == {"bos": "once", "join": "a,b"}
    assert data[0]["value"] == 27.8041


def test_json_of_a_broken_model_is_json() -> None:
    text = render([row("pruned", "perplexity", "wikitext", "ppl@128", math.inf)], "json")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads(text, parse_constant=refuse)[0]["value"] == "Infinity"


def test_csv_can_be_read_back() -> None:
    data = list(csv.DictReader(io.StringIO(render(ROWS, "csv"))))
    assert len(data) == len(ROWS)
    assert json.loads(data[0]["protocol"]) == {"bos": "once", "join": "a,b"}
    assert float(data[1]["value"]) == 1234.5
    assert data[1]["stderr"] == ""


@pytest.mark.parametrize("form", ["table", "markdown", "json", "csv"])
def test_nothing_measured_is_said(form: str) -> None:
    text = render([], form)
    assert {"json": "[]", "csv": ",".join(MetricRow.model_fields)}.get(form, "no results yet") == text


def test_a_perplexity_beyond_all_numbers_is_shown() -> None:
    assert table_rows([row("pruned", "perplexity", "text", "ppl@64", math.inf)])[0]["text ppl@64"] == "inf"


def test_each_suite_says_how_it_measured() -> None:
    data = {"dataset": "a/c", "config": None, "template": {"name": "alpaca", "input": None}}
    spec = {
        "model": {"id": "a/b", "revision": None},
        "calibration": {"data": data, "num_samples": 8, "seed": 0},
        "profile": None,
    }
    told, calibration, *lines = protocol_lines(ROWS[:3] + ROWS[5:6], spec)
    assert told == 'model: id "a/b"'
    assert calibration == (
        'calibration: data {"dataset": "a/c", "template": {"name": "alpaca"}}, num_samples 8, seed 0'
    )
    assert lines == ['perplexity: bos "once", join "a,b"', "zero_shot: limit 10", "profile: runs 5"]


@pytest.mark.parametrize(
    ("metric", "value", "stderr", "shown"),
    [
        ("ppl@128", 20.351, 3.25, "20.35 ± 3.25"),
        ("ppl@128", 20.3512, 0.0461, "20.351 ± 0.046"),
        ("acc", 0.7123, 0.0321, "0.712 ± 0.032"),
        ("acc", 0.7123, 0.0049, "0.7123 ± 0.0049"),
        ("kl@64", 0.00031, 0.00002, "0.000310 ± 0.000020"),
        ("ppl_ratio@64", 1.0042, 0.0011, "1.0042 ± 0.0011"),
        ("top1_agreement@64", 0.997, 0.0004, "0.99700 ± 0.00040"),
        ("kl_p99@64", 0.00031, None, "0.00031"),
        ("acc", 0.0, 0.0, "0.000 ± 0.000"),
        ("acc", 0.5, None, "0.500"),
        ("ppl@128", 9_999.5, 864.02, "9999.50 ± 864.02"),
        ("ppl@128", 5_428_747.99, 864_023.81, "5.43e+06 ± 8.6e+05"),
        ("ppl@128", float("inf"), None, "inf"),
    ],
)
def test_two_digits_of_the_error_are_seen(metric: str, value: float, stderr: float | None, shown: str) -> None:
    (cells,) = table_rows([row("pruned", "suite", "text", metric, value, stderr=stderr)])
    assert cells[f"text {metric}"] == shown


def test_data_and_versions_are_said_once() -> None:
    piqa, local = {"repo_id": "baber/piqa", "content": "0123456789abcdef"}, {"content": "fedcba9876543210"}
    versions = {"torch": "2.13.0", "transformers": "5.23.0"}
    suites = {"zero_shot": ([piqa], versions), "more": ([piqa, local], versions), "older": ([], {"torch": "2.12.0"})}
    rows = [
        row("dense", suite, "piqa", "acc", 0.5, protocol=json.dumps({"data_identity": data, "versions": libraries}))
        for suite, (data, libraries) in suites.items()
    ]
    assert protocol_lines(rows, {})[-2:] == [
        "data: baber/piqa content 0123456789ab; local data content fedcba987654",
        "versions: torch 2.13.0, transformers 5.23.0 / torch 2.12.0",
    ]


def test_training_on_what_is_measured_is_said_under_the_table() -> None:
    """Once for all figures that it makes doubtful, whichever of them comes last, and not as an option of the suite."""
    leaks = json.dumps({"bos": "once", "leaks": ["lora trains on x, and ppl measures x"]})
    rows = [
        row("tuned", "ppl", "text", "ppl@64", 20.0, protocol=leaks),
        row("tuned", "ppl", "text", "ppl@128", 20.0, protocol=leaks),
        row("again", "ppl", "text", "ppl@64", 20.0, protocol=leaks),
        row("dense", "ppl", "text", "ppl@64", 20.0, protocol='{"bos": "once"}'),
    ]
    told = "warning: lora trains on x, and ppl measures x [tuned, again]"
    assert protocol_lines(rows, {}) == ['ppl: bos "once"', told]
    assert protocol_lines(rows[::-1], {})[0] == 'ppl: bos "once"'
    assert warnings_of(rows) == [told]
    assert warnings_of(rows[-1:]) == []


def test_variants_say_what_they_change() -> None:
    variants = {"full": {}, "short": {"curve": "uniform", "calibration": {"seq_len": 64}}}
    spec = {"model": {"id": "a/b"}, "steps": [{"variants": variants}, {"recovery": "lora"}]}
    assert protocol_lines([], spec)[1:] == [
        "variant full: changes nothing",
        'variant short: curve "uniform", calibration {"seq_len": 64}',
    ]


def test_checkpoints_that_do_not_fit_come_below() -> None:
    rows = table_rows([row(f"checkpoint-{n}", "suite", "task", "acc", n / 100) for n in range(12)])
    tables = [table.splitlines() for table in aligned(rows, width=60).split("\n\n")]
    assert [name for table in tables for name in table[0].split()] == [f"checkpoint-{n}" for n in range(12)]
    assert [cell for table in tables for cell in table[1].split()[2:]] == [f"{n / 100:.3f}" for n in range(12)]
    assert {table[1].split()[0] for table in tables} == {"task"}
    assert all(len(line) <= 60 for table in tables for line in table)
    assert len(tables) == 4
    assert "\n\n" not in aligned(rows, width=1000)


def test_a_checkpoint_wider_than_the_terminal_stands_alone() -> None:
    rows = table_rows([row("x" * 50 + str(n), "suite", "task", "acc", 0.5) for n in range(2)])
    assert len(aligned(rows, width=20).split("\n\n")) == 2
