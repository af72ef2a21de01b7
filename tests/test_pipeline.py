"""The Analyzer: order kept, failures kept apart, threads kept apart."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import lungscope
from bundles import BIAS, seal, with_int8, write_bundle
from films import draw, radiograph, save
from lungscope.errors import BundleError, InputError, QualityError
from lungscope.pipeline import Analyzer, failure
from lungscope.report import Failure, Report


def test_a_path_and_its_pixels_give_the_same_report(analyzer: Analyzer, tmp_path: Path) -> None:
    path = save(tmp_path / "film.png", draw(opacities=[(0.6, 0.3, 0.1)]))
    from_path, from_film = analyzer.analyze(str(path)), analyzer.analyze(lungscope.read(path))
    first, second = from_path.to_json(), from_film.to_json()
    assert first.pop("run")["timings_ms"].keys() - second.pop("run")["timings_ms"].keys() == {"read"}
    assert first == second
    assert first["source"]["path"] == str(path)
    assert from_path.run.manifest == analyzer.bundle.sha256


def test_opacities_raise_the_severity_of_their_zones(analyzer: Analyzer) -> None:
    clear = analyzer.analyze(radiograph(draw())).severity
    ill = analyzer.analyze(radiograph(draw(opacities=[(0.72, 0.28, 0.13)]))).severity
    assert clear is not None
    assert ill is not None
    assert clear.total == 0
    zone = ill.zones["C"]
    assert zone is not None
    assert zone.score >= 2
    assert [ill.zones[name].score for name in "ADEF"] == [0, 0, 0, 0]


def test_a_segmenter_that_finds_opacity_tells_severity_and_nothing_else(tmp_path: Path) -> None:
    """Its map here is the film's own grey: all of a lung is above the limit, an opacity or none."""
    film = radiograph(draw(opacities=[(0.72, 0.28, 0.13)]))
    plain = Analyzer(write_bundle(tmp_path / "plain")).analyze(film)
    report = Analyzer(write_bundle(tmp_path / "both", opacity=True)).analyze(film)
    assert report.lungs.opacity is not None
    assert report.lungs.opacity.map.shape == (64, 64)
    assert (report.lungs.mask == plain.lungs.mask).all()
    assert report.severity is not None
    assert plain.severity is not None
    assert report.severity.basis == "opacity"
    assert plain.severity.basis == "evidence"
    assert report.severity.total == 18
    assert report.severity.evidence == plain.severity.evidence


def test_a_segmenter_without_the_map_that_its_bundle_claims_is_refused(tmp_path: Path) -> None:
    root = write_bundle(tmp_path)
    document = json.loads((root / "manifest.json").read_text())
    document["segmenter"]["opaque"] = 0.1
    seal(root, document)
    with pytest.raises(BundleError, match="opacity"):
        Analyzer(root)


def test_a_bundle_without_a_classifier_only_segments(tmp_path: Path) -> None:
    report = Analyzer(write_bundle(tmp_path, classifier=False)).analyze(radiograph(draw()))
    assert report.lungs.mask.any()
    assert report.classification is report.saliency is report.severity is None
    document = report.to_json()
    assert document["classification"] is document["saliency"] is document["severity"] is None


def test_warnings_are_those_of_the_film_and_of_its_lungs(analyzer: Analyzer) -> None:
    report = analyzer.analyze(radiograph(draw(lungs=["left"]), BodyPartExamined="SKULL"))
    told = [(warning.stage, warning.code) for warning in report.run.warnings]
    assert told == [("quality", "not-chest"), ("segmentation", "lung-missing")]


def test_an_altered_bundle_is_not_used(tmp_path: Path) -> None:
    root = write_bundle(tmp_path)
    with (root / "classifier.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(BundleError, match="altered"):
        Analyzer(root)


def test_many_keeps_the_order_and_goes_on_after_failures(analyzer: Analyzer, tmp_path: Path) -> None:
    good = [save(tmp_path / f"{name}.png", draw()) for name in ("c", "a")]
    text = tmp_path / "b.png"
    text.write_text("no image")
    broken = radiograph(np.zeros((300, 300, 3), np.float32), path=tmp_path / "x")
    results = list(analyzer.analyze_many([good[0], text, tmp_path / "missing.png", broken, good[1]]))
    assert [type(result) for result in results] == [Report, Failure, Failure, Failure, Report]
    assert [str(result.source.path) for result in results if isinstance(result, Report)] == [str(path) for path in good]
    failures = [result for result in results if isinstance(result, Failure)]
    assert [failure.path.name for failure in failures] == ["b.png", "missing.png", "x"]
    assert [failure.code for failure in failures][::2] == ["unreadable", "internal"]
    assert failures[2].message.startswith("ValueError: ")
    with pytest.raises(InputError):
        analyzer.analyze(text)


def test_faults_of_the_machine_have_codes_of_their_own() -> None:
    faults = (OSError(5, "Input/output error"), MemoryError(), ValueError())
    assert [failure(Path("a.png"), fault).code for fault in faults] == ["os", "memory", "internal"]


def test_a_package_that_is_missing_is_no_films_fault(analyzer: Analyzer, monkeypatch: pytest.MonkeyPatch) -> None:
    def inspect(film: object) -> None:
        raise ModuleNotFoundError("No module named 'pylibjpeg'")

    monkeypatch.setattr("lungscope.pipeline.inspect", inspect)
    with pytest.raises(ModuleNotFoundError):
        next(analyzer.analyze_many([radiograph(draw())]))


def test_many_is_lazy(analyzer: Analyzer) -> None:
    taken = []

    def films() -> Iterator[object]:
        for number in range(3):
            taken.append(number)
            yield radiograph(draw())

    answers = analyzer.analyze_many(films())
    assert taken == []
    next(answers)
    assert taken == [0]


def test_one_analyzer_serves_several_threads(analyzer: Analyzer) -> None:
    films = [radiograph(draw(opacities=[(0.3 + 0.05 * number, 0.28, 0.1)])) for number in range(8)]

    def facts(film: object) -> dict[str, object]:
        document = analyzer.analyze(film).to_json()
        del document["run"]
        return document

    alone = [facts(film) for film in films]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(facts, films)) == alone
    assert len({str(document) for document in alone}) == len(films)


def test_progress_tells_each_stage_as_it_begins(analyzer: Analyzer, tmp_path: Path) -> None:
    told: list[str] = []
    report = analyzer.analyze(save(tmp_path / "film.png", draw()), progress=told.append)
    assert told == ["read", "quality", "segmentation", "classification", "localization", "severity"]
    assert list(report.run.timings_ms) == told


def test_what_rounding_could_have_decided_is_computed_again(tmp_path: Path) -> None:
    """int8 adds 2 to COVID-19's logit, so that a film with opacities, which is Normal by 1.06, changes its class."""
    bundle = with_int8(tmp_path / "bundle", logits=(BIAS[0] + 2, *BIAS[1:]))
    clear, ill = (radiograph(draw(opacities=o)) for o in ([], [(0.72, 0.28, 0.13), (0.5, 0.7, 0.2), (0.4, 0.3, 0.13)]))
    exact, rounded = (Analyzer(bundle, precision=precision) for precision in ("f32", "int8"))
    assert (exact.margin, rounded.margin) == (0, 0), "no gate, no margin"
    found = [analyzer.analyze(ill).classification for analyzer in (exact, rounded)]
    assert found[0] is not None and found[1] is not None
    assert (found[0].label, found[1].label) == ("Normal", "COVID-19") and found[1].lead < 1
    sure = rounded.analyze(clear).classification
    assert sure is not None and sure.lead > 1.2

    again = Analyzer(bundle, precision="int8", margin=1.0)
    told: list[str] = []
    report = again.analyze(ill, progress=told.append)
    assert report.run.precision == "f32" and again.precision == "int8"
    assert told == ["quality", "segmentation", "classification", "localization", "severity"]
    assert list(report.run.timings_ms) == told
    expected, got = exact.analyze(ill).to_json(), report.to_json()
    for document in (expected, got):
        del document["run"]["timings_ms"], document["run"]["created"]
    assert got == expected
    report = again.analyze(clear)
    assert report.run.precision == "int8" and report.classification is not None
    assert report.classification.logits.tolist() == sure.logits.tolist()


def test_a_film_without_lungs_is_looked_at_again_before_it_is_refused(tmp_path: Path) -> None:
    bundle = with_int8(tmp_path / "bundle", darkest=0.7)
    film = radiograph(draw())
    with pytest.raises(QualityError):
        Analyzer(bundle, precision="int8").analyze(film)
    report = Analyzer(bundle, precision="int8", margin=0.1).analyze(film)
    assert report.run.precision == "f32" and report.lungs.mask.any()
    with pytest.raises(QualityError):
        Analyzer(bundle, precision="int8", margin=0.1).analyze(radiograph(np.ones((300, 300), np.float32)))


def test_weights_that_were_replaced_meanwhile_are_not_used(tmp_path: Path) -> None:
    analyzer = Analyzer(with_int8(tmp_path / "bundle"), precision="int8", margin=99)
    with (tmp_path / "bundle" / "classifier.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(BundleError, match="altered"):
        analyzer.analyze(radiograph(draw()))


def test_everything_can_be_loaded_before_the_files_are_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUNGSCOPE_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "bundle"
    bundle = with_int8(root, logits=(BIAS[0] + 2, *BIAS[1:]))
    analyzer = Analyzer(bundle, precision="int8", margin=99)
    analyzer.load_all()
    shutil.rmtree(root)
    shutil.rmtree(tmp_path / "cache")
    assert analyzer.analyze(radiograph(draw())).run.precision == "f32"


def test_what_was_loaded_late_is_let_go_of_and_comes_back(tmp_path: Path) -> None:
    analyzer = Analyzer(with_int8(tmp_path / "bundle"), precision="int8", margin=99)
    first = analyzer.analyze(radiograph(draw())).to_json()
    assert analyzer._exact is not None
    analyzer.release()
    assert analyzer._exact is None
    again = analyzer.analyze(radiograph(draw())).to_json()
    assert first.pop("run")["precision"] == again.pop("run")["precision"] == "f32"
    assert first == again
