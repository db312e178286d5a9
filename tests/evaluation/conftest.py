from __future__ import annotations

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()
