"""SlimGPT by a search over levels: never worse than its start, of the same size, and a kill changes nothing."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import PreTrainedModel

from pruning.allocation.budget import Allocation
from pruning.allocation.moves import Point, SearchSpace
from pruning.allocation.options import AllocationOptions
from pruning.allocation.schedule import solve_budgets
from pruning.checkpoints.decoder import ResidentDecoder
from pruning.checkpoints.save_load import save_checkpoint
from pruning.checkpoints.surgery import shrink_
from pruning.errors import PruningError
from pruning.families import decoder_parameters, layer_cost, shapes
from pruning.families.forward import output_name
from pruning.layerwise import kl as kl_module
from pruning.layerwise import streaming
from pruning.layerwise.kl import final_stream, mean_kl
from pruning.layerwise.split_search import Candidate, Job
from pruning.methods.slimgpt import Config
from pruning.obs.groups import Solver
from pruning.search import building
from pruning.search.building import Builder
from pruning.search.database import CandidateDecoder, LevelDatabase
from pruning.search.searched import Search, prune_by_search
from pruning.walk.sequential import walk_layers
from pruning.walk.state import MemoryWalkState
from tests.pruning.captured import CPU, logits, prune_copy, windows
from tests.pruning.streamed import Counted, Stop, stream
from tests.tiny import random_ids, tiny_model


def config(sparsity: float = 0.3, **more: Any) -> Config:
    asked = {"allocation": "searched", "start": "curve", "split": "equal", "forwards": 12, "levels": 1}
    return Config(**({"sparsity": sparsity} | asked | more))


def heldout_kl(dense: PreTrainedModel, masked: PreTrainedModel) -> float:
    """Of the windows that judge, measured anew."""
    ids_ML = windows(dense).heldout_ids_ML
    dense_MLC, masked_MLC = (final_stream(ResidentDecoder(model), ids_ML, CPU) for model in (dense, masked))
    return mean_kl(ResidentDecoder(dense), dense_MLC, masked_MLC, CPU)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("llama", {"search": "evolution"}),
        ("gemma2", {"start": "knapsack", "split": None, "steps": 2, "forwards": 14}),
        ("opt", {"channel_multiple": 4, "protect_last": 1}),
        ("olmo2", {"head_unit": "query_head", "split": "half", "ridge": "heldout"}),
    ],
)
def test_no_worse_than_its_start_at_the_same_size(name: str, more: dict[str, Any]) -> None:
    dense = tiny_model(name)
    asked = config(**more)
    masked, pruned = prune_copy(dense, asked)
    of_start = {"start", "search", "forwards", "levels"}
    start = Config(**(asked.model_dump(exclude=of_start) | {"allocation": asked.start}))
    begun, began = prune_copy(dense, start)
    first, *others = pruned.search
    assert first.kind == "start"
    assert first.heldout_kl == pytest.approx(heldout_kl(dense, begun), rel=1e-4), (
        "the start is what that allocation gives"
    )
    assert others
    assert others[-1].forwards <= asked.forwards
    assert heldout_kl(dense, masked) == pytest.approx(
        min(t.heldout_kl for t in pruned.search if t.windows == 2), rel=1e-4
    )
    assert heldout_kl(dense, masked) <= heldout_kl(dense, begun) * (1 + 1e-5)
    assert pruned.achieved_sparsity == pytest.approx(began.achieved_sparsity, abs=0.005)
    assert abs(pruned.achieved_sparsity - 0.3) <= 0.0051
    shrunk = copy.deepcopy(masked)
    shrink_(shrunk, pruned.plan)
    assert pruned.achieved_sparsity == pytest.approx(1 - decoder_parameters(shrunk) / decoder_parameters(dense))
    torch.testing.assert_close(
        logits(shrunk, random_ids(dense)), logits(masked, random_ids(dense)), atol=2e-5, rtol=1e-5
    )
    assert len(pruned.layers) == 6
    assert all(report.measured_error for report in pruned.layers if report.kept < report.total)


def test_with_forwards_enough_no_neighbour_is_better(monkeypatch: pytest.MonkeyPatch) -> None:
    """Judged anew: every pair of sites from the point that was found, as a model made of the same levels."""
    dense, calibration = tiny_model("llama", layers=2), windows(tiny_model("llama"))
    decoder, widths = ResidentDecoder(dense), shapes(dense)
    allocation, solver = Allocation(0.3), Solver(0.01, True, None, "kv_group")
    budgets = solve_budgets(widths, layer_cost(dense), allocation)
    space = SearchSpace(budgets, widths, layer_cost(dense), allocation, levels=1, level_size=0.1)
    database, job = LevelDatabase(None), Job(decoder, calibration, None, None, CPU)
    stream_MLC = Builder(job, solver, database, space.sites).levels(budgets, None, MemoryWalkState())
    dense_MLC = final_stream(decoder, calibration.heldout_ids_ML, CPU)

    def kl(point: Point) -> float:
        labels = {
            output_name(decoder.family, site.layer, site.kind): str(site.counts[level])
            for site, level in zip(space.sites, point, strict=True)
        }
        candidate = CandidateDecoder(decoder, database, labels, "kv_group")
        return mean_kl(decoder, dense_MLC, final_stream(candidate, calibration.heldout_ids_ML, CPU), CPU)

    assert kl(space.start) == pytest.approx(mean_kl(decoder, dense_MLC, stream_MLC, CPU), rel=1e-4)
    walks: list[int] = []

    def counted(*given: Any, **more: Any) -> Any:
        walks.append(1)
        return walk_layers(*given, **more)

    with monkeypatch.context() as patch:
        for module in (building, kl_module):
            patch.setattr(module, "walk_layers", counted)
        search, start = Search("coordinate", 1000, 1, 0.1, 0), Candidate("equal", allocation, solver)
        pruned = prune_by_search(job, [start], search, MemoryWalkState(), lambda share, message: None)
    assert len(walks) == pruned.search[-1].forwards < 1000
    best = min((trial for trial in pruned.search if trial.kind != "refit"), key=lambda trial: trial.heldout_kl)
    assert best.accepted
    assert best.heldout_kl < pruned.search[0].heldout_kl
    counts = {name: 0 for trial in pruned.search for name in trial.moves}
    for trial in pruned.search:
        for name, change in trial.moves.items() if trial.accepted else ():
            counts[name] += change
    place = {output_name(decoder.family, site.layer, site.kind): index for index, site in enumerate(space.sites)}
    found = list(space.start)
    for name, change in counts.items():
        site = space.sites[place[name]]
        found[place[name]] = site.counts.index(site.counts[found[place[name]]] + change)
    assert kl(tuple(found)) == pytest.approx(best.heldout_kl, rel=1e-6)
    assert all(kl(point) >= best.heldout_kl for point in space.neighbours(tuple(found)))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"split": "ffn", "start": "knapsack"},
            "split 'ffn' plays no part with allocation searched and start knapsack: leave it out, or set start to c",
        ),
        ({"steps": 2}, "steps 2 plays no part with allocation searched and start curve: .* set start to knapsack"),
        ({"uniform": True}, "uniform True plays no part with allocation searched: .* set allocation to curve"),
        ({"propagate_error": False}, "propagate_error False plays no part with allocation searched"),
        (
            {"allocation": "curve", "start": "knapsack"},
            "forwards 12 plays no part with allocation curve: .* to searched",
        ),
        ({"allocation": "knapsack", "start": "knapsack", "split": None}, "forwards 12 plays no part"),
        ({"forwards": 0}, "greater than 0"),
        ({"level_size": 0.0}, "greater than 0"),
        ({"search": "random"}, "'coordinate' or 'evolution'"),
    ],
)
def test_what_means_nothing_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        config(**options)


def test_what_cannot_be_is_refused_before_any_work() -> None:
    model = tiny_model("llama")
    with pytest.raises(
        PruningError, match=r"forwards 3 leave none .* take 4; set forwards to 4 or more, or choose a split"
    ):
        prune_copy(model, config(forwards=3))
    with pytest.raises(PruningError, match=r"take 23; set forwards to 23 or more, or lower steps \(now 5\)"):
        prune_copy(model, config(start="knapsack", split=None, forwards=22))
    with pytest.raises(PruningError, match=r"allocation 'searched' judges by held-out .*\.num_heldout to 1 or more"):
        prune_copy(model, config(), windows(model, num_heldout=0))
    with pytest.raises(PruningError, match=r"sparsity 0\.5 cannot be reached"):
        prune_copy(model, config(0.5, protect_first=2))
    with pytest.raises(PruningError, match="allocation 'searched' knows no experts"):
        prune_copy(tiny_model("mixtral"), config(split=None))


def test_options_that_are_not_used_are_in_no_key() -> None:
    assert Config(sparsity=0.2, allocation="knapsack").model_dump(mode="json").keys() - Config(sparsity=0.2).model_dump(
        mode="json"
    ).keys() == {"allocation"}
    plain = set(Config(sparsity=0.2).model_dump(mode="json"))
    assert not plain & set(AllocationOptions.model_fields)


def test_streamed_and_killed_anywhere_it_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    asked = config(start="knapsack", split=None, steps=1, head_unit="kv_group", forwards=11)
    save_checkpoint(model, None, tmp_path / "source")
    told: list[tuple[float, str]] = []
    whole, files = stream(tmp_path, "whole", asked, lambda share, message: told.append((share, message)))
    shares = [share for share, _ in told]
    assert shares == sorted(shares)
    assert told[-1] == (1.0, "written")
    assert not list((tmp_path / "whole").glob("*/*/database")), "the database is not needed any more"
    _, resident = prune_copy(model, asked, windows(model))
    assert (resident.plan, resident.search, resident.curves) == (whole.plan, whole.search, whole.curves)
    assert whole.search[-1].forwards <= asked.forwards
    for at in ("database: layer 2", "candidate 4", "refit: layer 2"):

        def stop(share: float, message: str, at: str = at) -> None:
            if at in message:
                raise Stop

        with pytest.raises(Stop):
            stream(tmp_path, "killed", asked, stop)
    monkeypatch.setattr(streaming, "StreamedDecoder", Counted)
    Counted.read = 0
    pruned, again = stream(tmp_path, "killed", asked)
    assert (pruned.plan, pruned.search) == (whole.plan, whole.search)
    assert again == files
    assert Counted.read <= 2 + 3 + 3  # what is left of the refit, the dense held-out stream, and what is written
    Counted.read = 0
    assert stream(tmp_path, "killed", asked)[1] == files
    assert Counted.read == 0, "all is known"
