"""`slimline verify`, `slimline gc`, `slimline import`: commands on the artifact store."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.commands.app import AsJson, app, prepared
from flows.errors import SpecError
from flows.runtime.prefect_access import cache_records

if TYPE_CHECKING:
    from infra.artifacts.garbage import Clearing

Runs = Annotated[list[str] | None, typer.Argument(metavar="[RUN]...", help="Run keys or spec names; default: all.")]
Run = Annotated[str, typer.Argument(metavar="RUN", help="Run key or spec name (its newest run).")]


@app.command()
def verify(
    runs: Runs = None,
    remove: Annotated[bool, typer.Option("--remove", help="Take out what is broken, to be remade.")] = False,
    as_json: AsJson = False,
) -> None:
    """Read every artifact and compare it with the hashes of when it was written; exit code 2 if one is broken."""
    settings = prepared()
    from flows.records.verify import remove_broken, verify_artifacts
    from infra.artifacts.store import ArtifactStore

    store = ArtifactStore(settings.store_root)
    with progress_bar("verify") as (total, read):
        report = verify_artifacts(settings, runs or (), total, read)
    for finding in (*report.broken, *report.litter):
        print(f"{'BROKEN' if finding.ref else 'litter'} {finding.path}: {finding.problem}")
    left = [finding for finding in report.broken if not (remove and remove_broken(store, finding))]
    print(f"{report.num_artifacts} artifacts read ({in_units(report.num_bytes)}), {len(report.broken)} broken")
    if report.broken and remove:
        print(f"{len(report.broken) - len(left)} taken out; run their specs again (slimline retry RUN) to remake them")
    if as_json:
        print(json.dumps(report.as_json() | {"left": [str(finding.path) for finding in left]}))
    if left:
        way_out = "in use: try again when no run is on" if remove else "take them out with `slimline verify --remove`"
        raise SpecError(f"{len(left)} artifacts in {store.root} are broken and {way_out}; the next run remakes them")


@app.command()
def gc(
    keep_last: Annotated[
        int | None, typer.Option(min=0, help="Keep the newest N runs per name, and those of the newest N nights.")
    ] = None,
    keep: Annotated[list[str], typer.Option(metavar="RUN", help="Keep this run too; repeatable.")] = [],
    older_than: Annotated[
        str, typer.Option(metavar="AGE", help="Keep what changed later than this ago: 90s, 30m, 12h, 2d.")
    ] = "1d",
    delete: Annotated[bool, typer.Option("--delete", help="Really delete; otherwise it is only listed.")] = False,
    as_json: AsJson = False,
) -> None:
    """List, or delete, what no kept run needs; without --keep-last every recorded run is kept."""
    settings = prepared()
    from flows.records.retention import check_kept, kept_artifacts
    from infra.artifacts.garbage import clear, survey
    from infra.artifacts.store import ArtifactStore
    from infra.results.store import ResultsStore

    results, store, age = ResultsStore.of(settings), ArtifactStore(settings.store_root), _age(older_than)
    check_kept(results, keep_last=keep_last, keep=keep, delete=delete)
    wanted = partial(kept_artifacts, results, keep_last=keep_last, keep=keep)
    clearing = clear(store, wanted, age, records=cache_records()) if delete else survey(store, wanted, age)
    _print_clearing(clearing, delete)
    if as_json:
        print(json.dumps(clearing.as_json() | {"deleted": delete}))


@app.command(name="import")
def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE.tar", help="What `slimline export` wrote.")],
    as_json: AsJson = False,
) -> None:
    """Take in an exported run; every hash is checked first, and what is here already stays as it is."""
    settings = prepared()
    from infra.artifacts.bundle_reader import import_bundle, read_bundle
    from infra.artifacts.store import ArtifactStore
    from infra.results.store import ResultsStore

    store, results = ArtifactStore(settings.store_root), ResultsStore.of(settings)
    store.preflight()
    bundle = read_bundle(file)
    with progress_bar("import") as (total, done):
        total(bundle.contents.bytes)
        taken = import_bundle(store, bundle, results.add_file, done)
    run_key, there = taken.contents.run_key, len(taken.contents.artifacts) - len(taken.new)
    print(f"{run_key}: {len(taken.new)} artifacts taken in, {there} were there already")
    print(f"its figures: slimline results --run {run_key}")
    if as_json:
        print(json.dumps({"run_key": run_key, "new": [ref.key for ref in taken.new], "there": there}))


def _print_clearing(clearing: Clearing, delete: bool) -> None:
    from infra.artifacts.garbage import by_size

    shown = [each for each in by_size(clearing.garbage) if each.what != "lock"]
    width = max((len(each.what) for each in shown), default=0)
    for each in shown:
        print(f"{each.what:{width}}  {in_units(each.bytes):>10}  {each.changed_at:%Y-%m-%d %H:%M}  {each.name}")
    locks = len(clearing.garbage) - len(shown)
    also = f" and {locks} lock files" if locks else ""
    done = "deleted" if delete else "would go"
    print(f"{len(shown)} things{also} {done}: {in_units(clearing.bytes)}", end="; ")
    print(f"{clearing.num_kept} artifacts kept: {in_units(clearing.kept_bytes)}")
    for name in clearing.in_use:
        print(f"left, since somebody is at work on it: {name}")
    if shown and not delete:
        print("nothing was deleted: add --delete to do it")


def _age(text: str) -> timedelta:
    units = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
    match = re.fullmatch(r"(\d{1,5})([smhdw]?)", text.strip())
    if match is None or not (match[2] or int(match[1]) == 0):
        raise SpecError(f"--older-than {text!r} is no age; give a number and s, m, h, d or w, such as 12h or 2d")
    return timedelta(**{units[match[2] or "s"]: int(match[1])})


def in_units(num_bytes: int) -> str:
    """A number of bytes as it is read: "1.50 GiB"."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:.2f} {unit}"
    return f"{num_bytes} B"


@contextmanager
def progress_bar(what: str) -> Iterator[tuple[Callable[[int], None], Callable[[int], None]]]:
    """A bar in a terminal: a function that sets the number of bytes in all, and one that adds to those done."""
    from tqdm import tqdm

    with tqdm(desc=what, unit="B", unit_scale=True, file=sys.stderr, disable=None, leave=False, total=0) as bar:

        def set_total(size: int) -> None:
            bar.total = size
            bar.refresh()

        def add(size: int) -> None:
            bar.update(size)

        yield set_total, add
