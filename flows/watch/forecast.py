"""How long a stage will take: the median of how long stages of its kind took, of the same model if there are any."""

from __future__ import annotations

import re
from collections.abc import Iterable
from statistics import median

from infra.errors import ResultsUnusable
from infra.results.store import ResultsStore

_EARLIER = """
SELECT s.stage_key, max(r.spec->>'$.model.id') AS model, max(s.seconds) AS seconds
FROM stages AS s JOIN runs AS r USING (run_key)
WHERE s.seconds IS NOT NULL AND s.status IN ('completed', 'cached')
GROUP BY s.stage_key
"""


class Timings:
    """Seconds that stages took before, by key, and by kind ("prune-slimgpt") and model."""

    def __init__(self, earlier: Iterable[tuple[str, str | None, float]]) -> None:
        """earlier: (stage key, model id, seconds)."""
        self._by_key: dict[str, float] = {}
        kinds: dict[tuple[str, str | None], list[float]] = {}
        for key, model, seconds in earlier:
            self._by_key[key] = seconds
            kinds.setdefault((_kind(key), model), []).append(seconds)
            kinds.setdefault((_kind(key), None), []).append(seconds)
        self._by_kind = {kind: median(seconds) for kind, seconds in kinds.items()}

    def expected(self, key: str, model: str) -> float | None:
        """Seconds; None if nothing of the kind was ever timed."""
        kind = _kind(key)
        ways = (self._by_key.get(key), self._by_kind.get((kind, model)), self._by_kind.get((kind, None)))
        return next((seconds for seconds in ways if seconds is not None), None)


def recorded_timings(results: ResultsStore) -> Timings:
    """Those of all recorded runs; none if the results store cannot be read."""
    try:
        return Timings(results.select(_EARLIER).rows)
    except ResultsUnusable:
        return Timings(())


def _kind(key: str) -> str:
    """Of a key without its version and its digest."""
    return re.sub(r"-v\d+-[^-]*$", "", key)
