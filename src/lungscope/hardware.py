"""What this machine is."""

from __future__ import annotations

import ctypes
import ipaddress
import os
import platform
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

#: Parameters of mallopt (glibc's malloc.h).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def cores() -> int:
    """The processor's cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_freed_memory() -> None:
    """Have glibc keep up to 256 MiB of what arrays leave for those of the next film. It would give them back to the
    system each time, and getting them anew takes longer than filling them. Other C libraries are left as they are."""
    if sys.platform == "linux":
        with suppress(AttributeError):
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(_M_MMAP_THRESHOLD, 2**25)  # the most that it takes
            mallopt(_M_TRIM_THRESHOLD, 2**28)


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
