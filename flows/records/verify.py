"""Whether the artifacts of some runs, or all of the store, are still as they were written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flows.records.lookup import find_run
from flows.records.retention import finished_artifacts
from infra.artifacts.claims import claims_frozen, live_claims
from infra.artifacts.inventory import Finding, broken, litter, stored
from infra.artifacts.store import ArtifactRef, ArtifactStore

if TYPE_CHECKING:
    from infra.settings import Settings


@dataclass(frozen=True)
class Verification:
    """How much was read, and what is wrong. litter: files that belong to no artifact, of the whole store only."""

    num_artifacts: int
    num_bytes: int
    broken: tuple[Finding, ...]
    litter: tuple[Finding, ...]

    def as_json(self) -> dict[str, Any]:
        """The same as plain data."""
        return {
            "artifacts": self.num_artifacts,
            "bytes": self.num_bytes,
            "broken": [_plain(finding) for finding in self.broken],
            "litter": [_plain(finding) for finding in self.litter],
        }


def verify_artifacts(
    settings: Settings, runs: Sequence[str], total: Callable[[int], None], read: Callable[[int], None]
) -> Verification:
    """Read the artifacts of the runs (by key or name), or of the whole store.

    total: called with the number of bytes to read. read: with how many more were read. Raises SpecError for an unknown
    run.
    """
    store = ArtifactStore(settings.store_root)
    wanted = _refs_of(settings, runs)
    sizes = {each.ref: each.bytes for each in stored(store) if not runs or each.ref in wanted}
    missing = [ref for ref in wanted if ref not in sizes]
    total(sum(sizes.values()))
    problems = [Finding(store.root / ref.kind / ref.key, "is not in the store", ref) for ref in missing]
    problems += broken(store, sizes, read)
    return Verification(len(sizes), sum(sizes.values()), tuple(problems), tuple(() if runs else litter(store)))


def remove_broken(store: ArtifactStore, finding: Finding) -> bool:
    """Remove a broken artifact, so that the next run makes it again; only its foreign files, if nothing else is wrong.

    False if a run at work needs the artifact or another process holds it.
    """
    assert finding.ref is not None
    with store.trash() as trash, claims_frozen(store.root):
        if any(finding.ref in claim.refs for claim in live_claims(store.root)):
            return False
        if not finding.foreign:
            return store.discard(finding.ref, trash)
        for path in finding.foreign:
            path.unlink(missing_ok=True)
        return True


def _refs_of(settings: Settings, runs: Sequence[str]) -> tuple[ArtifactRef, ...]:
    if not runs:
        return ()
    from infra.results.store import ResultsStore

    results = ResultsStore.of(settings)
    keys = [find_run(results, name).run_key for name in runs]
    return tuple(dict.fromkeys(ref for key in keys for ref in finished_artifacts(results, key)))


def _plain(finding: Finding) -> dict[str, Any]:
    return {"path": str(finding.path), "problem": finding.problem, "key": finding.ref and finding.ref.key}
