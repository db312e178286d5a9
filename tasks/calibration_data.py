"""Which text a model is calibrated on: any text data set, instruction data as text, or a preset by its short name.

Importing it needs no torch.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, model_validator

from infra.registry import did_you_mean
from infra.sources.find import Sources, TextData
from pruning.instructions import InstructionColumns, text_of

#: what a short name stands for; written out in full in a dumped spec, in cache keys and in every protocol
PRESETS: dict[str, dict[str, str]] = {
    # the shard that SparseGPT (arXiv 2301.00774) and SlimGPT (arXiv 2412.18110) read
    "c4": {"dataset": "allenai/c4", "data_files": "en/c4-train.00000-of-01024.json.gz"},
    "alpaca": {"dataset": "yahma/alpaca-cleaned", "template": "alpaca"},
    "stanford-alpaca": {"dataset": "tatsu-lab/alpaca", "template": "alpaca"},
    "gpt4-alpaca": {"dataset": "vicgalle/alpaca-gpt4", "template": "alpaca"},
    "wikitext2": {"dataset": "Salesforce/wikitext", "config": "wikitext-2-raw-v1", "rows": "lines"},
}


class Template(InstructionColumns):
    """How instruction records become text: the prompt's name and what the columns are called."""

    name: Literal["alpaca"] = "alpaca"


def _template(value: Any) -> Any:
    name = value.get("name", "alpaca") if isinstance(value, dict) else value
    if isinstance(name, str) and name != "alpaca":
        raise ValueError(f"unknown template {name!r}{did_you_mean(name, ['alpaca'])}; available: alpaca")
    return {"name": value} if isinstance(value, str) else value


class CalibrationData(TextData):
    """Text data, with what its rows are."""

    template: Annotated[Template | None, BeforeValidator(_template)] = None
    """Instruction data: each row becomes one text, prompt and response, and `text_field` plays no part. `alpaca` for
    columns instruction, input and output; or a mapping that names them: {instruction: question, input: null}."""
    rows: Literal["documents", "lines"] = "documents"
    """documents: rows are drawn in random order; lines: rows are the lines of one running text (WikiText), kept in
    their order and joined as perplexity joins them."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.template is not None and self.text_field != "text":
            raise ValueError(f"text_field {self.text_field!r} and a template exclude each other; leave one of them out")
        if self.template is not None and self.rows == "lines":
            raise ValueError("rows 'lines' and a template exclude each other: records are documents; leave rows out")
        return self

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that are read."""
        return (self.text_field,) if self.template is None else self.template.columns

    @property
    def protocol(self) -> dict[str, str]:
        """What the calibration set says about where it came from."""
        said = {"dataset": self.dataset, "config": self.config or "", "split": self.split, "rows": self.rows}
        said["columns"] = ", ".join(self.columns)
        if self.data_files is not None:
            said["data_files"] = self.data_files
        if self.template is not None:
            said["template"] = self.template.name
        return said


def expanded(value: Any) -> Any:
    """The full values for a preset's short name; anything else as it is. Raises ValueError for an unknown name."""
    if not isinstance(value, str):
        return value
    if value not in PRESETS:
        raise ValueError(
            f"unknown calibration set {value!r}{did_you_mean(value, PRESETS)}; available: {', '.join(PRESETS)}, or "
            "a mapping that names a dataset"
        )
    return PRESETS[value]


def documents(data: CalibrationData, sources: Sources, join: str) -> list[str]:
    """The texts to sample from, in order. Raises SourceMissing, or SourceInvalid naming what exists."""
    if data.template is not None:
        template = data.template
        return [text_of(record, template) for record in sources.records(data, template.columns)]
    texts = sources.texts(data)
    return [join.join(texts)] if data.rows == "lines" else texts
