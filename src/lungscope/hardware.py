"""What this machine is."""

from __future__ import annotations

import ctypes
import ipaddress
import os
import platform
from pathlib import Path
from typing import Any


def cores() -> int:
    """The processor's cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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


#: mallopt(3): release no free memory to the system; take no block from it outside the heap.
_MALLOPT = ((-1, -1), (-4, 0))


def keep_memory() -> bool:
    """Let this process keep the memory that it frees, where its C library is glibc; returns whether it does.

    Otherwise glibc returns each block of more than 32 MiB, which a network's activations are, and the system clears the
    next one's pages again: over a million page faults in a step of CoAtNet-0 on 16 films of 256², channels last.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    set_option = ctypes.CDLL(None).mallopt
    return all(set_option(option, value) == 1 for option, value in _MALLOPT)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
