"""`slimline serve`: a schedule fires, what failed is retried alone, and nothing is left when it ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows.errors import SpecError
from flows.serve.schedule import Timetable, _deployment, _refuse_foreign, serve_specs
from tests.flows.home import Home, stages_run
from tests.flows.run.test_compress import mirror_of, spoil
from tests.flows.serving import Api, alive_in, free_port, started, wait_for

SMOKE = str(Path(__file__).parents[3] / "flows/specs/smoke.yaml")


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ({"cron": "0 2 * *"}, "--cron '0 2 * *' is no cron expression"),
        ({"cron": "0 2 * * *", "interval": 60}, "give one of them"),
        ({"interval": 0}, "--interval 0 is not between a second and a year"),
        ({"interval": float("nan")}, "--interval nan is not"),
        ({"interval": 1e30}, "is not between a second and a year"),
        ({"cron": "0 2 * * *", "timezone": "Mars"}, "--timezone 'Mars' is no time zone"),
    ],
)
def test_a_timetable_that_cannot_be_is_refused(times: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message.replace("*", r"\*")):
        Timetable(**times)  # type: ignore[arg-type]


def test_what_cannot_be_served_is_refused_before_a_server_starts() -> None:
    with pytest.raises(SpecError, match="did you mean 'smoke'"):
        serve_specs(["smok"], Timetable())
    with pytest.raises(SpecError, match="sparsity"):
        serve_specs([SMOKE], Timetable(), overrides=["steps.0.sparsity=2"])
    with pytest.raises(SpecError, match="one name for 2 specs"):
        serve_specs(["demo", "smoke"], Timetable(), name="both")


def test_a_deployment_of_somebody_elses_keeps_its_name(prefect_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    api = Api(prefect_server)
    flow_id = api.post("flows/", {"name": "run"})["id"]
    theirs = {"name": "smoke", "flow_id": flow_id, "entrypoint": "their/flows.py:run"}
    created = api.post("deployments/", theirs)["id"]
    with pytest.raises(SpecError, match=r"has a deployment run/smoke .*their/flows.py:run.* another --name"):
        serve_specs([SMOKE], Timetable())
    ours = {"flow_id": flow_id, "id": created}
    (there,) = api.post("deployments/filter", {"deployments": {"name": {"any_": ["smoke"]}}})
    assert (there["flow_id"], there["id"], there["entrypoint"]) == (*ours.values(), theirs["entrypoint"])
    _refuse_foreign(_deployment(SMOKE, Timetable(), (), name="other", paused=False))
    api.delete(f"deployments/{created}")


@pytest.mark.slow
def test_a_schedule_fires_and_a_retry_runs_what_failed(
    smoke_copy: Home, prefect_home: Path, offline_root: Path, tmp_path: Path
) -> None:
    home = Home(smoke_copy.folder)  # it has no server: one must be started
    mirror = mirror_of(offline_root, tmp_path / "mirror")
    # a suite that is measured, beside the one that cannot be: for that alone nothing would begin
    overrides = [f"mirror={mirror}", "evals.0.windows=[32]", "evals.1.limit=5"]
    good = spoil(mirror / "baber/piqa", home)
    port, log = free_port(), tmp_path / "serve.log"
    api = Api(f"http://127.0.0.1:{port}/api")
    sets = [part for override in overrides for part in ("--set", override)]
    command = ["flows", "serve", SMOKE, *sets, "--interval", "3", "--prefect-port", str(port)]
    records = (home.folder / "prefect-results").rename(tmp_path / "records")
    known = set(records.iterdir())
    profile = f"PREFECT_LOCAL_STORAGE_PATH = '{records}'\nPREFECT_SERVER_ALLOW_EPHEMERAL_MODE = true\n"
    (prefect_home / "profiles.toml").write_text(f"active = 'own'\n[profiles.own]\n{profile}")
    own = {"PREFECT_HOME": str(prefect_home), "PREFECT_LOCAL_STORAGE_PATH": None}
    with started(home, log, *command, **own) as process:
        wait_for(lambda: "Ctrl-C ends the serving" in log.read_text(), 120, process)
        running = {"deployments": {"name": {"any_": ["smoke"]}}, "flow_runs": {"start_time": {"is_null_": False}}}
        first = wait_for(lambda: api.flow_runs(**running), 60, process)[-1]
        api.post(f"deployments/{first['deployment_id']}/pause_deployment", {})
        assert first["parameters"]["overrides"] == overrides
        wait_for(lambda: api.state(first["id"]) == "FAILED", 90, process)
        (zombies,) = api.post("automations/filter", {})
        assert zombies["trigger"]["posture"] == "Proactive"

        for path, content in good.items():
            path.write_bytes(content)
        before = log.read_text()
        assert "smoke.yaml: evaluate:zero_shot:" in before
        failed = {name for name in stages_run(before) if name.startswith("evaluate:zero_shot")}
        assert len(failed) == 3
        api.retry(first["id"])
        wait_for(lambda: api.flow_run(first["id"])["run_count"] == 2, 90, process)
        ended = wait_for(lambda: {api.state(first["id"])} & {"COMPLETED", "FAILED", "CRASHED"}, 150, process)
        assert ended == {"COMPLETED"}, log.read_text()
        assert api.flow_run(first["id"])["run_count"] == 2
        assert set(stages_run(log.read_text()[len(before) :])) == failed
    assert process.returncode == 0, log.read_text()
    assert alive_in(home) == []
    assert set(records.iterdir()) > known, "where the user's profile says"
    assert not (home.folder / "prefect-results").exists()
    assert "Traceback" not in log.read_text()
    assert "never awaited" not in log.read_text()
