"""Figures from whatever the results store holds: those of the papers, and what nights and plans look like.

Read catalogue.py first.
* catalogue.py: which figures there are, and which spec fills each.
* inputs.py: what is recorded, read once: checkpoints, layers, curves, names for them; the protocol under a figure.
* layers.py (slimgpt-2, slimgpt-4), calibration.py (slimgpt-3), training.py (slimgpt-5), pareto.py, kept.py, blocks.py,
  history.py: from that to what is drawn.

How it is drawn is in infra/figures. May import flows.records, tasks.recording, pruning's plans and orders, and infra.
"""
