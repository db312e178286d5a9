"""A checkpoint that was written is loaded once before it counts as made.

From its folder, by the class that will load it, with one short forward that must give what the model it stands for
gives. In memory at any time: the largest single weight, in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pruning.checkpoints.save_load import checkpoint_on_disk
from pruning.checkpoints.stored_tensors import StoredTensors, stored_tensors
from pruning.checkpoints.surgery import kept_inputs
from pruning.errors import PruningError, UnsoundCheckpoint
from pruning.families import ModelFamily, family_of
from pruning.families.experts import experts_module, route
from pruning.families.forward import KINDS, SubLayerKind, output_name
from pruning.families.head_norms import head_features, rms_norm

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pruning.plan import LayerPlan, PruningPlan

NUM_TOKENS = 16
#: norm of the logits' difference over their own norm: summing the kept columns alone moves the last digits
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
_TOLERANCE_HALF = 0.03


@torch.no_grad()
def check_pruned(folder: Path, source: Path, plan: PruningPlan) -> None:
    """Compare the pruned checkpoint in `folder` with the one it was made from, masked: all weights of `source` as they
    are, but each output linear reads only the inputs that `plan` keeps, with the compensated weights.

    Both compute in float32 whatever they are stored in, so that rounding hides nothing. Raises UnsoundCheckpoint if
    the folder does not load or gives other logits.
    """
    written = _clean(folder)
    dense = stored_tensors(source)
    with checkpoint_on_disk(dense, torch.float32) as model:
        _mask_(model, plan, dense, written)
        expected = _logits(model)
    _compare(written, expected, torch.float32, f"{source} masked")


@torch.no_grad()
def check_saved(folder: Path, model: PreTrainedModel) -> None:
    """Compare the checkpoint in `folder` with the model in memory, on the CPU, that was saved there.

    Raises PruningError if the model itself computes no numbers (training diverged), UnsoundCheckpoint if the folder
    does not load or gives other logits.
    """
    training = model.training
    expected = _logits(model.eval())
    model.train(training)
    if not bool(expected.isfinite().all()):
        raise PruningError(
            "the trained model's outputs are NaN or infinite, so training has diverged: lower learning_rate, or train "
            "in bfloat16 or float32 instead of float16"
        )
    _compare(_clean(folder), expected, model.dtype, "the model that was saved")


@torch.no_grad()
def check_copied(folder: Path, source: Path) -> None:
    """Compare the checkpoint in `folder` with the one in `source` that it was written from, both in float32.

    Raises UnsoundCheckpoint if the folder does not load or gives other logits.
    """
    with checkpoint_on_disk(stored_tensors(source), torch.float32) as model:
        expected = _logits(model)
    _compare(_clean(folder), expected, torch.float32, str(source))


@torch.no_grad()
def check_rows(folder: Path, source: Path, kept: Sequence[int]) -> None:
    """Compare the checkpoint in `folder`, which has only the `kept` rows of the vocabulary of the one in `source`, with
    that one: on the same tokens, the logits of these rows, both in float32.

    Raises UnsoundCheckpoint if the folder does not load or gives other logits.
    """
    rows_V = torch.tensor(kept)
    with checkpoint_on_disk(stored_tensors(source), torch.float32) as model:
        expected = _logits(model, rows_V)[..., rows_V]
    _compare(_clean(folder), expected, torch.float32, f"those tokens of {source}")


def _clean(folder: Path) -> StoredTensors:
    with _failing_as_ours(folder):
        stored = stored_tensors(folder)
    if stored.oddities:
        raise UnsoundCheckpoint(f"the checkpoint just written to {folder} is not clean: {'; '.join(stored.oddities)}")
    return stored


def _compare(written: StoredTensors, expected: Tensor, dtype: torch.dtype, what: str) -> None:
    folder = written.folder
    with _failing_as_ours(folder), checkpoint_on_disk(written, dtype) as model:
        found = _logits(model)
    difference = float((found - expected).norm() / expected.norm())
    if not difference <= _TOLERANCE.get(dtype, _TOLERANCE_HALF):  # also for NaN
        raise UnsoundCheckpoint(
            f"the checkpoint just written to {folder} gives other logits than {what} (relative difference "
            f"{difference:.2g})"
        )


@contextmanager
def _failing_as_ours(folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever a library makes of what we wrote
        raise UnsoundCheckpoint(f"the checkpoint just written to {folder} does not load: {error}") from error


def _logits(model: PreTrainedModel, rows_V: Tensor | None = None) -> Tensor:
    """Of a few tokens spread over the vocabulary, or over these rows of it: (1, NUM_TOKENS, all of it) float32."""
    vocab_size = model.config.vocab_size if rows_V is None else len(rows_V)
    ids_1L = (torch.arange(NUM_TOKENS) * (vocab_size // NUM_TOKENS + 1) % vocab_size)[None]
    if rows_V is not None:
        ids_1L = rows_V[ids_1L]
    logits: Tensor = model(input_ids=ids_1L, use_cache=False).logits
    return logits.float().cpu()


def _mask_(model: PreTrainedModel, plan: PruningPlan, dense: StoredTensors, pruned: StoredTensors) -> None:
    """Let the output linears of a dense model read what the plan keeps, with the weights of the pruned checkpoint."""
    family, layers = family_of(model), family_of(model).layers(model)
    for place, kept in enumerate(plan.layers):
        for kind in KINDS:
            if kind == "mlp" and kept.expert_size:
                _mask_experts_(layers[kept.layer], place, kept, dense, pruned)
                continue
            name = output_name(pruned.family, place, kind)
            _replace_(
                family, layers[kept.layer], kind, _KeptInputs(pruned, name, kept_inputs(kept, kind, plan.head_dim))
            )
        _mask_head_norms_(family, layers[kept.layer], place, kept, pruned)
    for index in plan.dropped_layers:
        width = family.o_proj(layers[index]).out_features
        for kind in KINDS:
            if kind == "mlp" and family.has_experts(layers[index]):
                setattr(layers[index], family.mlp_name, _Nothing(width))
            else:
                _replace_(family, layers[index], kind, _Nothing(width))


def _mask_experts_(layer: nn.Module, place: int, kept: LayerPlan, dense: StoredTensors, pruned: StoredTensors) -> None:
    family = dense.family
    experts, names = experts_module(family, layer), family.experts
    assert names is not None
    was, now = (f"{family.layers_path}.{index}.{family.mlp_name}." for index in (kept.layer, place))
    gate_up = _Weights(dense, f"{was}{names.module_name}.gate_up_proj")
    down = _Weights(pruned, f"{now}{names.module_name}.down_proj")
    rows = _Weights(pruned, f"{now}{names.router_name}.weight")
    setattr(experts.block, names.module_name, _KeptChannels(gate_up, down, kept, experts.module.act_fn))
    setattr(experts.block, names.router_name, _KeptRows(rows, kept, experts.router))


def _mask_head_norms_(
    family: ModelFamily, layer: nn.Module, place: int, kept: LayerPlan, pruned: StoredTensors
) -> None:
    if not family.head_norms_span_heads:
        return
    attention, head_dim = family.attention(layer), family.head_dim_of(layer)
    for norm_name, heads in zip(family.head_norm_names, (kept.kept_query_heads, kept.kept_kv_heads), strict=True):
        epsilon = float(getattr(attention.get_submodule(norm_name), family.norm_epsilon_name))
        name = f"{family.layers_path}.{place}.{family.attention_name}.{norm_name}.weight"
        setattr(attention, norm_name, _KeptFeatures(pruned, name, head_features(heads, head_dim), epsilon))


def _replace_(family: ModelFamily, layer: nn.Module, kind: SubLayerKind, linear: nn.Module) -> None:
    attention = kind == "attention"
    block = family.attention(layer) if attention else family.mlp(layer)
    setattr(block, family.o_name if attention else family.down_name, linear)


class _KeptInputs(nn.Module):
    """An output linear of a pruned checkpoint that stands in the dense model: it picks its inputs, and reads its
    weights when it is called."""

    def __init__(self, stored: StoredTensors, name: str, kept_I: Tensor) -> None:
        super().__init__()
        self._stored, self._kept_I = stored, kept_I
        self._names = [name for name in (f"{name}.weight", f"{name}.bias") if name in stored.places]

    def forward(self, inputs_BLI: Tensor) -> Tensor:
        weights = self._stored.read(self._names)
        return nn.functional.linear(inputs_BLI[..., self._kept_I], *(weights[name].float() for name in self._names))


@dataclass(frozen=True)
class _Weights:
    """A weight of a checkpoint that is read when it is asked for."""

    stored: StoredTensors
    name: str

    def __call__(self) -> Tensor:
        return self.stored.read([self.name])[self.name].float()


class _KeptRows(nn.Module):
    """The router of a pruned checkpoint in a dense layer: it calls the experts as they are called there."""

    def __init__(self, rows: _Weights, kept: LayerPlan, router: nn.Module) -> None:
        super().__init__()
        self._rows, self._kept_E, self._router_of = rows, torch.tensor(list(kept.kept_by_expert)), (router,)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (router,) = self._router_of  # no part of this module, or its hooks would be sought here
        return route(router, type(router), self._rows(), self._kept_E, hidden_states)


class _KeptChannels(nn.Module):
    """The experts of a dense layer with the output weights of a pruned checkpoint, whose channels they pick."""

    def __init__(self, gate_up: _Weights, down: _Weights, kept: LayerPlan, act_fn: nn.Module) -> None:
        super().__init__()
        self._gate_up, self._down, self._kept, self._act_fn = gate_up, down, kept, act_fn

    def forward(self, read_TC: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        gate_up, down, size = self._gate_up(), self._down(), self._kept.expert_size
        output_TC = torch.zeros_like(read_TC)
        for place, (expert, channels) in enumerate(self._kept.kept_by_expert.items()):
            token_T, which_T = (experts_TK == expert).nonzero(as_tuple=True)
            kept_I = torch.tensor(channels, dtype=torch.int64)
            gate_TI, up_TI = (read_TC[token_T] @ gate_up[expert, start + kept_I].T for start in (0, size))
            given_TC = (self._act_fn(gate_TI) * up_TI) @ down[place].T
            output_TC.index_add_(0, token_T, given_TC * weights_TK[token_T, which_T, None])
        return output_TC


class _KeptFeatures(nn.Module):
    """A norm over all heads of a pruned checkpoint that stands in the dense model: it looks at the heads that stay."""

    def __init__(self, stored: StoredTensors, name: str, kept_K: Tensor, epsilon: float) -> None:
        super().__init__()
        self._stored, self._name, self._kept_K, self._epsilon = stored, name, kept_K, epsilon

    def forward(self, features_BLF: Tensor) -> Tensor:
        weight_K = self._stored.read([self._name])[self._name].float()
        normed_BLK = rms_norm(features_BLF[..., self._kept_K], weight_K, self._epsilon)
        return torch.zeros_like(features_BLF).index_copy(-1, self._kept_K, normed_BLK)


class _Nothing(nn.Module):
    """The output linear of a layer that was dropped."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self._width = width

    def forward(self, inputs_BLI: Tensor) -> Tensor:
        return inputs_BLI.new_zeros(*inputs_BLI.shape[:-1], self._width)
