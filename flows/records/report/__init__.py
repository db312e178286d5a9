"""Tables as papers print them, from whatever the results store holds. Read papers.py first.

* papers.py: which tables there are: what stands in them, and which spec fills them.
* entries.py: the checkpoints that are recorded, each with its figures.
* build.py: from entries to sections, a table each, with the published figures that may stand beside ours.
* protocol.py: how the figures of a section were taken.
* draw.py: the whole as markdown, CSV, LaTeX, HTML.

May import the rest of flows.records, flows.errors, evaluation and infra.
"""
