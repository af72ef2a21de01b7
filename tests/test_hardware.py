"""Memory that a process keeps, seen from the system's side: by the pages that it has to clear."""

from __future__ import annotations

import platform

import pytest

from programs import python

FAULTS = """
import resource, sys
from lungscope.hardware import keep_freed_memory

def faults(size, count):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [bytearray(b"1") * size for _ in range(count)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def measure(size, count, *most):
    faults(size, count), faults(size, count)
    given_back = faults(size, count)
    assert keep_freed_memory(*most)
    faults(size, count), faults(size, count)
    print(given_back, faults(size, count))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep freed memory")
@pytest.mark.parametrize("arguments", ["2**23, 8", "2**26, 4, None"], ids=["films", "activations"])
def test_freed_memory_is_there_for_what_comes_next(arguments: str) -> None:
    done = python(FAULTS + f"measure({arguments})")
    assert done.returncode == 0, done.stderr
    given_back, kept = map(int, done.stdout.split())
    assert given_back > 1000
    assert kept < given_back / 100
