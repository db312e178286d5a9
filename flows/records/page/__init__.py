"""One HTML file with every checkpoint: sort, filter, compare, Pareto chart, lineage; works without network.

* content.py: from the results store to the content of a page. Read it first.
* encode.py: its parts as plain data.
* checkpoints.py: the checkpoints, each once, how each was made, what is kept of its layers.
* columns.py: their figures, a column for each name and protocol.
* significance.py: the verdicts between two checkpoints, from recorded pairs and from samples in the store.
* nights.py: a night: its lines, what changed, its history.
* document.py: the file: content as JSON, our script and style, Plotly; the only importer of plotly.
* assets/: what runs in the browser, in the order in which document.py names it; state.js first.

May import the rest of flows.records, flows.errors, tasks, evaluation and infra.
"""
