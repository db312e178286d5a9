"""A repository that was found, and what it is called in a cache key."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from infra.hub import RepoType
from infra.sources.fingerprints import fingerprint
from infra.sources.safe_names import check_card

LOCAL_PATH = "local path"


@dataclass(frozen=True)
class Located:
    """A repository that was found: in `folder` (which may be a single file), or on the hub if that is None."""

    repo_id: str
    repo_type: RepoType
    folder: Path | None
    revision: str | None
    mirror: str  # a word for logs: "hub", "offline default", "local path" or the mirror's folder
    memo: Path | None = field(default=None, repr=False, compare=False)

    @cached_property
    def identity(self) -> dict[str, str]:
        """What enters a cache key: id and commit for the hub, content for a folder; never a path."""
        if self.folder is None:
            assert self.revision is not None, "a hub repository is found with its commit"
            return {"repo_id": self.repo_id, "revision": self.revision}
        content = fingerprint(self.folder, self.memo)
        return {"content": content} if self.mirror == LOCAL_PATH else {"repo_id": self.repo_id, "content": content}


def named_by_content(located: Located, home: Path) -> Path:
    """A symbolic link to a located folder, named after its content; made once, replaced if it points elsewhere."""
    assert located.folder is not None, "the hub has no folder"
    if located.folder.is_dir():
        check_card(located.folder, located.repo_id)
    target = located.folder.resolve()
    link = home / "cache" / "by-content" / f"{located.identity['content'][:16]}-{target.name}"
    if link.is_symlink() and link.resolve() == target:
        return link
    link.parent.mkdir(parents=True, exist_ok=True)
    aside = link.with_name(f".{link.name}.{uuid.uuid4().hex[:8]}")
    aside.symlink_to(target)
    aside.replace(link)
    return link
