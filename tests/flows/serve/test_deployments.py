"""Deployments on a real server, too long for every push: `make chaos`, or python -m pytest -m long tests/flows/serve

A worker of a process pool runs what prefect.yaml deploys, and a retry runs only what failed; a flow run whose process
was killed is marked crashed, and one that lives is not; all of it works with PostgreSQL under Prefect and MLflow.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.command_line import PROJECT
from tests.flows.home import Home, stages_run
from tests.flows.run.test_compress import mirror_of, spoil
from tests.flows.serving import Api, alive_in, free_port, started, wait_for

pytestmark = pytest.mark.long

POSTGRES = max(Path("/usr/lib/postgresql").glob("*/bin"), default=Path("/usr/bin"))
#: the least that Prefect allows is a sign of life every thirty seconds
_SLEEPER = """
import prefect.flow_engine
prefect.flow_engine.MINIMUM_HEARTBEAT_INTERVAL = 1
prefect.flow_engine.BaseFlowRunEngine.heartbeat_seconds = property(lambda engine: 1)
import time
from prefect import flow, runtime

@flow
def sleeper():
    print(runtime.flow_run.id, flush=True)
    time.sleep(300)

sleeper()
"""


@contextmanager
def server(home: Home, log: Path, **variables: str) -> Iterator[Home]:
    """The home with a Prefect server of its own that runs all its services."""
    port = free_port()
    private = {"PREFECT_HOME": str(log.parent / "prefect")} | variables
    with started(
        home, log, "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port), **private
    ) as child:
        api = Api(f"http://127.0.0.1:{port}/api")
        wait_for(lambda: answers(api), 240, child)
        yield Home(home.folder, api.url, {"PREFECT_HOME": private["PREFECT_HOME"]})


def answers(api: Api) -> bool:
    try:
        api.flow_runs()
    except OSError:
        return False
    return True


def prefect(home: Home, *arguments: str) -> None:
    """Prefect's own command line in the project's folder."""
    command = [sys.executable, "-m", "prefect", *arguments]
    done = subprocess.run(command, cwd=PROJECT, env=home.environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_worker_runs_a_deployment_and_its_retry_runs_what_failed(
    smoke_copy: Home, offline_root: Path, tmp_path: Path
) -> None:
    mirror = mirror_of(offline_root, tmp_path / "mirror")
    # a suite that is measured, beside the one that cannot be: for that alone nothing would begin
    overrides = [f"mirror={mirror}", "evals.0.windows=[32]", "evals.1.limit=5"]
    good = spoil(mirror / "baber/piqa", smoke_copy)
    shutil.rmtree(smoke_copy.folder / "prefect-results")
    with server(Home(smoke_copy.folder), tmp_path / "server.log") as home:
        api, log = Api(home.api_url), tmp_path / "worker.log"
        template = "infra/deploy/work-pools/process.json"
        prefect(home, "work-pool", "create", "slimline", "--type", "process", "--base-job-template", template)
        prefect(home, "--no-prompt", "deploy", "--all")
        deployed = api.post("deployments/filter", {})
        assert {one["name"]: len(one["schedules"]) for one in deployed} == {"nightly": 1, "run": 0}
        (run,) = [one for one in deployed if one["name"] == "run"]
        wanted = {"parameters": {"spec": "smoke", "overrides": overrides}}
        first = api.post(f"deployments/{run['id']}/create_flow_run", wanted)["id"]
        # nobody tells the worker where Prefect's cache is or what is logged: the flow's module does
        nothing_of_ours = {"PREFECT_LOCAL_STORAGE_PATH": None, "PREFECT_LOGGING_EXTRA_LOGGERS": None}
        with started(home, log, "prefect", "worker", "start", "--pool", "slimline", **nothing_of_ours) as worker:
            wait_for(lambda: api.state(first) == "FAILED", 240, worker)
            for path, content in good.items():
                path.write_bytes(content)
            before = log.read_text()
            failed = {name for name in stages_run(before) if name.startswith("evaluate:zero_shot")}
            assert len(failed) == 3
            prefect(home, "flow-run", "retry", first)
            wait_for(lambda: api.state(first) == "COMPLETED", 240, worker)
            assert api.flow_run(first)["run_count"] == 2
            assert set(stages_run(log.read_text()[len(before) :])) == failed
        lines = [line["message"] for line in api.post("logs/filter", {"limit": 200})]
        assert any("evaluate:zero_shot:dense: running" in line for line in lines), "our lines are on Prefect's pages"
    records = {path.name for path in (home.folder / "prefect-results").iterdir()}
    assert any(name.startswith("evaluate-zero-shot") for name in records)
    wait_for(lambda: alive_in(home) == [], 20)


@pytest.mark.parametrize("how", ["stopped", "killed", "cancelled"])
def test_a_served_flow_run_ends_with_its_server_or_when_it_is_cancelled(
    how: str, smoke_copy: Home, tmp_path: Path
) -> None:
    """A service manager tells all processes at once; the training saves its step. kill -9 is of the server alone,
    and Prefect's pages cancel the flow run alone."""
    home, log, port = Home(smoke_copy.folder), tmp_path / "serve.log", free_port()
    sets = ["--set", "steps.1.max_steps=1000", "--set", "steps.1.save_steps=1000", "--set", "profile=null"]
    command = ["flows", "serve", str(PROJECT / "flows/specs/smoke.yaml"), *sets, "--interval", "3"]
    api = Api(f"http://127.0.0.1:{port}/api")
    private = {"PREFECT_HOME": str(tmp_path / "prefect"), "PREFECT_RUNNER_POLL_FREQUENCY": "1"}
    with started(home, log, *command, "--prefect-port", str(port), **private) as serve:
        wait_for(lambda: "recover:slimgpt-20+lora: running" in log.read_text(), 240, serve)
        time.sleep(3)
        if how == "cancelled":
            (run,) = api.flow_runs(flow_runs={"state": {"name": {"any_": ["Running"]}, "operator": "and_"},
                                              "parent_flow_run_id": {"operator": "and_"}},
                                   flows={"name": {"any_": ["run"]}})  # fmt: skip
            cancelling = {"type": "CANCELLING", "name": "Cancelling"}
            api.post(f"flow_runs/{run['id']}/set_state", {"state": cancelling, "force": True})
            wait_for(lambda: api.state(run["id"]) == "CANCELLED", 60, serve)
            wait_for(lambda: "interrupted at step" in log.read_text(), 60, serve)
            serve.terminate()
        elif how == "killed":
            serve.kill()
        else:
            for pid in (int(folder.name) for folder in Path("/proc").glob("[0-9]*")):
                if is_of(home, pid):
                    os.kill(pid, signal.SIGTERM)
        assert serve.wait(90) == (-signal.SIGKILL if how == "killed" else 0)
        wait_for(lambda: alive_in(home) == [], 20)
    saved = list(home.store.root.glob(".scratch/*/checkpoint-*/complete.json"))
    assert len(saved) == (0 if how == "killed" else 1)
    assert "Traceback" not in log.read_text()


def is_of(home: Home, pid: int) -> bool:
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
    return pid != os.getpid() and f"SLIMLINE_HOME={home.folder}".encode() in environment


def test_a_killed_flow_run_is_marked_crashed_and_a_living_one_is_not(tmp_path: Path) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from flows.serve.automations import ensure_zombie_automation

    (tmp_path / "home").mkdir()
    with server(Home(tmp_path / "home"), tmp_path / "server.log") as home:
        api = Api(home.api_url)
        with temporary_settings({PREFECT_API_URL: home.api_url}):
            assert ensure_zombie_automation(60)
            assert not ensure_zombie_automation(60)
            assert ensure_zombie_automation(10)
        assert len(api.post("automations/filter", {})) == 1
        killed, living = (sleeper(home) for _ in range(2))
        try:
            ids = [child.stdout.readline().strip() for child in (killed, living) if child.stdout]
            assert [api.state(one) for one in ids] == ["RUNNING", "RUNNING"]
            time.sleep(3)
            killed.send_signal(signal.SIGKILL)
            killed.wait()
            started_at = time.monotonic()
            wait_for(lambda: api.state(ids[0]) == "CRASHED", 60)
            assert time.monotonic() - started_at > 5
            assert "No sign of life for 10 s" in api.flow_run(ids[0])["state"]["message"]
            time.sleep(5)
            assert api.state(ids[1]) == "RUNNING"
        finally:
            for child in (killed, living):
                child.kill()
                child.wait()


def sleeper(home: Home) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _SLEEPER]
    return subprocess.Popen(command, env=home.environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


@contextmanager
def postgres() -> Iterator[str]:
    """host:port of a PostgreSQL with the empty databases prefect and mlflow; anybody on this machine may use it."""
    if not (POSTGRES / "initdb").exists():
        pytest.skip("no PostgreSQL server here")
    user = "postgres" if os.getuid() == 0 else None  # it refuses to run as root
    folder, port = Path(tempfile.mkdtemp(prefix="slimline-postgres-")), free_port()
    if user is not None:
        owner = pwd.getpwnam(user)
        os.chown(folder, owner.pw_uid, owner.pw_gid)

    def call(program: str, *arguments: str) -> None:
        subprocess.run([POSTGRES / program, *arguments], user=user, cwd=folder, check=True, stdout=subprocess.DEVNULL)

    data, options = str(folder / "data"), f"-h 127.0.0.1 -p {port} -k {folder} -c fsync=off"
    try:
        call("initdb", "--username", "slimline", "--auth", "trust", "--no-sync", "--pgdata", data)
        call("pg_ctl", "--pgdata", data, "--wait", "--log", str(folder / "log"), "--options", options, "start")
        for name in ("prefect", "mlflow"):
            call("createdb", "--host", "127.0.0.1", "--port", str(port), "--username", "slimline", name)
        yield f"127.0.0.1:{port}"
    finally:
        if (folder / "data/postmaster.pid").exists():
            call("pg_ctl", "--pgdata", data, "--mode", "immediate", "stop")
        shutil.rmtree(folder)


@pytest.mark.skipif(
    any(importlib.util.find_spec(driver) is None for driver in ("asyncpg", "psycopg2")),
    reason="no drivers: pip install 'slimline[postgres]'",
)
def test_prefect_and_mlflow_keep_a_run_in_postgresql(smoke_copy: Home, tmp_path: Path) -> None:
    import asyncio

    import asyncpg
    import psycopg2

    with postgres() as place:
        database = f"postgresql+asyncpg://slimline@{place}/prefect"
        with server(
            Home(smoke_copy.folder), tmp_path / "server.log", PREFECT_API_DATABASE_CONNECTION_URL=database
        ) as home:
            home.variables["SLIMLINE_MLFLOW_URI"] = f"postgresql+psycopg2://slimline@{place}/mlflow"
            for _ in range(2):
                home.child("run", "smoke")

        async def states() -> list[str]:
            connection = await asyncpg.connect(f"postgresql://slimline@{place}/prefect")
            rows = await connection.fetch("select state_name from flow_run")
            await connection.close()
            return [row["state_name"] for row in rows]

        assert asyncio.run(states()) == ["Completed"] * 2
        connection = psycopg2.connect(f"postgresql://slimline@{place}/mlflow")
        with connection, connection.cursor() as cursor:
            cursor.execute("select count(*), count(distinct run_uuid) from runs where status = 'FINISHED'")
            finished = cursor.fetchone()
            cursor.execute("select count(*) from metrics")
            metrics = cursor.fetchone()
        connection.close()
    assert finished is not None
    assert finished[0] >= 1
    assert metrics is not None
    assert metrics[0] > 10
