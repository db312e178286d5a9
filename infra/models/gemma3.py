"""A multimodal Gemma-3 as the text model in it: the decoder without the tower that looks at images.

Its text config leaves out what is as in Gemma3TextConfig, and its tensors have had two spellings. No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_IMAGES = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
#: of the checkpoints on the hub, and as transformers writes them since 4.52
_SPELLINGS = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
}
#: what may stand beside the text config, and is of the text
_OUTSIDE = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "dtype", "torch_dtype")
#: for images; a tokenizer needs none of them
_IMAGE_FILES = ("preprocessor_config.json", "processor_config.json", "image_processor_config.json")
_VOCAB_SIZE = 262208


def is_multimodal_gemma3(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of a Gemma-3 that sees images."""
    return config.get("model_type") == "gemma3" and isinstance(config.get("text_config"), dict)


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the text model."""
    outside = {name: config[name] for name in _OUTSIDE if name in config}
    text: dict[str, Any] = {"vocab_size": _VOCAB_SIZE} | outside | config["text_config"]
    return text | {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}


def text_names(name: str) -> list[str]:
    """What a tensor of the whole is called in the text model; none if it is about images."""
    if name.startswith(_IMAGES):
        return []
    for before, after in _SPELLINGS.items():
        if name.startswith(before):
            return [after + name.removeprefix(before)]
    return [name]


def text_tensors(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensor under its name in the text model; nothing if it is about images."""
    return dict.fromkeys(text_names(name), tensor)


def leave_image_files_(folder: Path) -> None:
    """Take out of an imported folder what is for images alone."""
    for name in _IMAGE_FILES:
        (folder / name).unlink(missing_ok=True)
