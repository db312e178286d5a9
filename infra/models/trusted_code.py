"""Code that comes with a model: none of it is run, unless the spec trusts that one model: then its tokenizer's.

The decoder is always transformers' own class for the model's architecture (or ours, for uneven layers): modelling code
in a model's folder is not run in any case and does not come along. What may be needed is a tokenizer's code.

The tokenizer of a folder is trusted if there is a note of its code that slimline itself wrote; a note that a model
brings along is not copied. It names each file with its hash: code that was changed since is not run.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from infra.errors import SourceInvalid
from infra.filesystem.disk import digest

NOTE = "trusted_code.json"

#: settings of how transformers computes; a hub repository named in one of them makes it download kernels and run them
_HOW_NOT_WHAT = (
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "experts_implementation",
)

log = logging.getLogger("slimline")


class TrustedCode(BaseModel):
    """The note: file name -> sha256 (hex) of the code that a spec trusted."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    files: dict[str, str]


def tokenizer_code(folder: Path) -> str | None:
    """The class of its own that a folder's tokenizer names ("tokenization_x.XTokenizer"), None for a stock one."""
    try:
        config = json.loads((folder / "tokenizer_config.json").read_bytes())
    except OSError:
        return None
    except ValueError as error:
        raise SourceInvalid(f"{folder}/tokenizer_config.json is not JSON ({error}); fetch it again") from error
    auto_map = config.get("auto_map") if isinstance(config, dict) else None
    named = auto_map.get("AutoTokenizer") if isinstance(auto_map, dict) else auto_map
    entries = named if isinstance(named, list) else [named]
    return next((str(entry) for entry in reversed(entries) if entry), None)


def code_file(reference: str) -> str:
    """The file in which a class lies that is named "tokenization_x.XTokenizer"."""
    return f"{reference.partition('.')[0]}.py"


def copy_trusted_code(folder: Path, out: Path, repo_id: str) -> None:
    """Let the code of a tokenizer that the spec trusts travel into an artifact, with the note that says so.

    Raises SourceInvalid if it lies in another repository or elsewhere: what is trusted is this model's content.
    """
    reference = tokenizer_code(folder)
    if reference is None:
        log.warning("model.trust_remote_code is true, but the tokenizer of %s has no code of its own", repo_id)
        return
    main = folder / code_file(reference)
    if "--" in reference or main.parent != folder or not main.is_file():
        raise SourceInvalid(
            f"the tokenizer of {repo_id} is the class {reference}, whose code does not lie beside it; put the file "
            f"into a folder with the rest of the model, name it in tokenizer_config.json and give the folder's path"
        )
    names = sorted(_with_imports(main, folder))
    for name in names:
        shutil.copyfile(folder / name, out / name)
    note = TrustedCode(files={name: digest(out / name) for name in names})
    (out / NOTE).write_text(note.model_dump_json(indent=1), encoding="utf-8")


def hand_on_trusted_code(source: Path, out: Path) -> None:
    """Give a checkpoint that was made from another one the trusted code of its tokenizer, if there is any."""
    note = _note(source)
    for name in (*note.files, NOTE) if note else ():
        shutil.copyfile(source / name, out / name)


def is_trusted(folder: Path) -> bool:
    """Whether the tokenizer in this folder may run its code. Raises SourceInvalid if it is not what was trusted."""
    note = _note(folder)
    for name, content in note.files.items() if note else ():
        if not (folder / name).is_file() or digest(folder / name) != content:
            raise SourceInvalid(f"{folder / name} is not the code that the spec trusted; import the model again")
    return note is not None


def without_code(config: Mapping[str, Any], repo_id: str) -> dict[str, Any]:
    """config.json without what would make transformers run code (classes of its own, and kernels by name), and without
    a quantisation that is none."""
    named = config.get("auto_map")
    if isinstance(named, dict) and "AutoModelForCausalLM" in named:
        log.info("%s has modelling code of its own: not run, it is computed as %s", repo_id, config.get("model_type"))
    left_out = {"auto_map", *_HOW_NOT_WHAT}
    if _is_switched_off(config.get("quantization_config")):
        left_out.add("quantization_config")
    return {key: value for key, value in config.items() if key not in left_out}


def _is_switched_off(quantisation: Any) -> bool:
    """Whether a quantization_config is empty or says no to each of its ways, as fine-tuning tools write it."""
    if isinstance(quantisation, dict) and not quantisation.get("quant_method"):
        return not any(quantisation.get(way) for way in ("load_in_4bit", "load_in_8bit", "bits"))
    return not quantisation


def refuse_adapter(folder: Path) -> None:
    """Raise SourceInvalid for a folder that transformers would take for an adapter of some other model."""
    if (folder / "adapter_config.json").exists():
        raise SourceInvalid(
            f"{folder} has an adapter_config.json, which makes transformers load another model and put an adapter on "
            "it; merge the two, or take that file out of a copy of the folder"
        )


def _with_imports(main: Path, folder: Path) -> set[str]:
    """Names of a module's file and of the files beside it that it imports, by `from .other import X`."""
    from transformers.dynamic_module_utils import get_relative_import_files

    files = {main, *map(Path, get_relative_import_files(main))}
    return {file.name for file in files if file.parent == folder and file.is_file()}


def _note(folder: Path) -> TrustedCode | None:
    try:
        return TrustedCode.model_validate_json((folder / NOTE).read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise SourceInvalid(f"{folder / NOTE} cannot be read; import the model again") from error
