"""A weights bundle: a folder with ONNX files, their papers, and the manifest that says what they are."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from lungscope.errors import BundleError, look_up
from lungscope.precision import CAPABILITIES, Compared, Gate, Offered
from lungscope.runtime import Quantized, Weights
from lungscope.stages.classification import INPUTS, ClassifierSpec, Conformal, ViewSpec
from lungscope.stages.segmentation import POOLS, SegmenterSpec

MANIFEST = "manifest.json"
MODEL_CARD = "MODEL_CARD.md"
SCHEMA_VERSION = "3"
EMBEDDED = Path(__file__).parent / "models"


@dataclass(frozen=True)
class Bundle:
    """A bundle whose every file has been checked against its manifest.

    files: SHA-256 by file name. classifier: None in a bundle that only segments. offered: the precisions that it was
    measured in besides f32; none in many. manifest: the whole manifest, as read.
    """

    root: Path
    name: str
    version: str
    files: dict[str, str]
    segmenter: SegmenterSpec
    classifier: ClassifierSpec | None
    offered: Offered
    manifest: dict[str, Any]

    @classmethod
    def load(cls, root: Path | None = None) -> Bundle:
        """Read and verify a bundle; None is the embedded default.

        Raises BundleError if there is none, if a file is missing or altered, if the manifest has another schema, a key
        that is not known, or a value that makes no sense.
        """
        root = EMBEDDED / "default" if root is None else Path(root)
        document = _read_manifest(root)
        bundle = _parse(root, document)
        bundle.verify()
        return bundle

    def verify(self) -> None:
        """Hold every file against its SHA-256. Raises BundleError for one that is missing or altered."""
        for name, digest in self.files.items():
            _verify(self.root / name, digest)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the manifest's content as sorted JSON: it names every file by its own, and every limit."""
        return hashlib.sha256(json.dumps(self.manifest, sort_keys=True).encode()).hexdigest()

    @property
    def weights(self) -> tuple[Weights, ...]:
        """Every ONNX file that the bundle computes with."""
        extra = () if self.classifier is None else (self.classifier.weights,)
        return self.segmenter.members + extra


def embedded() -> dict[str, Path]:
    """The bundles that came with the package, by folder name."""
    return {path.parent.name: path.parent for path in sorted(EMBEDDED.glob(f"*/{MANIFEST}"))}


def locate(model: str | None) -> Path:
    """The folder of a bundle named on a command line: a path, or the name of an embedded one; None is the default.

    Raises BundleError naming what there is.
    """
    if model is None:
        return EMBEDDED / "default"
    path = Path(model)
    if path.is_dir():
        return path
    have = embedded()
    if model in have:
        return have[model]
    raise BundleError(
        f"No bundle {model!r}: it is neither a folder nor an embedded bundle. "
        f"Embedded: {', '.join(have) or 'none'}. Give a folder that holds a {MANIFEST}."
    )


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_manifest(root: Path) -> dict[str, Any]:
    path = root / MANIFEST

    def refuse(constant: str) -> NoReturn:
        raise BundleError(f"{path}: {constant} is not a number that a manifest may hold.")

    try:
        document = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    except FileNotFoundError:
        raise BundleError(
            f"No weights bundle at {root}: {MANIFEST} is missing. Reinstall lungscope, or name a bundle with --model."
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BundleError(f"{path} is not a manifest that can be read: {error}") from error
    if not isinstance(document, dict):
        raise BundleError(f"{path} holds a {type(document).__name__}; a manifest is an object.")
    schema = document.get("schema_version")
    if schema != SCHEMA_VERSION:
        raise BundleError(
            f"{path} has schema_version {schema!r}; this lungscope reads {SCHEMA_VERSION!r}. "
            "Use the lungscope that the bundle was made for, or a bundle made for this one."
        )
    return document


def _verify(path: Path, expected: str) -> None:
    try:
        actual = sha256_of(path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise BundleError(
            f"{path} is in the manifest but can not be read ({reason}). Install the bundle again."
        ) from error
    if actual != expected:
        raise BundleError(
            f"{path} has been altered or is incomplete: its SHA-256 is {actual}, the manifest says {expected}. "
            "Install the bundle again."
        )


def _parse(root: Path, document: dict[str, Any]) -> Bundle:
    top = _Section(document, str(root / MANIFEST))
    top.keys(
        required="schema_version name version files segmenter classifier licence disclaimer created",
        optional="parity training precision",
    )
    files = top.section("files")
    digests = {name: files.text(name) for name in files.values}
    for name, digest in digests.items():
        if Path(name).name != name or name in {"", ".", "..", MANIFEST} or "\\" in name:
            files.fail(f"{name!r} is not a plain file name inside the bundle")
        if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
            files.fail(f"{name!r} has the digest {digest!r}; a SHA-256 is 64 lower-case hex digits")

    def listed(section: _Section, key: str) -> str:
        file = section.text(key)
        if file not in digests:
            section.fail(f"{file!r} is not listed under 'files', so it can not be verified")
        return file

    precision = top.section("precision") if "precision" in document else _Section({"int8": {}, "gates": {}}, "")
    precision.keys(required="int8 gates")
    int8 = precision.section("int8")

    def weights(section: _Section) -> Weights:
        file = listed(section, "file")
        found = listed(int8, file) if file in int8.values else None
        quantized = None if found is None else Quantized(root / found, digests[found])
        return Weights(section.text("network"), root / file, digests[file], quantized)

    segmenter = top.section("segmenter")
    segmenter.keys(required="members pool threshold size labels", optional="opaque grades")
    members = segmenter.sections("members")
    labels = segmenter.texts("labels")
    if labels != ("lung",):
        segmenter.fail(f"labels are {list(labels)}; a lung segmenter has ['lung']")
    for member in members:
        member.keys(required="network file", optional="labels")
        if "labels" in member.values and member.texts("labels") != labels:
            member.fail(f"labels {list(member.texts('labels'))} differ from the ensemble's {list(labels)}")
    bundle = Bundle(
        root=root,
        name=top.text("name"),
        version=top.text("version"),
        files=digests,
        segmenter=SegmenterSpec(
            members=tuple(weights(member) for member in members),
            pool=segmenter.choice("pool", POOLS),
            threshold=segmenter.number("threshold", 0, 1),
            size=segmenter.count("size"),
            opaque=segmenter.number("opaque", 0, 1) if "opaque" in segmenter.values else None,
            grades=_grades(segmenter) if "grades" in segmenter.values else None,
        ),
        classifier=None if document["classifier"] is None else _classifier(top.section("classifier"), weights),
        offered=_offered(precision, digests),
        manifest=document,
    )
    graphs = [found.path.name for found in bundle.weights]
    for file in int8.values:
        look_up(file, graphs, what=f"{int8.where}: the graph", error=BundleError)
    return bundle


def _grades(section: _Section) -> tuple[float, float, float]:
    limits = section.numbers("grades")
    if len(limits) != 3 or not limits[0] < limits[1] < limits[2]:
        section.fail(f"'grades' are {list(limits)}; three numbers that rise are needed")
    return limits[0], limits[1], limits[2]


def _offered(section: _Section, digests: dict[str, str]) -> Offered:
    gates = section.section("gates")
    names = [name for name in CAPABILITIES if name != "f32"]
    gates.keys(required="", optional=" ".join(names))
    return Offered({name: _gate(gates.section(name), digests) for name in gates.values}, bool(section.values["int8"]))


def _gate(section: _Section, digests: dict[str, str]) -> Gate:
    section.keys(
        required="passed films dice accuracy same_mask same_class speed measured", optional="margin again severity_mae"
    )
    weights = section.section("measured").section("weights")
    for file in weights.values:
        if weights.text(file) != digests.get(file):
            weights.fail(f"the gate was measured with another {file!r}. Measure again: lungscope quantize")

    def compared(key: str) -> Compared:
        score = section.section(key)
        score.keys(required="films f32 value")
        return Compared(score.count("films", 10**9), score.number("f32", 0, 1), score.number("value", 0, 1))

    gate = Gate(
        films=section.count("films", 10**9),
        dice=compared("dice"),
        accuracy=None if section.values["accuracy"] is None else compared("accuracy"),
        same_mask=section.number("same_mask", 0, 1),
        same_class=None if section.values["same_class"] is None else section.number("same_class", 0, 1),
        speed=section.number("speed", 0, 1e6),
        margin=section.number("margin", 0, 1e6) if "margin" in section.values else 0.0,
        again=section.number("again", 0, 1) if "again" in section.values else 0.0,
        severity_mae=None if section.values.get("severity_mae") is None else section.number("severity_mae", 0, 3),
    )
    if section.values["passed"] is not gate.passed:
        found = "; ".join(gate.failures) or "they pass"
        section.fail(f"'passed' is {section.values['passed']!r}, which its numbers do not say ({found})")
    return gate


def _classifier(section: _Section, weights: Callable[[_Section], Weights]) -> ClassifierSpec:
    section.keys(required="network file labels bias view temperature conformal", optional="mirror")
    view = section.section("view")
    view.keys(required="input crop margin size", optional="equalised aligned")
    labels = section.texts("labels")
    bias = section.numbers("bias")
    if len(labels) < 2 or len(set(labels)) != len(labels):
        section.fail(f"labels are {list(labels)}; at least two, all different, are needed")
    if len(bias) != len(labels):
        section.fail(f"'bias' has {len(bias)} numbers for {len(labels)} labels")
    equalised, aligned = (key in view.values and view.truth(key) for key in ("equalised", "aligned"))
    if aligned and not view.truth("crop"):
        view.fail("'aligned' lungs are cut out, and 'crop' is false")
    return ClassifierSpec(
        weights=weights(section),
        labels=labels,
        bias=bias,
        view=ViewSpec(
            input=view.choice("input", INPUTS),
            crop=view.truth("crop"),
            margin=view.number("margin", 0, 1),
            size=view.count("size"),
            equalised=equalised,
            aligned=aligned,
        ),
        temperature=section.number("temperature", 1e-3, 1e3),
        conformal=None if section.values["conformal"] is None else _conformal(section.section("conformal"), labels),
        mirror=section.number("mirror", 0, 1e6) if "mirror" in section.values else 0.0,
    )


def _conformal(section: _Section, labels: tuple[str, ...]) -> Conformal:
    section.keys(required="coverage thresholds")
    thresholds = section.numbers("thresholds")
    if len(thresholds) != len(labels) or not all(0 <= threshold <= 1 for threshold in thresholds):
        section.fail(f"'thresholds' are {list(thresholds)}; {len(labels)} numbers in 0..1 are needed")
    return Conformal(section.number("coverage", 0, 1), thresholds)


class _Section:
    """One object of the manifest, with checks that say where they failed."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = values
        self.where = where

    def fail(self, what: str) -> NoReturn:
        raise BundleError(f"{self.where}: {what}.")

    def keys(self, required: str, optional: str = "") -> None:
        needed, allowed = required.split(), required.split() + optional.split()
        if missing := [key for key in needed if key not in self.values]:
            self.fail(f"{', '.join(map(repr, missing))} missing")
        for key in self.values:
            look_up(key, allowed, what=f"{self.where}: the key", error=BundleError)

    def _get(self, key: str, kind: type | tuple[type, ...], what: str) -> Any:
        value = self.values[key]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            self.fail(f"{key!r} is {value!r}; {what} is needed")
        return value

    def text(self, key: str) -> str:
        return str(self._get(key, str, "a text"))

    def texts(self, key: str) -> tuple[str, ...]:
        values = self._get(key, list, "a list of texts")
        if not values or not all(isinstance(value, str) for value in values):
            self.fail(f"{key!r} is {values!r}; a list of texts is needed")
        return tuple(values)

    def number(self, key: str, low: float, high: float) -> float:
        value = float(self._get(key, (int, float), "a number"))
        if not low <= value <= high:
            self.fail(f"{key!r} is {value}; it must lie in {low}..{high}")
        return value

    def numbers(self, key: str) -> tuple[float, ...]:
        values = self._get(key, list, "a list of numbers")
        if not all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in values):
            self.fail(f"{key!r} is {values!r}; a list of numbers is needed")
        return tuple(float(value) for value in values)

    def count(self, key: str, most: int = 4096) -> int:
        value = int(self._get(key, int, "a whole number"))
        if not 1 <= value <= most:
            self.fail(f"{key!r} is {value}; it must lie in 1..{most}")
        return value

    def truth(self, key: str) -> bool:
        return bool(self._get(key, bool, "true or false"))

    def choice(self, key: str, allowed: tuple[Any, ...]) -> Any:
        return look_up(self.text(key), allowed, what=f"{self.where}: {key}", error=BundleError)

    def section(self, key: str) -> _Section:
        return _Section(self._get(key, dict, "an object"), f"{self.where}: {key}")

    def sections(self, key: str) -> list[_Section]:
        values = self._get(key, list, "a list of objects")
        if not values or not all(isinstance(value, dict) for value in values):
            self.fail(f"{key!r} is {values!r}; a list of objects is needed")
        return [_Section(value, f"{self.where}: {key}[{index}]") for index, value in enumerate(values)]
