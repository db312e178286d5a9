"""Checkpoint folders of pruned models: plain safetensors that `from_pretrained` can load.

Equal widths are saved as the stock class. Different widths are saved under our own model_type with `per_layer_config`;
the modelling file lies beside the weights and `auto_map` names it, so that transformers alone loads the folder with
trust_remote_code=True. `load_checkpoint` uses the classes of this package and never executes code found in a folder.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from pruning.checkpoints.meta_model import NothingDrawn
from pruning.checkpoints.stored_tensors import StoredTensors, stored_tensors
from pruning.errors import PruningError
from pruning.families import shapes
from pruning.modeling import config_shapes
from pruning.plan import PruningPlan, describe_shapes

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PLAN_FILE = "plan.json"
MAX_SHARD_SIZE = "5GB"


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
    with no_progress_bars():
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

    Raises PruningError if the folder is no whole checkpoint of a supported family (see `stored_tensors`) or a file
    cannot be read.
    """
    if device is not None and device_map is not None:
        raise PruningError(f"give device ({device}) or device_map ({device_map}), not both")
    stored = stored_tensors(Path(folder))
    model = _from_pretrained(stored, dtype=dtype or stored.dtype, device_map=device_map)
    return model if device is None else model.to(device)


@contextmanager
def checkpoint_on_disk(stored: StoredTensors, dtype: torch.dtype) -> Iterator[PreTrainedModel]:
    """The model of a checkpoint folder as `load_checkpoint` would give it, on the CPU, but with its weights left in the
    files: each is read when a forward comes to it and dropped again. It lasts as long as the block.

    In memory: the largest single weight. Raises PruningError for a file that cannot be read.
    """
    with tempfile.TemporaryDirectory() as nothing:  # safetensors are read where they lie
        with _without_notice(), NothingDrawn():
            options = {"device_map": _weights_on_disk(stored), "offload_folder": nothing}
            model = _from_pretrained(stored, dtype=dtype, **options)
        yield model


@contextmanager
def _without_notice() -> Iterator[None]:
    """accelerate warns of every model whose weights are left on the disk; here that is what was asked for."""

    def other(record: logging.LogRecord) -> bool:
        return "offloaded to" not in record.getMessage()

    logger = logging.getLogger("accelerate.big_modeling")
    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)


def _weights_on_disk(stored: StoredTensors) -> dict[str, str]:
    """A device map: what is large on the disk; norms, positions and rotary tables in memory."""
    family = stored.family
    device_map = dict.fromkeys((family.layers_path, family.embeddings_path, family.head_path), "disk")
    parts = {name.rpartition(".")[0] for name in stored.places if not name.startswith(f"{family.layers_path}.")}
    for part in (*sorted(parts), *([family.rotary_path] if family.rotary_path else [])):
        device_map.setdefault(part, "cpu")
    return device_map


def _from_pretrained(stored: StoredTensors, **options: Any) -> PreTrainedModel:
    try:
        with no_progress_bars():
            loaded: tuple[PreTrainedModel, dict[str, Any]] = stored.model_class.from_pretrained(
                stored.folder,
                config=stored.config,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                **options,
            )
    except (SafetensorError, OSError, RuntimeError) as error:
        raise PruningError(f"cannot load the weights in {stored.folder}: {error}") from error
    model, info = loaded
    wrong = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    assert not wrong, f"transformers finds no weight for {wrong} in {stored.folder}"
    return model


def load_plan(folder: Path | str) -> PruningPlan | None:
    """The plan beside a checkpoint, None if it was saved without one."""
    path = Path(folder) / PLAN_FILE
    return PruningPlan.model_validate_json(path.read_bytes()) if path.is_file() else None


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Libraries do not draw bars; the switch of transformers is global, so it is put back."""
    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()
