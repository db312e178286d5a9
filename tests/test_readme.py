"""What the documentation tells the user to type works: commands are executed, or parsed where they need a GPU, the
network or minutes; specs are specs; SQL is asked; files, links, topics, variables and benchmark parts exist."""

from __future__ import annotations

import ast
import contextlib
import os
import re
import shlex
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from typer.main import get_command

from evaluation.samples import Sample
from flows.__main__ import app
from flows.commands.help import page, topics
from flows.spec.load import load_night, load_spec, parse_night, parse_spec, shipped_nights, shipped_specs
from infra.registry import load
from infra.results.rows import NightRow
from infra.settings import PREFIX, Settings
from infra.strict_yaml import load_yaml
from pruning.methods._ranked import CurveOptions, OrderOptions, Ranked
from pruning.ranking.inputs import rank_by_inputs
from pruning.ranking.job import RankingJob
from tests.flows.recorded_runs import NOON, Evaluation, Records
from tests.pruning.captured import prune_copy
from tests.tiny import tiny_model

ROOT = Path(__file__).parents[1]
FILES = [
    *(ROOT / name for name in ("README.md", "pruning/README.md", "tests/README.md", "infra/deploy/README.md")),
    *sorted((ROOT / "flows/commands/topics").glob("*.md")),
]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in FILES}
EVERYTHING = "\n".join(TEXTS.values())
BLOCKS = [block for text in TEXTS.values() for block in re.findall(r"```(\w+)\n(.*?)```", text, flags=re.DOTALL)]
PROGRAMS = ("slimline", "make", "python", "pip", "prefect", "hf", "docker")
SLIMLINE = get_command(app).commands  # type: ignore[attr-defined]
Words = tuple[str, ...]
#: they want a checkpoint, run stages for minutes, ask the hub or a server, or go on until they are ended
ONLY_PARSED = ("plan", "export", "push", "chat", "run", "nightly", "retry", "serve", "ui", "automations", "doctor")


def _commands(lines: list[str]) -> list[tuple[str, ...]]:
    found = [tuple(shlex.split(line, comments=True)) for line in lines]
    return [words for words in dict.fromkeys(found) if words]


#: the lines of all bash blocks
TYPED = _commands([line for language, block in BLOCKS if language == "bash" for line in block.splitlines()])
_SPANS = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", EVERYTHING, flags=re.DOTALL))
#: commands in backticks inside of sentences, whole or in part
MENTIONED = _commands([span for span in _SPANS if re.match(rf"({PREFIX}\w+=\S+ )?({'|'.join(PROGRAMS)})\s", span)])


def of(program: str, commands: list[tuple[str, ...]]) -> list[Any]:
    """The commands of a program, without its name and what goes before it in the line."""
    found = [words[words.index(program) :] for words in commands if program in words[:2]]
    return [pytest.param(words[1:], id=" ".join(words)) for words in found]


def yaml_blocks(*names: str) -> list[Any]:
    return [
        load_yaml(block) for name in names for block in re.findall(r"```yaml\n(.*?)```", TEXTS[name], flags=re.DOTALL)
    ]


def topic(name: str) -> str:
    return f"flows/commands/topics/{name}.md"


RUN = yaml_blocks("README.md")[0]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Records:
    """A home with the runs that the documentation speaks of, which were never run."""
    home = Records(tmp_path_factory.mktemp("documented") / "home")
    dense = [Sample("piqa", item, f"{item}", {"acc": float(item % 4 > 0)}) for item in range(20)]
    pruned = [Sample("piqa", item, f"{item}", {"acc": float(item % 2 > 0)}) for item in range(20)]
    for name in ("demo", "other"):
        home.add(
            name,
            {"dense": [Evaluation(dense)], "slimgpt-20": [Evaluation(pruned)], "slimgpt": [Evaluation(pruned)]},
            spec=RUN,
        )
    counts = {"num_stages": 1, "num_run": 1, "num_cached": 0, "num_failed": 0}
    home.results.record_night(
        NightRow(
            night_id="smoke-night-1", name="smoke-night", spec="{}", status="completed", gates_passed=True,
            started_at=NOON, finished_at=NOON, slimline_version="0", **counts,
        )
    )  # fmt: skip
    return home


@pytest.fixture
def here(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process works in that home, in a folder with the files that the commands name."""
    monkeypatch.setattr("flows.commands.app.prepare_environment", lambda settings: None)
    for name, value in records.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(records.folder)
    Path("my-spec.yaml").write_text(yaml.safe_dump(RUN), encoding="utf-8")
    with contextlib.redirect_stdout(None):
        get_command(app).main(["export", "demo", "run.tar"], standalone_mode=False)


@pytest.mark.parametrize("words", of("slimline", TYPED))
def test_every_slimline_command_works(words: Words, here: None, capsys: pytest.CaptureFixture[str]) -> None:
    name, *rest = words
    if name not in ONLY_PARSED:
        assert not get_command(app).main(words, standalone_mode=False)
        assert capsys.readouterr().out.strip()
        return
    given = SLIMLINE[name].make_context(name, rest).params
    if "set_" in given:
        for spec in given.get("specs") or [given["spec"]]:
            (load_night if name in ("nightly", "serve") else load_spec)(spec, given["set_"])


@pytest.mark.parametrize("words", of("slimline", MENTIONED))
def test_every_slimline_command_in_a_sentence_exists(words: Words) -> None:
    name, *rest = words
    if name == "help":
        assert rest in ([], ["TOPIC"]) or rest[0] in topics()
    elif name != "COMMAND":
        options = {option for parameter in SLIMLINE[name].params for option in parameter.opts}
        assert {word for word in rest if word.startswith("-")} <= options


@pytest.mark.parametrize("words", of("make", TYPED + MENTIONED))
def test_every_make_target_exists(words: Words) -> None:
    child = subprocess.run(["make", "--dry-run", *words], cwd=ROOT, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert child.stdout


@pytest.mark.parametrize("words", of("python", TYPED + MENTIONED))
def test_every_module_that_is_run_exists(words: Words) -> None:
    module = words[words.index("-m") + 1]
    spec = find_spec(module)
    assert spec is not None
    assert spec.submodule_search_locations is None or find_spec(f"{module}.__main__")


@pytest.mark.parametrize("words", of("pip", TYPED + MENTIONED))
def test_what_pip_installs_is_there(words: Words) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert words[0] == "install"
    for word in words[1:]:
        if extra := re.fullmatch(r"slimline\[(\w+)\]", word):
            assert extra[1] in project["optional-dependencies"]
        else:
            assert word in ("-e", ".", "-r", "--no-deps") or (ROOT / word).is_file()


@pytest.mark.parametrize(
    "program, module, main", [("prefect", "prefect.cli", "app"), ("hf", "huggingface_hub.cli.hf", "main")]
)
def test_other_programs_know_the_options(program: str, module: str, main: str) -> None:
    commands = [command.values[0] for command in of(program, TYPED + MENTIONED)]
    # Prefect's own options stand before the verb
    asked = [words[1:] if words[0] == "--no-prompt" else words for words in commands]
    verbs = [[word for word in words[:2] if re.fullmatch(r"[a-z][a-z-]+", word)] for words in asked]
    code = (
        f"import sys; from {module} import {main} as app\n"
        f"for verbs in {verbs}:\n"
        f"    sys.argv = [{program!r}, *verbs, '--help']\n"
        "    try: app()\n"
        "    except SystemExit as left: assert not left.code\n"
        "    print('=====')\n"
    )
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert verbs
    for words, text in zip(asked, child.stdout.split("=====")[:-1], strict=True):
        for option in (word for word in words if word.startswith("-")):
            assert option in text, f"{program} {words}: {text}"


def test_files_and_links_that_are_named_exist() -> None:
    made = re.compile(r"(build|results)/|my-spec|run\.tar")
    for name, text in TEXTS.items():
        prose = re.sub(r"```(?!bash).*?```", "", text, flags=re.DOTALL)
        named = re.findall(r"(?<![\w/.<>-])[\w.-]+(?:/[\w.-]+)+\.(?:md|py|yaml|json|txt|example)", prose)
        named += [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")]
        for path in named:
            if made.match(path) or path.endswith("compose.env"):
                continue
            places = (ROOT / path, (ROOT / name).parent / path)
            assert any(place.exists() for place in places), f"{name} names {path}"


def test_the_map_of_the_source_has_every_folder() -> None:
    rooms = ("flows", "tasks", "pruning", "evaluation", "infra")
    folders = {
        path.parent.relative_to(ROOT).as_posix() for room in rooms for path in ROOT.glob(f"{room}/*/__init__.py")
    }
    named = set(re.findall(r"^\| `([\w/]+)`", TEXTS[topic("architecture")], flags=re.MULTILINE))
    assert named == folders | {"flows/specs", "infra/deploy"}


def test_the_specs_are_specs() -> None:
    for run in (RUN, yaml_blocks(topic("spec"))[0]):
        assert parse_spec(run, source="README").checkpoints == ("dense", "slimgpt-20", "slimgpt-20+lora")
    evals, profile, branches, night = yaml_blocks(*map(topic, ("evals", "profile", "ablations", "nights")))
    trained = parse_spec(RUN | yaml_blocks(topic("recovery"))[0], source="recovery")
    assert trained.checkpoints[1:] == ("slimgpt-50", "slimgpt-50+cpt", "slimgpt-50+cpt+lora")
    measured = parse_spec(RUN | evals, source="evals")
    assert [entry.suite for entry in measured.evals] == ["perplexity"] * 4 + [
        "agreement", "zero_shot", "mmlu", "longbench"
    ]  # fmt: skip
    for entry in measured.evals:
        entry.module.check(entry.config)
    profiled = parse_spec(RUN | profile, source="profile").profile
    assert profiled is not None
    assert profiled.settings.new_tokens == (128, 512)
    names = parse_spec(RUN | branches, source="ablations").checkpoints
    assert len(names) == 1 + 3 * 2 * 2
    assert names[1:4] + names[-1:] == ("full-20", "full-20+lora", "full-50", "short-50+lora")
    exports = parse_spec(RUN | yaml_blocks(topic("exports"))[0], source="exports")
    assert len(exports.files) == 3 * len(exports.checkpoints)
    assert len(parse_night(night, source="nights").cells) == 2 * 2 * 2 * 2 - 2 * 2
    assert len([language for language, _ in BLOCKS if language == "yaml"]) == 8, "a block that no test reads"


def test_the_sql_can_be_asked(records: Records, here: None) -> None:
    import duckdb

    key = next(row.run_key for row in records.results.runs() if row.name == "demo")
    for checkpoint, letter in (("dense", "A"), ("slimgpt-20", "B")):
        os.symlink(records.store.path(records.report(key, checkpoint, "zero_shot")), f"<{letter}>")
    queries = [block for language, block in BLOCKS if language == "sql"]
    files = [query for query in queries if "parquet" in query]
    assert [len(duckdb.sql(query).fetchall()) for query in files] == [0, 6]
    views = [query for query in queries if query not in files]
    assert [records.results.select(query).rows for query in views] == [()], "no run there is an ablation"


def test_the_documented_method_prunes() -> None:
    (block,) = [block for language, block in BLOCKS if language == "python"]
    names: dict[str, Any] = {
        "CurveOptions": CurveOptions, "OrderOptions": OrderOptions, "Ranked": Ranked, "RankingJob": RankingJob,
        "rank_by_inputs": rank_by_inputs,
    }  # fmt: skip
    exec(compile(block, "pruning/README.md", "exec"), names)
    method: Any = SimpleNamespace(**names)
    _, pruned = prune_copy(tiny_model("llama"), method.Config(sparsity=0.3, power=1.0), method=method)
    assert abs(pruned.achieved_sparsity - 0.3) < 0.05
    slimgpt = load("pruning.methods", "slimgpt", "method")
    asked = {name for name in names if name in vars(slimgpt) and not name.startswith("_")}
    assert asked >= {"VERSION", "ORDERS_FROM", "Config", "OrderConfig", "order", "order_config", "prune", "check_model"}


def test_every_setting_is_explained_and_exists() -> None:
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    explained = re.findall(rf"^  ({PREFIX}\w+): .*\n      \S", page("variables"), flags=re.MULTILINE)
    assert set(explained) == known
    assert set(re.findall(rf"{PREFIX}[A-Z_]+", EVERYTHING)) <= known


def test_every_topic_is_in_the_readme_and_short_enough() -> None:
    assert set(re.findall(r"\[[\w-]+\]\(flows/commands/topics/([\w-]+)\.md\)", TEXTS["README.md"])) == {
        path.stem for path in FILES if path.parent.name == "topics"
    }
    assert len(TEXTS["README.md"].splitlines()) <= 200


def test_the_specs_that_are_named_are_shipped() -> None:
    named = set(
        re.findall(r"(?<![\w/])(?:llama|smollm2|qwen|mistral|vicuna)[\w.]*-[\w.]+(?:-[\w.]+)*(?![\w/])", EVERYTHING)
    )
    assert named
    assert named <= {*shipped_specs(), *shipped_nights()}


def keys_in(file: str, name: str) -> set[str]:
    """The keys of a dict in a module that takes long to be imported."""
    (found,) = [
        node.value
        for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == name and isinstance(node.value, ast.Dict)
    ]
    return {ast.literal_eval(key) for key in found.keys if key is not None}


def test_every_part_of_the_benchmarks_is_explained() -> None:
    parts = set(re.findall(r"^\| `(\w+)` \| `", TEXTS["tests/README.md"], flags=re.MULTILINE))
    assert parts == keys_in("tests/bench/__main__.py", "PARTS")
    asked = dict(word.split("=", 1) for command in of("make", TYPED) for word in command.values[0] if "=" in word)
    assert set(asked["PARTS"].split()) <= parts
    assert set(asked["FAULTS"].split()) <= keys_in("tests/chaos/faults.py", "FAULTS")
