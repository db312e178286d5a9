"""The figures from a store: what is drawn of what is recorded, and what is said when there is nothing."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from flows.errors import SpecError
from flows.records.figures.catalogue import FIGURES, build_figure
from flows.records.figures.inputs import Recorded
from flows.records.figures.pareto import front
from flows.spec.load import shipped_nights, shipped_specs
from infra.artifacts.store import ArtifactRef, ArtifactStore
from infra.figures.draw import draw
from infra.figures.panels import Drawing, Panel, Series
from infra.results.lineage import Made
from infra.results.rows import CurveRow, LayerRow, MetricRow, NightFigureRow
from infra.results.store import ResultsStore
from pruning.orders import Order
from pruning.plan import LayerPlan, LayerShape, PruningPlan
from tests.infra.figures.test_draw import texts
from tests.infra.result_examples import NOON, cell_row, checkpoints, figure_row, measured, night_row, pruned, repaired
from tests.infra.result_examples import run_row as run

PPL = "perplexity/wikitext-2-raw-v1/ppl@128"
WINDOWS = {"data": {"dataset": "allenai/c4"}, "num_samples": 32, "seq_len": 512, "seed": 7}
ODD = "Größe & <script>alert(1)</script> 50%_x $a$"


@pytest.fixture
def recorded(tmp_path: Path) -> Recorded:
    return Recorded(ResultsStore(tmp_path / "results.duckdb"), ArtifactStore(tmp_path / "store"))


def ppl(key: str, checkpoint: str, value: float, **changes: Any) -> MetricRow:
    protocol = json.dumps({"bos": "once", "split": "test", "versions": {"torch": "2.13"}})
    return measured(key, checkpoint, PPL, value, **{"stderr": 0.5, "protocol": protocol} | changes)


def layers(key: str, checkpoint: str, errors: Sequence[float | None], kept: int = 3) -> list[LayerRow]:
    return [
        LayerRow(run_key=key, stage_key=f"key-{checkpoint}", layer=layer, sub_layer=sub_layer, kept=kept, total=4,
                 sparsity=1 - kept / 4, measured_error=error, heldout_error=None if error is None else 2 * error)
        for layer, error in enumerate(errors) for sub_layer in ("attention", "mlp")
    ]  # fmt: skip


def add(recorded: Recorded, key: str, *made: Made, sizes: Mapping[str, int] | None = None, **rows: Any) -> None:
    """A run with its checkpoints. sizes: parameters by checkpoint. model, name: of the run."""
    model, name = rows.pop("model", "org/tiny"), rows.pop("name", key)
    found = checkpoints(key, *made, model=model)
    if sizes:
        found = tuple(row.model_copy(update={"num_parameters": sizes.get(row.checkpoint)}) for row in found)
    finished = NOON + timedelta(minutes=len(recorded.results.runs()))
    recorded.results.record(run(key, name=name, finished_at=finished), checkpoints=found, **rows)


def series_of(panel: Panel | None) -> dict[str, Series]:
    assert panel is not None
    return {series.label: series for series in panel.series}


def the_panel(drawing: Drawing) -> Panel:
    (panel,) = drawing.panels()
    return panel


def drawn(drawing: Drawing) -> str:
    """The texts of the SVG, in which the protocol is; notes are wrapped there."""
    return " ".join(texts(draw(drawing, "svg")).split())


def write(recorded: Recorded, kind: str, key: str, request: Mapping[str, Any], **files: str) -> None:
    ref = ArtifactRef.model_validate({"kind": kind, "key": key})
    with recorded.artifacts.writing(ref, request=dict(request), versions={}) as folder:
        for name, text in files.items():
            (folder / f"{name}.json").write_text(text, encoding="utf-8")


def plan(*kept: int, heads: int = 4, channels: int = 8) -> str:
    """Of every layer so many heads and channels; a layer of 0 is dropped."""
    shape = LayerShape(num_heads=heads, num_kv_heads=heads, intermediate_size=channels)
    left = tuple(
        LayerPlan(layer=index, kept_query_heads=tuple(range(count)), kept_kv_heads=tuple(range(count)),
                  kept_channels=tuple(range(count)))
        for index, count in enumerate(kept) if count
    )  # fmt: skip
    return PruningPlan(source=(shape,) * len(kept), head_dim=2, layers=left).model_dump_json()


def test_output_errors_by_layer(recorded: Recorded) -> None:
    small, large, blind = pruned(0.2, calibration=WINDOWS), pruned(0.5, calibration=WINDOWS), pruned(0.3, name=ODD)
    add(recorded, "r1", small, large, blind, name=ODD, layers=[
        *layers("r1", small.name, [0.1, math.nan, 0.3]), *layers("r1", large.name, [0.2, 0.4, math.inf]),
        *layers("r1", ODD, [None, None, None]),
    ])  # fmt: skip
    drawing = build_figure(recorded, "slimgpt-2")
    lines = series_of(the_panel(drawing))
    assert list(lines) == ["slimgpt-20", "slimgpt-20, held out", "slimgpt-50", "slimgpt-50, held out"]
    assert lines["slimgpt-50"].y == (0.2, 0.4, math.inf)
    assert lines["slimgpt-50, held out"].dashes == "dashed"
    shown = drawn(drawing)
    for told in (
        "without a measured error: 1 more",
        "num_samples 32",
        'id "org/tiny"',
        f"runs: {ODD}",
        "slimgpt-20 nan",
    ):
        assert told in shown


def test_sparsities_by_layer_without_whole_layers(recorded: Recorded) -> None:
    flat, rising, short = pruned(0.5, name="flat-50"), pruned(0.5, name="rising-50"), pruned(0.5, name="short-50")
    less = pruned(0.2, name="flat-20")
    add(recorded, "r1", flat, rising, short, less, layers=[
        *layers("r1", "flat-50", [None] * 3, kept=2), *layers("r1", "rising-50", [None] * 3, kept=1),
        *layers("r1", "short-50", [None] * 3, kept=0), *layers("r1", "flat-20", [None] * 3),
    ])  # fmt: skip
    drawing = build_figure(recorded, "slimgpt-4")
    assert [[panel.title for panel in row if panel] for row in drawing.rows] == [
        ["attention heads, 20 % asked", "FFN channels, 20 % asked"],
        ["attention heads, 50 % asked", "FFN channels, 50 % asked"],
    ]
    lines = series_of(drawing.rows[1][1])
    assert {name: line.y for name, line in lines.items()} == {"flat": (50.0,) * 3, "rising": (75.0,) * 3}
    assert series_of(drawing.rows[0][1])["flat"].style == lines["flat"].style
    assert "left out: 1 more" in drawn(drawing)


def test_calibration_sets_that_differ_in_one_number_are_a_line(recorded: Recorded) -> None:
    made = [pruned(0.5, name=f"n{n}", calibration={**WINDOWS, "num_samples": n}) for n in (64, 8, 32)]
    made += [pruned(0.5, name="short", calibration={**WINDOWS, "seq_len": 64})]
    made += [pruned(0.5, name="seed", calibration={**WINDOWS, "seed": 8})]
    values = {"n8": 60.0, "n32": 50.0, "n64": math.inf, "short": 90.0, "seed": 1.0}
    add(recorded, "r1", *made, metrics=[ppl("r1", name, value) for name, value in values.items()])
    drawing = build_figure(recorded, "slimgpt-3")
    ((windows, lengths),) = drawing.rows
    line = series_of(windows)["slimgpt 50 %, windows of 512 tokens"]
    assert (line.x, line.y) == ((8.0, 32.0, 64.0), (60.0, 50.0, math.inf))
    assert line.spread == (0.5,) * 3
    assert series_of(lengths)["slimgpt 50 %, 32 windows"].x == (64.0, 512.0)
    shown = drawn(drawing)
    assert "off the scale in wikitext-2-raw-v1 ppl@128: slimgpt 50 %, windows of 512 tokens inf" in shown
    assert 'wikitext-2-raw-v1 ppl@128: bos "once"' in shown


def test_losses_of_every_training(recorded: Recorded) -> None:
    one = pruned(0.5)
    trained = repaired(one)
    points = {"train_loss": (3.0, math.nan, 2.0), "heldout_loss": (3.5, 3.2, 3.1), "learning_rate": (0.1, 0.1, 0.1)}
    curves = [CurveRow(run_key="r1", stage_key=f"key-{trained.name}", metric=metric, step=step, value=value)
              for metric, values in points.items() for step, value in enumerate(values)]  # fmt: skip
    add(recorded, "r1", one, trained, curves=curves)
    drawing = build_figure(recorded, "slimgpt-5")
    panel = the_panel(drawing)
    assert panel.title == trained.name
    assert list(series_of(panel)) == ["training loss", "held-out loss"]
    assert "lora: epochs 1.0" in drawn(drawing)


def test_quality_by_cost_names_the_front(recorded: Recorded) -> None:
    made = [pruned(0.2), pruned(0.3, name="bad"), pruned(0.4, name=ODD), pruned(0.5, name="broken")]
    sizes = {"dense": 100_000_000, "slimgpt-20": 80_000_000, "bad": 80_000_000, ODD: 60_000_000, "broken": 50_000_000}
    values = {"dense": 10.0, "slimgpt-20": 12.0, "bad": 30.0, ODD: 20.0, "broken": math.inf}
    device = '{"device_name": "H200"}'
    latency = [measured("r1", name, "profile/profile/decode_ms_per_token_p50", value, protocol=device)
               for name, value in {"dense": 5.0, "slimgpt-20": 6.0}.items()]  # fmt: skip
    average = [measured("r1", name, "zero_shot/average/acc", value, num_fewshot=0)
               for name, value in {"dense": 0.6, "slimgpt-20": 0.5, "bad": math.nan}.items()]  # fmt: skip
    metrics = [*(ppl("r1", name, value) for name, value in values.items()), *latency, *average]
    add(recorded, "r1", *made, sizes=sizes, metrics=metrics)
    drawing = build_figure(recorded, "pareto")
    (by_size, by_latency), (accuracy, _) = drawing.rows
    lines = series_of(by_size)
    assert lines["Pareto front"].x == (60.0, 80.0, 100.0)
    assert sorted(name for line in lines.values() for name in line.names if name) == sorted(
        ["dense", "slimgpt-20", ODD]
    )
    assert series_of(by_latency)["Pareto front"].x == (5.0,)
    assert accuracy is not None
    assert accuracy.y_label == "accuracy (higher is better)"
    shown = drawn(drawing)
    assert "off the scale in wikitext-2-raw-v1 ppl@128: slimgpt inf" in shown
    assert 'device_name "H200"' in shown


def test_the_front_is_that_of_the_view(recorded: Recorded) -> None:
    chance = random.Random(3)
    made = [pruned(0.5, name=f"c{index}") for index in range(40)]
    sizes = {each.name: 1000 + chance.randint(0, 40) for each in made}
    values = {each.name: float(chance.randint(1, 20)) for each in made}
    add(recorded, "r1", *made, sizes=sizes, metrics=[ppl("r1", name, value) for name, value in values.items()])
    names = list(values)
    ours = {names[index] for index in front([(sizes[name], values[name]) for name in names])}
    assert ours == {name for (name,) in recorded.results.select("SELECT checkpoint FROM pareto").rows}


def test_kept_heads_and_channels_of_few_and_of_many(recorded: Recorded) -> None:
    made = [pruned(0.2, name=name) for name in ("one", ODD, "three", "four", "five", "lost")]
    add(recorded, "r1", *made, name="r1")
    for each, kept in zip(made[:2], ((4, 2, 0), (4, 4, 4)), strict=False):
        write(recorded, "checkpoint", f"key-{each.name}".replace(ODD, "odd"), {}, plan=plan(*kept))
    recorded.results.record(run("r1", name="r1"), checkpoints=[
        row.model_copy(update={"checkpoint_key": row.checkpoint_key.replace(ODD, "odd")})
        for row in checkpoints("r1", *made, model="org/tiny")
    ])  # fmt: skip
    drawing = build_figure(recorded, "kept")
    assert len(drawing.rows) == 2
    heads, channels = next(row for row in drawing.rows if row[0] and row[0].title == "one: attention heads")
    assert heads is not None
    assert heads.heat is not None
    assert heads.heat.values == ((1.0,) * 4, (1.0, 1.0, 0.0, 0.0), (0.0,) * 4)
    assert heads.heat.ends == ("4/4", "2/4", "0/4")
    assert channels is not None
    assert channels.heat is not None
    assert channels.heat.ends == ("4/8", "2/8", "0/8")
    assert "left out: 4 more checkpoints" in drawn(drawing)
    for name in ("three", "four", "five"):
        write(recorded, "checkpoint", f"key-{name}", {}, plan=plan(2, 2, 2))
    (heads,), (channels,) = build_figure(recorded, "kept").rows
    assert heads is not None
    assert heads.heat is not None
    assert len(heads.heat.values) == 5
    assert heads.heat.values[heads.heat.rows.index("one")] == (1.0, 0.5, 0.0)


def test_plans_and_rankings_that_are_gone_name_the_way_out(recorded: Recorded) -> None:
    add(recorded, "r1", pruned(), Made("short", "dense", "prune", "shortened", {"layers": 1}), name="my-run")
    for name in ("kept", "blocks"):
        with pytest.raises(SpecError, match=r"not in the artifact store any more; .* slimline retry my-run"):
            build_figure(recorded, name)


def test_blocks_in_their_order(recorded: Recorded) -> None:
    short = Made("short", "dense", "prune", "shortened", {"layers": 1, "criterion": "ppl"})
    shorter = Made("shorter", "dense", "prune", "shortened", {"layers": 2, "criterion": "ppl"})
    config = {"criterion": "ppl", "unit": "layer", "iterative": True, "protect_first": 1, "protect_last": 0}
    order = Order.of_scores([0.0, 5.0, 2.0, 3.0], [2, 3, 1])
    ref = {"kind": "statistics", "key": "order-shortened-v1-0"}
    write(recorded, "statistics", ref["key"], {}, **{"model.layers.layer": order.model_dump_json()})
    rows = []
    for each, gone in ((short, {2}), (shorter, {2, 3})):
        write(recorded, "checkpoint", f"key-{each.name}", {"config": config, "orders": ref}, plan="{}")
        rows += [row for layer in range(4) for row in layers("r1", each.name, [None] * 4, 0 if layer in gone else 4)
                 if row.layer == layer]  # fmt: skip
    add(recorded, "r1", short, shorter, layers=rows)
    panel = the_panel(build_figure(recorded, "blocks"))
    assert panel.title == "ppl, measured anew after each removal, first 1 protected"
    assert {label: (line.x, line.y, line.names) for label, line in series_of(panel).items()} == {
        "removed at 1 layers": ((2.0,), (2.0,), ("1",)),
        "removed at 2 layers": ((3.0,), (3.0,), ("2",)),
        "not removed": ((1.0,), (5.0,), ("3",)),
    }


def night(recorded: Recorded, number: int, values: Mapping[str, tuple[float, str]], name: str = "small") -> None:
    key = f"n{number}"
    figures: list[NightFigureRow] = []
    for cell, (value, verdict) in values.items():
        for checkpoint, stage in (("dense", "shared"), (cell, f"{key}-{cell}")):
            changed = {"cell": cell, "checkpoint": checkpoint, "stage_key": stage, "suite": "perplexity",
                       "metric": "ppl@128", "verdict": verdict if checkpoint == cell else "same", "gate": None,
                       "value": value if checkpoint == cell else 10.0}  # fmt: skip
            figures.append(figure_row(key, "wiki").model_copy(update=changed))
    started = NOON + timedelta(days=number)
    recorded.results.record_night(
        night_row(key, name=name, started_at=started, finished_at=started),
        [cell_row(key, cell) for cell in values],
        figures,
    )


def test_nights_with_what_got_worse_marked(recorded: Recorded) -> None:
    add(recorded, "r1", pruned(), metrics=[ppl("r1", "dense", 10.0)])
    night(recorded, 0, {ODD: (20.0, "first"), "b": (30.0, "first")})
    night(recorded, 1, {ODD: (29.0, "worse"), "b": (math.inf, "noise")})
    night(recorded, 2, {ODD: (20.0, "better")})
    night(recorded, 3, {"c": (1.0, "first")}, name="other")
    drawing = build_figure(Recorded(recorded.results, recorded.artifacts, ["small"]), "history")
    panel = the_panel(drawing)
    lines = series_of(panel)
    odd = lines[f"{ODD} {ODD}"]
    assert odd.crossed == (1,)
    assert odd.names == ("", "worse", "better")
    assert lines["b b"].x == (0.0, 1.0)
    assert {"dense of 2 cells", f"{ODD} dense"} & set(lines)
    assert [label for _, label in panel.x_ticks] == ["06-01", "06-02", "06-03"]
    shown = drawn(drawing)
    assert "the last one, of 2025-06-03 12:00 UTC: 0 of 2 figures worse, 1 better" in shown
    assert 'id "org/tiny"' in shown
    with pytest.raises(SpecError, match=r"no night 'smal'; did you mean 'small'\?; there are: other, small"):
        build_figure(Recorded(recorded.results, recorded.artifacts, ["smal"]), "history")
    with pytest.raises(SpecError, match="nights of one name, not of other, small"):
        build_figure(Recorded(recorded.results, recorded.artifacts, ["small", "other"]), "history")
    assert "other, night" in build_figure(recorded, "history").title


def test_of_many_lines_those_to_which_something_happened_stand_out(recorded: Recorded) -> None:
    cells = {f"c{index}": (float(index + 1), "first") for index in range(12)}
    night(recorded, 0, cells)
    night(recorded, 1, {name: (value, "same") for name, (value, _) in cells.items()} | {"c11": (50.0, "worse")})
    lines = the_panel(build_figure(recorded, "history")).series
    coloured = [line.label for line in lines if line.style is not None]
    assert "c11 c11" in coloured
    assert len(coloured) == 7
    assert {line.label for line in lines if line.style is None} == {"others, in no night worse"}


def test_an_empty_figure_says_what_fills_it(recorded: Recorded) -> None:
    for _ in range(2):
        for name in FIGURES:
            with pytest.raises(SpecError, match=f"nothing for {name} .*; what fills it: slimline (run|nightly) "):
                build_figure(recorded, name)
        add(recorded, "r1", metrics=[ppl("r1", "dense", 12.0)])  # of the dense model alone there is nothing to say


def test_what_fills_a_figure_is_shipped() -> None:
    shipped = {*shipped_specs(), *shipped_nights()}
    for known in FIGURES.values():
        named = re.findall(r"(?<=run |tly | or )[\w-]*\w-[\w-]+", known.fill)
        assert set(named) <= shipped, known.fill


def test_unknown_names_are_refused_with_the_nearest(recorded: Recorded) -> None:
    add(recorded, "r1", pruned())
    with pytest.raises(SpecError, match=r"no figure 'paretto'; did you mean 'pareto'\?; there are: slimgpt-2, "):
        build_figure(recorded, "paretto")
    with pytest.raises(SpecError, match="no run 'r2'"):
        build_figure(Recorded(recorded.results, recorded.artifacts, ["r2"]), "pareto")


def test_the_same_name_in_two_runs_is_told_apart(recorded: Recorded) -> None:
    for key, curve in (("r1", "log"), ("r2", "uniform")):
        one = pruned(0.5, curve=curve)
        rows = [row.model_copy(update={"stage_key": f"key-{key}"}) for row in layers(key, one.name, [0.1, 0.2])]
        made = [row.model_copy(update={"checkpoint_key": f"key-{key}"}) if row.checkpoint == one.name else row
                for row in checkpoints(key, one, model="org/tiny")]  # fmt: skip
        recorded.results.record(run(key, name=f"spec-{key}"), layers=rows, checkpoints=made)
    labels = list(series_of(the_panel(build_figure(recorded, "slimgpt-2"))))
    assert labels[::2] == ["slimgpt-50 (spec-r1)", "slimgpt-50 (spec-r2)"]
    only = Recorded(recorded.results, recorded.artifacts, ["spec-r2"])
    assert next(iter(series_of(the_panel(build_figure(only, "slimgpt-2"))))) == "slimgpt-50"
