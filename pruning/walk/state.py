"""What a walk has done so far, layer by layer, from where an interrupted one goes on; and what comes of it (`Pruned`).

A layer is entered in two steps: `decide` records what is kept of it (its weights are already compensated), and when its
output has joined the residual stream the walk calls `layer_done`. Then the layer is finished for good.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from pruning.activations.activations import Activations
from pruning.allocation.trace import AllocationStep, Curves, SearchTrial
from pruning.checkpoints.surgery import shrink_layer_
from pruning.families import ModelFamily, family_of
from pruning.families.experts import experts_of, mask_router_
from pruning.families.forward import KINDS, output_linear, silence_
from pruning.families.head_norms import mask_head_norms_
from pruning.plan import LayerPlan, LayerShape, PruningPlan


class SubLayerReport(BaseModel):
    """What pruning one linear cost.

    predicted_error, measured_error, heldout_error: mean squared output error per token, by the OBS sum (dampened
    Hessian), on the calibration tokens and on held-out tokens; output_energy: the mean squared output itself, of the
    weight as it was, to put the errors in proportion. condition: of the dampened Hessian, estimated in the 1-norm.
    score: the sum of the scores of what went, in the method's own unit. Of an expert num_tokens are those that the
    router sent to it, and the means are over all tokens; assumed_tokens: how many it was given beside them, see
    walk.experts. ridge: the share of each diagonal element that the held-out windows chose for the refit. sensitivity:
    mean over tokens of the squared gradient of the loss at the sub-layer's output, where it decided how much goes.
    refactorisations: 0; reports of earlier
    versions may say more. A linear that loses nothing is not measured: its errors are 0 and the rest is None. What
    cannot be measured for want of a Hessian is None.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    layer: int
    sub_layer: str
    name: str
    kept: int
    total: int
    predicted_error: float | None = 0.0
    measured_error: float | None = 0.0
    output_energy: float | None = None
    heldout_error: float | None = None
    condition: float | None = None
    score: float | None = None
    ridge: float | None = Field(default=None, exclude_if=lambda share: share is None)
    sensitivity: float | None = Field(default=None, exclude_if=lambda square: square is None)
    refactorisations: int = 0
    num_tokens: int = 0
    assumed_tokens: int = Field(default=0, exclude_if=lambda count: count == 0)
    seconds: float = 0.0


class LayerEntry(BaseModel):
    """What is kept of a layer (None: it is dropped as a whole) and what its linears paid."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    plan: LayerPlan | None
    reports: tuple[SubLayerReport, ...]


class Pruned(BaseModel):
    """What every pruning method returns; the compensated weights are in the WalkState it was given.

    achieved_sparsity: share of decoder-layer parameters that the plan removes. split: the one between attention and FFN
    that was carried out. split_kl: held-out KL (nats per token) of each split that was tried, if there was a choice.
    steps: of an allocation that measures anew between steps. search: the candidates of one that searches, and curves
    what they say, for the record.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    plan: PruningPlan
    layers: tuple[SubLayerReport, ...] = ()
    achieved_sparsity: float
    split: str | None = None
    split_kl: dict[str, float] = {}
    steps: tuple[AllocationStep, ...] = Field(default=(), exclude_if=lambda steps: not steps)
    search: tuple[SearchTrial, ...] = Field(default=(), exclude_if=lambda trials: not trials)
    curves: Curves = Field(default={}, exclude_if=lambda curves: not curves)


@dataclass(frozen=True)
class WalkedLayer:
    """A layer whose output has joined the residual stream.

    module: with its masked, compensated weights; None for a layer that is dropped. stream: after the layer, None if
    nothing was walked. spans: first sample and end of each batch. is_last: no layer follows.
    """

    index: int
    module: nn.Module | None
    family: ModelFamily
    stream: Activations | None = None
    spans: Sequence[tuple[int, int]] = ()
    is_last: bool = False


#: an output linear; of a layer with experts the weight of all of theirs
_Output = nn.Linear | Tensor

#: called with the entry of each layer that is finished
OnEntry = Callable[[LayerEntry], None]


def no_listener(entry: LayerEntry) -> None:
    """Nobody wants to know of a finished layer."""


class WalkState(ABC):
    """The finished layers of one walk, in order. folder: where it keeps files, None if in memory only. on_entry: called
    with each layer when it is finished, first with those that an interrupted walk had finished."""

    folder: Path | None = None

    def __init__(self, on_entry: OnEntry = no_listener) -> None:
        self._on_entry = on_entry
        self._entries: list[LayerEntry] = []
        self._decided: LayerEntry | None = None

    @property
    def entries(self) -> tuple[LayerEntry, ...]:
        """Of the finished layers, in order."""
        return tuple(self._entries)

    @property
    def layers_done(self) -> int:
        """Number of finished layers, so the index of the next one."""
        return len(self._entries)

    def plan(self, source: Sequence[LayerShape], head_dim: int) -> PruningPlan:
        """What all layers together keep of a model of these shapes."""
        kept = tuple(entry.plan for entry in self._entries if entry.plan is not None)
        return PruningPlan(source=tuple(source), head_dim=head_dim, layers=kept)

    def decide(self, entry: LayerEntry) -> None:
        """Set the outcome of the layer that is being walked, to be entered by `layer_done`."""
        self._decided = entry

    def layer_done(self, walked: WalkedLayer) -> None:
        """Save the layer with the entry that was decided on."""
        assert self._decided is not None, f"nothing was decided for layer {walked.index}"
        assert walked.index == self.layers_done, (walked.index, self.layers_done)
        self._save_layer(walked, self._decided)
        self._entries.append(self._decided)
        self._on_entry(self._decided)
        self._decided = None

    def flush(self) -> None:  # noqa: B027 (what is kept at once is kept)
        """Wait until every finished layer is kept. Raises what keeping one raised."""

    @abstractmethod
    def _save_layer(self, walked: WalkedLayer, entry: LayerEntry) -> None: ...

    @abstractmethod
    def resumed(self, start: int, stop: int) -> Tensor:
        """The residual stream of some samples after the last finished layer, (stop - start, L, C)."""

    @abstractmethod
    def branch(self, name: str, *, keeps_weights: bool = False) -> WalkState:
        """The state of another walk over the same model; same name, same state. keeps_weights: those of its finished
        layers are wanted, not only its noted numbers."""

    @abstractmethod
    def discard(self, name: str) -> None:
        """Free what a branch keeps, if there is one of that name."""

    @abstractmethod
    def finish_(self, layer: nn.Module, index: int, family: ModelFamily) -> None:
        """Give a copy of the dense model's layer `index`, which stays in part, the weights and the widths that it has
        after the walk."""

    @abstractmethod
    def note_text(self, name: str, text: str) -> None:
        """Store what was decided before this walk; all processes of a group store the same."""

    @abstractmethod
    def recall_text(self, name: str) -> str | None:
        """A stored text, as `recall`."""

    @abstractmethod
    def note(self, name: str, value: float) -> None:
        """Store a number that was measured on this walk."""

    @abstractmethod
    def recall(self, name: str) -> float | None:
        """A number noted in this process or, if the state is durable, in one before it; None if there is none."""


class MemoryWalkState(WalkState):
    """In memory only: holds the output linears in masked form, which `apply_` puts into the model."""

    def __init__(self) -> None:
        super().__init__()
        self._outputs: list[tuple[_Output, ...] | None] = []
        self._numbers: dict[str, float] = {}
        self._texts: dict[str, str] = {}

    def apply_(self, model: nn.Module) -> None:
        """Give the model the masked weights and biases of all layers; a dropped layer adds nothing to the stream."""
        family = family_of(model)
        with torch.no_grad():
            for layer, entry, outputs in zip(family.layers(model), self._entries, self._outputs, strict=True):
                experts = experts_of(family, layer)
                if entry.plan is not None:
                    mask_head_norms_(family, layer, entry.plan.kept_query_heads, entry.plan.kept_kv_heads)
                    if experts is not None:
                        mask_router_(experts, entry.plan.kept_by_expert)
                for kind, output in zip(KINDS, outputs or (None, None), strict=True):
                    if output is None:
                        silence_(family, layer, kind)
                    elif isinstance(output, Tensor):
                        assert experts is not None
                        experts.module.down_proj.copy_(output)
                    else:
                        linear = output_linear(family, layer, kind)
                        linear.weight.copy_(output.weight)
                        if output.bias is not None:
                            linear.bias = nn.Parameter(output.bias.to(linear.weight, copy=True))

    def _save_layer(self, walked: WalkedLayer, entry: LayerEntry) -> None:
        if walked.module is None:
            self._outputs.append(None)
            return
        family, experts = walked.family, experts_of(walked.family, walked.module)
        mlp = experts.module.down_proj.detach() if experts else family.down_proj(walked.module)
        self._outputs.append((family.o_proj(walked.module).cpu(), mlp.cpu()))

    def resumed(self, start: int, stop: int) -> Tensor:
        """Not called: a new state has no finished layers."""
        raise AssertionError(f"samples {start} to {stop} asked of a state that outlives no walk")

    def branch(self, name: str, *, keeps_weights: bool = False) -> MemoryWalkState:
        """A new state each time."""
        return MemoryWalkState()

    def discard(self, name: str) -> None:
        """Nothing: whoever asked for a branch holds it."""

    def finish_(self, layer: nn.Module, index: int, family: ModelFamily) -> None:
        """Copy the output linears and cut the layer."""
        plan, outputs = self._entries[index].plan, self._outputs[index]
        assert plan is not None, index
        assert outputs is not None, index
        mask_head_norms_(family, layer, plan.kept_query_heads, plan.kept_kv_heads)
        for linear, output in zip((family.o_proj(layer), family.down_proj(layer)), outputs, strict=True):
            assert isinstance(output, nn.Linear), "a model with experts has gone through no steps"
            linear.load_state_dict(output.state_dict())
        shrink_layer_(family, layer, plan)

    def note_text(self, name: str, text: str) -> None:
        """Store a text."""
        self._texts[name] = text

    def recall_text(self, name: str) -> str | None:
        """A stored text, None if there is none."""
        return self._texts.get(name)

    def note(self, name: str, value: float) -> None:
        """Store a number."""
        self._numbers[name] = value

    def recall(self, name: str) -> float | None:
        """A noted number, None if there is none."""
        return self._numbers.get(name)
