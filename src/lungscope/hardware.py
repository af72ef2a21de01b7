"""What this machine is."""

from __future__ import annotations

import ctypes
import ipaddress
import os
import platform
import sys
from pathlib import Path
from typing import Any

#: Parameters of mallopt (glibc's malloc.h). Setting the threshold above which blocks are mapped stops glibc from
#: raising it.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4


def cores() -> int:
    """The processor's cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_freed_memory(most: int | None = 2**28) -> bool:
    """Have glibc keep what large arrays leave for those that come next: `most` bytes of it, None for all. Returns
    whether it does; other C libraries are left as they are.

    It would give them back to the system each time, and pages that the system has to clear again cost more than filling
    them: over a million page faults in a training step of CoAtNet-0 on 16 films of 256². With `most`, blocks above
    32 MiB still go back.
    """
    if most is None:
        return _tune({_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1})
    return _tune({_M_MMAP_THRESHOLD: 2**25, _M_TRIM_THRESHOLD: most})


def give_back_freed_arrays() -> bool:
    """Have glibc take every array from the system, and give it back when it is freed; what is set last counts. Returns
    whether it does.

    For a process that waits most of the time, as a server: after a flood of films `keep_freed_memory` holds half a
    gigabyte.
    """
    return _tune({_M_MMAP_THRESHOLD: 2**20})


def _tune(settings: dict[int, int]) -> bool:
    """Set parameters of glibc's malloc; returns whether it took them."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    return mallopt is not None and all(mallopt(parameter, value) == 1 for parameter, value in settings.items())


def give_back_memory() -> None:
    """Give freed memory back to the system, with glibc; others do as they like."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def processor() -> dict[str, Any]:
    """The processor's name, its cores that this process may use, and the vector extensions that matter here."""
    name, flags = platform.processor(), set[str]()
    info = Path("/proc/cpuinfo")
    if info.exists():
        fields = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        fields = {key.strip(): value.strip() for key, value in fields.items()}
        name = fields.get("model name", name)
        flags = set((fields.get("flags") or fields.get("Features") or "").split())
    wanted = (
        "sse4_2",
        "avx2",
        "fma",
        "avx512f",
        "avx512_vnni",
        "avx_vnni",
        "avx512_bf16",
        "avx512_fp16",
        "amx_bf16",
        "amx_int8",
        "asimd",
        "bf16",
    )
    return {"name": name, "cores": cores(), "features": [flag for flag in wanted if flag in flags]}


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
