"""Models of any format in, one plain checkpoint out. May import infra.filesystem, infra.sources and infra.hub.

Read import_model.py first. torch and transformers are imported inside functions: `plan` needs neither.
import_model.py  GGUF, safetensors or hub -> safetensors, config, tokenizer
model_files.py   the files of a model's folder: config, weights, what their headers say
card.py          what a model is, from these headers: ModelCard
gguf_header.py   the header of a GGUF file, without the weights
baichuan.py      Baichuan-7B as the Llama that it is
gemma3.py        a multimodal Gemma-3 as the text model in it
vocabulary.py    tokens that a tokenizer has and its model has no embedding for
trusted_code.py  code that comes with a model: none is run but a trusted tokenizer's
licence.py       under which licence it came
"""
