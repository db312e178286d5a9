"""How each program loads what was exported: the lines of a model card."""

from __future__ import annotations

from collections.abc import Iterator

_FENCE = "```"


def loading_lines(*, uneven: bool) -> Iterator[str]:
    """uneven: the folder has a modelling file of ours, for its layers differ in width."""
    trust = ", trust_remote_code=True" if uneven else ""
    if uneven:
        yield (
            "The layers differ in width. Their widths stand in `config.json` under the standard `per_layer_config`; "
            "`modeling_slimline.py`, beside the weights, builds them (transformers 5.14 or newer, nothing else):\n"
        )
    yield f"{_FENCE}python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
    yield f'model = AutoModelForCausalLM.from_pretrained("<this repository>"{trust})'
    yield f'tokenizer = AutoTokenizer.from_pretrained("<this repository>")\n{_FENCE}\n'
    yield "| program | |\n| --- | --- |"
    yield "| peft | on top of the model above, as on any other |"
    known = ",trust_remote_code=True" if uneven else ""
    yield f"| lm-eval | `lm_eval --model hf --model_args pretrained=<this repository>{known} --tasks ...` |"
    if uneven:
        yield "| vLLM, SGLang, TGI | no: their classes build all layers equal |"
        yield "| llama.cpp | as GGUF of architecture `deci`, the Llama family only: `slimline export --format gguf` |"
    else:
        yield "| vLLM, SGLang, TGI | as any model of its class: its config is a stock one (not run by us) |"
        yield "| llama.cpp, Ollama | as GGUF: `slimline export --format gguf` |"
