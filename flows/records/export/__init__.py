"""What a run measured, in the formats of other tools: a file for each checkpoint. Read write.py first.

* write.py: which formats there are; names of files, and JSON that every parser reads.
* evaluated.py: one checkpoint with the figures of its evaluations, as both formats take it.
* lm_eval_results.py: as lm-eval writes its results_*.json.
* every_eval_ever.py: the format of the Every Eval Ever collection.

May import the rest of flows.records, flows.errors and infra.
"""
