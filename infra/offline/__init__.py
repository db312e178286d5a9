"""The offline default: a mirror built from installed wheels. May import infra.filesystem,
infra.overlap and infra.hub's types.

Read default.py first: the recipes by repository id.
default.py       OfflineDefault: builds a repository when it is first asked for
repository.py    writes a data set as on the hub: parquet and a README with its configs
models.py        SmolLM2-135M-Instruct, and a tiny random Llama
texts.py         news to calibrate on, Wikipedia to measure perplexity on
wikitext.py      prose out of Wikipedia's markup
questions.py     the items of lm-eval's zero-shot tasks
instructions.py  records to recover on
"""
