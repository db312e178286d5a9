"""Suites by name: the file `<name>.py` is the suite `<name>` of a spec, of cache keys and of every record.

`evaluation/suite.py` says what a suite must offer; a file whose name begins with "_" is none. Suites import every other
folder of the room, the heavy ones (torch, lm-eval) only when they measure: a run is planned without them. Start with
perplexity.py.

* perplexity.py: perplexity of texts at several window lengths
* agreement.py: divergence from the dense model on the same windows
* zero_shot.py, mmlu.py, longbench.py: tasks of lm-eval, each with the averages of its papers
"""
