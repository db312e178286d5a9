"""Which data sets a training reads: instruction records, or running text. Importing it needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag

from pruning.bounds import Count
from pruning.instructions import InstructionColumns

#: what a short name stands for; written out in full in a dumped spec, in cache keys and in every protocol
TEXTS: dict[str, dict[str, str]] = {
    "c4": {"dataset": "allenai/c4", "config": "en"},
    "fineweb-edu": {"dataset": "HuggingFaceFW/fineweb-edu", "config": "sample-10BT"},
    "redpajama": {"dataset": "togethercomputer/RedPajama-Data-1T-Sample"},
    "slimpajama": {"dataset": "cerebras/SlimPajama-627B"},
}
RECORDS: dict[str, dict[str, str]] = {
    "alpaca": {"dataset": "yahma/alpaca-cleaned"},
    "stanford-alpaca": {"dataset": "tatsu-lab/alpaca"},
    "gpt4-alpaca": {"dataset": "vicgalle/alpaca-gpt4"},
}


class RecordData(InstructionColumns):
    """Where instruction records come from, what their columns are called, and how they become text.

    template: "alpaca", the prompt that those data sets were made for; "chat", the chat template of the model's
    tokenizer, with instruction and input as the user's turn.
    """

    dataset: str = "yahma/alpaca-cleaned"
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    data_files: str | None = None
    template: Literal["alpaca", "chat"] = "alpaca"


class PlainText(BaseModel):
    """Documents of one text column: a data set of the hub, a folder, or one .txt, .jsonl, .csv or .parquet file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str
    config: str | None = None
    split: str = "train"
    text_field: str = "text"
    revision: str | None = None
    data_files: str | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """The column that is read."""
        return (self.text_field,)


class WatchedText(PlainText):
    """A text that is not learnt from: the loss of its first `num_windows` windows of seq_len tokens is watched."""

    num_windows: Count = 8
    seq_len: Annotated[Count, Field(ge=2)] = 512


def data_read(module: Any, config: Any) -> tuple[TrainingData | WatchedText, ...]:
    """All that a plug-in reads: what it learns from, and the text whose loss it only watches."""
    return (*module.reads(config), *getattr(config, "watches", ()))


def written_out(presets: Mapping[str, Mapping[str, str]]) -> BeforeValidator:
    """A validator that puts a preset's values in the place of its name; a mapping passes."""

    def expand(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if value not in presets:
            raise ValueError(
                f"unknown data {value!r}; available: {', '.join(sorted(presets))}, or a mapping that names a dataset"
            )
        return dict(presets[value])

    return BeforeValidator(expand)


def _kind(data: Any) -> str:
    if isinstance(data, BaseModel):
        return "records" if isinstance(data, RecordData) else "text"
    telling = RecordData.model_fields.keys() - PlainText.model_fields.keys()
    names = {preset["dataset"] for preset in RECORDS.values()}
    is_records = isinstance(data, dict) and (bool(telling & data.keys()) or data.get("dataset") in names)
    return "records" if is_records else "text"


Texts = Annotated[PlainText, written_out(TEXTS)]
Watched = Annotated[WatchedText, written_out(TEXTS)]
Records = Annotated[RecordData, written_out(RECORDS)]
TextsOrRecords = Annotated[
    Annotated[PlainText, Tag("text")] | Annotated[RecordData, Tag("records")],
    Discriminator(_kind),
    written_out(TEXTS | RECORDS),
]
"""Records if a column of records or a template is named, or the data set is one of RECORDS; else documents."""

TrainingData = PlainText | RecordData
