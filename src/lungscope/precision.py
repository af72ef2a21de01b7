"""In which arithmetic a bundle's networks are computed, and the gate that any other than f32 has to pass."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from lungscope.errors import BundleError, UsageError, look_up

#: What may be asked for. auto: the fastest that the device computes natively and whose gate was passed, else f32.
PRECISIONS = ("auto", "f32", "bf16", "f16", "int8")
#: How OpenVINO's OPTIMIZATION_CAPABILITIES call what a device computes natively.
CAPABILITIES = {"f32": "FP32", "bf16": "BF16", "f16": "FP16", "int8": "INT8"}
#: What auto tries on a kind of device; on any other kind f32 alone.
TRIED = {"cpu": ("int8", "bf16"), "gpu": ("f16",)}
#: Of these vector extensions a processor must have one for auto to take a precision, whatever its gate says of another
#: processor's speed. Intel's without AMX compute bf16 more slowly than f32, and x86 without VNNI gains little by int8.
NEEDED = {"int8": ("amx_int8", "avx512_vnni", "avx_vnni"), "bf16": ("amx_bf16",)}

#: The most that mean Dice with the drawn lungs, and accuracy, may fall below f32's.
MOST_LOST = 0.002
#: The least share of films with f32's class, and the least mean Dice with f32's masks.
LEAST_SAME_CLASS = 0.998
LEAST_SAME_MASK = 0.995
#: The most that a zone's severity score, 0 to 3, may differ from f32's on average.
MOST_SEVERITY_MAE = 0.05
#: How many times as fast as f32 auto wants networks to be, close calls included. For less it is not worth that a film
#: that is computed twice waits longer than in f32, that a process starts more slowly, that the networks of both
#: precisions take up memory, and that a zone's severity differs between machines.
LEAST_SPEED = 2.0
#: Differences of such numbers are exact to this.
_EXACT = 1e-9


@dataclass(frozen=True)
class Compared:
    """One score in f32 and in another precision. films: n."""

    films: int
    f32: float
    value: float

    @property
    def lost(self) -> float:
        """How far it fell below f32's; negative where it rose."""
        return self.f32 - self.value


@dataclass(frozen=True)
class Gate:
    """What another precision changed, on films of the validation part.

    dice: strict mean Dice with drawn lungs. accuracy: share of right classes; None without a classifier.
    same_mask: mean Dice with f32's masks. same_class: share of films with f32's class; None without a classifier.
    speed: f32's time in the networks over this one's, where it was measured.
    margin: where the two largest logits are closer than this, the film was computed again in f32, and is wherever this
    precision is used; 0 never is. again: share of films that it happened to. All numbers are with it.
    severity_mae: mean absolute difference of the zones' severity scores from f32's, 0..3; a zone that one of both did
    not find counts as 3. None where it was not measured.
    """

    films: int
    dice: Compared
    accuracy: Compared | None
    same_mask: float
    same_class: float | None
    speed: float
    margin: float = 0.0
    again: float = 0.0
    severity_mae: float | None = None

    @property
    def failures(self) -> list[str]:
        """What was not held, in words; none for a gate that is passed."""
        found = []
        if self.dice.lost > MOST_LOST + _EXACT:
            found.append(f"Dice falls by {self.dice.lost:.4f}, more than {MOST_LOST}")
        if self.accuracy is not None and self.accuracy.lost > MOST_LOST + _EXACT:
            found.append(f"accuracy falls by {self.accuracy.lost:.4f}, more than {MOST_LOST}")
        if self.same_class is not None and self.same_class < LEAST_SAME_CLASS - _EXACT:
            found.append(f"{self.same_class:.2%} of films keep their class, fewer than {LEAST_SAME_CLASS:.1%}")
        if self.same_mask < LEAST_SAME_MASK - _EXACT:
            found.append(f"masks have Dice {self.same_mask:.4f} with those of f32, less than {LEAST_SAME_MASK}")
        if self.severity_mae is not None and self.severity_mae > MOST_SEVERITY_MAE + _EXACT:
            found.append(
                f"zones' severity scores differ by {self.severity_mae:.3f} on average, more than {MOST_SEVERITY_MAE}"
            )
        return found

    @property
    def passed(self) -> bool:
        return not self.failures

    def describe(self, name: str) -> str:
        """The gate of precision `name` in a line."""
        what = "passed" if self.passed else f"failed, {'; '.join(self.failures)}"
        again = f", {self.again:.1%} of them again in f32" if self.margin else ""
        return f"{name}: {what}; {self.films} films{again}, networks {self.speed:.2f} times as fast as in f32"

    def to_json(self) -> dict[str, Any]:
        def compared(score: Compared | None) -> dict[str, Any] | None:
            return None if score is None else {"films": score.films, "f32": score.f32, "value": score.value}

        return {
            "passed": self.passed,
            "films": self.films,
            "dice": compared(self.dice),
            "accuracy": compared(self.accuracy),
            "same_mask": self.same_mask,
            "same_class": self.same_class,
            "speed": self.speed,
            "margin": self.margin,
            "again": self.again,
            "severity_mae": self.severity_mae,
        }


@dataclass(frozen=True)
class Offered:
    """What a bundle can be computed in. gates: by precision, what was measured. quantised: whether it has int8."""

    gates: Mapping[str, Gate] = field(default_factory=dict)
    quantised: bool = False

    def margin(self, precision: str) -> float:
        """The margin that `precision` was measured with; 0 where it was not."""
        return self.gates[precision].margin if precision in self.gates else 0.0


def choose(
    asked: str,
    device: str,
    capabilities: Collection[str],
    offered: Offered,
    features: Collection[str] = (),
) -> tuple[str, str]:
    """The precision to compute in, and why in words.

    asked: one of `PRECISIONS`. device: in lower case. capabilities: OpenVINO's, of that device. features: the
    processor's vector extensions, as `hardware.processor` names them.
    Raises UsageError for a precision that does not exist or that the device does not compute natively, BundleError for
    int8 without a quantisation.
    """
    look_up(asked, PRECISIONS, what="Precision")
    if asked == "auto":
        return _fastest(device, capabilities, offered, features)
    # Every device computes f32 some way.
    if asked != "f32" and CAPABILITIES[asked] not in capabilities:
        can = [name for name, needed in CAPABILITIES.items() if needed in capabilities]
        raise UsageError(
            f"Precision {asked!r} is nothing that {device} computes natively. It does {', '.join(can)}. Ask for one of "
            "them, or for auto."
        )
    if asked == "int8" and not offered.quantised:
        raise BundleError(
            "Precision 'int8' needs a quantisation, which this bundle does not have. "
            "Make it: lungscope quantize BUNDLE --data STORE --split SPLIT"
        )
    return asked, "asked for"


def _fastest(
    device: str, capabilities: Collection[str], offered: Offered, features: Collection[str]
) -> tuple[str, str]:
    found: dict[str, Gate] = {}
    passed_over = []
    kind = device.partition(".")[0]
    for name in TRIED.get(kind, ()):
        gate = offered.gates.get(name)
        if CAPABILITIES[name] not in capabilities:
            passed_over.append(f"{name}: {device} does not compute it natively")
        elif kind == "cpu" and not set(NEEDED[name]) & set(features):
            passed_over.append(f"{name}: this processor has no {' or '.join(NEEDED[name])}, which makes it fast")
        elif name == "int8" and not offered.quantised:
            passed_over.append(f"{name}: the bundle has no quantisation")
        elif gate is None:
            passed_over.append(f"{name}: its gate was not measured for this bundle")
        elif not gate.passed:
            passed_over.append(f"{name}: its gate failed, {gate.failures[0]}")
        elif gate.speed < LEAST_SPEED:
            passed_over.append(
                f"{name}: {gate.speed:.2f} times as fast as f32 where its gate was measured, less than {LEAST_SPEED}"
            )
        else:
            found[name] = gate
    if not found:
        return "f32", "; ".join(passed_over) or f"nothing else is tried on {device}"
    best = max(found, key=lambda name: found[name].speed)
    slower = [f"{name}: slower where the gates were measured" for name in found if name != best]
    passed = f"{best}: native, and its gate was passed on {found[best].films} films"
    return best, "; ".join([passed, *slower, *passed_over])
