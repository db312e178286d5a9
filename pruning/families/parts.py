"""That a decoder layer has no part which the row of its family does not know: nothing is silently left unpruned."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pruning.errors import PruningError
from pruning.families.experts import experts_of
from pruning.families.forward import KINDS, input_norm, output_norm

if TYPE_CHECKING:
    from torch import nn

    from pruning.families.family import ModelFamily


def check_parts(family: ModelFamily, model: nn.Module) -> None:
    """Raise PruningError naming a parameter, or a buffer that is saved, of a layer that belongs neither to a linear,
    nor to a norm, nor to the experts that the family's row names. No weight is read."""
    for index, layer in enumerate(family.layers(model)):
        known = {id(module) for module in _named_by_the_row(family, layer)}
        for name, module in layer.named_modules():
            if id(module) in known:
                continue
            owned = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            for part, _ in owned:
                if part not in module._non_persistent_buffers_set:
                    whole = ".".join(each for each in (family.layers_path, str(index), name, part) if each)
                    raise PruningError(
                        f"{whole} of this {type(model).__name__} is a part that the family {family.name} does not know "
                        "and would leave unpruned: take a model, or a version of transformers, without it"
                    )


def _named_by_the_row(family: ModelFamily, layer: nn.Module) -> list[nn.Module]:
    norms = [find(family, layer, kind) for kind in KINDS for find in (input_norm, output_norm)]
    experts = experts_of(family, layer)
    mixture = [] if experts is None else [experts.module, experts.router]
    norms_there = [norm for norm in norms if norm is not None]
    return [*family.linears(layer).values(), *family.head_norms(layer), *norms_there, *mixture]
