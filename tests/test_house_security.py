"""Nothing in the project runs what it reads: checked on the syntax trees of all rooms."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_house import FILES, imports, name_of

#: readers of formats that can hold code
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
RUNNERS = {"eval", "exec", "compile", "__import__", "execfile"}
#: what a loader may be made from; the second is the first in C, where there is one
SAFE_LOADERS = {"yaml.SafeLoader", "getattr(yaml, 'CSafeLoader', yaml.SafeLoader)"}
#: the one file that may let a library run a model's code, and for which value
TRUSTING = {"infra/models/import_model.py": {"False", "trusted"}}


def calls(path: Path) -> Iterator[tuple[ast.Call, str]]:
    """Every call in a file, with the dotted name of what is called."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield node, ast.unparse(node.func)


def keyword(call: ast.Call, name: str) -> str | None:
    return next((ast.unparse(given.value) for given in call.keywords if given.arg == name), None)


def safe_loaders(path: Path) -> set[str]:
    """Loader classes of a file that are a SafeLoader with more."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    found = {
        node.name
        for node in nodes
        if isinstance(node, ast.ClassDef) and SAFE_LOADERS & set(map(ast.unparse, node.bases))
    }
    return found | {"yaml.SafeLoader"}


def faults(path: Path) -> Iterator[str]:
    yield from (f"imports {module}" for module in imports(path) if module.partition(".")[0] in PICKLES)
    for call, name in calls(path):
        if name in RUNNERS:
            yield f"calls {name}"
        safe = name == "yaml.safe_load" or (name == "yaml.load" and keyword(call, "Loader") in safe_loaders(path))
        if name.startswith("yaml.") and "load" in name and not safe:
            yield f"calls {name} without a SafeLoader"
        if name in ("torch.load", "torch.jit.load") and keyword(call, "weights_only") != "True":
            yield f"calls {name} without weights_only=True"
        if name.endswith(("read_pickle", "os.system", "os.popen", "getoutput")):
            yield f"calls {name}"
        if keyword(call, "shell") not in (None, "False") or keyword(call, "allow_pickle") not in (None, "False"):
            yield f"calls {name} with shell or allow_pickle"


def hosts(path: Path) -> list[str]:
    """Addresses of all interfaces among the strings of a file, docstrings not counted."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return [str(node.value) for node in nodes if isinstance(node, ast.Constant) and node.value == "0.0.0.0"]


@pytest.mark.parametrize("code, fault", [
    ("import yaml; yaml.load(x)", "calls yaml.load without a SafeLoader"),
    ("import yaml; yaml.load(x, Loader=yaml.Loader)", "calls yaml.load without a SafeLoader"),
    ("import yaml; yaml.unsafe_load(x)", "calls yaml.unsafe_load without a SafeLoader"),
    ("import torch; torch.load(x)", "calls torch.load without weights_only=True"),
    ("from pickle import loads", "imports pickle"),
    ("eval(x)", "calls eval"),
    ("subprocess.run(x, shell=True)", "calls subprocess.run with shell or allow_pickle"),
    ("numpy.load(x, allow_pickle=True)", "calls numpy.load with shell or allow_pickle"),
])  # fmt: skip
def test_the_check_finds_what_it_looks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, fault: str
) -> None:
    monkeypatch.setattr("tests.test_house.PROJECT", tmp_path)
    (tmp_path / "x.py").write_text(code)
    assert list(faults(tmp_path / "x.py")) == [fault]


def test_what_is_read_is_never_run() -> None:
    assert [f"{name_of(path)} {fault}" for path in FILES for fault in faults(path)] == []


def test_no_server_listens_on_all_addresses() -> None:
    assert [name_of(path) for path in FILES if hosts(path)] == []


def test_only_a_tokenizer_that_the_spec_trusts_may_run_its_code() -> None:
    """lm-eval, datasets, the decoder and the profiler are never told to trust anything."""
    own = {"import_model", "import_into", "Field", "ImportRequest"}  # ours: they carry the spec's word
    for path in FILES:
        asked = {keyword(call, "trust_remote_code") for call, name in calls(path) if name not in own} - {None, "False"}
        assert asked <= TRUSTING.get(name_of(path), set()), name_of(path)


def test_the_trainer_that_resumes_reads_its_own_files_without_running_them() -> None:
    """Checkpoints of a training lie in the stage's own working folder and are known by their hashes; still."""
    import transformers

    found = [call for call, name in calls(Path(transformers.__path__[0]) / "trainer.py") if name == "torch.load"]
    assert found
    assert {keyword(call, "weights_only") for call in found} == {"True"}
