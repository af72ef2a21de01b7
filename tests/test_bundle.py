"""A bundle loads only if it is whole, unaltered, and says nothing that is not understood."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bundles import BIAS, LABELS, SIZE, write_bundle
from lungscope.bundle import Bundle, embedded, locate
from lungscope.errors import BundleError
from lungscope.stages.classification import ViewSpec


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "b")


def alter(root: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = root / "manifest.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_a_valid_bundle_says_what_it_holds(bundle: Path) -> None:
    alter(bundle, lambda d: d["segmenter"].update(threshold=0.4))
    alter(bundle, lambda d: d["classifier"].update(temperature=0.5, mirror=0.75))
    alter(bundle, lambda d: d["classifier"]["view"].update(aligned=True))
    loaded = Bundle.load(bundle)
    assert (loaded.name, loaded.version) == ("tiny", "0.1.0")
    assert set(loaded.files) == {"segmenter.onnx", "classifier.onnx", "LICENCE"}
    assert (loaded.segmenter.size, loaded.segmenter.threshold) == (SIZE, 0.4)
    assert loaded.classifier is not None
    assert loaded.classifier.labels == LABELS
    assert loaded.classifier.bias == BIAS
    assert (loaded.classifier.temperature, loaded.classifier.mirror) == (0.5, 0.75)
    assert loaded.classifier.view == ViewSpec("lungs", True, 0.05, SIZE, aligned=True)
    assert [weights.path.name for weights in loaded.weights] == ["segmenter.onnx", "classifier.onnx"]


def test_a_bundle_may_only_segment(tmp_path: Path) -> None:
    loaded = Bundle.load(write_bundle(tmp_path, classifier=False))
    assert loaded.classifier is None
    assert len(loaded.weights) == 1


@pytest.mark.parametrize("name", ["segmenter.onnx", "classifier.onnx", "LICENCE"])
def test_one_flipped_bit_in_any_file_is_refused(bundle: Path, name: str) -> None:
    data = bytearray((bundle / name).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / name).write_bytes(data)
    with pytest.raises(BundleError, match=f"{name} has been altered"):
        Bundle.load(bundle)


def test_a_missing_file_is_refused(bundle: Path) -> None:
    (bundle / "LICENCE").unlink()
    with pytest.raises(BundleError, match=r"LICENCE is in the manifest but can not be read"):
        Bundle.load(bundle)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"schema_version": NaN}', "\udcff"])
def test_a_broken_manifest_is_refused(bundle: Path, text: str) -> None:
    (bundle / "manifest.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(BundleError, match=r"manifest\.json"):
        Bundle.load(bundle)


def test_a_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="No weights bundle"):
        Bundle.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(schema_version="2"), "schema_version '2'; this lungscope reads '3'"),
        (lambda d: d.update(segmentr=1), "'segmentr' does not exist.*Did you mean 'segmenter'"),
        (lambda d: d["segmenter"].update(treshold=1), "Did you mean 'threshold'"),
        (lambda d: d["classifier"].pop("bias"), "'bias' missing"),
        (lambda d: d["classifier"].update(bias=[0.0]), "'bias' has 1 numbers for 3 labels"),
        (lambda d: d["classifier"].update(bias=[0.0, "1", 2]), "a list of numbers"),
        (lambda d: d["classifier"].update(labels=["a", "a", "b"]), "all different"),
        (lambda d: d["classifier"].update(temperature=0), r"must lie in 0\.001"),
        (lambda d: d["classifier"].update(conformal=True), "an object is needed"),
        (lambda d: d["classifier"]["conformal"].update(coverage=True), "a number is needed"),
        (lambda d: d["classifier"]["conformal"].update(thresholds=[0.5, 0.5]), r"3 numbers in 0\.\.1"),
        (lambda d: d["classifier"]["conformal"].update(thresholds=[0.5, 0.5, 1.5]), r"3 numbers in 0\.\.1"),
        (lambda d: d["classifier"]["view"].update(input="lung"), "Did you mean 'lungs'"),
        (lambda d: d["classifier"]["view"].update(crop=1), "true or false"),
        (lambda d: d["classifier"]["view"].update(crop=False, aligned=True), "'aligned' lungs are cut out"),
        (lambda d: d["segmenter"].update(pool="median"), "Allowed: mean, union, vote"),
        (lambda d: d["segmenter"].update(members=[]), "a list of objects is needed"),
        (lambda d: d["segmenter"].update(opaque=True), "a number is needed"),
        (lambda d: d["segmenter"].update(opaque=1.5), r"must lie in 0\.\.1"),
        (lambda d: d["segmenter"].update(grades=[0.5, 1.0]), "three numbers that rise"),
        (lambda d: d["segmenter"].update(grades=[0.5, 1.5, 1.0]), "three numbers that rise"),
        (lambda d: d["segmenter"].update(size=64.0), "a whole number is needed"),
        (lambda d: d["segmenter"].update(labels=["lung", "heart"]), "a lung segmenter has"),
        (lambda d: d["segmenter"]["members"][0].update(labels=["heart"]), "differ from the ensemble's"),
        (lambda d: d["segmenter"]["members"][0].update(file="other.onnx"), "not listed under 'files'"),
        (lambda d: d["files"].update({"../x": "0" * 64}), "not a plain file name"),
        (lambda d: d["files"].update({"LICENCE": "ABC"}), "64 lower-case hex digits"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(
    bundle: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    alter(bundle, change)
    with pytest.raises(BundleError, match=message):
        Bundle.load(bundle)


def test_locate_takes_a_folder_or_a_name(bundle: Path) -> None:
    assert locate(str(bundle)) == bundle
    assert locate(None).name == "default"
    with pytest.raises(BundleError, match="neither a folder nor an embedded bundle"):
        locate("no-such-bundle")
    for name, path in embedded().items():
        assert locate(name) == path


# Precisions ----------------------------------------------------------------------------------------------------------

GATE = {
    "passed": True,
    "films": 100,
    "dice": {"films": 20, "f32": 0.97, "value": 0.969},
    "accuracy": {"films": 100, "f32": 0.93, "value": 0.93},
    "same_mask": 0.997,
    "same_class": 0.999,
    "speed": 1.5,
    "measured": {"weights": {}},
}


def test_a_bundle_that_says_nothing_of_precisions_is_f32(bundle: Path) -> None:
    offered = Bundle.load(bundle).offered
    assert (dict(offered.gates), offered.quantised) == ({}, False)


def test_gates_are_read(bundle: Path) -> None:
    alter(bundle, lambda d: d.update(precision={"int8": {}, "gates": {"bf16": {**GATE, "margin": 1.5, "again": 0.1}}}))
    gate = Bundle.load(bundle).offered.gates["bf16"]
    assert (gate.severity_mae, gate.margin, gate.again) == (None, 1.5, 0.1)
    assert gate.passed and gate.dice.lost == pytest.approx(0.001)


@pytest.mark.parametrize(
    ("section", "why"),
    [
        ({}, "'int8', 'gates' missing"),
        ({"int8": {}, "gates": {}, "int4": {}}, "'int4' does not exist"),
        ({"int8": {"segmenter.onnx": "absent.npz"}, "gates": {}}, "'absent.npz' is not listed under 'files'"),
        ({"int8": {"other.onnx": "LICENCE"}, "gates": {}}, "the graph 'other.onnx' does not exist"),
        ({"int8": {}, "gates": {"f32": GATE}}, "'f32' does not exist"),
        ({"int8": {}, "gates": {"bf16": {**GATE, "passed": False}}}, r"'passed' is False.*\(they pass\)"),
        ({"int8": {}, "gates": {"bf16": {**GATE, "same_class": 0.9}}}, "'passed' is True.*90.00% of films"),
        ({"int8": {}, "gates": {"bf16": {**GATE, "severity_mae": 0.5}}}, "'passed' is True.*severity scores differ"),
        ({"int8": {}, "gates": {"bf16": {**GATE, "speed": "fast"}}}, "'speed' is 'fast'; a number is needed"),
        ({"int8": {}, "gates": {"bf16": {**GATE, "same_mask": 1.2}}}, "it must lie in 0..1"),
        ({"int8": {}, "gates": {"bf16": {**GATE, "dice": {"films": 20, "f32": 0.97}}}}, "'value' missing"),
        (
            {"int8": {}, "gates": {"bf16": {**GATE, "measured": {"weights": {"segmenter.onnx": "0" * 64}}}}},
            "measured with another 'segmenter.onnx'",
        ),
    ],
)
def test_a_section_of_precisions_that_makes_no_sense_is_refused(
    bundle: Path, section: dict[str, Any], why: str
) -> None:
    alter(bundle, lambda d: d.update(precision=section))
    with pytest.raises(BundleError, match=why):
        Bundle.load(bundle)


def test_bundles_that_differ_in_a_limit_alone_are_told_apart(tmp_path: Path) -> None:
    one, other = (Bundle.load(write_bundle(tmp_path / str(n), opacity=True)) for n in range(2))
    assert one.sha256 == other.sha256 != replace(other, manifest={**other.manifest, "segmenter": {}}).sha256
