"""The command line. Exit codes: 0; 2 for what you can mend (in one sentence); 3 for a gate; 1 for the rest."""

from __future__ import annotations

import logging
import sys
from typing import NoReturn

from flows.commands import figure, help, nights, report, results, retry, runs, serve, store, watch
from flows.commands.app import app
from flows.commands.checkpoints import chat, export, push
from flows.night.outcome import NightFailed
from flows.run.outcome import StagesFailed
from flows.runtime.environment import log_to_terminal
from flows.runtime.user_errors import user_message
from flows.spec.validation import one_line
from infra.secrets import redacted

__all__ = [
    "app",
    "chat",
    "export",
    "figure",
    "help",
    "main",
    "nights",
    "push",
    "report",
    "results",
    "retry",
    "runs",
    "serve",
    "store",
    "watch",
]

log = logging.getLogger("slimline")


def main() -> None:
    """Entry point of the `slimline` command."""
    verbose = "--verbose" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--verbose"]
    log_to_terminal(verbose=verbose)
    try:
        app()
    except (StagesFailed, NightFailed) as error:
        _fail(str(error), error.exit_code, verbose)
    except Exception as error:
        log.debug("traceback", exc_info=True)
        words = user_message(error)
        if words is not None:
            _fail(words, 2, verbose)
        # the last resort: an unforeseen error still gets one line and a way to see more
        _fail(f"{type(error).__name__}: {error}", 1, verbose)


def _fail(text: str, code: int, verbose: bool) -> NoReturn:
    hint = "" if code != 1 or verbose else " (--verbose shows the traceback)"
    print(f"slimline: {one_line(redacted(text))}{hint}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
