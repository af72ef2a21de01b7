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
    speed=2.0,
)
BAD = replace(GOOD, same_class=0.5)
INT8 = ("FP32", "INT8", "BIN", "EXPORT_IMPORT")
BF16 = ("FP32", "BF16", "INT8", "BIN")
#: What processors have: Intel's newer servers, AMD's and Intel's older ones, laptops, none of it.
AMX = ("avx2", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
ZEN = ("avx2", "avx512_vnni", "avx512_bf16")
VNNI = ("avx2", "avx_vnni")
AVX2 = ("avx2",)
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
    ("device", "capabilities", "gates", "quantised", "features", "chosen", "why"),
    [
        ("cpu", INT8, {}, False, VNNI, "f32", "no quantisation"),
        ("cpu", INT8, {}, True, VNNI, "f32", "int8: its gate was not measured"),
        ("cpu", INT8, {"int8": GOOD}, True, VNNI, "int8", "its gate was passed on 1000 films"),
        ("cpu", INT8, {"int8": GOOD}, True, ZEN, "int8", "native"),
        (
            "cpu",
            INT8,
            {"int8": GOOD},
            True,
            AVX2,
            "f32",
            "int8: this processor has no amx_int8 or avx512_vnni or avx_vnni",
        ),
        ("cpu", INT8, {"int8": GOOD}, True, (), "f32", "which makes it fast"),
        ("cpu", INT8, {"int8": BAD}, True, VNNI, "f32", "its gate failed, 50.00% of films keep their class"),
        ("cpu", INT8, {"int8": BAD, "bf16": GOOD}, True, VNNI, "f32", "bf16: cpu does not compute it natively"),
        ("cpu", BF16, {"int8": BAD, "bf16": GOOD}, True, AMX, "bf16", "int8: its gate failed"),
        ("cpu", BF16, {"int8": BAD, "bf16": GOOD}, True, ZEN, "f32", "bf16: this processor has no amx_bf16"),
        ("cpu", BF16, {"int8": GOOD, "bf16": GOOD}, True, AMX, "int8", "native"),
        ("cpu", BF16, {"int8": GOOD, "bf16": replace(GOOD, speed=2.1)}, True, AMX, "bf16", "int8: slower"),
        ("cpu", BF16, {"int8": replace(GOOD, speed=1.9)}, True, AMX, "f32", "int8: 1.90 times as fast as f32"),
        ("cpu", BF16, {"bf16": GOOD}, False, AMX, "bf16", "native"),
        ("cpu", BF16, {"bf16": BAD}, False, AMX, "f32", "bf16: its gate failed"),
        ("cpu", BF16, {"f16": GOOD}, False, AMX, "f32", "bf16: its gate was not measured"),
        ("gpu.0", GPU, {"int8": GOOD}, True, AMX, "f32", "f16: its gate was not measured"),
        ("gpu", GPU, {"f16": GOOD}, False, AVX2, "f16", "native"),
        ("gpu", GPU, {"f16": BAD}, False, AVX2, "f32", "f16: its gate failed"),
        ("npu", GPU, {"int8": GOOD, "f16": GOOD}, True, AMX, "f32", "nothing else is tried on npu"),
    ],
)
def test_auto_takes_what_is_native_fast_and_passed(
    device: str, capabilities: tuple[str, ...], gates: dict[str, Gate], quantised: bool, features: tuple[str, ...],
    chosen: str, why: str,
) -> None:  # fmt: skip
    found, words = choose("auto", device, capabilities, Offered(gates, quantised), features)
    assert found == chosen
    assert why in words


def test_what_is_asked_for_is_taken_without_a_gate() -> None:
    assert choose("bf16", "cpu", BF16, Offered())[0] == "bf16"
    assert choose("int8", "cpu", INT8, Offered({"int8": BAD}, quantised=True))[0] == "int8"
    assert choose("f32", "npu", ("FP16",), Offered())[0] == "f32"


def test_what_can_not_be_computed_is_refused() -> None:
    with pytest.raises(UsageError, match=r"'bf16' is nothing that cpu computes natively\. It does f32, int8"):
        choose("bf16", "cpu", INT8, Offered())
    with pytest.raises(UsageError, match=r"Precision 'fp32' does not exist\. Allowed: auto, f32.*Did you mean 'f32'"):
        choose("fp32", "cpu", INT8, Offered())
    with pytest.raises(BundleError, match=r"needs a quantisation.*lungscope quantize BUNDLE"):
        choose("int8", "cpu", INT8, Offered())
