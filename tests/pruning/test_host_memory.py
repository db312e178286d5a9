"""Memory that is kept between the steps of a training on CPU."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys

import pytest
import torch

from pruning.host_memory import kept_memory

FAULTS = """
import json, resource, sys, threading, torch
from pruning.host_memory import kept_memory, one_arena

def faults():
    def once():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for mib in (40, 100, 200):
            torch.ones(mib * 2**18)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return min(once() for _ in range(12))  # the heap takes some rounds to find its size

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20

def work():
    found["usual"] = faults()
    with kept_memory(torch.device("cpu")):
        with kept_memory(torch.device("cpu")):
            pass
        found["kept"] = faults()
        found["resident within"] = resident()
    found["resident after"] = resident()
    found["after"] = faults()

found = {}
one_arena()
thread = threading.Thread(target=work)
thread.start()
thread.join()
print(json.dumps(found))
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library has no mallopt")
def test_pages_are_not_faulted_again_within_and_are_given_back_after() -> None:
    """In a thread, as stages run; 340 MiB are 87,040 pages of 4 KiB."""
    answer = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    found = json.loads(answer.stdout)
    assert found["usual"] > 80_000, found
    assert found["kept"] < 0.1 * found["usual"], found
    assert found["after"] > 0.5 * found["usual"], found
    assert found["resident after"] < found["resident within"] - 150, found


def test_other_devices_leave_the_allocator_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    monkeypatch.setattr("pruning.host_memory._call", lambda *call: calls.append(call))
    with kept_memory(torch.device("meta")):
        pass
    assert calls == []
    with pytest.raises(ValueError, match="as it is"), kept_memory(torch.device("cpu")):
        raise ValueError("as it is")
    assert ("malloc_trim", 0) in calls
