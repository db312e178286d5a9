"""Types of the numbers in configs: finite, no larger than machines count, and not a YAML `true` taken for 1."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

_LARGEST = 2**31 - 1


def refuse_truth(value: Any) -> Any:
    """Anything but true and false, as it is. Raises ValueError."""
    if isinstance(value, bool):
        raise ValueError(f"{json.dumps(value)} is no number; give a number")
    return value


Number = BeforeValidator(refuse_truth)
"""Beside the bounds of a field of int or float."""

Count = Annotated[int, Number, Field(gt=0, le=_LARGEST)]
"""How many: one at least."""

Amount = Annotated[int, Number, Field(ge=0, le=_LARGEST)]
"""How many, perhaps none."""

Seed = Annotated[int, Number, Field(ge=-(2**63), le=2**63 - 1)]
"""What torch's generators take."""

Real = Annotated[float, Number, Field(allow_inf_nan=False)]
"""A finite number; its own field says between which bounds."""
