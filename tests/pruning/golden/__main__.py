"""Pin the numbers of methods anew, after their VERSION was bumped:  python -m tests.pruning.golden slimgpt"""

from __future__ import annotations

import sys

from infra import registry
from tests.pruning.golden.pins import write

for name in sys.argv[1:] or registry.available("pruning.methods"):
    print(write(name))  # noqa: T201
