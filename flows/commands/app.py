"""The command line's application and what all its commands have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from flows.runtime.environment import prepare_environment
from infra.settings import load_settings

if TYPE_CHECKING:
    from infra.settings import Settings

app = typer.Typer(
    name="slimline",
    help="Make large language models small, and prove what the shrinking cost.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

SpecName = Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped spec (slimline list specs).")]
Overrides = Annotated[
    list[str], typer.Option("--set", metavar="A.B.C=VALUE", help="Override one value of the spec; repeatable.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one last line of JSON with everything.")]
Refresh = Annotated[
    list[str], typer.Option(metavar="STAGE", help="Run this stage and all that follow from it again; repeatable.")
]
Runner = Annotated[
    str | None,
    typer.Option(metavar="threads|dask|ray", help="Where stages run; SLIMLINE_RUNNER, or threads, by default."),
]


def prepared() -> Settings:
    """The settings, with the libraries' own put into the environment. Raises SettingsInvalid."""
    settings = load_settings()
    prepare_environment(settings)
    return settings
