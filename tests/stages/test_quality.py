"""What is refused, what is warned of, and that clinical films pass in silence."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from pydicom.sr._snomed_dict import mapping
from pydicom.sr.codedict import codes as concepts
from pydicom.uid import DigitalXRayImageStorageForProcessing
from tests.corpus import draw_chest

from lungscope.errors import QualityError, UnsupportedImageError
from lungscope.radiograph import Pixels, Radiograph, Source
from lungscope.readers import read
from lungscope.stages.quality import LEVELS, SIDE_CODES, InputCheck, _histogram, inspect

CHEST = draw_chest(256, 256, np.random.default_rng(4))


def film(pixels: Pixels = CHEST, spacing: tuple[float, float] | None = None, **tags: str) -> Radiograph:
    return Radiograph(pixels.astype(np.float32), Source(Path("some/film.png"), "0" * 64, "PNG", tags), spacing)


def codes(check: InputCheck) -> list[str]:
    return [warning.code for warning in check.warnings]


def test_a_good_film_passes_in_silence() -> None:
    check = inspect(film(ViewPosition="AP", BodyPartExamined="CHEST", PatientOrientation="L\\F"))
    assert check.warnings == () and check.view == "AP"
    assert check.to_json()["warnings"] == []
    assert 0.25 < check.spread < 1 and check.clipped < 0.05


def test_numbers_are_what_they_say() -> None:
    pixels = np.full((100, 100), 0.5)
    pixels[:20], pixels[20:30] = 0, 1
    check = inspect(film(pixels))
    assert (check.empty, check.clipped, check.spread) == pytest.approx((0.2, 0.1, 1.0), abs=1e-3)


@pytest.mark.parametrize(
    ("pixels", "reason"),
    [
        (CHEST[:63], "256 x 63"),
        (CHEST[:80], "strip"),
        (np.zeros((256, 256)), "blank"),
        (np.ones((256, 256)), "blank"),
        (np.full((256, 256), 0.3), "blank"),
        (CHEST / 16, "12-bit"),
        (CHEST > 0.5, "a mask or a drawing"),
        (np.where(np.arange(256 * 256).reshape(256, 256) < 3000, CHEST + 0.2, 0), "black"),
    ],
)
def test_what_no_stage_could_use_is_refused(pixels: Pixels, reason: str) -> None:
    with pytest.raises(QualityError, match=reason) as caught:
        inspect(film(pixels))
    assert "film.png" in str(caught.value)


@pytest.mark.parametrize(
    ("pixels", "code"),
    [
        (CHEST[:200], "small"),
        (np.repeat(CHEST, 2, axis=0), "odd-aspect"),
        (CHEST / 5, "low-contrast"),
        (np.pad(CHEST, 150), "mostly-empty"),
        (np.clip(CHEST * 3, 0, 1), "clipped"),
    ],
)
def test_odd_pictures_are_warned_of(pixels: Pixels, code: str) -> None:
    warnings = inspect(film(pixels)).warnings
    assert code in [warning.code for warning in warnings]
    assert all(warning.stage == "quality" and warning.message for warning in warnings)


@pytest.mark.parametrize("view", ["LL", "RL", "LATERAL", "lateral", "RLO"])
def test_side_views_are_refused(view: str) -> None:
    with pytest.raises(UnsupportedImageError, match="frontal"):
        inspect(film(ViewPosition=view))


def test_view_codes_count_where_there_is_no_view_position() -> None:
    with pytest.raises(UnsupportedImageError, match="left lateral"):
        inspect(film(ViewCodeMeaning="left lateral"))
    assert inspect(film(ViewPosition="PA", ViewCodeMeaning="left lateral")).view == "PA"
    assert inspect(film(ViewPosition="LLD", ViewCodeMeaning="left lateral decubitus")).view == "LLD"


@pytest.mark.parametrize("code", ["399067008", "R-10236", "399135007"])
def test_a_view_code_counts_in_any_language(code: str) -> None:
    with pytest.raises(UnsupportedImageError, match="seitlich"):
        inspect(film(ViewCode=code, ViewCodeMeaning="seitlich"))
    assert inspect(film(ViewCode="399348003", ViewCodeMeaning="a.p.")).warnings == ()


def test_view_codes_are_those_of_the_standard() -> None:
    """Both are for the same views, and none of them is frontal."""
    views = {code.value: code.meaning for code in (getattr(concepts.cid4010, name) for name in concepts.cid4010.dir())}
    old = {code: now for code, now in mapping["SRT"].items() if code in SIDE_CODES}
    new = {code for code in SIDE_CODES if code.isdigit()}
    assert set(old.values()) == new and len(old) + len(new) == len(SIDE_CODES)
    words = ("lateral", "oblique", "axial", "sagittal")
    assert all(any(word in views[code].lower() for word in words) for code in new)


@pytest.mark.parametrize(
    ("tags", "code"),
    [
        ({"BodyPartExamined": "EXTREMITY"}, "not-chest"),
        ({"PresentationIntentType": "FOR PROCESSING"}, "for-processing"),
        ({"SOPClassUID": DigitalXRayImageStorageForProcessing}, "for-processing"),
        ({"PatientOrientation": "R\\F"}, "mirrored"),
        ({"PatientOrientation": "L\\H"}, "upside-down"),
        ({"PatientOrientation": "A\\F"}, "maybe-lateral"),
        ({"PatientOrientation": "F\\L"}, "rotated"),
    ],
)
def test_header_oddities_are_warned_of(tags: dict[str, str], code: str) -> None:
    assert codes(inspect(film(**tags))) == [code]


@pytest.mark.parametrize("part", ["CHEST", "Chest", "LUNG", "THORAX", "RIBS", "CHEST_TO_ABDOMEN", ""])
def test_chest_parts_are_not(part: str) -> None:
    assert inspect(film(BodyPartExamined=part)).warnings == ()


@pytest.mark.parametrize("orientation", ["R", "RF", "R\\", "R\\F\\X", "RIGHT\\FEET"])
def test_a_film_is_mirrored_only_where_it_is_warned_of(orientation: str) -> None:
    odd = film(PatientOrientation=orientation)
    assert not odd.mirrored and codes(inspect(odd)) == ["orientation-unknown"]
    assert film(PatientOrientation="r\\f").mirrored


def test_words_of_the_header_are_not_repeated() -> None:
    """What warns goes into objects that leave without the patient."""
    odd = film(BodyPartExamined="DOE JOHN", PatientOrientation="HERR\\DOE")
    check = inspect(odd)
    assert codes(check) == ["not-chest", "orientation-unknown"]
    assert not any("DOE" in warning.message for warning in check.warnings)


def test_pixels_that_are_not_square() -> None:
    assert codes(inspect(film(PixelAspectRatio="1\\2"))) == ["pixels-not-square"]
    assert codes(inspect(film(PixelAspectRatio="1\\1"))) == []
    assert codes(inspect(film(PatientOrientation="\\"))) == []
    assert codes(inspect(film(PixelAspectRatio="1\\2", spacing=(0.2, 0.2)))) == []
    assert codes(inspect(film(spacing=(0.2, 0.3)))) == ["pixels-not-square"]
    assert codes(inspect(film(spacing=(0.2, 0.2)))) == []


@pytest.mark.data
def test_clinical_films_pass_in_silence() -> None:
    data = Path(os.environ.get("LUNGSCOPE_DATA", Path(__file__).parents[3] / "shared" / "data"))
    paths = sorted((data / "severity" / "images").glob("*"))[::3] + sorted((data / "lungs" / "images").glob("*"))[::20]
    if not paths:  # their terms keep them out of the repository
        pytest.skip(f"no films in {data}; set LUNGSCOPE_DATA")
    found = {path.name: codes(inspect(read(path))) for path in paths}
    assert {name: warned for name, warned in found.items() if warned} == {}


def test_levels_are_counted_to_the_nearest() -> None:
    """0 and 1 are the first and the last level."""
    for shape in ((40, 60), (1100, 1000)):
        levels = np.random.default_rng(0).integers(0, LEVELS, shape)
        levels[0, :2] = 0, LEVELS - 1
        pixels = (levels / (LEVELS - 1) + np.random.default_rng(1).uniform(-1e-4, 1e-4, shape)).clip(0, 1)
        counts = _histogram(pixels.astype(np.float32))
        np.testing.assert_array_equal(counts, np.bincount(levels.ravel(), minlength=LEVELS))
