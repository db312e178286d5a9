"""Rows through a model: in batches as large as memory takes, over copies of the model if there are any.

Imports `evaluation.errors` alone. Read batches.py first: every measurement goes through its `run_batches`.

* options.py: EvalOptions and Progress, without torch
* batches.py, oom.py, replicas.py: batches by length, what to do when memory runs out, copies in other processes
* loglikelihood.py, shared_prefix.py: scores of given answers; prompts that begin alike are run once
* generate.py, prompts.py: answers that a model writes, and prompts cut to its context; dialogue.py: a talk, streamed
* logits.py: next-token logits within a memory cap
* eval_mode.py, global_state.py: models and process-wide state, changed for a while and put back
"""
