"""Squared gradients at what sub-layers add, layer by layer, are those of autograd on the whole model."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pruning.checkpoints.decoder import ResidentDecoder
from pruning.errors import PruningError
from pruning.families import family_of
from pruning.families.forward import KINDS, output_name
from pruning.gradients.sensitivity import LayerSensitivity, walk_sensitivities
from pruning.walk.loss import sampled_losses, token_losses
from tests.pruning.captured import CPU, hooked_moments, outputs
from tests.tiny import random_ids, tiny_model


def walked(model: PreTrainedModel, ids_NL: Tensor, options=CPU, **more) -> dict[int, LayerSensitivity]:  # type: ignore[no-untyped-def]
    name_of = partial(output_name, family_of(model))
    decoder = ResidentDecoder(model)
    return {each.layer: each for each in walk_sensitivities(decoder, ids_NL, options, name_of=name_of, **more)}


def hooked_gradients(model: PreTrainedModel, ids_NL: Tensor) -> dict[str, Tensor]:
    """Mean over predicted tokens of the squared gradient of the summed loss at every output linear's output."""
    given: dict[str, Tensor] = {}

    def keep(name: str, output: Tensor) -> None:
        given[name] = output.requires_grad_()
        output.retain_grad()

    handles = [
        linear.register_forward_hook(lambda _m, _i, output, name=name: keep(name, output))
        for name, linear in outputs(model).items()
    ]
    num_tokens = ids_NL.shape[0] * (ids_NL.shape[1] - 1)
    (model(ids_NL, labels=ids_NL).loss * num_tokens).backward()
    for handle in handles:
        handle.remove()
    model.zero_grad(set_to_none=True)
    return {name: output.grad.square().flatten(0, -2).sum(0) / num_tokens for name, output in given.items()}  # type: ignore[union-attr]


@pytest.mark.parametrize(("name", "in_files"), [("llama", True), ("phi", False), ("opt", False), ("phi3", False)])
def test_equal_to_the_whole_model(name: str, in_files: bool) -> None:
    model = tiny_model(name)
    ids_NL = random_ids(model, 5, 17)  # batches of 3 and 2
    gradients, moments = hooked_gradients(model, ids_NL), hooked_moments(model, ids_NL)
    shares: list[float] = []
    options = replace(CPU, activation_budget_bytes=0) if in_files else CPU
    found = walked(model, ids_NL, options, progress=shares.append)
    assert list(found) == [2, 1, 0]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)
    for layer, of_layer in found.items():
        assert tuple(of_layer.sub_layers) == KINDS
        for kind, sub_layer in of_layer.sub_layers.items():
            linear = output_name(family_of(model), layer, kind)
            torch.testing.assert_close(sub_layer.gradient_C, gradients[linear], rtol=1e-4, atol=1e-9)
            torch.testing.assert_close(sub_layer.hessian.matrix_II.double(), moments[linear], rtol=1e-4, atol=1e-5)


def test_what_a_norm_or_a_multiplier_makes_of_the_output_is_what_counts() -> None:
    """The gradient is the one at the stream: an output that is multiplied on its way has that times the multiplier."""
    model = tiny_model("granite")
    ids_NL = random_ids(model, 3, 12)
    gradients = hooked_gradients(model, ids_NL)
    for layer, of_layer in walked(model, ids_NL).items():
        at_linear = gradients[output_name(family_of(model), layer, "mlp")]
        torch.testing.assert_close(0.6**2 * of_layer.sub_layers["mlp"].gradient_C, at_linear, rtol=1e-4, atol=1e-9)


def test_a_sub_layer_that_is_gone_is_left_out() -> None:
    model, silent = tiny_model("llama"), tiny_model("llama")
    silent.model.layers[1].self_attn.o_proj.weight.data.zero_()
    ids_NL = random_ids(model, 3, 12)
    expected = hooked_gradients(silent, ids_NL)
    found = walked(model, ids_NL, present=lambda layer: KINDS[1:] if layer == 1 else KINDS)
    assert tuple(found[1].sub_layers) == ("mlp",)
    first = found[0].sub_layers["attention"].gradient_C
    torch.testing.assert_close(first, expected["model.layers.0.self_attn.o_proj"], rtol=1e-4, atol=1e-9)


def test_sampled_labels_are_the_models_own() -> None:
    """Drawn as the softmax says, by each sample's own tokens: batches play no part."""
    logits_V = torch.tensor([2.0, 0.0, 1.0, -1.0])
    stream_BLC = logits_V.expand(40, 101, 4)
    ids_BL = torch.arange(40 * 101).reshape(40, 101)
    losses = list(sampled_losses(lambda stream: stream, stream_BLC, ids_BL))
    drawn_mean = sum(map(float, losses)) / 4000
    log_p = logits_V.log_softmax(0)
    entropy = float(-(log_p.exp() * log_p).sum())
    deviation = float((log_p.exp() * (log_p + entropy).square()).sum()) ** 0.5
    assert abs(drawn_mean - entropy) < 4 * deviation / 4000**0.5
    apart = [*sampled_losses(lambda stream: stream, stream_BLC[3:4], ids_BL[3:4])]
    assert torch.equal(apart[0], losses[3])
    model = tiny_model("llama")
    ids_NL = random_ids(model, 6, 17)
    one = walked(model, ids_NL, labels="sampled")[1].sub_layers["mlp"]
    other = walked(model, ids_NL, replace(CPU, batch_size=1), labels="sampled")[1].sub_layers["mlp"]
    torch.testing.assert_close(one.gradient_C, other.gradient_C, rtol=1e-4, atol=1e-12)
    assert not torch.allclose(one.gradient_C, walked(model, ids_NL)[1].sub_layers["mlp"].gradient_C, rtol=1e-3)


def test_text_labels_are_the_next_tokens() -> None:
    stream_BLC, ids_BL = torch.randn(2, 5, 4), torch.tensor([[0, 1, 2, 3, 0], [3, 3, 1, 0, 2]])
    (loss, _) = token_losses(lambda stream: stream, stream_BLC, ids_BL)
    expected = -stream_BLC[0, :-1].log_softmax(-1)[torch.arange(4), ids_BL[0, 1:]].sum()
    torch.testing.assert_close(loss, expected)


def test_what_is_not_finite_is_refused() -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(PruningError, match=r"gradient at the output of model\.layers\.2\..* is not finite"):
        walked(model, random_ids(model, 2, 8))
    with pytest.raises(PruningError, match="two tokens at least"):
        walked(tiny_model("llama"), random_ids(model, 2, 1))
