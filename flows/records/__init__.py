"""What recorded runs say: reads DuckDB and the artifact store, for the command line. Read lookup.py first.

* lookup.py: a run or a night by its key, id or name.
* tables.py: results as text, markdown, JSON, CSV; the protocol lines under them. render.py: markdown and CSV.
* answers.py: what an SQL question gave, as text.
* compare.py: two checkpoints item by item. compare_tables.py: that as tables. protocol_diff.py: what was measured
  otherwise.
* report/: the tables of the papers. figures/: their figures, and others. page/: one HTML page of all checkpoints.
* export/: evaluations in the formats of other tools.
* retention.py: which artifacts recorded runs need. verify.py: whether the store still has them whole.

May import tasks, evaluation, infra and the plain types of pruning, not flows.run.
"""
