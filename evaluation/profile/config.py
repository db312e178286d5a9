"""What to time. Importable without torch, so that a spec can hold it."""

from __future__ import annotations

from itertools import product
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, field_validator, model_validator

from evaluation.bounds import Amount, Count, Real, Seed
from evaluation.errors import EvaluationError
from evaluation.naming import did_you_mean

PRESETS: dict[str, dict[str, Any]] = {
    # arXiv 2402.02834, section 4 and its published measuring script: a prompt of 12 tokens; latency is the time of a
    # whole generation, throughput the tokens generated per second of it, averaged over 20 runs after 10 warm-up runs.
    "shortened_llama": {
        "batch_size": (1, 8, 16, 32, 64, 128, 256),
        "prompt_len": 12,
        "new_tokens": (128, 512),
        "warmup": 10,
        "runs": 20,
    },
    # arXiv 2412.18110, table 4: peak memory and latency at 512 tokens, over 50 runs. Its 13.51 ms for LLaMA-7B are the
    # time that 27 GB of float32 weights take through an A100's memory: of one decoded token, decode_ms_per_token here.
    # The length of the prompt is not printed.
    "slimgpt_table4": {"batch_size": 1, "prompt_len": 12, "new_tokens": 512, "warmup": 10, "runs": 50},
}


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


Axis = Annotated[tuple[Count, ...], BeforeValidator(_as_tuple), Field(min_length=1)]
"""One number, or several to be measured each."""


class GridPoint(BaseModel, frozen=True, extra="forbid"):
    """One combination of batch size and lengths in tokens. task: its name in reports."""

    task: str
    batch_size: int
    prompt_len: int
    new_tokens: int


class ProfileConfig(BaseModel, frozen=True, extra="forbid"):
    """A forward pass over a prompt, then greedy decoding, repeated, for every combination of the sizes asked for.

    `preset` is a short word for a paper's options; options beside it go before its own. It is written out, not kept.
    """

    preset: Literal["shortened_llama", "slimgpt_table4"] | None = Field(default=None, exclude=True)
    batch_size: Axis = (1,)
    prompt_len: Axis = (128,)
    """Random token ids of the prompt."""

    new_tokens: Axis = (32,)
    """Tokens generated: the first follows from the prompt's forward pass, each other one from a step of its own. An
    end-of-sequence token does not stop it."""

    warmup: Amount = 2
    """Runs before the timed ones."""

    runs: Count = 5
    """Timed runs."""

    attn_implementation: Literal["eager", "sdpa"] | None = None
    """None: the one that the model was loaded with."""

    compile: bool = False
    """Compile the forward pass with torch.compile; the warm-up runs take the time that this costs."""

    ratio_precision: Real = Field(default=0.01, gt=0, lt=1)
    """The models take turns until the standard error of each ratio is this share of it, ..."""

    ratio_seconds: Real = Field(default=60.0, ge=0)
    """... or until so many seconds are over, at each grid point; but at least `runs` rounds."""

    seed: Seed = 0
    """Draws the prompt."""

    @model_validator(mode="before")
    @classmethod
    def _written_out(cls, data: Any) -> Any:
        if not isinstance(data, dict) or data.get("preset") is None:
            return data
        name = data["preset"]
        if name not in PRESETS:
            hint = did_you_mean(str(name).lower().replace("-", "_"), PRESETS, most=1)
            raise ValueError(f"unknown preset {name!r}; {hint and f'{hint} '}available: {', '.join(PRESETS)}")
        return PRESETS[name] | {key: value for key, value in data.items() if key != "preset"}

    @field_validator("batch_size", "prompt_len", "new_tokens")
    @classmethod
    def _each_once(cls, values: tuple[int, ...]) -> tuple[int, ...]:
        twice = [value for value in values if values.count(value) > 1]
        if twice:
            raise ValueError(f"{twice[0]} is there twice; ask for each size once")
        return values

    @property
    def points(self) -> tuple[GridPoint, ...]:
        """All combinations, in the order given; where there is one, its task is called "profile"."""
        sizes = list(product(self.batch_size, self.prompt_len, self.new_tokens))
        return tuple(
            GridPoint(
                task="profile" if len(sizes) == 1 else f"profile b{batch} p{prompt} n{new}",
                batch_size=batch,
                prompt_len=prompt,
                new_tokens=new,
            )
            for batch, prompt, new in sizes
        )

    def check_lengths(self, max_position_embeddings: int | None) -> None:
        """Raise EvaluationError if the model has too few positions for prompt and new tokens; None: not known."""
        _check_lengths(max(self.prompt_len), max(self.new_tokens), max_position_embeddings)


class FileProfileConfig(BaseModel, frozen=True, extra="forbid"):
    """How llama.cpp is timed with a GGUF file: a prompt, then greedy decoding, repeated."""

    prompt_len: Count = 128
    """Tokens of the prompt."""

    new_tokens: Count = 64
    """Tokens generated."""

    warmup: Amount = 1
    """Runs before the timed ones."""

    runs: Count = 5
    """Timed runs."""

    def check_lengths(self, max_position_embeddings: int | None) -> None:
        """As that of ProfileConfig."""
        _check_lengths(self.prompt_len, self.new_tokens, max_position_embeddings)


def _check_lengths(prompt: int, new: int, longest: int | None) -> None:
    if longest is not None and prompt + new > longest:
        raise EvaluationError(
            f"prompt_len {prompt} + new_tokens {new} is more than the model's max_position_embeddings of {longest}; "
            "shorten one of them"
        )
