"""What the README tells the user to type exists; its spec is a spec."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from flows.__main__ import app
from flows.spec.load import load_night, load_spec, parse_night, parse_spec, shipped_specs
from infra.settings import PREFIX, Settings

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [
    line.partition("#")[0].strip()
    for language, block in BLOCKS
    if language == "bash"
    for line in block.splitlines()
    if line.strip()
]


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("slimline")])
def test_every_slimline_command_is_understood(command: str) -> None:
    name, *rest = shlex.split(command)[1:]
    subcommand = get_command(app).commands[name]  # type: ignore[attr-defined]
    context = subcommand.make_context(name, rest)
    specs = context.params.get("specs") or [context.params.get("spec")]
    for spec in specs:
        if isinstance(spec, str) and spec != "my-spec.yaml":
            load = load_night if name in ("nightly", "serve") else load_spec
            load(spec, context.params["set_"])


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("make")])
def test_every_make_target_exists(command: str) -> None:
    assert re.search(rf"^{command.split()[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)


def test_the_readmes_specs_are_specs() -> None:
    run, evals, profile, branches, night = [yaml.safe_load(block) for language, block in BLOCKS if language == "yaml"]
    assert parse_spec(run, source="README").checkpoints == ("dense", "slimgpt-20", "slimgpt-20+lora")
    measured = parse_spec(run | evals, source="README")
    assert [entry.suite for entry in measured.evals] == ["perplexity"] * 4 + [
        "agreement", "zero_shot", "mmlu", "longbench"
    ]  # fmt: skip
    for entry in measured.evals:
        entry.module.check(entry.config)
    profiled = parse_spec(run | profile, source="README").profile
    assert profiled is not None
    assert profiled.settings.new_tokens == (128, 512)
    names = parse_spec(run | branches, source="README").checkpoints
    assert len(names) == 1 + 3 * 2 * 2
    assert names[1:4] + names[-1:] == ("full-20", "full-20+lora", "full-50", "short-50+lora")
    assert len(parse_night(night, source="README").cells) == 2 * 2 * 2 * 2 - 2 * 2


def test_every_setting_is_told_and_exists() -> None:
    told = set(re.findall(rf"`({PREFIX}[A-Z_]+)`", README)) | set(re.findall(rf"`({PREFIX}[A-Z_]+)=", README))
    assert told == {PREFIX + name.upper() for name in Settings.model_fields}


def test_the_specs_that_the_readme_names_are_shipped() -> None:
    assert {"demo", "smoke", "llama2-7b-slimgpt", "smollm2-135m-p1"} <= set(shipped_specs())
