"""Which precision is chosen, and what a gate lets through: functions of what a machine has and what was measured."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lungscope.errors import BundleError, UsageError
from lungscope.precision import Compared, Gate, Offered, choose

GOOD = Gate(
    films=1000,
    dice=Compared(178, 0.97, 0.97 - 0.002),
    accuracy=Compared(1000, 0.93, 0.93 - 0.002),
    same_mask=0.995,
    same_class=0.998,
    speed=1.5,
)
BAD = replace(GOOD, same_class=0.5)
AVX2 = ("FP32", "INT8", "BIN", "EXPORT_IMPORT")
AMX = ("FP32", "BF16", "INT8", "BIN")
GPU = ("FP32", "FP16", "INT8")


def test_a_gate_is_passed_at_its_limits() -> None:
    assert GOOD.passed and GOOD.failures == []
    assert replace(GOOD, accuracy=None, same_class=None).passed
    assert replace(GOOD, severity_mae=0.05).passed
    assert replace(GOOD, dice=Compared(3, 0.9, 0.95)).passed, "better is not worse"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"dice": Compared(178, 0.97, 0.9679)}, "Dice falls by 0.0021, more than 0.002"),
        ({"accuracy": Compared(1000, 0.93, 0.927)}, "accuracy falls by 0.0030, more than 0.002"),
        ({"same_class": 0.997}, "99.70% of films keep their class, fewer than 99.8%"),
        ({"same_mask": 0.9949}, "masks have Dice 0.9949 with those of f32, less than 0.995"),
        ({"severity_mae": 0.06}, "zones' severity scores differ by 0.060 on average, more than 0.05"),
    ],
)
def test_a_gate_is_failed_past_any_limit(change: dict[str, Any], why: str) -> None:
    gate = replace(GOOD, **change)
    assert not gate.passed
    assert gate.failures == [why]
    assert gate.to_json()["passed"] is False


@pytest.mark.parametrize(
    ("device", "capabilities", "gates", "quantised", "machine", "chosen", "why"),
    [
        ("cpu", AVX2, {}, False, "x86_64", "f32", "no quantisation"),
        ("cpu", AVX2, {}, True, "x86_64", "f32", "int8: its gate was not measured"),
        ("cpu", AVX2, {"int8": GOOD}, True, "x86_64", "int8", "its gate was passed on 1000 films"),
        ("cpu", AVX2, {"int8": GOOD}, True, "AMD64", "int8", "native"),
        ("cpu", AVX2, {"int8": GOOD}, True, "aarch64", "f32", "on aarch64 was not measured"),
        ("cpu", AVX2, {"int8": BAD}, True, "x86_64", "f32", "its gate failed, 50.00% of films keep their class"),
        ("cpu", AVX2, {"int8": BAD, "bf16": GOOD}, True, "x86_64", "f32", "bf16: cpu does not compute it natively"),
        ("cpu", AMX, {"int8": BAD, "bf16": GOOD}, True, "x86_64", "bf16", "int8: its gate failed"),
        ("cpu", AMX, {"int8": GOOD, "bf16": GOOD}, True, "x86_64", "int8", "native"),
        ("cpu", AMX, {"int8": GOOD, "bf16": replace(GOOD, speed=1.6)}, True, "x86_64", "bf16", "int8: slower"),
        ("cpu", AMX, {"int8": replace(GOOD, speed=1.1)}, True, "x86_64", "f32", "int8: 1.10 times as fast as f32"),
        ("cpu", AMX, {"bf16": GOOD}, False, "x86_64", "bf16", "native"),
        ("cpu", AMX, {"bf16": BAD}, False, "x86_64", "f32", "bf16: its gate failed"),
        ("cpu", AMX, {"f16": GOOD}, False, "x86_64", "f32", "bf16: its gate was not measured"),
        ("gpu.0", GPU, {"int8": GOOD}, True, "x86_64", "f32", "f16: its gate was not measured"),
        ("gpu", GPU, {"f16": GOOD}, False, "x86_64", "f16", "native"),
        ("gpu", GPU, {"f16": BAD}, False, "x86_64", "f32", "f16: its gate failed"),
        ("npu", GPU, {"int8": GOOD, "f16": GOOD}, True, "x86_64", "f32", "nothing else is tried on npu"),
    ],
)
def test_auto_takes_what_is_native_and_passed(
    device: str, capabilities: tuple[str, ...], gates: dict[str, Gate], quantised: bool, machine: str, chosen: str,
    why: str,
) -> None:  # fmt: skip
    found, words = choose("auto", device, capabilities, Offered(gates, quantised), machine)
    assert found == chosen
    assert why in words


def test_what_is_asked_for_is_taken_without_a_gate() -> None:
    assert choose("bf16", "cpu", AMX, Offered())[0] == "bf16"
    assert choose("int8", "cpu", AVX2, Offered({"int8": BAD}, quantised=True))[0] == "int8"
    assert choose("f32", "npu", ("FP16",), Offered())[0] == "f32"


def test_what_can_not_be_computed_is_refused() -> None:
    with pytest.raises(UsageError, match=r"'bf16' is nothing that cpu computes natively\. It does f32, int8"):
        choose("bf16", "cpu", AVX2, Offered())
    with pytest.raises(UsageError, match=r"Precision 'fp32' does not exist\. Allowed: auto, f32.*Did you mean 'f32'"):
        choose("fp32", "cpu", AVX2, Offered())
    with pytest.raises(BundleError, match=r"needs a quantisation.*lungscope quantize BUNDLE"):
        choose("int8", "cpu", AVX2, Offered())
