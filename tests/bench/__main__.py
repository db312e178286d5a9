"""Benchmarks: what is compared is measured side by side in one run.

    python -m tests.bench [PARTS...] [--help]

Writes bench.json and bench.md; parts run one after another meet in them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tests.bench import (
    against_lm_eval,
    against_naive,
    few_shot,
    growth,
    night,
    ordering,
    p1,
    profile_ratio,
    report,
    results,
    speed,
    streaming,
    transfers,
    zero_shot,
)
from tests.bench.materials import Materials
from tests.bench.options import Options, parse_options
from tests.bench.report import Result, Skipped

log = logging.getLogger("slimline.bench")

PARTS: dict[str, Callable[[Materials, Options], Result]] = {
    "speed": speed.run,
    "naive": against_naive.run,
    "stream": streaming.run,
    "transfers": transfers.run,
    "growth": growth.run,
    "night": night.run,
    "results": results.run,
    "p1": p1.run,
    "ordering": ordering.run,
    "profile": profile_ratio.run,
    "zero_shot": zero_shot.run,
    "few_shot": few_shot.run,
    "lm_eval": against_lm_eval.run,
}


def run_parts(parts: tuple[str, ...], options: Options) -> None:
    """Run them in order; each part's figures are written when it ends."""
    options.scratch.mkdir(parents=True, exist_ok=True)
    # a folder of our own inside it, for only that may be removed
    scratch = Path(tempfile.mkdtemp(prefix="run-", dir=options.scratch))
    try:
        options = replace(options, scratch=scratch)
        materials = Materials(options)
        for part in parts:
            log.info("part %s", part)
            try:
                report.record(PARTS[part](materials, options), options.out)
            except Skipped as reason:
                log.warning("part %s is skipped: %s", part, reason)
                report.record_skip(part, str(reason), options.out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        with contextlib.suppress(OSError):
            scratch.parent.rmdir()


def main(arguments: list[str] | None = None) -> None:
    parts, options = parse_options(arguments, tuple(PARTS))
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    logging.getLogger("slimline").setLevel(logging.INFO)
    run_parts(parts, options)
    sys.stdout.write(report.markdown(report.read(options.out)))


if __name__ == "__main__":
    main()
