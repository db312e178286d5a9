"""Stores for the tests of the page: a small one with everything odd, and one of many checkpoints."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from infra.keys import slug
from infra.results.files import Record
from infra.results.lineage import Made, checkpoint_rows
from infra.results.rows import RUN, LayerRow, MetricRow, NightCellRow, PairRow
from infra.results.store import ResultsStore
from tests.infra.result_examples import (
    NOON,
    checkpoints,
    figure_row,
    measured,
    night_row,
    pruned,
    repaired,
    run_row,
)

ODD = "Größe/<script>window.hurt = 1</script> & 'x' \u2028"
PPL = "perplexity/wikitext-2-raw-v1/ppl@1024"
PROTOCOL = {"dataset": "Salesforce/wikitext", "max_windows": 8, "versions": {"torch": "2.13"}}
OTHER_PROTOCOL = PROTOCOL | {"max_windows": 4}


def fill_odd(store: ResultsStore) -> None:
    """Two runs of one name, odd names, NaN, infinity, figures that some lack, two protocols, a night."""
    small, smaller = pruned(0.2, curve="log_increase"), pruned(0.5, name=ODD, curve="uniform")
    made = (small, repaired(small), smaller)
    sizes = {"dense": 100, "slimgpt-20": 80, "slimgpt-20+lora": 80, ODD: 50}
    rows = [
        row.model_copy(
            update={
                "num_parameters": 10**6 * (10 + sizes[row.checkpoint]),
                "num_decoder_parameters": 10**6 * sizes[row.checkpoint],
            }
        )
        for row in checkpoints("r1", *made)
    ]
    metrics = [
        ppl("r1", "dense", 27.832468013579, 2.4),
        ppl("r1", "slimgpt-20", 47.5, 5.25),
        ppl("r1", "slimgpt-20+lora", math.nan),
        ppl("r1", ODD, math.inf),
        *(
            accuracy("r1", name, value)
            for name, value in (("dense", 0.7), ("slimgpt-20", 0.65), ("slimgpt-20+lora", 0.66))
        ),
        measured("r1", "dense", "profile/profile/latency_ms_p50", 1500.0, higher_is_better=False),
        measured("r1", "slimgpt-20", "profile/profile/latency_ms_p50", 1200.0, higher_is_better=False),
        measured("r1", "slimgpt-20", "profile/profile/macs_64_tokens", 8.748e9, higher_is_better=False),
    ]
    layers = [
        LayerRow(
            run_key="r1", stage_key="key-slimgpt-20", layer=layer, sub_layer=half, kept=kept, total=total, sparsity=0.2
        )
        for layer in range(3)
        for half, kept, total in (("attention", 3 - layer, 3), ("mlp", 12, 16))
    ]
    pairs = [
        pair("r1", "slimgpt-20", PPL, 47.5, 27.832468013579, p_value=0.001, stage="ppl-slimgpt-20"),
        pair("r1", "slimgpt-20", "zero_shot/piqa/acc", 0.65, 0.7, p_value=0.4, stage="acc-slimgpt-20"),
    ]
    first = run_row("r1", name=ODD, finished_at=NOON + timedelta(hours=2), mlflow_run_id="0123abcd")
    store.record(first, metrics=metrics, checkpoints=rows, layers=layers, pairs=pairs)
    other = checkpoint_rows("r2", {"id": "tiny"}, (pruned(),), {"dense": "key-dense", "slimgpt-20": "key-other"})
    store.record(
        run_row(
            "r2", name="another", status="failed", message="it <b>broke</b>", finished_at=NOON + timedelta(hours=1)
        ),
        metrics=[
            ppl(
                "r2", "slimgpt-20", 44.0, protocol=json.dumps(OTHER_PROTOCOL), checkpoint_key="key-other", stage_key="o"
            )
        ],
        checkpoints=other,
    )
    store.record(run_row("r0", name=ODD), metrics=[ppl("r0", "dense", 1.0)], checkpoints=checkpoints("r0", pruned(0.9)))
    for index, (value, verdict) in enumerate(((0.5, "first"), (0.5, "same"), (0.3, "worse"))):
        night = night_row(
            f"n{index}", started_at=NOON + timedelta(days=index), previous_night_id=f"n{index - 1}" if index else None
        )
        figure = figure_row(f"n{index}").model_copy(
            update={
                "cell": ODD,
                "value": value,
                "verdict": verdict,
                "before_value": 0.5 if index else None,
                "p_value": 0.001,
            }
        )
        cells = [NightCellRow(night_id=f"n{index}", cell=ODD, run_key="r1", status="completed", seconds=1.5, num_run=1,
                              num_cached=0, num_failed=0, num_skipped=0)]  # fmt: skip
        store.record_night(night, cells, [figure])


def ppl(run: str, checkpoint: str, value: float, stderr: float | None = None, **changes: Any) -> MetricRow:
    fields = {"protocol": json.dumps(PROTOCOL), "stage_key": _key("ppl", checkpoint), "stderr": stderr}
    return measured(run, checkpoint, PPL, value, **(fields | changes))


def accuracy(run: str, checkpoint: str, value: float) -> MetricRow:
    return measured(
        run, checkpoint, "zero_shot/piqa/acc", value, stderr=0.07, num_fewshot=0, stage_key=_key("acc", checkpoint)
    )


def pair(run: str, checkpoint: str, name: str, value: float, dense: float, p_value: float, stage: str) -> PairRow:
    suite, task, metric = name.split("/")
    return PairRow(
        run_key=run, checkpoint=checkpoint, reference="dense", suite=suite, task=task, metric=metric, value=value,
        reference_value=dense, difference=value - dense, low=value - dense - 0.1, high=value - dense + 0.1,
        p_value=p_value, test="sign_flip", num_items=40, higher_is_better=not metric.startswith("ppl"),
        stage_key=stage, reference_stage_key="d",
    )  # fmt: skip


def _key(suite: str, checkpoint: str) -> str:
    return f"{suite}-{slug(checkpoint)}"


def fill_many(store: ResultsStore, count: int) -> None:
    """Runs of a hundred checkpoints each, with six figures."""
    generator = random.Random(0)
    for index in range(count // 100):
        key = f"run-spec-v1-{index:016x}"
        method = ("slimgpt", "flap", "wanda_sp")[index % 3]
        made = [Made(f"{method}-{n}", "dense", "prune", method, {"sparsity": n / 100}, n / 100) for n in range(1, 100)]
        keys = {name: f"prune-{name}-{index:016x}" for name in ("dense", *(each.name for each in made))}
        rows = [
            row.model_copy(update={"num_parameters": 10**8 - place * 2 * 10**4, "num_decoder_parameters": 10**8})
            for place, row in enumerate(checkpoint_rows(key, {"id": "tiny"}, made, keys))
        ]
        metrics = [metric for name in keys for metric in _metrics(key, name, keys[name], generator)]
        run = run_row(key, name=f"spec {index}", finished_at=NOON + timedelta(minutes=index))
        store.files.write(Record(RUN, {"runs": (run,), "metrics": metrics, "checkpoints": rows}))


def _metrics(run: str, checkpoint: str, key: str, generator: random.Random) -> Iterator[MetricRow]:
    names = [
        *(f"perplexity/{text}/ppl@1024" for text in ("wikitext", "c4")),
        *(f"zero_shot/{task}/acc" for task in ("piqa", "boolq")),
        *(f"profile/profile/{metric}" for metric in ("latency_ms_p50", "peak_memory_gib")),
    ]
    for name in names:
        yield measured(run, checkpoint, name, generator.uniform(0.1, 90), stderr=0.1, num_fewshot=0, checkpoint_key=key,
                       protocol=json.dumps(PROTOCOL), stage_key=f"{name}-{key}")  # fmt: skip
