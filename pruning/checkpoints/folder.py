"""What a checkpoint folder says of itself: which class it wants, whether it has weights. Nothing in it is executed."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

from pruning.errors import PruningError
from pruning.families import FAMILIES
from pruning.modeling import class_of

#: the file of a small model's weights, and the list of a larger one's
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def class_of_folder(folder: Path) -> Any:
    """The causal LM class for a checkpoint folder.

    Raises PruningError if the folder is no checkpoint of a supported family or has no safetensors.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise PruningError(f"{folder} is not a checkpoint folder: it has no config.json")
    try:
        model_type = str(json.loads(path.read_bytes()).get("model_type"))
    except (ValueError, AttributeError) as error:
        raise PruningError(f"{path} is not a model config: {error}") from error
    model_class = class_of(model_type)
    _check_weights(folder)
    return model_class


def with_own_modelling_file_(folder: Path) -> None:
    """Put our modelling file into a checkpoint folder of uneven layers, so that transformers alone can load it.

    What a model of that kind brought along as modelling code is not taken over: it need not be ours.
    """
    path = folder / "config.json"
    config: dict[str, Any] = json.loads(path.read_bytes())
    if config["model_type"] not in {family.model_types[1] for family in FAMILIES}:
        return
    model_class = class_of(config["model_type"])
    source = Path(inspect.getfile(model_class))
    shutil.copyfile(source, folder / source.name)
    classes = {"AutoConfig": model_class.config_class, "AutoModelForCausalLM": model_class}
    config["auto_map"] = {name: f"{source.stem}.{found.__name__}" for name, found in classes.items()}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _check_weights(folder: Path) -> None:
    if any(folder.glob("*.safetensors")):
        return
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickled:
        raise PruningError(
            f"{folder} has only pickled weights ({pickled[0]}), which can run code when read: "
            "convert them to safetensors"
        )
    raise PruningError(f"{folder} has no weights: no .safetensors file")
