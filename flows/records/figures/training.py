"""SlimGPT's figure 5: losses while tuning."""

from __future__ import annotations

from flows.records.figures.inputs import Recorded, labels_of, protocol_of
from infra.figures.panels import Drawing, in_rows
from tasks.recording.images import LOSSES, loss_panel


def losses(recorded: Recorded) -> Drawing | None:
    """A panel per training with its training, held-out and watched loss by optimizer step."""
    entries = recorded.entries(lambda entry: entry.row.action != "import")
    curves = recorded.curves(entries)
    trained = [e for e in entries if any(point.metric in LOSSES for point in curves.get(e.row.checkpoint_key, ()))]
    if not trained:
        return None
    panels = [loss_panel(label, curves[key]) for key, label in labels_of(trained).items()]
    notes = (
        "training loss: at each optimizer step, before it; held-out: of examples that are not trained on; watched: of "
        "another text",
        *protocol_of(trained),
    )
    return Drawing("Loss while tuning", in_rows(panels, 2), notes)
