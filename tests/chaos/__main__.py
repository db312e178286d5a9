"""Do faults to a small night and count what survives.

    python -m tests.chaos [FAULTS...] [--kills 30] [--others 3] [--seed 0] [--out build]

Writes chaos.json (tried, survived, stages_repeated, rows_lost, and the same of each fault) and chaos.md. Exit code 1 if
anything did not survive.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from mlflow import MlflowClient

from infra.offline.default import OfflineDefault
from tests.chaos.faults import FAULTS, NotHere
from tests.chaos.scene import Picture, Scene, Survival, night_command, picture, port_free, prefect_server

#: two cells with a common pruning stage, one of them with a recovery
SMALL = (
    "name=chaos",
    "matrix.methods={slimgpt: {split: ffn}}",
    "matrix.sparsities=[0.5]",
    "matrix.recoveries.lora.max_steps=2",
    "evals.0.max_windows=4",
)
#: repositories of the offline default that it reads
READ = ("slimline/tiny-random-llama", "slimline/news", "slimline/instructions", "slimline/wikipedia")


def stage(folder: Path, offline: Path, api_url: str, blank_mlflow: Path, overrides: tuple[str, ...] = SMALL) -> Scene:
    """Run the night undisturbed; what takes so long only the first time is made before.

    blank_mlflow: an MLflow database in which nothing is recorded.
    """
    for repo_id in READ:
        OfflineDefault(offline).folder(repo_id)
    nothing = Picture({}, frozenset(), frozenset())
    bare = Scene(folder, offline, api_url, blank_mlflow, overrides, nothing, 0.0)
    home, started = bare.home("reference"), time.monotonic()
    home.child(*night_command(overrides))
    return Scene(folder, offline, api_url, blank_mlflow, overrides, picture(home), time.monotonic() - started)


Flat = dict[str, int | str]


def disturb(scene: Scene, faults: dict[str, int], seed: int, report: Callable[[Flat], None] = lambda _: None) -> Flat:
    """Every fault so many times. Returns the figures; `report` is called with those so far after every fault."""
    survivals: list[tuple[str, Survival]] = []
    skipped: dict[str, str] = {}
    for fault, times in faults.items():
        for index in range(times):
            name = f"{fault}-{index}"
            try:
                survival = FAULTS[fault](scene, name, random.Random(f"{seed}-{name}"))
            except NotHere as reason:
                skipped[fault] = str(reason)
                break
            except Exception as error:  # whatever went wrong, this night was not survived, and the next is tried
                survival = Survival(fault, (f"{type(error).__name__}: {error}",))
            survivals.append((fault, survival))
            sys.stderr.write(f"{time.strftime('%H:%M:%S')} {_line(survival)}\n")
            report(figures(survivals, skipped))
            shutil.rmtree(scene.folder / name, ignore_errors=True)
    return figures(survivals, skipped)


def figures(survivals: list[tuple[str, Survival]], skipped: dict[str, str]) -> Flat:
    """Flat keys: totals, then `<fault>_tried` and so on, and why a fault could not be done here."""
    flat: Flat = dict(_counts([survival for _, survival in survivals]))
    for fault in dict.fromkeys(name for name, _ in survivals):
        counts = _counts([survival for name, survival in survivals if name == fault])
        flat |= {f"{fault}_{key}": value for key, value in counts.items()}
    return flat | {f"{fault}_skipped": reason for fault, reason in skipped.items()}


def table(flat: Flat) -> str:
    """The same as markdown."""
    lines = ["| fault | survived / tried | stages repeated | rows lost |", "|---|---|---|---|"]
    for name in ["", *(key.removesuffix("_tried") for key in flat if key.endswith("_tried"))]:
        prefix = f"{name}_" if name else ""
        lines.append(
            f"| {name or 'all'} | {flat[prefix + 'survived']} / {flat[prefix + 'tried']} "
            f"| {flat[prefix + 'stages_repeated']} | {flat[prefix + 'rows_lost']} |"
        )
    lines += [
        f"| {key.removesuffix('_skipped')} | not tried: {why} | | |"
        for key, why in flat.items()
        if key.endswith("_skipped")
    ]
    return "\n".join(lines)


def write(flat: Flat, folder: Path) -> None:
    """chaos.json and chaos.md; also after every fault, so that who interrupts keeps what there is."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "chaos.json").write_text(json.dumps(flat, indent=1) + "\n", encoding="utf-8")
    (folder / "chaos.md").write_text(f"# Faults done to a small night\n\n{table(flat)}\n", encoding="utf-8")


def _counts(survivals: list[Survival]) -> dict[str, int]:
    return {
        "tried": len(survivals),
        "survived": sum(survival.survived for survival in survivals),
        "stages_repeated": sum(survival.stages_repeated for survival in survivals),
        "rows_lost": sum(survival.rows_lost for survival in survivals),
    }


def _line(survival: Survival) -> str:
    if survival.survived:
        return f"survived: {survival.fault}"
    costs = f"{survival.stages_repeated} stages repeated, {survival.rows_lost} rows lost"
    return f"NOT survived: {survival.fault}: {costs}; {'; '.join(survival.problems)}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("faults", nargs="*", choices=[*FAULTS, []], help=f"of {', '.join(FAULTS)}; default: all")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--others", type=int, default=3, help="how often each other fault is done (crowd: once)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("build"))
    options = parser.parse_args(arguments)
    times = {"kill": options.kills, "crowd": min(options.others, 1)}
    wanted = {name: times.get(name, options.others) for name in options.faults or FAULTS}
    folder = Path(tempfile.mkdtemp(prefix="slimline-chaos-"))
    try:
        (folder / "offline").mkdir()
        with prefect_server(folder, port_free()) as url:
            blank = folder / "blank-mlflow.db"
            MlflowClient(f"sqlite:///{blank}").search_experiments(max_results=1)
            scene = stage(folder, folder / "offline", url, blank)
            sys.stderr.write(
                f"the undisturbed night took {scene.seconds:.1f} s, {len(scene.reference.artifacts)} stages\n"
            )
            flat = disturb(scene, wanted, options.seed, lambda flat: write(flat, options.out))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    write(flat, options.out)
    sys.stdout.write(f"{table(flat)}\n")
    return 0 if flat["survived"] == flat["tried"] else 1


if __name__ == "__main__":
    sys.exit(main())
