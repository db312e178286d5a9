"""Checkpoint folders of pruned models: plain safetensors that `from_pretrained` can load.

Equal widths are saved as the stock class. Different widths are saved under our own model_type with `per_layer_config`;
the modelling file lies beside the weights and `auto_map` names it, so that transformers alone loads the folder with
trust_remote_code=True. `load_checkpoint` uses the classes of this package and never executes code found in a folder.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from pruning.errors import PruningError
from pruning.families import shapes
from pruning.folders import class_of_folder
from pruning.modeling import config_shapes
from pruning.plan import PruningPlan, describe_shapes

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PLAN_FILE = "plan.json"
MAX_SHARD_SIZE = "5GB"

#: transformers sets process-wide state (the default dtype, progress bars) while it loads a model
_loading = threading.Lock()


def save_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path | str,
    plan: PruningPlan | None = None,
    *,
    max_shard_size: str = MAX_SHARD_SIZE,
) -> None:
    """Write model (and tokenizer, and plan as plan.json) into `folder`, which is made if needed.

    plan: how the model came from its original, for the reader; it is not needed to load the folder.
    Raises PruningError for an unsupported model.
    """
    promised, actual = config_shapes(model.config), shapes(model)
    assert promised == actual, f"config says {describe_shapes(promised)}, weights {describe_shapes(actual)}"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with _no_progress_bars():
        model.save_pretrained(folder, max_shard_size=max_shard_size)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if plan is not None:
        (folder / PLAN_FILE).write_text(plan.model_dump_json(), encoding="utf-8")


def load_checkpoint(
    folder: Path | str,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    device_map: Any = None,
) -> PreTrainedModel:
    """Load a checkpoint folder, pruned or dense, as its stock or uneven class, in eval mode.

    dtype: None keeps the dtype it was saved in. device: where to put it (CPU if None). device_map: as in transformers,
    for models too large for one device; not together with device.

    Raises PruningError if the folder is no checkpoint of a supported family, has only pickled weights, or lacks or
    damages a weight.
    """
    if device is not None and device_map is not None:
        raise PruningError(f"give device ({device}) or device_map ({device_map}), not both")
    folder = Path(folder)
    model_class = class_of_folder(folder)
    try:
        with _no_progress_bars():
            loaded: tuple[PreTrainedModel, dict[str, Any]] = model_class.from_pretrained(
                folder,
                dtype=dtype or "auto",
                device_map=device_map,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except (SafetensorError, OSError, RuntimeError) as error:
        raise PruningError(f"cannot load the weights in {folder}: {error}") from error
    model, info = loaded
    if wrong := sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"]):
        raise PruningError(f"{folder} lacks or misshapes {len(wrong)} weights, the first is {wrong[0]}: save it again")
    return model if device is None else model.to(device)


def load_plan(folder: Path | str) -> PruningPlan | None:
    """The plan beside a checkpoint, None if it was saved without one."""
    path = Path(folder) / PLAN_FILE
    return PruningPlan.model_validate_json(path.read_bytes()) if path.is_file() else None


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Libraries do not draw bars; the switch of transformers is global, so it is put back."""
    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()
