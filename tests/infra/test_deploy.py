"""What cannot run in a test is held against the schemas of those who read it: pools, compose, Kubernetes, the image."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.settings import PREFIX, Settings

PROJECT = Path(__file__).parents[2]
DEPLOY = PROJECT / "infra/deploy"
POOLS = ("process", "docker", "kubernetes")
FILES = [
    PROJECT / "prefect.yaml",
    *sorted(path for path in DEPLOY.rglob("*") if path.is_file() and path.name != "compose.env"),
]
#: of the hub, MLflow, Postgres, pip and the interpreter; Prefect's are looked up, but for one that is no setting
FOREIGN = {
    "PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR",
    *("BASE", "DO_NOT_TRACK", "HF_TOKEN", "HOME", "MLFLOW_BACKEND_STORE_URI", "MLFLOW_DISABLE_TELEMETRY", "PATH"),
    *("MLFLOW_SERVER_ALLOWED_HOSTS", "PIP_DISABLE_PIP_VERSION_CHECK", "PIP_NO_CACHE_DIR", "POSTGRES_DB"),
    *("POSTGRES_PASSWORD", "POSTGRES_USER", "PYTHONUNBUFFERED"),
}
#: what the compose file itself asks of its env file, and the image of whoever builds it
OWN = {
    *("MLFLOW_PORT", "POSTGRES_VERSION", "PREFECT_AUTH", "PREFECT_PORT", "SHM_SIZE", "SLIMLINE_IMAGE", "SLIMLINE_UID"),
    "TORCH_INDEX",
}


def template(pool: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((DEPLOY / "work-pools" / f"{pool}.json").read_text(encoding="utf-8"))
    return content


def rendered(pool: str, **values: Any) -> dict[str, Any]:
    """As Prefect fills it in for a flow run whose deployment says nothing."""
    from prefect.utilities.templating import apply_values

    content = template(pool)
    defaults = {
        name: variable["default"]
        for name, variable in content["variables"]["properties"].items()
        if variable.get("default") is not None
    }
    return dict(apply_values(content["job_configuration"], defaults | values))


def compose() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    return content


def kubernetes_documents() -> list[dict[str, Any]]:
    paths = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
    return [one for path in paths for one in yaml.safe_load_all(path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("pool", POOLS)
def test_every_placeholder_of_a_pool_is_a_variable_and_every_variable_is_used(pool: str) -> None:
    from jsonschema import Draft202012Validator
    from prefect.utilities.templating import find_placeholders

    content = template(pool)
    Draft202012Validator.check_schema(content["variables"])
    properties = content["variables"]["properties"]
    assert {one.name for one in find_placeholders(content["job_configuration"])} == set(properties)
    defaults = {name: entry["default"] for name, entry in properties.items() if entry.get("default") is not None}
    Draft202012Validator(content["variables"]).validate(defaults)


def test_the_process_pool_is_what_prefects_process_worker_takes() -> None:
    from prefect.workers.process import ProcessJobConfiguration, ProcessWorker

    ProcessJobConfiguration.model_validate(rendered("process"))
    default = ProcessWorker.get_default_base_job_template()
    assert template("process")["job_configuration"] == default["job_configuration"]


def test_the_docker_pool_asks_for_gpus_and_shares_the_home() -> None:
    from docker.types import HostConfig

    job = rendered("docker")
    assert job["volumes"] == ["slimline-home:/data"]
    assert job["env"]["SLIMLINE_HOME"] == "/data"
    config = HostConfig(version="1.43", **job["container_create_kwargs"])
    assert config["DeviceRequests"][0]["Capabilities"] == [["gpu"]]
    assert config["ShmSize"] == 8 * 1024**3
    assert config["SecurityOpt"] == ["no-new-privileges:true"]
    assert not job["privileged"]
    without = rendered("docker", gpus=[])["container_create_kwargs"]
    assert HostConfig(version="1.43", **without)["DeviceRequests"] == []


def test_the_kubernetes_pool_makes_a_valid_job_with_gpus() -> None:
    validator = pytest.importorskip("kubernetes_validate")
    job = rendered(
        "kubernetes", command=["prefect", "flow-run", "execute"], env=[{"name": "A", "value": "b"}], labels={}
    )
    manifest = job["job_manifest"]
    manifest["metadata"]["name"] = "the validator does not know generateName"
    validator.validate(manifest, validator.latest_version(), strict=True)
    pod = manifest["spec"]["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert pod["nodeSelector"] == {"nvidia.com/gpu.present": "true"}
    assert_hardened(pod)


def test_kubernetes_manifests_are_valid() -> None:
    validator = pytest.importorskip("kubernetes_validate")
    documents = kubernetes_documents()
    assert {"Namespace", "PersistentVolumeClaim", "Job", "Deployment"} <= {one["kind"] for one in documents}
    for document in documents:
        validator.validate(document, validator.latest_version(), strict=True)
        if document["kind"] in ("Job", "Deployment"):
            assert_hardened(document["spec"]["template"]["spec"])


def test_the_job_has_a_gpu_and_the_home() -> None:
    (job,) = [one for one in kubernetes_documents() if one["kind"] == "Job"]
    pod = job["spec"]["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    (claim,) = [one for one in kubernetes_documents() if one["kind"] == "PersistentVolumeClaim"]
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    of_the_pool = rendered("kubernetes")["job_manifest"]["spec"]["template"]["spec"]
    assert {"claimName": claim["metadata"]["name"]} in [
        one.get("persistentVolumeClaim") for one in of_the_pool["volumes"]
    ]


def assert_hardened(pod: dict[str, Any]) -> None:
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in pod["containers"]:
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
        assert "memory" in container["resources"]["limits"]


def test_compose_opens_ports_on_the_loopback_address_only() -> None:
    services = compose()["services"]
    assert set(services) == {"postgres", "prefect", "mlflow", "worker"}
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert len(ports) == 2
    assert all(port.startswith("127.0.0.1:") for port in ports)
    assert not [name for name, service in services.items() if service.get("privileged") or "network_mode" in service]
    assert set(compose()["volumes"]) == {"postgres", "prefect", "mlflow", "home"}
    assert all("healthcheck" in services[name] for name in ("postgres", "prefect", "mlflow"))
    assert services["worker"]["depends_on"].keys() == {"prefect", "mlflow"}


def test_no_password_is_written_down_and_compose_demands_every_one() -> None:
    text = (DEPLOY / "compose.yaml").read_text(encoding="utf-8")
    for name in ("POSTGRES_PASSWORD", "PREFECT_AUTH"):
        uses = re.findall(rf"\$\{{{name}([^}}]*)\}}", text)
        assert uses
        assert all(use.startswith(":?") for use in uses), f"{name} must be given"
    example = (DEPLOY / "compose.env.example").read_text(encoding="utf-8")
    for name in ("POSTGRES_PASSWORD", "PREFECT_AUTH", "HF_TOKEN"):
        assert re.search(rf"^{name}=$", example, flags=re.MULTILINE), f"{name} is empty in the example"
    for path in FILES:
        found = re.search(r"(?i)(password|token|secret|api_key)\s*[:=]\s*['\"]?[a-z0-9]{6,}", path.read_text("utf-8"))
        assert found is None, f"{path.name}: {found}"


def test_every_environment_variable_is_known() -> None:
    from prefect import settings

    known = FOREIGN | OWN | {PREFIX + name.upper() for name in Settings.model_fields}
    named = {
        (path.name, word)
        for path in FILES
        for word in re.findall(r"\b(?:[A-Z]+_)+[A-Z]+\b", path.read_text(encoding="utf-8"))
        if word.partition("_")[0] in ("SLIMLINE", "PREFECT", "MLFLOW", "HF", "POSTGRES", "PIP")
    }
    assert {(name, word) for name, word in named if word not in known and not hasattr(settings, word)} == set()


def test_the_image_has_no_root_and_no_secret_and_keeps_the_pins() -> None:
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    instructions = re.sub(r"\\\n", " ", re.sub(r"(?m)^#.*\n", "", text)).splitlines()
    users = [line.split()[1] for line in instructions if line.startswith("USER ")]
    assert users == ["${SLIMLINE_UID}"]
    uid = re.search(r"ARG SLIMLINE_UID=(\d+)", text)
    assert uid is not None
    pods = [one["spec"]["template"]["spec"] for one in kubernetes_documents() if one["kind"] in ("Job", "Deployment")]
    assert {pod["securityContext"]["runAsUser"] for pod in pods} == {int(uid[1])}
    assert not re.search(r"(?im)^(arg|env)\s.*(token|password|secret)", text)
    assert "--constraint infra/constraints.txt" in text
    assert "SLIMLINE_HOME=/data" in text
    owned = next(line for line in instructions if "install --directory" in line)
    ours = [service for name, service in compose()["services"].items() if name != "postgres"]
    folders = {volume.partition(":")[2] for service in ours for volume in service["volumes"]}
    assert all(f" {folder}" in owned for folder in folders), "Docker would make them root's"
    copied = [line.split()[1:-1] for line in instructions if line.startswith("COPY ")]
    for source in (name for names in copied for name in names):
        assert (PROJECT / source).exists(), source
        ignored = (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
        assert f"!{source.partition('/')[0]}" in ignored


def test_prefect_yaml_names_flows_that_take_its_parameters() -> None:
    import inspect

    content = yaml.safe_load((PROJECT / "prefect.yaml").read_text(encoding="utf-8"))
    assert content["pull"] == [], "the package is installed where a worker runs it"
    source = (PROJECT / "flows/serve/deployments.py").read_text(encoding="utf-8")
    for deployment in content["deployments"]:
        module, _, name = deployment["entrypoint"].rpartition(".")
        assert module == "flows.serve.deployments"
        assert name in source
    (nightly,) = [one for one in content["deployments"] if one["name"] == "nightly"]
    assert nightly["schedules"][0]["timezone"]
    from flows.night.nightly import nightly as flow

    assert set(nightly["parameters"]) == set(inspect.signature(flow.fn).parameters)
