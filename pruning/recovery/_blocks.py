"""The blocks of a pruned model, fitted one after the other to what the dense model has at that depth.

Each is given what the fitted blocks before it put out. Its loss is the squared error of the residual stream after it,
relative to the dense one's square at every token (after a norm, tokens of a huge activation count no more than others),
plus lookahead_weight times the divergence of the vocabulary's distribution after the next block, as it was pruned.

Shapes: N windows, the held-out ones last; B of one forward pass; L tokens each; P probed positions; C residual stream;
V vocabulary.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from pruning.activations.activations import FOLDER_PREFIX, Activations
from pruning.activations.tiers import ActivationStore
from pruning.checkpoints.decoder import ResidentDecoder
from pruning.errors import PruningError
from pruning.families import family_of
from pruning.families.forward import KINDS
from pruning.host_memory import activation_budget, kept_memory
from pruning.recovery import RecoveryInputs
from pruning.recovery._block_files import finished_, keep, load_, put_
from pruning.recovery._block_options import BlockOptions, FittedBlock
from pruning.recovery._session import layer_pairs
from pruning.training.durable import identity_of
from pruning.training.example_sets import window_examples
from pruning.training.objectives import precision
from pruning.training.options import Curves, TrainingConfig, TrainingRun
from pruning.training.trainer import check_device
from pruning.walk.embedding import spans
from pruning.walk.options import WalkOptions
from pruning.walk.streams import ResidualStreams

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def fit_blocks_(
    model: PreTrainedModel,
    inputs: RecoveryInputs,
    options: BlockOptions,
    config: TrainingConfig,
    run: TrainingRun,
) -> tuple[FittedBlock, ...]:
    """Fit all blocks of the model in place, those that a killed call had finished being read from run.scratch.

    A block is the better for it on the held-out windows, weights rounded to their dtype, or stays as it was. The model
    is not changed before all blocks are done. config: for num_heldout, seed and dtype, and to name the run. Of several
    processes the leading one fits, and the others read what it wrote. Raises PruningError for layers that do not
    correspond to the dense model's, or a loss that is not finite.
    """
    check_device(run)
    layers = family_of(model).layers(model)
    assert inputs.calibration is not None, "it has the calibration windows"
    identity = identity_of(model, window_examples(inputs.calibration, config).identity, config.model_dump_json())
    if run.num_processes > 1 and not run.leads:
        dist.barrier()
    finished = finished_(run.scratch, identity, len(layers))
    if len(finished) < len(layers):
        run.scratch.mkdir(parents=True, exist_ok=True)
        for left in run.scratch.glob(f"{FOLDER_PREFIX}*"):  # of a killed process
            shutil.rmtree(left, ignore_errors=True)
        # windows are read in a new order each pass, and the device is for training
        walk = WalkOptions(torch.device(run.device), 1, activation_budget(), 0, activation_folder=run.scratch)
        with walk.activation_store(0) as store, kept_memory(walk.device):
            fitting = _Fitting(model, inputs, options, config, run, walk, store)
            finished = fitting.run(finished, identity)
    if run.num_processes > 1 and run.leads:
        dist.barrier()
    for index, layer in enumerate(layers):
        load_(layer, run.scratch, index)
    return tuple(finished)


def block_curves(fitted: Sequence[FittedBlock]) -> Curves:
    """What is reported of each layer, by metric."""
    shown = [_shown(each) for each in fitted]
    return {name: tuple((index, each[name]) for index, each in enumerate(shown)) for name in shown[0]}


def _shown(block: FittedBlock) -> dict[str, float]:
    return {
        "block_loss_before": block.before,
        "block_loss_after": block.after,
        "block_train_loss": block.train_loss,
    }


@dataclass(frozen=True)
class _Block:
    """One block, and what it is fitted to.

    following: the next pruned layer, None after the last one. target: the dense stream after the block. ahead: the one
    that the probe is compared with: after the following layer, if there is one.
    """

    index: int
    following: nn.Module | None
    target: Activations
    ahead: Activations


class _Fitting:
    """Two models side by side: the residual streams of all windows, taken from block to block."""

    def __init__(
        self,
        model: PreTrainedModel,
        inputs: RecoveryInputs,
        options: BlockOptions,
        config: TrainingConfig,
        run: TrainingRun,
        walk: WalkOptions,
        store: ActivationStore,
    ) -> None:
        assert inputs.teacher is not None, "it has a teacher"
        assert inputs.calibration is not None, "it has the calibration windows"
        self._options, self._config, self._run, self._device, self._store = options, config, run, walk.device, store
        self._own, self._dense = ResidentDecoder(model), ResidentDecoder(inputs.teacher())
        self._depths = _depths(inputs, self._own.num_layers, self._dense.num_layers)
        windows_NL, heldout_ML = inputs.calibration.input_ids_NL, inputs.calibration.heldout_ids_ML
        ids_NL = torch.cat([windows_NL, heldout_ML[: config.num_heldout]])
        self._num_windows, self._num_all, self._length = len(windows_NL), *ids_NL.shape
        self._stream = ResidualStreams(self._own, walk, store, ids_NL)
        self._dense_stream = ResidualStreams(self._dense, walk, store, ids_NL)
        if options.lookahead_weight:
            self._own_logits = self._own.logits_of(self._device, torch.float32)
            self._dense_logits = self._dense.logits_of(self._device, torch.float32)

    def run(self, finished: Sequence[FittedBlock], identity: str) -> list[FittedBlock]:
        """All blocks; what is done of them already is only read."""
        fitted, stream = list(finished), self._stream
        targets = self._targets()
        target, ahead = next(targets), next(targets, None)
        for index in range(self._own.num_layers):
            if index == len(fitted):
                weights, outcome = self._fit(index, target, ahead)
                keep(self._run.scratch, index, identity, weights, outcome)
                fitted.append(outcome)
                self._run.curves(index, _shown(outcome))
                self._tell(index, index + 1, outcome.before, outcome.after)
            layer = self._own.layer(index, self._device)
            load_(layer, self._run.scratch, index)
            stream.advance(stream.common, layer, index, KINDS, into=stream.common)
            if ahead is not None:
                self._store.free(target)
                target, ahead = ahead, next(targets, None)
        return fitted

    def _targets(self) -> Iterator[Activations]:
        """The dense stream at each of the depths; all that were given are readable until they are freed."""
        dense, index, stream = self._dense_stream, 0, self._dense_stream.common
        for depth in self._depths:
            after = dense.allocate()
            while index < depth:
                layer = self._dense.layer(index, self._device)
                dense.advance(stream, layer, index, KINDS, into=after)
                stream, index = after, index + 1
            if depth == self._depths[0]:
                self._store.free(dense.common)
            yield after

    def _fit(self, index: int, target: Activations, ahead: Activations | None) -> tuple[dict[str, Tensor], FittedBlock]:
        """The weights of one block, in their own dtypes on the CPU, that are best on the held-out windows."""
        judged, trained = (self._own.layer(index, self._device) for _ in range(2))
        dtypes = {name: parameter.dtype for name, parameter in judged.named_parameters()}
        judged, trained = judged.float(), trained.float().requires_grad_(True)
        following = None if ahead is None else self._own.layer(index + 1, self._device).float()
        block = _Block(index, following, target, target if ahead is None else ahead)
        generator = torch.Generator().manual_seed(self._config.seed * 2**16 + index)
        probed_MP = self._positions(self._num_all - self._num_windows, generator)
        optimizer = torch.optim.AdamW(_weights(trained), lr=self._options.learning_rate, weight_decay=0.0)
        per_pass = math.ceil(self._num_windows / self._options.batch_size)
        best, best_pass = _rounded(judged, dtypes), 0
        before = lowest = self._heldout_loss(block, judged, probed_MP)
        for done in range(1, self._options.passes + 1):
            train_loss = self._pass(block, trained, optimizer, generator)
            rounded = _rounded(trained, dtypes)
            put_(judged, rounded)
            loss = self._heldout_loss(block, judged, probed_MP)
            if not math.isfinite(train_loss + loss):
                raise PruningError(
                    f"the loss of block {index + 1} became {train_loss} in pass {done}, held-out {loss}: lower "
                    f"blocks.learning_rate (now {self._options.learning_rate:g}) or train in float32"
                )
            if loss < lowest:
                best, best_pass, lowest = rounded, done, loss
            self._tell(index, index + done / self._options.passes, before, loss, f"pass {done}, ")
            if self._options.patience is not None and done - best_pass >= self._options.patience:
                break
        outcome = FittedBlock(
            before=before,
            after=lowest,
            train_loss=train_loss,
            num_steps=done * per_pass,
            kept_step=best_pass * per_pass,
        )
        return best, outcome

    def _pass(
        self, block: _Block, layer: nn.Module, optimizer: torch.optim.Optimizer, generator: torch.Generator
    ) -> float:
        """Every window once, in a new order; returns the mean loss."""
        weights, total = _weights(layer), 0.0
        order_N = torch.randperm(self._num_windows, generator=generator)
        probed_NP = self._positions(self._num_windows, generator)
        for begin, end in spans(0, self._num_windows, self._options.batch_size):
            optimizer.zero_grad(set_to_none=True)
            for start, stop in spans(begin, end, self._options.micro_batch_size):
                numbers_B, count = order_N[start:stop], stop - start
                loss = self._loss(block, layer, numbers_B.tolist(), probed_NP[numbers_B])
                torch.autograd.backward(loss * (count / (end - begin)), inputs=weights)
                total += float(loss.detach()) * count
            optimizer.step()
        return total / self._num_windows

    @torch.no_grad()
    def _heldout_loss(self, block: _Block, layer: nn.Module, probed_MP: Tensor) -> float:
        total, first = 0.0, self._num_windows
        for start, stop in spans(0, len(probed_MP), self._options.micro_batch_size):
            loss = self._loss(block, layer, range(first + start, first + stop), probed_MP[start:stop])
            total += float(loss) * (stop - start)
        return total / len(probed_MP)

    def _loss(self, block: _Block, layer: nn.Module, numbers: Sequence[int], probed_BP: Tensor) -> Tensor:
        """Mean over the tokens of those windows."""
        before_BLC, target_BLC = self._read(self._stream.common, numbers), self._read(block.target, numbers)
        with precision(self._device, self._config.dtype == "bfloat16"):
            after_BLC = self._stream.through(layer, block.index, before_BLC)
            error_BL = (after_BLC.float() - target_BLC).square().sum(-1)
            loss = (error_BL / target_BLC.square().sum(-1).clamp_min(torch.finfo().tiny)).mean()
            if self._options.lookahead_weight:
                if block.following is not None:
                    after_BLC = self._stream.through(block.following, block.index + 1, after_BLC)
                divergence = self._divergence(after_BLC, self._read(block.ahead, numbers), probed_BP)
                loss = loss + self._options.lookahead_weight * divergence
        return loss

    def _divergence(self, own_BLC: Tensor, dense_BLC: Tensor, probed_BP: Tensor) -> Tensor:
        """KL(dense || own) in nats, mean over the probed positions."""
        rows_B1, probed_BP = torch.arange(len(probed_BP))[:, None].to(self._device), probed_BP.to(self._device)
        own_BPV = self._own_logits(own_BLC[rows_B1, probed_BP]).float().log_softmax(-1)
        with torch.no_grad():
            dense_BPV = self._dense_logits(dense_BLC[rows_B1, probed_BP]).float().log_softmax(-1)
        return F.kl_div(own_BPV, dense_BPV, log_target=True, reduction="sum") / probed_BP.numel()

    def _positions(self, count: int, generator: torch.Generator) -> Tensor:
        """Some positions of each of so many windows, drawn without replacement."""
        wanted = min(self._options.probe_positions, self._length)
        return torch.rand(count, self._length, generator=generator).argsort(1)[:, :wanted]

    def _read(self, stream: Activations, numbers: Sequence[int]) -> Tensor:
        return torch.cat([stream.get(number, number + 1) for number in numbers]).to(self._device, torch.float32)

    def _tell(self, index: int, done: float, before: float, loss: float, more: str = "") -> None:
        num_layers = self._own.num_layers
        words = f"block {index + 1}/{num_layers}, {more}held-out {loss:.4f} (was {before:.4f})"
        self._run.progress(done / num_layers, words)


def _depths(inputs: RecoveryInputs, num_own: int, num_dense: int) -> tuple[int, ...]:
    """How many layers of the dense model lead to what each layer should put out, after itself."""
    try:
        return tuple(depth for _, depth in layer_pairs(inputs, num_own, num_dense))
    except PruningError as error:
        raise PruningError(
            f"blocks are fitted layer by layer, and the model has {num_own} layers, the dense one {num_dense}, and no "
            "plan says which it has lost: take mode: end_to_end"
        ) from error


def _weights(layer: nn.Module) -> list[nn.Parameter]:
    """Those that have values: a layer may have no heads or no channels."""
    return [parameter for parameter in layer.parameters() if parameter.numel()]


@torch.no_grad()
def _rounded(layer: nn.Module, dtypes: dict[str, torch.dtype]) -> dict[str, Tensor]:
    return {
        name: parameter.to("cpu", dtypes[name], copy=True).contiguous() for name, parameter in layer.named_parameters()
    }
