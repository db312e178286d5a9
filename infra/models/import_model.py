"""Models as they come in: GGUF, safetensors or hub in, one plain checkpoint (safetensors, config, tokenizer) out."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from infra import hub
from infra.errors import SourceInvalid
from infra.filesystem.disk import full_disk_named
from infra.models import baichuan, gemma3, trusted_code, vocabulary
from infra.models.card import ModelCard, card_of_config, card_of_folder
from infra.models.model_files import (
    INDEX,
    WEIGHTS,
    gguf_file,
    is_left_behind,
    is_plain,
    parsed_config,
    read_config,
    tensor_header,
    weight_files,
)
from infra.progress_bars import progress_bars_hidden
from infra.sources.located import Located

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

__all__ = ["Dtype", "ModelCard", "Progress", "describe", "hand_on_tokenizer", "import_model", "load_tokenizer"]

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Progress = Callable[[float, str], None]
#: from a tensor's name and the tensor to what is stored instead
Unpack = Callable[[str, "torch.Tensor"], "dict[str, torch.Tensor]"]

log = logging.getLogger("slimline")

_PROBES = ("The capital of France is Paris.", "if a  ==  12:\n    return 345", "你好，世界。", "Ａ１ é ﬁ 🙂")


def _silent(_share: float, _message: str) -> None: ...


def describe(located: Located) -> ModelCard:
    """What a model is, from headers alone (a tenth of a second, no torch).

    Raises SourceInvalid for what could not be imported.
    """
    if located.folder is not None:
        return card_of_folder(located.folder)
    files = hub.model_files(located.repo_id, located.revision)
    weights = {name: size for name, size in files.items() if name.endswith(".safetensors")}
    config = hub.download_file(located.repo_id, "config.json", located.revision)
    if config is None:
        raise SourceInvalid(
            f"the hub's {located.repo_id} has no config.json; download its GGUF file and give its path as the model"
        )
    values = parsed_config(config.read_bytes(), f"config.json of the hub's {located.repo_id}")
    _refuse_quantised(values, located.repo_id)
    return card_of_config(values, located.repo_id, num_parameters=None, size=sum(weights.values()), dtype=None)


def import_model(
    located: Located, out: Path, dtype: Dtype, *, trust_remote_code: bool = False, progress: Progress = _silent
) -> ModelCard:
    """Write the model into `out` (an empty folder) as a plain checkpoint and return its card.

    dtype "auto" keeps every tensor as it is stored; for GGUF it means float32, which holds the dequantised values
    exactly. safetensors are read one shard at a time. Every other top-level file that is neither weight nor code comes
    along (tokenizer, plan.json). A Baichuan-7B becomes the Llama that it is, a multimodal Gemma-3 its text model.
    trust_remote_code: the tokenizer's own code comes along too, and is run here and by whoever loads the tokenizer of
    the checkpoint or of one made from it; modelling code never is (see infra/models/trusted_code.py).

    Raises SourceInvalid for pickled or quantised weights, NaN or infinity (naming the tensor), a missing tokenizer or
    one that needs code which is not trusted, a Baichuan-13B; hub.Unreachable; DiskFull.
    """
    folder = located.folder
    if folder is None:
        progress(0.0, f"downloading {located.repo_id}")
        folder = hub.download_model(located.repo_id, located.revision)
    gguf = gguf_file(folder)
    with full_disk_named(out):
        if gguf is not None:
            _import_gguf(gguf, out, "float32" if dtype == "auto" else dtype, progress)
        else:
            _import_safetensors(folder, out, dtype, progress)
            if trust_remote_code:
                trusted_code.copy_trusted_code(folder, out, located.repo_id)
    card = card_of_folder(out)
    vocabulary.fit_to_embedding_(out, located.repo_id, load_tokenizer)
    progress(1.0, f"imported {located.repo_id}")
    return card


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint folder; no network, and no foreign code but what the spec trusted.

    Raises SourceInvalid if there is none that loads and works, or none without code that is not trusted.
    """
    from transformers import AutoTokenizer

    trusted = trusted_code.is_trusted(folder)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trusted
        )
        # a wrong value in its configuration may show only now
        tokenizer.decode(tokenizer("A few words.")["input_ids"])
    except Exception as error:  # a dozen types, down to those of the Rust tokenizer
        code = trusted_code.tokenizer_code(folder)
        if code is not None and not trusted:
            raise SourceInvalid(
                f"the tokenizer in {folder} is code of its own ({trusted_code.code_file(code)}), which is "
                "not run unless the spec trusts this model: read that file and set model.trust_remote_code to true, or "
                "take a copy of the model with a stock tokenizer"
            ) from error
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SourceInvalid(
            f"{folder} has no tokenizer that loads and works ({reason}); put a good tokenizer.json or "
            "tokenizer.model beside the model"
        ) from error
    return tokenizer


def hand_on_tokenizer(source: Path, out: Path) -> None:
    """Give a checkpoint the tokenizer of the one it was made from, with the code that was trusted, and load it once.

    Raises SourceInvalid if it does not come out of its files as it went in.
    """
    tokenizer = load_tokenizer(source)
    tokenizer.save_pretrained(out)
    trusted_code.hand_on_trusted_code(source, out)
    again = load_tokenizer(out)
    for text in _PROBES:
        if again(text).input_ids != tokenizer(text).input_ids:
            raise SourceInvalid(
                f"the tokenizer of {source} splits {text!r} otherwise once transformers has saved and loaded it; save "
                "it as a fast one (tokenizer.json) beside the model that you import"
            )


def _import_gguf(file: Path, out: Path, dtype: Dtype, progress: Progress) -> None:
    from transformers import AutoTokenizer

    trusted_code.refuse_adapter(file.parent)
    with progress_bars_hidden():
        progress(0.05, f"dequantising {file.name}")
        model = _dequantised(file, dtype)
        for name, tensor in model.state_dict().items():
            assert tensor.is_floating_point(), f"{name} came out of {file} still quantised"
            _check_finite(name, tensor, file, dtype)
        progress(0.6, f"reading the tokenizer of {file.name}")
        AutoTokenizer.from_pretrained(
            str(file.parent), gguf_file=file.name, local_files_only=True, trust_remote_code=False
        ).save_pretrained(out)
        progress(0.9, "writing safetensors")
        model.save_pretrained(out)


def _dequantised(file: Path, dtype: Dtype) -> Any:
    import torch
    import transformers

    # Where GGUF kernels are installed newer transformers would leave the weights packed; older ones know no such class.
    gguf_config = getattr(transformers, "GgufConfig", None)
    options = {} if gguf_config is None else {"quantization_config": gguf_config(dequantize=True)}
    try:
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            str(file.parent),
            gguf_file=file.name,
            dtype=getattr(torch, dtype),
            local_files_only=True,
            trust_remote_code=False,
            **options,
        )
    except (ValueError, NotImplementedError, KeyError) as error:
        raise SourceInvalid(f"transformers cannot load {file}: {error}; use the model's safetensors instead") from error
    # transformers 5.23 takes what came from GGUF for quantised and refuses to save it, although it holds plain tensors.
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model


def _import_safetensors(folder: Path, out: Path, dtype: Dtype, progress: Progress) -> None:
    config = trusted_code.without_code(read_config(folder), str(folder))
    files = weight_files(folder)
    if not is_plain(files):
        _refuse_quantised(config, str(folder))
    elif config.pop("quantization_config", None):
        log.warning("%s: its quantization_config is left out, for its weights are plain floating point", folder)
    trusted_code.refuse_adapter(folder)
    for file in sorted(folder.iterdir()):
        if file.is_file() and not file.name.startswith(".") and not is_left_behind(file):
            shutil.copyfile(file, out / file.name)
    unpack: Unpack | None = None
    if baichuan.is_baichuan(config):
        config = baichuan.llama_config(config, str(folder))
        unpack = partial(baichuan.llama_tensors, vocab_size=config["vocab_size"])
        baichuan.make_llama_tokenizer_(out)
        baichuan.check_llama_tokenizer(out, load_tokenizer(out))
    elif gemma3.is_multimodal_gemma3(config):
        config, unpack = gemma3.text_config(config), gemma3.text_tensors
        gemma3.leave_image_files_(out)
    total, done = sum(file.stat().st_size for file in files), 0
    for file in files:
        progress(done / total, f"reading {file.name}")
        _cast_shard(file, out / (file.name if len(files) > 1 else WEIGHTS), dtype, unpack)
        done += file.stat().st_size
    if len(files) > 1:
        _write_index(out)
    # "torch_dtype" is what transformers before 4.56 wrote; both at once could disagree.
    config.pop("torch_dtype", None)
    config["dtype"] = card_of_folder(out).dtype
    _write_json(out / "config.json", config)


def _cast_shard(source: Path, target: Path, dtype: Dtype, unpack: Unpack | None) -> None:
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    tensor_header(source)  # says in a sentence that a file is cut off; safe_open does not
    as_stored = dtype == "auto" and unpack is None
    tensors: dict[str, torch.Tensor] = {}
    with safe_open(source, framework="pt") as shard:
        for name in shard.keys():  # noqa: SIM118 (safe_open is no mapping)
            tensor = shard.get_tensor(name)
            _check_finite(name, tensor, source, "auto")
            if dtype != "auto":
                tensor = tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor
                _check_finite(name, tensor, source, dtype)
            if not as_stored:
                tensors |= {name: tensor} if unpack is None else unpack(name, tensor)
    if as_stored:
        shutil.copyfile(source, target)
    elif tensors:
        save_file(tensors, target, metadata={"format": "pt"})


def _check_finite(name: str, tensor: torch.Tensor, file: Path, dtype: Dtype) -> None:
    if not tensor.is_floating_point() or bool(tensor.isfinite().all()):
        return
    bad = int((~tensor.isfinite()).sum())
    fault = (
        "NaN or infinite"
        if dtype == "auto"
        else f"NaN or infinite in {dtype} (float16 ends at 65504; bfloat16 does not)"
    )
    raise SourceInvalid(
        f"{file}: {bad} of the {tensor.numel()} values of {name} are {fault}; fetch the model again or choose "
        "another dtype"
    )


def _refuse_quantised(config: Mapping[str, Any], where: str) -> None:
    quantisation = config.get("quantization_config")
    if quantisation:
        method = (
            quantisation.get("quant_method", "an unnamed method") if isinstance(quantisation, dict) else quantisation
        )
        raise SourceInvalid(f"{where} is quantised ({method}); pruning needs plain weights: take the unquantised model")


def _write_index(out: Path) -> None:
    """Say which shard holds which tensor."""
    headers = {file.name: tensor_header(file) for file in sorted(out.glob("*.safetensors"))}
    spans = [entry["data_offsets"] for header in headers.values() for entry in header.values()]
    weight_map = {name: file for file, header in headers.items() for name in header}
    total = sum(end - start for start, end in spans)
    _write_json(out / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
