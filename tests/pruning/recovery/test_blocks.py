"""Reconstruction block by block: each block nearer to the dense one or as it was, the same bits after a kill."""

from __future__ import annotations

import copy
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from pruning.activations.activations import FOLDER_PREFIX
from pruning.calibration import CalibrationSet
from pruning.checkpoints.surgery import shrink_
from pruning.distributed import ProcessGroup
from pruning.errors import PruningError
from pruning.families import family_of, shapes
from pruning.plan import LayerPlan, PruningPlan
from pruning.recovery import RecoveryInputs, RecoveryReport
from pruning.recovery import _blocks as blocks_module
from pruning.recovery.reconstruct import Config, recover
from pruning.training.options import TrainingRun
from tests.pruning.checkpoints.test_surgery import plan_for
from tests.pruning.killed import exit_code, kill_this_process
from tests.pruning.recovery.test_lora import same
from tests.pruning.test_distributed import together
from tests.tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[3]
WINDOWS, HELDOUT, LENGTH = 16, 4, 24
FAST: dict[str, Any] = {"passes": 4, "learning_rate": 1e-2, "batch_size": 2}


def windows() -> CalibrationSet:
    ids = torch.randint(2, 300, (WINDOWS + HELDOUT, LENGTH), generator=torch.Generator().manual_seed(3))
    return CalibrationSet(ids[:WINDOWS], ids[WINDOWS:], {})


def uneven_plan(dense: PreTrainedModel) -> PruningPlan:
    """Four layers: half the width, without heads, dropped, and without channels."""
    source, head_dim = shapes(dense), family_of(dense).head_dim(dense)
    keeps_half = plan_for(dense, seed=1, drop=0).layers
    empty = {"kept_query_heads": (), "kept_kv_heads": ()}
    layers = (
        keeps_half[0],
        keeps_half[1].model_copy(update=empty),
        keeps_half[3].model_copy(update={"kept_channels": ()}),
    )
    return PruningPlan(source=source, head_dim=head_dim, layers=layers)


def pair(
    family: str = "qwen2", *, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedModel, PruningPlan]:
    """A dense model, the pruned one, and what it lost."""
    dense = tiny_model(family, layers=4).to(dtype)
    plan, pruned = uneven_plan(dense), copy.deepcopy(dense)
    shrink_(pruned, plan)
    return dense, pruned, plan


def inputs(dense: PreTrainedModel, plan: PruningPlan | None) -> RecoveryInputs:
    return RecoveryInputs(
        teacher=lambda: copy.deepcopy(dense), teacher_tokenizer=tiny_tokenizer, calibration=windows(), plan=plan
    )


def fit(
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    plan: PruningPlan | None,
    scratch: Path,
    *,
    run: dict[str, Any] | None = None,
    mode: str = "blocks",
    dtype: str = "float32",
    **options: Any,
) -> RecoveryReport:
    config = Config.model_validate(
        {"mode": mode, "num_heldout": HELDOUT, "dtype": dtype, "blocks": {**FAST, **options}}
    )
    return recover(pruned, tiny_tokenizer(), inputs(dense, plan), config, TrainingRun(scratch, **(run or {})))


@torch.no_grad()
def heldout_kl(dense: PreTrainedModel, model: PreTrainedModel) -> float:
    ids = windows().heldout_ids_ML
    theirs, mine = (each(ids).logits.float().log_softmax(-1) for each in (dense, model))
    return float(F.kl_div(mine, theirs, log_target=True, reduction="sum") / ids.numel())


def values(report: RecoveryReport, metric: str) -> list[float]:
    assert [layer for layer, _ in report.curves[metric]] == list(range(len(report.curves[metric])))
    return [value for _, value in report.curves[metric]]


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi", "opt", "gemma2", "granite"])
def test_blocks_and_the_whole_come_nearer_to_the_dense_model(family: str, tmp_path: Path) -> None:
    dense, pruned, plan = pair(family)
    before, kind = copy.deepcopy(pruned), type(pruned)
    random_state, modes = torch.get_rng_state(), [module.training for module in pruned.modules()]
    report = fit(dense, pruned, plan, tmp_path)
    first, last = values(report, "block_loss_before"), values(report, "block_loss_after")
    assert len(first) == len(plan.layers) == 3
    assert all(b < a for a, b in zip(first, last, strict=True))
    assert report.final_loss == sum(last) / 3
    assert report.num_steps == report.kept_step == 3 * FAST["passes"] * WINDOWS // FAST["batch_size"]
    assert (report.num_examples, report.num_tokens) == (WINDOWS, WINDOWS * LENGTH)
    assert heldout_kl(dense, pruned) < 0.95 * heldout_kl(dense, before)
    assert type(pruned) is kind
    assert [module.training for module in pruned.modules()] == modes
    assert all(parameter.requires_grad and parameter.grad is None for parameter in pruned.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)
    family_names = f"{family_of(pruned).layers_path}."
    for (name, now), (_, was) in zip(pruned.state_dict().items(), before.state_dict().items(), strict=True):
        assert name.startswith(family_names) or torch.equal(now, was), name


def relative(after_BLC: Tensor, target_BLC: Tensor) -> Tensor:
    error = (after_BLC - target_BLC).square().sum(-1) / target_BLC.square().sum(-1)
    return error.mean()


def streams(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """Before every layer and after the last one, before the final norm."""
    family, found = family_of(model), []
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: found.append((*args, *kwargs.values())[0]), with_kwargs=True
        )
        for layer in family.layers(model)
    ]
    hooks.append(family.final_norm(model).register_forward_pre_hook(lambda _, args: found.append(args[0])))
    model(ids)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("family", ["qwen2", "phi", "opt"])
@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_the_first_step_is_that_of_a_hand_written_one(family: str, weight: float, tmp_path: Path) -> None:
    """All windows at once, all positions: hooks on the whole model say what AdamW's first step is."""
    dense, pruned, plan = pair(family)
    ids, held = windows().input_ids_NL, windows().heldout_ids_ML
    by_hand = copy.deepcopy(pruned)

    def loss(model: PreTrainedModel, some: Tensor) -> Tensor:
        own = streams(model, some)
        with torch.no_grad():
            theirs = streams(dense, some)
        depths = [plan.layers[1].layer, plan.layers[2].layer]
        found = relative(own[1], theirs[depths[0]])
        if weight:
            names = family_of(model)
            logits, target = (
                names.head(each)(names.final_norm(each)(stream)).log_softmax(-1)
                for each, stream in ((model, own[2]), (dense, theirs[depths[1]]))
            )
            found = found + weight * F.kl_div(logits, target, log_target=True, reduction="sum") / some.numel()
        return found

    first = family_of(by_hand).layers(by_hand)[0]
    was = float(loss(by_hand, held).detach())
    optimizer = torch.optim.AdamW(first.parameters(), lr=1e-3, weight_decay=0.0)
    loss(by_hand, ids).backward()
    optimizer.step()
    report = fit(
        dense, pruned, plan, tmp_path, passes=1, learning_rate=1e-3, batch_size=WINDOWS, micro_batch_size=3,
        lookahead_weight=weight, probe_positions=1000,
    )  # fmt: skip
    assert values(report, "block_loss_before")[0] == pytest.approx(was, rel=1e-5)
    assert values(report, "block_loss_after")[0] == pytest.approx(float(loss(by_hand, held).detach()), rel=1e-4)
    fitted, steps = family_of(pruned).layers(pruned)[0], 0
    for (name, mine), theirs in zip(fitted.named_parameters(), first.parameters(), strict=True):
        assert theirs.grad is not None
        sure = theirs.grad.abs() > 1e-6  # of a gradient that is rounding Adam makes a whole step
        torch.testing.assert_close(mine[sure], theirs[sure], atol=2e-5, rtol=0, msg=name)
        steps += int(sure.sum())
    assert steps > 1000


def test_the_look_ahead_has_gradients_of_its_own(tmp_path: Path) -> None:
    found = []
    for weight in (0.0, 0.05):
        dense, pruned, plan = pair()
        report = fit(dense, pruned, plan, tmp_path / str(weight), lookahead_weight=weight)
        found.append((pruned, values(report, "block_loss_before")))
    assert not same(found[0][0], found[1][0])
    assert all(with_it > without for without, with_it in zip(found[0][1], found[1][1], strict=True))
    # and on its own it is enough to learn from
    dense, pruned, plan = pair()
    before = heldout_kl(dense, pruned)
    fit(dense, pruned, plan, tmp_path / "alone", lookahead_weight=1e6)
    assert heldout_kl(dense, pruned) < before


@pytest.mark.parametrize("family", ["llama", "llama-mha", "gemma", "opt"])
def test_what_cannot_improve_is_left_bit_equal(family: str, tmp_path: Path) -> None:
    dense = tiny_model(family)
    whole, before = copy.deepcopy(dense), copy.deepcopy(dense)
    report = fit(dense, whole, None, tmp_path / "whole", patience=2)
    assert same(whole, before), "nothing was pruned"
    assert max(values(report, "block_loss_after")) < 1e-9
    dense, pruned, plan = pair(family)
    before = copy.deepcopy(pruned)
    report = fit(dense, pruned, plan, tmp_path / "far", learning_rate=10.0, patience=2)
    assert same(pruned, before), "every step is far too large"
    assert values(report, "block_loss_after") == values(report, "block_loss_before")
    assert report.num_steps == 3 * 2 * WINDOWS // FAST["batch_size"]


def test_in_bfloat16_it_is_judged_as_it_is_kept(tmp_path: Path) -> None:
    dense, pruned, plan = pair(dtype=torch.bfloat16)
    before = heldout_kl(dense, pruned)
    report = fit(dense, pruned, plan, tmp_path, dtype="bfloat16")
    assert {parameter.dtype for parameter in pruned.parameters()} == {torch.bfloat16}
    assert all(b < a for a, b in zip(*(values(report, f"block_loss_{n}") for n in ("before", "after")), strict=True))
    assert heldout_kl(dense, pruned) < before
    again = copy.deepcopy(pruned)
    after = fit(dense, again, plan, tmp_path / "again", dtype="bfloat16", passes=1, learning_rate=10.0)
    assert values(after, "block_loss_before") == pytest.approx(values(report, "block_loss_after"), rel=0.05)


def test_without_memory_the_streams_lie_in_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, pruned, plan = pair()
    in_files = copy.deepcopy(pruned)
    fit(dense, pruned, plan, tmp_path / "memory")
    monkeypatch.setattr(blocks_module, "activation_budget", lambda: 0)
    folders: list[list[str]] = []

    def look(share: float, words: str) -> None:
        folders.append([path.name for path in (tmp_path / "files").glob(f"{FOLDER_PREFIX}*/*")])

    fit(dense, in_files, plan, tmp_path / "files", run={"progress": look})
    assert len(folders[0]) == 3, "the pruned stream, and two of the dense model"
    assert same(in_files, pruned)
    assert sorted(path.name for path in (tmp_path / "files").iterdir()) == ["block-0", "block-1", "block-2"]


def killed_at(words: str, scratch: str) -> None:
    def kill(share: float, message: str) -> None:
        if message.startswith(words):
            kill_this_process()

    fit(*pair(), Path(scratch), run={"progress": kill})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("message", "kept", "goes_on"),
    [("block 2/3, pass 3", 1, "block 2/3, pass 1"), ("block 2/3, held-out", 2, "block 3/3, pass 1")],
)
def test_killed_and_resumed_equals_uninterrupted(message: str, kept: int, goes_on: str, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    dense, whole, plan = pair()
    expected = fit(dense, whole, plan, tmp_path / "whole")
    code = exit_code(f"{__name__}:killed_at", message, str(scratch), imports=("pruning.recovery._blocks",))
    assert code == -signal.SIGKILL
    assert len(list(scratch.glob("block-*"))) == kept
    (scratch / f"block-{kept}").mkdir()  # as if killed while it was being written
    (scratch / f"{FOLDER_PREFIX}left").mkdir()
    told: list[str] = []
    resumed = pair()[1]
    report = fit(dense, resumed, plan, scratch, run={"progress": lambda share, words: told.append(words)})
    assert told[0].startswith(goes_on)
    assert report == expected
    assert same(resumed, whole)
    assert sorted(path.name for path in scratch.iterdir()) == ["block-0", "block-1", "block-2"]
    told.clear()
    again = pair()[1]
    assert fit(dense, again, plan, scratch, run={"progress": lambda share, words: told.append(words)}) == expected
    assert (told, same(again, whole)) == ([], True)


def test_a_damaged_block_and_all_after_it_are_fitted_again(tmp_path: Path) -> None:
    dense, whole, plan = pair()
    expected = fit(dense, whole, plan, tmp_path)
    damaged = tmp_path / "block-1" / "weights.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-4])
    told: list[str] = []
    again = pair()[1]
    assert fit(dense, again, plan, tmp_path, run={"progress": lambda share, words: told.append(words)}) == expected
    assert told[0].startswith("block 2/3, pass 1")
    assert same(again, whole)
    other = pair()[1]
    fit(dense, other, plan, tmp_path, learning_rate=2e-2)
    assert not same(other, whole), "blocks of another run are not taken"


def test_what_is_told_and_what_telling_raises(tmp_path: Path) -> None:
    dense, pruned, plan = pair()
    before, told, shown = copy.deepcopy(pruned), [], []
    run = {
        "progress": lambda share, words: told.append((share, words)),
        "curves": lambda step, values: shown.append((step, dict(values))),
    }
    report = fit(dense, pruned, plan, tmp_path / "a", run=run)
    shares = [share for share, _ in told]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    was, now = values(report, "block_loss_before")[2], values(report, "block_loss_after")[2]
    assert told[-1][1] == f"block 3/3, held-out {now:.4f} (was {was:.4f})"
    live = {name: tuple((step, each[name]) for step, each in shown) for name in report.curves}
    assert live == report.curves
    unchanged = copy.deepcopy(before)

    def tell(share: float, words: str) -> None:
        if words.startswith("block 2/3"):
            raise InterruptedError(words)

    with pytest.raises(InterruptedError):
        fit(dense, unchanged, plan, tmp_path / "b", run={"progress": tell})
    assert same(unchanged, before), "the model is as it was"


def test_a_dropped_first_layer(tmp_path: Path) -> None:
    dense = tiny_model("llama", layers=4)
    source = shapes(dense)
    kept = (LayerPlan.full(1, source[1]), LayerPlan.full(3, source[3]))
    plan = PruningPlan(source=source, head_dim=family_of(dense).head_dim(dense), layers=kept)
    pruned = copy.deepcopy(dense)
    shrink_(pruned, plan)
    before = heldout_kl(dense, pruned)
    report = fit(dense, pruned, plan, tmp_path)
    assert all(b < a for a, b in zip(*(values(report, f"block_loss_{n}") for n in ("before", "after")), strict=True))
    assert heldout_kl(dense, pruned) < before


def test_both_is_blocks_and_then_end_to_end(tmp_path: Path) -> None:
    dense, blocks, plan = pair()
    both, told = copy.deepcopy(blocks), []
    first = fit(dense, blocks, plan, tmp_path / "blocks")
    report = fit(dense, both, plan, tmp_path / "both", run={"progress": lambda *what: told.append(what)}, mode="both")
    assert {name: report.curves[name] for name in first.curves} == first.curves
    assert report.curves["heldout_loss"][0][1] == pytest.approx(heldout_of(dense, blocks), rel=1e-3)
    assert heldout_kl(dense, both) < heldout_kl(dense, blocks)
    assert report.num_steps == len(report.curves["train_loss"])
    assert [share for share, _ in told] == sorted(share for share, _ in told)


@torch.no_grad()
def heldout_of(dense: PreTrainedModel, model: PreTrainedModel) -> float:
    """Of the tokens that are predicted."""
    ids = windows().heldout_ids_ML
    theirs, mine = (each(ids).logits[:, :-1].log_softmax(-1) for each in (dense, model))
    return float(F.kl_div(mine, theirs, log_target=True, reduction="sum") / ids[:, 1:].numel())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"blocks": {"passes": 3}}, "blocks is for mode: blocks or both, and mode is end_to_end"),
        ({"mode": "blocks", "learning_rate": 1e-5}, "learning_rate is of the end-to-end part, and mode is blocks"),
        ({"mode": "blocks", "hidden_weight": 1.0}, "hidden_weight is of the end-to-end part"),
        ({"mode": "block"}, "'end_to_end', 'blocks' or 'both'"),
    ],
)
def test_options_of_another_mode_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Config.model_validate(options)


def test_layers_that_do_not_correspond_are_refused(tmp_path: Path) -> None:
    dense, pruned, _ = pair()
    with pytest.raises(PruningError, match=r"the model has 3 layers, the dense one 4.* take mode: end_to_end"):
        fit(dense, pruned, None, tmp_path)


def test_a_loss_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    dense, pruned, plan = pair()
    with pytest.raises(PruningError, match=r"the loss of block 1 became .* lower blocks.learning_rate \(now 1e\+30\)"):
        fit(dense, pruned, plan, tmp_path, learning_rate=1e30)


def in_a_group(process_group: ProcessGroup, folder: Path) -> None:
    dense, pruned, plan = pair()
    told: list[str] = []
    run = {
        "rank": process_group.rank,
        "num_processes": process_group.size,
        "progress": lambda share, words: told.append(words),
    }
    report = fit(dense, pruned, plan, folder / "together", run=run)
    assert bool(told) is process_group.leads, "the leading process fits, the others wait"
    alone = pair()[1]
    assert fit(dense, alone, plan, folder / f"alone-{process_group.rank}") == report
    assert same(pruned, alone)


@pytest.mark.slow
def test_several_processes_end_with_the_same_model(tmp_path: Path) -> None:
    together(in_a_group, tmp_path)
