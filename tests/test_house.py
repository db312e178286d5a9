"""The rules of the house, checked on the syntax trees: who may import whom, what planning may cost, what is small."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.registry import available, load

PROJECT = Path(__file__).parents[1]
ROOMS = ("flows", "tasks", "pruning", "evaluation", "infra")
ALLOWED = {
    "flows": set(ROOMS),
    "tasks": {"tasks", "pruning", "evaluation", "infra"},
    "pruning": {"pruning"},
    "evaluation": {"evaluation"},
    "infra": {"infra"},
}
FOREIGN = {
    "pruning": {"prefect", "mlflow", "duckdb"},
    "evaluation": {"prefect", "mlflow", "duckdb"},
    "infra": {"prefect"},
}
ONLY_IMPORTER = {
    "mlflow": "infra/tracking/tracker.py",
    "duckdb": "infra/results/index.py",
    "lm_eval": "evaluation/harness/run_tasks.py",
    "peft": "pruning/recovery/lora.py",
    "datasets": "infra/sources/datasets.py",
}
HEAVY = ("torch", "transformers", "datasets", "mlflow", "lm_eval", "peft", "duckdb")
PLUGINS = {
    "pruning.methods": ("needs_statistics", "order_config", "prune"),
    "pruning.recovery": ("check_model", "recover", "scratch_bytes"),
    "evaluation.suites": ("needs", "check", "check_model", "evaluate"),
}
FILES = [path for room in ROOMS for path in sorted((PROJECT / room).rglob("*.py"))]
MODULES = [(package, name) for package in PLUGINS for name in available(package)]


def name_of(path: Path) -> str:
    return path.relative_to(PROJECT).as_posix()


def imports(path: Path) -> Iterator[str]:
    """Every module a file imports, anywhere in it; relative ones are written out."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(path.relative_to(PROJECT).parts[: -node.level]) if node.level else ""
            yield ".".join(part for part in (package, node.module) if part)


def reads_environment(path: Path) -> bool:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv"):
            return True
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            return any(alias.name in ("environ", "environb", "getenv") for alias in node.names)
    return False


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_down_only(room: str) -> None:
    forbidden = {*ROOMS, "tests"} - ALLOWED[room] | FOREIGN.get(room, set())
    found = {
        f"{name_of(path)} imports {module}"
        for path in FILES
        if path.relative_to(PROJECT).parts[0] == room
        for module in imports(path)
        if module.partition(".")[0] in forbidden
    }
    assert found == set()


def test_mathematics_does_not_read_the_environment() -> None:
    mathematics = [path for path in FILES if path.relative_to(PROJECT).parts[0] in ("pruning", "evaluation")]
    assert [name_of(path) for path in mathematics if reads_environment(path)] == []


@pytest.mark.parametrize("library", ONLY_IMPORTER)
def test_one_file_imports_the_library(library: str) -> None:
    importers = {name_of(path) for path in FILES if library in {module.partition(".")[0] for module in imports(path)}}
    # which files of a folder are a split is asked where rows are read and where lm-eval is told what to read
    also = {"evaluation/harness/local_dataset.py"} if library == "datasets" else set()
    assert importers == {ONLY_IMPORTER[library]} | also


def test_the_modelling_file_that_travels_with_a_checkpoint_needs_no_slimline() -> None:
    roots = {module.partition(".")[0] for module in imports(PROJECT / "pruning/modeling/modeling_slimline.py")}
    assert not roots & set(ROOMS)


def test_files_are_small_enough_to_read() -> None:
    lengths = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {name: length for name, length in lengths.items() if length > 310} == {}


def test_names_say_something() -> None:
    assert [name_of(path) for path in FILES if path.stem in ("utils", "util", "helpers", "helper", "common")] == []
    nodes = [(path, node) for path in FILES for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    classes = [f"{name_of(path)}: {node.name}" for path, node in nodes if isinstance(node, ast.ClassDef)]
    assert [name for name in classes if name.endswith(("Manager", "Handler"))] == []


def test_one_logger_which_users_see() -> None:
    """A logger of another name has no handler on the command line: what it says is lost."""
    others = [name_of(path) for path in FILES if "getLogger(__name__)" in path.read_text(encoding="utf-8")]
    assert others == []


def test_no_path_of_this_machine_is_in_a_tracked_file() -> None:
    if not (PROJECT / ".git").exists():
        pytest.skip("not a checkout: git does not say which files are tracked")
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=PROJECT, capture_output=True, text=True, check=True
    )
    machine = re.compile(r"(?<![\w.<])/(?:work|root|home|Users)/[\w.-]+/?")
    found = []
    for name in listed.stdout.splitlines():
        path = PROJECT / name
        if path.is_file() and path.suffix in (".py", ".md", ".yaml", ".yml", ".toml", ".txt", ".cfg", ".sh", ""):
            text = path.read_text(encoding="utf-8", errors="ignore")
            found += [f"{name}: {match.group()}" for match in machine.finditer(text)]
    assert found == []


def loaded_after(code: str) -> set[str]:
    """Top-level modules of a fresh process after `code`."""
    code += "\nimport sys; print('\\n'.join({name.partition('.')[0] for name in sys.modules}))"
    child = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    return set(child.stdout.split())


def test_planning_imports_nothing_heavy() -> None:
    loaded = loaded_after(
        "import flows.run.stages, flows.run.preflight, flows.spec.load\n"
        "for name in flows.spec.load.shipped_specs():\n"
        "    spec = flows.spec.load.load_spec(name)\n"
        "    assert flows.spec.load.dump_spec(spec)\n"
    )
    assert not loaded & set(HEAVY)


def test_plugins_import_nothing_heavy() -> None:
    loaded = loaded_after("import importlib\n" + "".join(f"import {p}.{name}\n" for p, name in MODULES))
    assert not loaded & {*HEAVY, "prefect"}


@pytest.mark.parametrize("package, name", MODULES, ids=lambda value: value.rpartition(".")[2])
def test_a_plugin_offers_what_its_package_promises(package: str, name: str) -> None:
    module = load(package, name, "module")
    assert isinstance(module.VERSION, int)
    assert module.VERSION >= 1
    assert module.Config.model_config["frozen"] is True
    assert module.Config.model_config["extra"] == "forbid"
    assert module.__doc__, "slimline list prints its first line"
    if package == "evaluation.suites":
        assert module.IMPORTS
        for heavy in module.IMPORTS:
            assert importlib.util.find_spec(heavy), heavy
    for function in PLUGINS[package]:
        assert callable(getattr(module, function))
