"""The rules of the house, checked on the syntax trees: who may import whom, what planning may cost, what is small."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import get_args

import pytest

from infra.registry import available, load
from pruning.recovery import Need

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
    "mlflow": "infra/tracking/mlflow_store.py",
    "duckdb": "infra/results/index.py",
    "lm_eval": "evaluation/harness/run_tasks.py",
    "peft": "pruning/training/adapters.py",
    "datasets": "infra/sources/datasets.py",
    "gguf": "infra/exporting/gguf_file.py",
    "xllamacpp": "evaluation/profile/llama_cpp.py",
    "matplotlib": "infra/figures/draw.py",
    "plotly": "flows/records/page/document.py",
}
#: files of a folder, without `__init__.py`
MOST_FILES = 12
#: of a method that trains while it prunes, in the place of those above it
TRAINED_METHOD = (
    *("check_model", "check_training", "needs_statistics", "order_config", "reads", "scratch_bytes", "train"),
)
#: of one that makes the vocabulary smaller, likewise
VOCABULARY_METHOD = ("check_model", "check_tokenizer", "needs_statistics", "order_config", "reads", "rebuild")
HEAVY = ("torch", "transformers", "datasets", "mlflow", "lm_eval", "peft", "duckdb", "matplotlib")
PLUGINS = {
    "pruning.methods": ("needs_statistics", "order_config", "prune"),
    "pruning.recovery": ("check_model", "reads", "recover", "scratch_bytes"),
    "evaluation.suites": ("needs", "check", "check_model", "evaluate"),
}
FILES = [path for room in ROOMS for path in sorted((PROJECT / room).rglob("*.py"))]
MODULES = [(package, name) for package in PLUGINS for name in available(package)]


def name_of(path: Path) -> str:
    return path.relative_to(PROJECT).as_posix()


def imports(path: Path) -> Iterator[str]:
    """Every module a file imports, anywhere in it; relative ones are written out."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(path.relative_to(PROJECT).parts[: -node.level]) if node.level else ""
            yield ".".join(part for part in (package, node.module) if part)


def reads_environment(path: Path) -> bool:
    for node in ast.walk(tree_of(path)):
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


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def module_of(path: Path) -> str:
    """Dotted; a package's `__init__.py` is the package."""
    return ".".join(path.relative_to(PROJECT).with_suffix("").parts).removesuffix(".__init__")


def import_graph() -> dict[str, set[str]]:
    """Which file imports which, wherever in it that stands. `from a.b import c` is the file a.b.c if there is one."""
    files = {module_of(path): path for path in FILES}
    graph: dict[str, set[str]] = {}
    for name, path in files.items():
        found = set(imports(path))
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ImportFrom) and node.module:
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
        graph[name] = {module for module in found if module in files and module != name}
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Members of each circle, by what can be reached from where."""
    reached = {name: set(targets) for name, targets in graph.items()}
    for middle in graph:
        for name in graph:
            if middle in reached[name]:
                reached[name] |= reached[middle]
    inside = {
        name: frozenset({name} | {other for other in reached[name] if name in reached.get(other, ())}) for name in graph
    }
    return sorted(sorted(circle) for circle in set(inside.values()) if len(circle) > 1)


def test_a_circle_is_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert circles({"a": {"b"}, "b": set(), "c": {"a", "b"}}) == []


def test_no_file_imports_itself_through_others() -> None:
    assert circles(import_graph()) == []


def test_no_folder_imports_itself_through_others() -> None:
    packages = {module_of(path) for path in FILES if path.name == "__init__.py"}
    folders: dict[str, set[str]] = {package: set() for package in packages}

    def folder_of(module: str) -> str:
        return module if module in packages else module.rpartition(".")[0]

    for module, targets in import_graph().items():
        if not module.endswith("__main__"):  # the door of a room, not a part of it
            folders[folder_of(module)] |= {folder_of(target) for target in targets} - {folder_of(module)}
    assert circles(folders) == []


def test_every_folder_is_small_and_says_what_lives_there() -> None:
    counts = {path.parent: 0 for path in FILES}
    for path in FILES:
        counts[path.parent] += path.name != "__init__.py"
    full = {name_of(folder): count for folder, count in counts.items() if count > MOST_FILES}
    assert full == {}
    silent = [
        name_of(folder)
        for folder in counts
        if len((ast.get_docstring(tree_of(folder / "__init__.py")) or "").splitlines()) < 4
    ]
    assert silent == []


def test_tests_lie_where_what_they_test_lies() -> None:
    """tests/<room>/<folder> for each folder of a room; what spans rooms is in tests/scenarios."""
    for room in ROOMS:
        for folder in sorted((PROJECT / "tests" / room).rglob("test_*.py")):
            inside = folder.parent.relative_to(PROJECT / "tests")
            assert (PROJECT / inside).is_dir(), f"{name_of(folder)} tests nothing that is there"


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
    # shipped beside checkpoints, where it must be one file: three short classes for every family
    del lengths["pruning/modeling/modeling_slimline.py"]
    assert {name: length for name, length in lengths.items() if length > 310} == {}


def test_names_say_something() -> None:
    assert [name_of(path) for path in FILES if path.stem in ("utils", "util", "helpers", "helper", "common")] == []
    nodes = [(path, node) for path in FILES for node in ast.walk(tree_of(path))]
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
    other_kinds = {"train": TRAINED_METHOD, "rebuild": VOCABULARY_METHOD}
    kinds = [functions for name, functions in other_kinds.items() if hasattr(module, name)] or [PLUGINS[package]]
    for function in kinds[0]:
        assert callable(getattr(module, function))
    if package == "pruning.recovery":
        assert set(get_args(Need)) >= module.NEEDS
