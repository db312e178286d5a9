"""A checkpoint of the store as a Hugging Face folder: transformers, peft, lm-eval, vLLM and the hub take it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from tasks.exporting.publishing import written_aside

#: what the tokenizer's loader noted of its own call, and no other loader should find
_OF_THE_CALL = ("is_local", "local_files_only", "name_or_path")


def export_hf_folder(
    checkpoint: Path, out: Path, texts: Mapping[str, str], along: Sequence[Path], *, stock: bool = False
) -> None:
    """Write the checkpoint in the folder `checkpoint` as the folder `out`, which is new or empty.

    texts: further files by their names in `out` (a model card, results). along: files that are copied beside it
    (licences). stock: refuse what needs a modelling file of ours. It is loaded once, with equal logits, before `out`
    is there. Raises PruningError, InfraError.
    """
    from infra.models.import_model import hand_on_tokenizer
    from pruning.checkpoints.plain_folder import check_stock, write_plain_folder

    if stock:
        check_stock(checkpoint)
    with written_aside(out) as folder:
        write_plain_folder(checkpoint, folder)
        hand_on_tokenizer(checkpoint, folder)
        _make_plain_(folder / "tokenizer_config.json")
        for file in along:
            shutil.copyfile(file, folder / file.name)
        for name, text in texts.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")


def _make_plain_(file: Path) -> None:
    values = json.loads(file.read_bytes())
    kept = {name: value for name, value in values.items() if name not in _OF_THE_CALL}
    if kept.get("tokenizer_class") == "TokenizersBackend":
        kept["tokenizer_class"] = "PreTrainedTokenizerFast"  # the same class, by the name that transformers 4 knows too
    file.write_text(json.dumps(kept, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
