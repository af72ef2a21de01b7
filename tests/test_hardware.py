"""Memory that a process keeps."""

from __future__ import annotations

import platform

import pytest

from programs import python


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
def test_memory_that_is_kept_is_not_cleared_again() -> None:
    """Page faults of writing 64 MiB blocks one after the other: each time anew, and none once memory is kept."""
    done = python(
        "import resource, numpy as np\n"
        "from lungscope.hardware import keep_freed_memory\n"
        "def faults():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    for _ in range(10):\n"
        "        np.full(2**26, 1, np.uint8)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "faults(); anew = faults(); assert keep_freed_memory(None); faults(); print(anew, faults())\n"
    )
    assert done.returncode == 0, done.stderr
    anew, kept = map(int, done.stdout.split())
    assert anew > 100
    assert kept < anew / 10
