"""A talk with a model, answer by answer, each told piece by piece while it is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TextStreamer

from evaluation.errors import EvaluationError
from evaluation.inference.global_state import torch_seed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OnText = Callable[[str], None]


@dataclass(frozen=True)
class DialogueOptions:
    """max_tokens: of an answer. temperature: 0 takes the likeliest token, more draws by `seed`. system: what a chat
    template is told first."""

    max_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0
    system: str | None = None


@dataclass
class Dialogue:
    """One talk. With a chat template the model is given all of it; without one it continues each text by itself."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    options: DialogueOptions
    turns: list[dict[str, str]] = field(default_factory=list)

    @property
    def has_template(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return self.tokenizer.chat_template is not None

    def answer(self, text: str, on_text: OnText) -> str:
        """The answer to a text. on_text: told each piece of it as soon as it is certain.

        Raises EvaluationError for a text that is longer than the model's context.
        """
        self.turns.append({"role": "user", "content": text})
        ids_1L = self._prompt(text)
        pieces: list[str] = []

        def tell(piece: str) -> None:
            pieces.append(piece)
            on_text(piece)

        try:
            self._generate(ids_1L, tell)
        finally:  # what was written before somebody interrupted it was said
            self.turns.append({"role": "assistant", "content": "".join(pieces)})
        return "".join(pieces)

    def _prompt(self, text: str) -> Tensor:
        """Token ids, (1, L): with the oldest turns left out if all of them leave no room for an answer."""
        context = getattr(self.model.config, "max_position_embeddings", None)
        ids_1L = self._encoded(text)
        while context is not None and ids_1L.shape[1] > max(1, context - self.options.max_tokens):
            if not self.has_template or len(self.turns) < 3:
                if ids_1L.shape[1] < context:
                    break
                self.turns.pop()
                raise EvaluationError(
                    f"the text has {ids_1L.shape[1]} tokens, and the model's context is {context}: make it shorter"
                )
            del self.turns[:2]
            ids_1L = self._encoded(text)
        return ids_1L

    def _encoded(self, text: str) -> Tensor:
        if not self.has_template:
            return torch.tensor([self.tokenizer(text).input_ids])
        system = [{"role": "system", "content": self.options.system}] if self.options.system else []
        written = self.tokenizer.apply_chat_template([*system, *self.turns], add_generation_prompt=True, tokenize=False)
        # the template writes the special tokens itself
        return torch.tensor([self.tokenizer(str(written), add_special_tokens=False).input_ids])

    @torch.no_grad()
    def _generate(self, ids_1L: Tensor, on_text: OnText) -> None:
        context = getattr(self.model.config, "max_position_embeddings", None)
        most = self.options.max_tokens if context is None else min(self.options.max_tokens, context - ids_1L.shape[1])
        drawn = {"do_sample": True, "temperature": self.options.temperature} if self.options.temperature else {}
        device = self.model.device
        pad = self.tokenizer.pad_token_id
        with torch_seed(self.options.seed, [device] if device.type == "cuda" else []):
            self.model.generate(
                ids_1L.to(device),
                attention_mask=torch.ones_like(ids_1L, device=device),
                max_new_tokens=max(1, most),
                pad_token_id=self.tokenizer.eos_token_id if pad is None else pad,
                streamer=_Told(self.tokenizer, on_text),
                **({"do_sample": False} | drawn),
            )


class _Told(TextStreamer):  # type: ignore[misc]
    """Hands on each piece of the answer; the prompt and special tokens are none."""

    def __init__(self, tokenizer: Any, on_text: OnText) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by transformers with text that no further token changes."""
        if text:
            self._on_text(text)
