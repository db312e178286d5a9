"""Several processes that prune one model together: each walks its share of the calibration samples.

Second moments are summed over all of them; whatever is decided from the sums is decided by the leader (rank 0) and
broadcast, so that no rounding on another device can make two processes disagree.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pruning.errors import PruningError

T = TypeVar("T")

#: how long a process waits for the others. The leader solves alone, for a down_proj of a 70B model tens of minutes on a
#: CPU, where torch gives up after 30 (gloo) or 10 (NCCL). A process that died need not be waited for: whoever started
#: the group ends it.
TIMEOUT = timedelta(hours=12)


@dataclass(frozen=True)
class ProcessGroup:
    """The processes of one torch.distributed group; the default is one process, for which everything is local."""

    rank: int = 0
    size: int = 1

    @classmethod
    def join(cls, backend: str, meeting: str, rank: int, size: int) -> ProcessGroup:
        """Make the default group of torch.distributed together with the other processes.

        backend: "gloo" or "nccl". meeting: the URI of a file that does not exist yet, the same for all.
        """
        dist.init_process_group(backend, init_method=meeting, rank=rank, world_size=size, timeout=TIMEOUT)
        return cls(rank, size)

    @property
    def leads(self) -> bool:
        """Whether this process decides for all and writes what is written once."""
        return self.rank == 0

    def share(self, samples_NL: Tensor) -> Tensor:
        """The rows that this process walks: a contiguous part, sizes differing by one at most."""
        return samples_NL.tensor_split(self.size)[self.rank]

    def sum_(self, tensor: Tensor) -> None:
        """Replace the tensor by its sum over the group."""
        if self.size > 1:
            dist.all_reduce(tensor)

    def sum_of(self, *values: float) -> tuple[float, ...]:
        """Sums of plain numbers over the group, in float64."""
        if self.size == 1:
            return values
        summed = torch.tensor(values, dtype=torch.float64, device=_wire_device())
        dist.all_reduce(summed)
        return tuple(summed.tolist())

    def largest(self, value: float) -> float:
        """The largest of the processes' numbers."""
        if self.size == 1:
            return value
        number = torch.tensor(value, dtype=torch.float64, device=_wire_device())
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
        return float(number)

    def decide(self, decision: Callable[[], T]) -> T:
        """What the leader's call returns, in every process; what it raises is raised in all: nobody waits for it."""
        if self.size == 1:
            return decision()
        message: list[T | Exception | None] = [None]
        if self.leads:
            try:
                message[0] = decision()
            except PruningError as error:
                message[0] = error
            except Exception as error:
                message[0] = RuntimeError(f"the leading process failed: {type(error).__name__}: {error}")
                dist.broadcast_object_list(message, src=0, device=_wire_device())
                raise
        dist.broadcast_object_list(message, src=0, device=_wire_device())
        (answer,) = message
        if isinstance(answer, Exception):
            raise answer
        return answer  # type: ignore[return-value]  # None only if the decision returned None

    def copy_from_leader_(self, tensor: Tensor) -> None:
        """Overwrite the tensor by the leader's."""
        if self.size > 1:
            dist.broadcast(tensor, src=0)


def _wire_device() -> torch.device:
    """Where small messages must lie for the group's backend: NCCL carries nothing from the host."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
