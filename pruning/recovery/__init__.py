"""Training a pruned model back to health: one file per way, and its name is what a spec asks for.

* `lora`          adapters on instruction records, merged at the end; start here
* `cpt`           continued pretraining of all parameters on running text
* `distill`       the divergence from the dense model minimised, on text or records
* `reconstruct`   the same on the calibration windows alone, block by block, end to end, or both

Each way has VERSION, NEEDS, Config, reads, check_model, scratch_bytes and recover; the
contract is in `RecoveryInputs` and `RecoveryReport`. The files are found by `infra.registry`. Importing one imports
neither torch nor peft.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict

from pruning.training.options import Curves

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pruning.calibration import CalibrationSet
    from pruning.plan import PruningPlan

Need = Literal["teacher", "calibration"]
"""The dense model, and the windows that the model was pruned with."""


@dataclass(frozen=True)
class RecoveryInputs:
    """What a recovery reads besides the model; what it does not need is not looked at.

    texts: documents of its data set in a seeded order, each call from the first on. records: instruction records with
    the text columns that its data names. watched: documents, in their order, whose loss is only watched. identity: of
    the data it learns from, in a word. teacher: loads the dense model on the CPU.
    calibration: the windows that the model was pruned with. plan: which layers of the teacher the model still has,
    None for all.
    """

    texts: Callable[[], Iterator[str]] | None = None
    records: Sequence[Mapping[str, str]] | None = None
    watched: Callable[[], Iterator[str]] | None = None
    identity: str = ""
    teacher: Callable[[], PreTrainedModel] | None = None
    teacher_tokenizer: Callable[[], PreTrainedTokenizerBase] | None = None
    calibration: CalibrationSet | None = None
    plan: PruningPlan | None = None


class RecoveryReport(BaseModel):
    """What a training run did.

    curves: by metric, (optimizer step, value): train_loss (nats per predicted token of that step's batch),
    heldout_loss, watched_loss (of another text, nats per token), learning_rate, grad_norm, tokens_per_second.
    num_examples: windows or records trained on. num_tokens: tokens in one pass over them, prompts included. kept_step:
    whose weights were kept. adapter: whether adapter/ in the checkpoint's folder holds what was merged into it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    curves: Curves
    num_steps: int
    num_examples: int
    num_tokens: int
    kept_step: int
    final_loss: float
    adapter: bool = False
