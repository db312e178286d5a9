"""What of a model an estimate counts."""

from __future__ import annotations

import pytest

from flows.run.estimate import _LLAMAS, _size_of_card, _size_of_llama
from infra.models.card import ModelCard


def card(**changed: object) -> ModelCard:
    of_llama_7b: dict[str, object] = {
        "model_type": "llama",
        "num_layers": 32,
        "hidden_size": 4096,
        "num_parameters": 6_738_415_616,
        "bytes": 1,
        "dtype": "float16",
        "intermediate_size": 11008,
        "attention_size": 4096,
        "num_heads": 32,
        "num_kv_heads": 32,
    }
    return ModelCard.model_validate(of_llama_7b | changed)


def test_a_published_card_is_as_large_as_the_papers_model() -> None:
    found, theirs = _size_of_card(card(), 2), _size_of_llama(_LLAMAS[0], 2)
    assert found is not None
    assert (found.shapes, found.head_dim, found.layer_bytes) == (theirs.shapes, theirs.head_dim, theirs.layer_bytes)
    assert found.layer_bytes == pytest.approx(2 * 32 * 202_383_360, rel=1e-6)
    assert found.vocab_size == pytest.approx(2 * theirs.vocab_size, rel=1e-3), "embeddings and head are apart"


@pytest.mark.parametrize("changed", [{"num_heads": None}, {"model_type": "mixtral", "num_experts": 8}])
def test_what_is_not_counted_has_no_size(changed: dict[str, object]) -> None:
    assert _size_of_card(card(**changed), 2) is None
