"""A night: every cell of a matrix of models, methods, sparsities and recoveries, then one verdict on the whole.

nightly.py      the Prefect flow; read it first: cells as sub-runs, comparison, gates, record, artifact
regressions.py  figures against those of the last good night (paired tests, z tests), and the gates applied to them
headlines.py    its first three lines: what got worse, what failed, what is new; of a result or of recorded rows
outcome.py      the result types, and NightFailed, which the command line turns into an exit code
summary.py      the same result as markdown and for a terminal

The matrix itself is flows/spec/night.py; a cell is a run of flows/run/compress.py. May import flows.run, flows.spec,
flows.runtime, tasks, and what those may; nothing but flows.serve and flows.commands imports this folder.
"""
