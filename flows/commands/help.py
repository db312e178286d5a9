"""`slimline help`: the reference. Topics are Markdown files in `topics/`; the keys and variables in them, and the pages
of methods, recoveries and suites, are made from the code's own types and docstrings."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import textwrap
import types
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from flows.commands.app import app
from flows.errors import SpecError
from infra.registry import available, did_you_mean, load

_TOPICS = Path(__file__).parent / "topics"
_PLUGINS = {"pruning.methods": "method", "pruning.recovery": "recovery", "evaluation.suites": "suite"}
#: a line of a topic that stands for the fields of a pydantic model, e.g. "[keys: flows.spec.run.ModelSpec]"
_KEYS = re.compile(r"^\[keys: ([\w.]+)\.(\w+)\]$", flags=re.MULTILINE)
_WIDTH = 110
_WORDS = {str: "text", int: "int", float: "number", bool: "true | false", Path: "path"}


@app.command(name="help")
def help_(
    topic: Annotated[str | None, typer.Argument(metavar="[TOPIC]", help="Without it, the topics are listed.")] = None,
) -> None:
    """Show the reference: a topic, a method, a recovery or a suite with all its keys."""
    pages = topics()
    if topic is not None:
        commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
        if topic in commands and topic not in pages:
            commands[topic].main(["--help"], prog_name=f"slimline {topic}")
        if topic not in pages:
            raise SpecError(f"no topic {topic!r}{did_you_mean(topic, pages)}; there are: {', '.join(pages)}")
        print(page(topic))
        return
    width = max(map(len, pages))
    for name, title in pages.items():
        print(f"{name:{width}}  {title}")
    print("\nslimline help TOPIC shows one of them; slimline COMMAND --help the options of a command")


def topics() -> dict[str, str]:
    """Every name that `slimline help` knows, with its title: the written topics, then the plug-ins."""
    written = {path.stem: _title(path.read_text(encoding="utf-8")) for path in sorted(_TOPICS.glob("*.md"))}
    plugins = {name: _title(load(package, name, noun).__doc__) for name, (package, noun) in _plugins().items()}
    return written | plugins


def page(topic: str) -> str:
    """The text of a topic, with all keys written out."""
    if topic in (plugins := _plugins()):
        module = load(plugins[topic][0], topic, plugins[topic][1])
        return f"# {topic}\n\n{inspect.getdoc(module)}\n\n{inspect.getdoc(module.Config)}\n\n{keys_of(module.Config)}"
    text = (_TOPICS / f"{topic}.md").read_text(encoding="utf-8").rstrip()
    return _KEYS.sub(lambda found: keys_of(getattr(importlib.import_module(found[1]), found[2])), text)


def keys_of(model: type[BaseModel]) -> str:
    """A model's keys, each with its type, its default and its docstring; of settings, the environment variables."""
    prefix, docs = model.model_config.get("env_prefix"), _docstrings(model)
    made = getattr(model, "TYPED", ())  # fields that are no keys in YAML
    lines = []
    for name, field in model.model_fields.items():
        if name not in made:
            key = name if prefix is None else f"{prefix}{name}".upper()
            lines.append(_wrapped(f"{key}: {_type(field.annotation)}{_default(field)}", "  "))
            lines += [_wrapped(docs[name], "      ")] if name in docs else []
    return "\n".join(lines)


def _plugins() -> dict[str, tuple[str, str]]:
    return {name: (package, noun) for package, noun in _PLUGINS.items() for name in available(package)}


def _title(text: str | None) -> str:
    return str(text).splitlines()[0].removeprefix("# ")


def _docstrings(model: type[BaseModel]) -> dict[str, str]:
    """The string below each field, own and inherited."""
    found: dict[str, str] = {}
    for base in reversed(model.__mro__[: model.__mro__.index(BaseModel)]):
        if base.__module__.startswith("pydantic"):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body  # type: ignore[attr-defined]
        for field, text in pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                found[ast.unparse(field.target)] = inspect.cleandoc(str(text.value.value))
    return found


def _type(annotation: Any) -> str:
    """In the words of YAML: "a | b" for choices, "list of int", "mapping"; that null is allowed goes without saying."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(inner[0])
    if origin is Literal:
        return " | ".join(map(str, inner))
    if origin in (Union, types.UnionType):
        return " | ".join(dict.fromkeys(_type(one) for one in inner if one is not types.NoneType))
    if origin in (tuple, list):
        several = "" if inner[-1] is Ellipsis else f"{len(inner)} "
        return f"list of {several}{_type(inner[0])}"
    return _WORDS.get(annotation, "mapping")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return " (required)"
    value = field.get_default(call_default_factory=True)
    if value is None or isinstance(value, BaseModel):
        return " (optional)"
    shown = str(value) if isinstance(value, str | Path) else json.dumps(value)
    return f" = {shown if shown.strip() and shown.isprintable() else json.dumps(value)}"


def _wrapped(text: str, indent: str) -> str:
    text = " ".join(text.split())
    return textwrap.fill(text, _WIDTH, initial_indent=indent, subsequent_indent=" " * 6, break_on_hyphens=False)
