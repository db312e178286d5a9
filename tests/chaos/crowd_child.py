"""One of several processes that run small specs into one home: python -m tests.chaos.crowd_child NUMBER RUNS"""

from __future__ import annotations

import logging
import sys

from flows.runtime.environment import prepare_process


def main(number: str, runs: str) -> None:
    """Runs called crowd-NUMBER-0 and so on; their stages are those of the other processes."""
    prepare_process()
    from flows.run.compress import compress
    from flows.spec.load import load_spec

    text = "suite: perplexity, dataset: slimline/wikipedia, config: null, max_windows: 1"
    bare = ["steps=[]", "calibration=null", "profile=null"]
    for index in range(int(runs)):
        name, evals = f"name=crowd-{number}-{index}", f"evals=[{{{text}, windows: [{16 + index}]}}]"
        compress(load_spec("smoke", [name, *bare, evals]))
    logging.getLogger("slimline").info("done")


if __name__ == "__main__":
    main(*sys.argv[1:])
