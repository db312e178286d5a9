"""Figures as files: what stands in one, and how it is drawn. Who has the numbers says what to show: no runs in here.

It lies in infra because flows (`slimline figure`) and tasks (images in MLflow) both draw. Read panels.py first.
panels.py  Drawing: panels with curves or a heat map, and the notes under them; imports no matplotlib
text.py    texts of one line, wrapped or cut
draw.py    from a Drawing to SVG, PNG or PDF, the same bytes for the same numbers; the only importer of matplotlib
"""
