"""Energy of a training, where the hardware counts it: processors by Linux's powercap (RAPL), GPUs by NVML."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


class EnergyMeter:
    """Joules of this machine between calls, whatever else it does meanwhile.

    powercap: the folder of Linux's powercap zones; its counters are usually for root alone to read.
    """

    def __init__(self, powercap: Path = POWERCAP) -> None:
        self._counters = {"processors": _processors(powercap), "gpus": _gpus()}
        self._last = {kind: [read() for read, _ in counters] for kind, counters in self._counters.items()}

    def joules(self) -> dict[str, float | None]:
        """Since the call before, or since the meter was made: of all "processors", of all "gpus"; None where not every
        one of them can be read."""
        found: dict[str, float | None] = {}
        for kind, counters in self._counters.items():
            now = [read() for read, _ in counters]
            spent = [
                None if a is None or b is None else (b - a) % span
                for a, b, (_, span) in zip(self._last[kind], now, counters, strict=True)
            ]
            self._last[kind] = now
            known = [joules for joules in spent if joules is not None]
            found[kind] = round(sum(known), 1) if known and len(known) == len(spent) else None
        return found


#: A counter in joules, None while it can not be read, and where it begins anew at 0.
_Counter = tuple[Callable[[], float | None], float]


def _processors(powercap: Path) -> list[_Counter]:
    """One counter a package: zones intel-rapl:N, AMD's too, whose parts are intel-rapl:N:M (Linux, power/powercap)."""
    zones = [zone for zone in sorted(powercap.glob("intel-rapl:*")) if zone.name.count(":") == 1]
    return [
        (partial(_microjoules, zone / "energy_uj"), _microjoules(zone / "max_energy_range_uj") or math.inf)
        for zone in zones
    ]


def _microjoules(path: Path) -> float | None:
    try:
        return int(path.read_text()) / 1e6
    except (OSError, ValueError):
        return None


def _gpus() -> list[_Counter]:
    try:
        import pynvml
    except ModuleNotFoundError:
        return []
    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(n) for n in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []

    def read(handle: object) -> float | None:
        try:
            return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3
        except pynvml.NVMLError:
            return None

    return [(partial(read, handle), math.inf) for handle in handles]
