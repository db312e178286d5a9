"""Prompts in a tokenizer's chat template are possible only where it has one."""

from __future__ import annotations

from evaluation.errors import EvaluationError


def check_chat_template(present: bool | None) -> None:
    """Raise EvaluationError if a chat template is asked for and absent; None: it is not known yet."""
    if present is False:
        raise EvaluationError(
            "chat_template: true, but the model's tokenizer has no chat template; "
            "set chat_template: false, or take the instruct or chat version of the model "
            "(a template that writes tokens without an embedding does not count)"
        )
