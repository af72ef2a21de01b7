"""What is set on this machine, seen from the system's side."""

from __future__ import annotations

import platform

import pytest

from programs import python

FILMS = """
import resource
from lungscope.hardware import keep_freed_memory

def film():
    return [bytearray(b"1") * 2**23 for _ in range(8)]

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    film()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

film(), film()
given_back = faults()
keep_freed_memory()
film(), film()
print(given_back, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep freed memory")
def test_freed_memory_is_there_for_the_next_film() -> None:
    given_back, kept = map(int, python(FILMS).stdout.split())
    assert kept < given_back / 100
