"""Energy counters are read where they are, run over, and are None where they can not be read."""

from __future__ import annotations

from pathlib import Path

from lungscope.training.energy import EnergyMeter


def _zone(folder: Path, name: str, microjoules: int, span: int = 100_000_000) -> Path:
    zone = folder / name
    zone.mkdir(parents=True, exist_ok=True)
    (zone / "energy_uj").write_text(f"{microjoules}\n")
    (zone / "max_energy_range_uj").write_text(f"{span}\n")
    return zone


def test_packages_are_added_and_their_parts_are_not(tmp_path: Path) -> None:
    for name in ("intel-rapl:0", "intel-rapl:1", "intel-rapl:0:0"):
        _zone(tmp_path, name, 1_000_000)
    meter = EnergyMeter(tmp_path)
    _zone(tmp_path, "intel-rapl:0", 3_500_000)
    _zone(tmp_path, "intel-rapl:1", 2_000_000)
    _zone(tmp_path, "intel-rapl:0:0", 90_000_000)
    assert meter.joules()["processors"] == 3.5
    assert meter.joules()["processors"] == 0


def test_a_counter_that_began_anew(tmp_path: Path) -> None:
    _zone(tmp_path, "intel-rapl:0", 99_000_000)
    meter = EnergyMeter(tmp_path)
    _zone(tmp_path, "intel-rapl:0", 500_000)
    assert meter.joules()["processors"] == 1.5


def test_what_can_not_be_read_is_none(tmp_path: Path) -> None:
    assert EnergyMeter(tmp_path).joules()["processors"] is None
    _zone(tmp_path, "intel-rapl:0", 1_000_000)
    broken = _zone(tmp_path, "intel-rapl:1", 1_000_000)
    meter = EnergyMeter(tmp_path)
    (broken / "energy_uj").unlink()
    assert meter.joules()["processors"] is None
