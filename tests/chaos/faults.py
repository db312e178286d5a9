"""One function a fault: it happens to a night, the night is run again, and what it cost is returned."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import duckdb

from infra.artifacts.store import MANIFEST, ArtifactRef
from tests.chaos.scene import Scene, Survival, again, finished, half_made, judged, keys_run, port_free, prefect_server
from tests.command_line import PROJECT
from tests.flows.home import Home

_CROWD = 4
_CROWD_RUNS = 50

Fault = Callable[[Scene, str, random.Random], Survival]


class NotHere(Exception):
    """A fault that cannot be done on this machine, and why."""


def kill(scene: Scene, name: str, rng: random.Random) -> Survival:
    """kill -9 of the night at a random moment."""
    home, moment = _killed(scene, name, rng.uniform(0.02, 0.98) * scene.seconds)
    broken = half_made(home)
    survival = again(scene, home, f"kill -9 after {moment:.1f} s")
    return _with(survival, [f"visible after the kill: {problem}" for problem in broken])


def full_disk(scene: Scene, name: str, rng: random.Random) -> Survival:
    """The disk becomes full somewhere in the night; then there is room again."""
    folder = scene.folder / name
    used = sum(
        file.stat().st_size for file in (scene.folder / "reference" / "home" / "store").rglob("*") if file.is_file()
    )
    room = int(used * rng.uniform(0.2, 0.9)) + 2**20
    with _small_disk(folder, room):
        home = scene.home(name)
        child = home.start(*scene.command)
        _, errors = child.communicate(timeout=600)
        problems = half_made(home)
        if child.returncode == 0:
            problems.append("the night did not notice that the disk was full")
        elif "disk" not in errors:
            problems.append(f"the disk is not named: {errors[-300:]}")
        subprocess.run(["mount", "-o", "remount,size=2g", folder], check=True)
        return _with(again(scene, home, f"a disk of {room / 2**20:.1f} MiB"), problems)


def truncated(scene: Scene, name: str, rng: random.Random) -> Survival:
    """A file of a finished artifact is cut."""
    home = scene.finished_home(name)
    ref, file = _some_file(home, rng)
    with file.open("rb+") as stream:
        stream.truncate(rng.randrange(file.stat().st_size))
    return again(scene, home, f"truncated {ref.kind}/{file.name}", spared=_from(scene, ref))


def manifest_broken(scene: Scene, name: str, rng: random.Random) -> Survival:
    """A manifest is garbage."""
    home = scene.finished_home(name)
    ref = rng.choice(sorted(finished(home), key=lambda ref: ref.key))
    (home.store.root / ref.kind / ref.key / MANIFEST).write_bytes(rng.randbytes(200))
    return again(scene, home, f"garbage as manifest of {ref.kind}", spared=_from(scene, ref))


def flipped(scene: Scene, name: str, rng: random.Random) -> Survival:
    """One bit of a finished artifact is flipped: `slimline verify --remove` finds it, the next night makes it again."""
    home = scene.finished_home(name)
    ref, file = _some_file(home, rng)
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)
    found = home.child("verify", "--remove")
    problems = [] if ref.key in found.stdout + found.stderr else ["verify does not name it"]
    return _with(again(scene, home, f"bit flipped in {ref.kind}/{file.name}", spared=_from(scene, ref)), problems)


def deleted(scene: Scene, name: str, rng: random.Random) -> Survival:
    """The folder of a finished artifact is deleted."""
    home = scene.finished_home(name)
    ref = rng.choice(sorted(finished(home), key=lambda ref: ref.key))
    shutil.rmtree(home.store.root / ref.kind / ref.key)
    return again(scene, home, f"deleted a {ref.kind}", spared=_from(scene, ref))


def records_deleted(scene: Scene, name: str, rng: random.Random) -> Survival:
    """What is not the store is deleted: Prefect's cache records, the results' index, MLflow's database, the locks."""
    home = scene.finished_home(name)
    for path in ("prefect-results", "results.duckdb", "mlflow.db", "mlartifacts", "store/.locks"):
        target = home.folder / path
        shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
    return again(scene, home, "deleted records and locks")


def server_gone(scene: Scene, name: str, rng: random.Random) -> Survival:
    """Prefect's server dies in mid-run and comes back on the same port."""
    folder, port = scene.folder / name, port_free()
    folder.mkdir()
    with prefect_server(folder, port) as url:
        home = Home(scene.home(name).folder, url)
        child = home.start(*scene.command)
        time.sleep(rng.uniform(0.2, 0.8) * scene.seconds)
    time.sleep(2.0)
    with prefect_server(folder, port):
        child.communicate(timeout=600)
        broken = half_made(home)
        return _with(again(scene, home, "Prefect's server gone and back"), broken)


def database_locked(scene: Scene, name: str, rng: random.Random) -> Survival:
    """Somebody holds the results' index during the whole night, and MLflow's database for some seconds of it."""
    home = scene.home(name)
    index = home.settings.results_path
    holder = f"import duckdb, time; index = duckdb.connect({str(index)!r}); print('held', flush=True); time.sleep(600)"
    child = subprocess.Popen([sys.executable, "-c", holder], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    child.stdout.readline()
    stop = threading.Event()
    thread = threading.Thread(target=_lock_now_and_then, args=(home.folder / "mlflow.db", stop, rng.random()))
    thread.start()
    try:
        survival = again(scene, home, "results' index and MLflow's database locked")
    finally:
        stop.set()
        thread.join()
        child.kill()
        child.wait()
    home.results.runs()  # the holder is gone: the next reader brings the index up to date for whoever asks by SQL
    with duckdb.connect(str(index), read_only=True) as connection:
        rows = connection.execute("SELECT run_key, status FROM runs").fetchall()
    return _with(survival, [] if scene.reference.runs <= set(rows) else ["the index was not brought up to date"])


def clock_jump(scene: Scene, name: str, rng: random.Random) -> Survival:
    """The night begins two days ahead, is killed, and goes on in the past, as after a battery's failure."""
    library = _faketime()
    home = scene.home(name)

    def shifted(days: int) -> Home:
        return Home(
            home.folder, home.api_url, {"LD_PRELOAD": library, "FAKETIME": f"{days:+d}d", "DONT_FAKE_MONOTONIC": "1"}
        )

    child = shifted(2).start(*scene.command)
    time.sleep(rng.uniform(0.4, 0.9) * scene.seconds)
    child.kill()
    child.communicate()
    return again(scene, shifted(-2), "clock two days ahead, then two behind")


def two_nights(scene: Scene, name: str, rng: random.Random) -> Survival:
    """Two nights at once on an empty home."""
    home = scene.home(name)
    children = [home.start(*scene.command) for _ in range(2)]
    logs = [child.communicate(timeout=900)[1] for child in children]
    problems = [
        f"ended with {child.returncode}: {log[-300:]}"
        for child, log in zip(children, logs, strict=True)
        if child.returncode
    ]
    ran = [key for log in logs for key in keys_run(log)]
    if len(home.results.nights()) != 2:
        problems.append(f"{len(home.results.nights())} nights are recorded")
    return judged(scene, home, "two nights at once", ran, set(), problems)


def crowd(scene: Scene, name: str, rng: random.Random) -> Survival:
    """Four processes with fifty small runs each, at once, into one empty home."""
    home, started = scene.home(name), time.monotonic()
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.crowd_child", str(number), str(_CROWD_RUNS)],
            **{"cwd": PROJECT, "env": home.environment, "stderr": subprocess.PIPE, "text": True},
        )
        for number in range(_CROWD)
    ]
    logs = [child.communicate(timeout=3600)[1] for child in children]
    seconds = time.monotonic() - started
    problems = [
        f"ended with {c.returncode}: {log[-300:]}" for c, log in zip(children, logs, strict=True) if c.returncode
    ]
    names = {f"crowd-{number}-{index}" for number in range(_CROWD) for index in range(_CROWD_RUNS)}
    recorded = {row.name for row in home.results.runs() if row.status == "completed"}
    lost = len(names - recorded) + len(names - _names_in_mlflow(home))
    ran = [key for log in logs for key in keys_run(log)]
    repeated = len(ran) - len(set(ran))
    fault = f"{_CROWD} processes x {_CROWD_RUNS} runs in {seconds:.0f} s"
    return Survival(fault, (*problems, *half_made(home)), repeated, lost)


FAULTS: dict[str, Fault] = {
    "kill": kill,
    "full_disk": full_disk,
    "truncated": truncated,
    "manifest_broken": manifest_broken,
    "flipped": flipped,
    "deleted": deleted,
    "records_deleted": records_deleted,
    "server_gone": server_gone,
    "database_locked": database_locked,
    "clock_jump": clock_jump,
    "two_nights": two_nights,
    "crowd": crowd,
}


def _killed(scene: Scene, name: str, moment: float) -> tuple[Home, float]:
    """A home whose night was killed, and after how many seconds. One that is faster than the moment is begun anew."""
    while True:
        home, started = scene.home(name), time.monotonic()
        child = home.start(*scene.command)
        try:
            child.communicate(timeout=moment)
        except subprocess.TimeoutExpired:
            child.kill()
            child.communicate()
            return home, moment
        moment *= 0.9 * (time.monotonic() - started) / scene.seconds
        shutil.rmtree(scene.folder / name)


def _names_in_mlflow(home: Home) -> set[str]:
    with closing(sqlite3.connect(home.folder / "mlflow.db")) as connection:
        return {row[0] for row in connection.execute("SELECT name FROM runs WHERE lifecycle_stage = 'active'")}


def _with(survival: Survival, problems: list[str]) -> Survival:
    return Survival(survival.fault, (*problems, *survival.problems), survival.stages_repeated, survival.rows_lost)


def _some_file(home: Home, rng: random.Random) -> tuple[ArtifactRef, Path]:
    ref = rng.choice(sorted(finished(home), key=lambda ref: ref.key))
    names = sorted(name for name, entry in home.store.manifest(ref).files.items() if entry.bytes)
    return ref, home.store.root / ref.kind / ref.key / rng.choice(names)


def _from(scene: Scene, ref: ArtifactRef) -> frozenset[str]:
    """The one that was hit. What follows from it is found by its key and not made again."""
    assert ref in scene.reference.artifacts
    return frozenset({ref.key})


@contextmanager
def _small_disk(folder: Path, room: int) -> Iterator[None]:
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        raise NotHere(f"no small disk can be mounted: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def _lock_now_and_then(database: Path, stop: threading.Event, offset: float) -> None:
    """Hold a sqlite file exclusively for two seconds of every five."""
    stop.wait(5 * offset)
    while not stop.is_set():
        try:
            connection = sqlite3.connect(database, timeout=0.1, isolation_level=None)
            connection.execute("BEGIN EXCLUSIVE")
            stop.wait(2)
            connection.execute("ROLLBACK")
            connection.close()
        except sqlite3.OperationalError:
            pass  # somebody else holds it: as good
        stop.wait(3)


def _faketime() -> str:
    folders = [
        *Path("/usr/lib").glob("*/faketime"),
        Path("/usr/lib/faketime"),
        Path(os.environ.get("FAKETIME_LIBRARY", "/nonexistent")),
    ]
    for folder in folders:
        found = folder / "libfaketimeMT.so.1"
        if found.is_file():
            return str(found)
    raise NotHere("libfaketime is not installed (Debian: apt install faketime), or FAKETIME_LIBRARY names its folder")
