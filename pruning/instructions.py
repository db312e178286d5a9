"""Instruction records as text: the Alpaca prompt and the response behind it, for training and for calibration."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict

# The prompt of Stanford Alpaca (github.com/tatsu-lab/stanford_alpaca), which its data sets are made for
PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
PROMPT_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


class InstructionColumns(BaseModel):
    """What the columns of instruction records are called. `input` may be None: no such column."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    instruction: str = "instruction"
    input: str | None = "input"
    output: str = "output"

    @property
    def columns(self) -> tuple[str, ...]:
        """Their names in the data set, without those that are None."""
        return tuple(name for name in (self.instruction, self.input, self.output) if name is not None)


def prompt_of(record: Mapping[str, str], columns: InstructionColumns) -> str:
    """The Alpaca prompt for a record, up to where the response begins."""
    text = record[columns.input] if columns.input is not None else ""
    if text:
        return PROMPT_WITH_INPUT.format(instruction=record[columns.instruction], input=text)
    return PROMPT_WITHOUT_INPUT.format(instruction=record[columns.instruction])


def text_of(record: Mapping[str, str], columns: InstructionColumns) -> str:
    """The whole record as a model meets it: prompt and response."""
    return prompt_of(record, columns) + record[columns.output]
