"""Claims: what a running run counts on, so that nobody clears it away meanwhile.

A claim is a pair of files in `<root>/.claims`: `<id>.json` says which artifacts, `<id>.lock` is held as long as the
process lives. The kernel frees the lock of a dead process, so its claim is void however it died.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from pydantic import AwareDatetime, BaseModel, ConfigDict, ValidationError

from infra.artifacts.store import ArtifactRef
from infra.errors import StoreInUse
from infra.filesystem.disk import make_folder, write_durably
from infra.filesystem.locks import flocked


class Claim(BaseModel):
    """Who counts on which artifacts. `holder` is for people: a run key, or what somebody is doing."""

    model_config = ConfigDict(frozen=True)
    holder: str
    process: int
    claimed_at: AwareDatetime
    refs: tuple[ArtifactRef, ...]


@contextmanager
def claimed(root: Path, refs: Iterable[ArtifactRef], holder: str) -> Iterator[None]:
    """Keep the artifacts, made or still to be made, from being cleared away until the block ends or the process dies.

    root: of the store. Waits while somebody clears up, which is a matter of moments. Raises StoreUnwritable, DiskFull.
    """
    claim = Claim(holder=holder, process=os.getpid(), claimed_at=datetime.now(UTC), refs=tuple(dict.fromkeys(refs)))
    path = _folder(root) / f"{secrets.token_hex(8)}.json"
    lock = path.with_suffix(".lock")
    with flocked(lock):
        with claims_frozen(root):
            write_durably(path, claim.model_dump_json(indent=1).encode())
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            lock.unlink(missing_ok=True)


@contextmanager
def claims_frozen(root: Path) -> Iterator[None]:
    """While the block runs no new claim is made: what nobody claims now can be cleared away."""
    with flocked(_folder(root) / ".settled"):
        yield


def live_claims(root: Path) -> tuple[Claim, ...]:
    """The claims of living processes; those of dead ones are removed. To be asked while `claims_frozen`.

    Raises StoreInUse if one cannot be read.
    """
    found = []
    for lock in sorted(_folder(root).glob("*.lock")):
        path = lock.with_suffix(".json")
        with flocked(lock, wait=False) as dead:
            if dead:
                path.unlink(missing_ok=True)
                lock.unlink(missing_ok=True)
            elif (claim := _read(path)) is not None:
                found.append(claim)
    return tuple(found)


def _read(path: Path) -> Claim | None:
    """None for one that is still being made (it waits for us) or that has just been given up."""
    try:
        return Claim.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise StoreInUse(f"the claim {path} of a running process cannot be read; wait until it has ended") from error


def _folder(root: Path) -> Path:
    return make_folder(root / ".claims")
