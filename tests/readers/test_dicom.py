"""The DICOM grey scale by the sections of PS3.3 that define it, and the rules about what is read."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO
from pathlib import Path

import cv2
import jpeg_ls
import numpy as np
import pydicom.uid as uid
import pytest
from PIL import Image
from pydicom import Dataset, dcmread
from pydicom.data import get_testdata_file
from pydicom.dataelem import RawDataElement
from pydicom.encaps import encapsulate
from pydicom.tag import Tag
from tests.corpus import WRITERS, as_integers, draw_chest, jpeg_lossless, make_dicom, save_dicom

from lungscope.errors import UnreadableFileError, UnsupportedImageError
from lungscope.radiograph import Radiograph
from lungscope.readers import read
from lungscope.readers.dicom import DECODERS, _jpeg_2000, _look_up, grey_scale
from lungscope.stages.quality import inspect

RAMP = np.arange(4096, dtype=np.uint16).reshape(64, 64)


def film(tmp_path: Path, stored: np.ndarray = RAMP, bits: int = 12, **elements: object) -> Radiograph:
    return read(save_dicom(make_dicom(stored, bits, **elements), tmp_path / "film.dcm"))


def lut(first: int, bits: int, entries: list[int]) -> list[Dataset]:
    item = Dataset()
    item.LUTDescriptor = [len(entries), first, bits]
    item["LUTDescriptor"].VR = "SS" if first < 0 else "US"
    item.LUTData = np.array(entries, "<u2").tobytes()
    item["LUTData"].VR = "OW"
    return [item]


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 15, 16])
def test_without_window_the_range_is_that_of_bits_stored(tmp_path: Path, bits: int) -> None:
    stored = np.full((64, 64), 2 ** (bits - 2), np.uint16)
    assert film(tmp_path, stored, bits).pixels == pytest.approx(2 ** (bits - 2) / (2**bits - 1))


def test_signed_values_and_a_negative_slope(tmp_path: Path) -> None:
    signed = (RAMP.astype(np.int32) - 2048).astype(np.int16)
    assert film(tmp_path, signed).pixels == pytest.approx(RAMP / 4095, abs=1e-6)
    rescaled = film(tmp_path, RescaleSlope=-2, RescaleIntercept=100)
    assert rescaled.pixels == pytest.approx(1 - RAMP / 4095, abs=1e-6)


def test_linear_window_of_c_11_2_1_2_1(tmp_path: Path) -> None:
    """The example of the standard: center 2048, width 4096 is the whole range of 12 bits, end to end."""
    assert film(tmp_path, WindowCenter=2048, WindowWidth=4096).pixels == pytest.approx(RAMP / 4095, abs=1e-6)
    narrow = film(tmp_path, WindowCenter=[1000, 9], WindowWidth=[201, 9]).pixels.ravel()
    assert narrow[899] == 0 and narrow[1100] == 1
    assert narrow[1000] == pytest.approx(0.5 / 200 + 0.5)
    step = film(tmp_path, WindowCenter=2048, WindowWidth=1).pixels.ravel()
    assert step[2047] == 0 and step[2048] == 1


def test_exact_and_sigmoid_windows_of_c_11_2_1_3(tmp_path: Path) -> None:
    exact = film(tmp_path, WindowCenter=1000, WindowWidth=200, VOILUTFunction="LINEAR_EXACT").pixels.ravel()
    assert exact[[900, 1000, 1050, 1100]] == pytest.approx([0, 0.5, 0.75, 1])
    sigmoid = film(tmp_path, WindowCenter=1000, WindowWidth=200, VOILUTFunction="SIGMOID").pixels.ravel()
    assert sigmoid[[900, 1000, 1050]] == pytest.approx([1 / (1 + np.exp(2)), 0.5, 1 / (1 + np.exp(-1))], abs=1e-6)


def test_the_window_is_in_rescaled_units_and_an_illegal_one_is_passed_over(tmp_path: Path) -> None:
    moved = film(tmp_path, RescaleSlope=2, RescaleIntercept=-1000, WindowCenter=1000, WindowWidth=401).pixels.ravel()
    assert moved[899] == 0 and moved[1100] == 1 and moved[1000] == pytest.approx(0.5 / 400 + 0.5)
    assert film(tmp_path, WindowCenter=5, WindowWidth=0).pixels == pytest.approx(RAMP / 4095, abs=1e-6)


def test_a_voi_lut_comes_before_a_window(tmp_path: Path) -> None:
    table = lut(1000, 10, [0, 100, 1023])
    out = film(tmp_path, VOILUTSequence=table, WindowCenter=2048, WindowWidth=10)
    values = out.pixels.ravel()
    assert values[[0, 1000, 1001, 1002, 4095]] == pytest.approx([0, 0, 100 / 1023, 1, 1])
    assert out.source.tags["GreyScale"] == "VOI LUT"


def test_a_modality_lut_comes_before_all(tmp_path: Path) -> None:
    signed = (RAMP.astype(np.int32) - 2048).astype(np.int16)
    ds = make_dicom(signed, ModalityLUTSequence=lut(-2, 16, [0, 40000, 65535]))
    table, how = grey_scale(ds)
    stored = np.array([-2048, -2, -1, 0, 2047]) & 4095
    assert table[stored] == pytest.approx([0, 0, 40000 / 65535, 1, 1])
    assert how == "all of 0 to 65535"


@pytest.mark.parametrize("bits", [8, 12])
def test_a_lut_of_words_is_the_same_in_big_endian(tmp_path: Path, bits: int) -> None:
    entries = [0, 200, 30, 255] if bits == 8 else [0, 4000, 100, 4095]
    table = lut(1000, bits, entries)
    if bits == 8:
        table[0].LUTData = np.array(entries, np.uint8).tobytes()
    expected = film(tmp_path, VOILUTSequence=table).pixels.ravel()
    assert expected[[999, 1001, 1002, 1003]] == pytest.approx(np.array(entries) / (2**bits - 1))
    table[0].LUTData = np.frombuffer(table[0].LUTData, np.uint16).byteswap().tobytes()
    ds = make_dicom(RAMP.byteswap(), VOILUTSequence=table)
    ds["PixelData"].VR = "OW"
    path = tmp_path / "big.dcm"
    ds.file_meta.TransferSyntaxUID = uid.ExplicitVRBigEndian
    ds.save_as(path, enforce_file_format=True)
    np.testing.assert_array_equal(read(path).pixels.ravel(), expected)


@pytest.mark.parametrize(("signed", "intercept", "first"), [(False, -2048, -500), (True, 40000, 40000)])
def test_the_first_value_mapped_is_of_the_rescaled_range(
    tmp_path: Path, signed: bool, intercept: int, first: int
) -> None:
    """Implicit VR does not say whether it is signed, and the stored samples do not, either (PS3.3 C.11.2.1.1)."""
    stored = (RAMP.astype(np.int32) - 2048).astype(np.int16) if signed else RAMP
    ds = make_dicom(stored, RescaleSlope=1, RescaleIntercept=intercept, VOILUTSequence=lut(first, 8, [0, 128, 255]))
    ds.VOILUTSequence[0]["LUTDescriptor"].VR = "SS" if first < 0 else "US"
    found = read(save_dicom(ds, tmp_path / "film.dcm", uid.ImplicitVRLittleEndian)).pixels.ravel()
    at = first - intercept + 2048 * signed
    assert found[at - 1 : at + 3] == pytest.approx([0, 0, 128 / 255, 1])


def test_a_lut_of_an_odd_number_of_bytes_is_read() -> None:
    item = lut(0, 8, [0, 0])[0]
    item.LUTDescriptor, item.LUTData = [3, 0, 8], bytes([0, 128, 255])
    values, _ = _look_up(np.arange(3), item, swapped=False)
    assert values.tolist() == [0, 128, 255]


def test_a_lut_may_have_more_entries_than_a_signed_number_can_count() -> None:
    item = lut(-20000, 16, list(range(40000)))[0]
    item.LUTDescriptor = [40000 - 2**16, -20000, 16]
    values, _ = _look_up(np.array([-20000, 0, 19999]), item, swapped=False)
    assert values.tolist() == [0, 20000, 39999]


@pytest.mark.parametrize(
    ("keyword", "text", "reason"),
    [
        ("PixelSpacing", "0,143\\0,143", None),
        ("NominalScannedPixelSpacing", "\\", None),
        ("ImagerPixelSpacing", "0.2x\\0.2", None),
        ("WindowCenter", "12,5", "WindowCenter"),
        ("RescaleSlope", "1,0", "RescaleSlope"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_an_optional_value_that_is_no_number_is_passed_over_or_named(
    tmp_path: Path, keyword: str, text: str, reason: str | None
) -> None:
    good = {"ImagerPixelSpacing": [0.5, 0.5], "WindowCenter": 2048, "WindowWidth": 4096}
    path = save_dicom(make_dicom(RAMP, **(good | {keyword: "7"} if keyword not in good else good)), tmp_path / "a.dcm")
    ds = dcmread(path)
    ds.add(RawDataElement(Tag(keyword), "DS", len(text), text.encode(), 0, False, True))
    ds.save_as(path)
    if reason is None:
        assert read(path).spacing_mm == (None if keyword == "ImagerPixelSpacing" else (0.5, 0.5))
    else:
        with pytest.raises(UnreadableFileError, match=reason):
            read(path)


@pytest.mark.parametrize(
    ("photometric", "shape", "inverted", "warned"),
    [
        ("MONOCHROME2", None, False, False),
        ("MONOCHROME2", "IDENTITY", False, False),
        ("MONOCHROME1", None, True, False),
        ("MONOCHROME1", "INVERSE", True, False),
        ("MONOCHROME1", "IDENTITY", True, True),
        ("MONOCHROME2", "INVERSE", True, True),
    ],
)
def test_polarity(tmp_path: Path, photometric: str, shape: str | None, inverted: bool, warned: bool) -> None:
    out = film(tmp_path, PhotometricInterpretation=photometric, PresentationLUTShape=shape)
    expected = 1 - RAMP / 4095 if inverted else RAMP / 4095
    assert out.pixels == pytest.approx(expected, abs=1e-6)
    assert ("polarity" in [warning.code for warning in inspect(out).warnings]) == warned


def test_padding_is_black_whatever_the_polarity(tmp_path: Path) -> None:
    for photometric in ("MONOCHROME1", "MONOCHROME2"):
        out = film(
            tmp_path, PhotometricInterpretation=photometric, PixelPaddingValue=100, PixelPaddingRangeLimit=90
        ).pixels.ravel()
        assert not out[90:101].any() and out[89] > 0 and out[101] > 0


def test_padding_may_be_written_without_the_sign_of_the_pixels(tmp_path: Path) -> None:
    signed = (RAMP.astype(np.int32) - 2048).astype(np.int16)
    for value in (-2000, 2**16 - 2000):
        ds = make_dicom(signed)
        ds.add_new("PixelPaddingValue", "SS" if value < 0 else "US", value)
        out = read(save_dicom(ds, tmp_path / "film.dcm"))
        assert out.pixels.ravel()[48] == 0 and out.pixels.ravel()[[47, 49]].all()
        assert out.source.tags["GreyScale"].endswith("padding -2000 to -2000 as 0")
    ds = make_dicom(np.full((64, 64), 65535, np.uint16), 16)
    ds.add_new("PixelPaddingValue", "SS", -1)
    assert not read(save_dicom(ds, tmp_path / "film.dcm")).pixels.any()


def test_an_empty_limit_of_padding_is_none(tmp_path: Path) -> None:
    ds = make_dicom(RAMP, PixelPaddingValue=100)
    ds.add_new("PixelPaddingRangeLimit", "US", None)
    out = read(save_dicom(ds, tmp_path / "film.dcm")).pixels.ravel()
    assert out[100] == 0 and out[[99, 101]].all()


def test_overlay_bits_above_bits_stored_are_no_part_of_the_value(tmp_path: Path) -> None:
    ds = make_dicom(RAMP | 0x8000)
    ds.add_new(Tag(0x6002, 0x0102), "US", 15)
    told = read(save_dicom(ds, tmp_path / "film.dcm"))
    assert told.pixels == pytest.approx(RAMP / 4095, abs=1e-6)
    assert "UnusedBits" not in told.source.tags


def test_a_jpeg_of_many_scans_is_refused_before_decoding(tmp_path: Path) -> None:
    buffer = BytesIO()
    Image.fromarray((RAMP >> 4).astype(np.uint8)).save(buffer, "JPEG", progressive=True)
    frame = buffer.getvalue()
    last = frame[frame.rindex(b"\xff\xda") : -2]
    ds = make_dicom((RAMP >> 4).astype(np.uint8), 8)
    ds.PixelData = encapsulate([frame[:-2] + 100 * last + frame[-2:]])
    ds["PixelData"].is_undefined_length = True
    ds.file_meta.TransferSyntaxUID = uid.JPEGBaseline8Bit
    ds.save_as(tmp_path / "film.dcm", enforce_file_format=True)
    with pytest.raises(UnsupportedImageError, match="more than 100 scans"):
        read(tmp_path / "film.dcm")


@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.RLELossless])
def test_bits_above_bits_stored_that_are_no_overlay_are_told(tmp_path: Path, syntax: uid.UID) -> None:
    """A header may be wrong about Bits Stored."""
    found = read(save_dicom(make_dicom(np.repeat(np.repeat(RAMP, 4, 0), 4, 1) << 3, 14), tmp_path / "film.dcm", syntax))
    assert found.source.tags["UnusedBits"] == "0x4000"
    assert "unused-bits" in [warning.code for warning in inspect(found).warnings]
    signed = np.full((64, 64), -1, np.int16)
    assert "UnusedBits" not in film(tmp_path, signed).source.tags


def test_spaces_around_values_mean_nothing(tmp_path: Path) -> None:
    """PS3.5 6.2: of a code string, before and behind it."""
    for value in (["R ", "F"], [" R", "F"], ["R", " F"]):
        turned = film(tmp_path, PatientOrientation=value)
        assert turned.mirrored and turned.orientation == ("R", "F")


def test_spacing_says_where_it_came_from(tmp_path: Path) -> None:
    detector, patient, scanner = [0.2, 0.3], [0.15, 0.16], [0.4, 0.4]
    both = film(tmp_path, ImagerPixelSpacing=detector, PixelSpacing=patient)
    assert (both.spacing_mm, both.spacing_origin) == ((0.15, 0.16), "PixelSpacing")
    one = film(tmp_path, ImagerPixelSpacing=detector, PixelSpacing=[0, 0])
    assert (one.spacing_mm, one.spacing_origin) == ((0.2, 0.3), "ImagerPixelSpacing")
    scanned = film(tmp_path, ImagerPixelSpacing=None, NominalScannedPixelSpacing=scanner)
    assert (scanned.spacing_mm, scanned.spacing_origin) == ((0.4, 0.4), "NominalScannedPixelSpacing")
    assert film(tmp_path, ImagerPixelSpacing=None).spacing_mm is None
    same = film(tmp_path, ImagerPixelSpacing=detector, PixelSpacing=detector)
    assert (same.spacing_mm, same.spacing_origin) == ((0.2, 0.3), "ImagerPixelSpacing"), "not calibrated to the patient"


def test_tags_do_not_name_the_patient(tmp_path: Path) -> None:
    tags = film(tmp_path).source.tags
    assert tags["ViewPosition"] == "PA" and tags["BodyPartExamined"] == "CHEST"
    assert "Nobody" not in " ".join(tags.values())


def test_other_modalities_and_a_missing_one(tmp_path: Path) -> None:
    assert film(tmp_path, Modality=None).shape == (64, 64)
    for modality in ("CT", "MR", "US", "MG", "NM"):
        with pytest.raises(UnsupportedImageError, match=f"modality {modality}"):
            film(tmp_path, Modality=modality)
    with pytest.raises(UnsupportedImageError, match="3 samples"):
        film(tmp_path, SamplesPerPixel=3)
    with pytest.raises(UnsupportedImageError, match="no modality, CT Image Storage"):
        film(tmp_path, Modality=None, SOPClassUID=uid.CTImageStorage)


def test_a_file_from_before_part_10_is_read(tmp_path: Path) -> None:
    path = save_dicom(make_dicom(RAMP), tmp_path / "whole.dcm", uid.ImplicitVRLittleEndian)
    data = path.read_bytes()
    path.write_bytes(data[144 + int.from_bytes(data[140:144], "little") :])
    assert read(path).pixels == pytest.approx(RAMP / 4095, abs=1e-6)


def test_a_codestream_of_another_size_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    for kind in ("dicom-jpeg", "dicom-j2k", "dicom-jpegls", "dicom-jpeg-lossless"):
        path = WRITERS[kind](draw_chest(80, 96, np.random.default_rng(0)), tmp_path / kind)
        data = path.read_bytes()
        rows = b"\x28\x00\x10\x00US\x02\x00"
        path.write_bytes(data.replace(rows + b"\x50\x00", rows + b"\x40\x00"))
        with pytest.raises(UnreadableFileError, match=r"96 x 64.*\(96, 80\)"):
            read(path)


def announce(columns: int, rows: int) -> bytes:
    """What begins a JPEG 2000 codestream of that size and one component of 8 bits (ISO 15444-1 A.5.1)."""
    sizes = (columns, rows, 0, 0, columns, rows, 0, 0)
    return b"\xff\x4f\xff\x51\0\x29\0\0" + struct.pack(">8I", *sizes) + b"\0\x01\x07\x01\x01"


def comment(text: bytes) -> bytes:
    return b"\xff\xfe" + struct.pack(">H", 2 + len(text)) + text


def sof(columns: int, rows: int) -> bytes:
    """A JPEG's frame header of one component of 8 bits (ISO 10918-1 B.2.2)."""
    return b"\xff\xc0" + struct.pack(">HBHHB", 11, 8, rows, columns, 1) + b"\x01\x11\0"


LARGE = np.zeros((256, 320), np.uint8)
JPEG = cv2.imencode(".jpg", LARGE)[1].tobytes()
JP2 = cv2.imencode(".jp2", LARGE)[1].tobytes()
J2K = JP2[JP2.index(b"\xff\x4f\xff\x51") :]
JPEG_LS = bytes(jpeg_ls.encode(LARGE))
# A box of a kind that is passed over, with a codestream in it that is none.
BOX = struct.pack(">I", 8 + len(announce(64, 64))) + b"free" + announce(64, 64)


#: Transfer syntax, what follows in the Basic Offset Table, and the frame.
DECOYS = {
    "comment in JPEG": (uid.JPEGBaseline8Bit, b"", JPEG[:2] + comment(announce(64, 64)) + JPEG[2:]),
    "second header in JPEG": (uid.JPEGBaseline8Bit, b"", JPEG[:2] + sof(64, 64) + JPEG[2:]),
    "marker without a length": (uid.JPEGBaseline8Bit, b"", JPEG[:2] + b"\xff\xd0\xff\xfe" + JPEG + sof(64, 64)),
    "marker of JPEG-LS": (uid.JPEGBaseline8Bit, b"", JPEG[:2] + b"\xff\xf7" + sof(64, 64)[2:] + JPEG[2:]),
    "comment in JPEG-LS": (uid.JPEGLSLossless, b"", JPEG_LS[:2] + comment(announce(64, 64)) + JPEG_LS[2:]),
    "table before JPEG-LS": (uid.JPEGLSLossless, announce(64, 64), JPEG_LS),
    "table before JPEG 2000": (uid.JPEG2000Lossless, announce(64, 64), J2K),
    "box before JPEG 2000": (uid.JPEG2000Lossless, b"", JP2[:32] + BOX + JP2[32:]),
}


@pytest.mark.parametrize("decoy", DECOYS)
def test_a_size_is_looked_for_where_the_decoder_finds_it(
    tmp_path: Path, decoy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What else in the file looks like a size of 64 x 64 is none; nothing is decoded."""
    syntax, table, frame = DECOYS[decoy]
    ds = make_dicom(np.zeros((64, 64), np.uint8), 8)
    items = [bytes(4) + table if table else b"", frame]
    items = [item + bytes(-len(item) % 4) for item in items]
    ds.PixelData = b"".join(b"\xfe\xff\x00\xe0" + struct.pack("<I", len(item)) + item for item in items)
    ds.PixelData += b"\xfe\xff\xdd\xe0\0\0\0\0"
    ds["PixelData"].is_undefined_length = True
    ds.file_meta.TransferSyntaxUID = syntax
    ds.save_as(tmp_path / "film.dcm", enforce_file_format=True)
    for decoder in ("get_decoder", "_jpeg_2000", "lossless.decode"):
        monkeypatch.setattr(f"lungscope.readers.dicom.{decoder}", lambda *_: pytest.fail("decoded"))
    with pytest.raises(UnreadableFileError, match=r"\(320, 256\)|do not begin with how many pixels"):
        read(tmp_path / "film.dcm")


def test_an_extended_offset_table_leads_to_no_other_frame(tmp_path: Path) -> None:
    ds = make_dicom(np.zeros((64, 64), np.uint8), 8)
    small = cv2.imencode(".jpg", np.zeros((64, 64), np.uint8))[1].tobytes()
    hidden = comment(JPEG)
    frame = small[:2] + hidden + small[2:]
    ds.PixelData = encapsulate([frame])
    ds["PixelData"].is_undefined_length = True
    ds.ExtendedOffsetTable = struct.pack("<Q", len(small[:2] + hidden) - len(JPEG))
    ds.ExtendedOffsetTableLengths = struct.pack("<Q", len(JPEG))
    ds.file_meta.TransferSyntaxUID = uid.JPEGBaseline8Bit
    ds.save_as(tmp_path / "film.dcm", enforce_file_format=True)
    assert read(tmp_path / "film.dcm").shape == (64, 64)


def test_a_jpeg_2000_file_in_the_place_of_a_codestream_is_read(tmp_path: Path) -> None:
    stored = as_integers(draw_chest(64, 72, np.random.default_rng(2)), 8).astype(np.uint8)
    ds = make_dicom(stored, 8)
    whole = [cv2.IMWRITE_JPEG2000_COMPRESSION_X1000, 1000]
    ds.PixelData = encapsulate([cv2.imencode(".jp2", stored, whole)[1].tobytes()])
    ds["PixelData"].is_undefined_length = True
    ds.file_meta.TransferSyntaxUID = uid.JPEG2000Lossless
    ds.save_as(tmp_path / "film.dcm", enforce_file_format=True)
    assert read(tmp_path / "film.dcm").pixels == pytest.approx(stored / 255, abs=1e-6)


def test_values_that_do_not_fill_the_low_bits_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedImageError, match=r"High Bit is 15 with 12 bits stored; 11 is needed"):
        film(tmp_path, HighBit=15)


def test_more_bits_than_the_header_allows_are_refused(tmp_path: Path) -> None:
    ds = make_dicom(RAMP, bits=10)
    ds.PixelData = encapsulate([jpeg_lossless(RAMP, 12)])
    ds.file_meta.TransferSyntaxUID = uid.JPEGLosslessSV1
    ds["PixelData"].is_undefined_length = True
    ds.save_as(tmp_path / "film.dcm", enforce_file_format=True)
    with pytest.raises(UnreadableFileError, match="10 bits"):
        read(tmp_path / "film.dcm")


def test_compressions_that_are_not_read_say_what_to_send(tmp_path: Path) -> None:
    ds = make_dicom(RAMP)
    ds.PixelData = encapsulate([b"\0" * 64])
    ds["PixelData"].is_undefined_length = True
    for syntax in (uid.JPEGExtended12Bit, uid.MPEG2MPML):
        ds.file_meta.TransferSyntaxUID = syntax
        ds.save_as(tmp_path / "film.dcm", enforce_file_format=True)
        with pytest.raises(UnsupportedImageError, match="JPEG-LS"):
            read(tmp_path / "film.dcm")


def test_every_decoder_that_is_named_is_installed() -> None:
    from pydicom.pixels.decoders.base import get_decoder

    for syntax, plugin in DECODERS.items():
        if plugin not in ("", "own"):
            assert plugin in get_decoder(uid.UID(syntax)).available_plugins, syntax


@pytest.mark.parametrize("form", ["whole", "group length 0", "group length 2 ** 31", "no preamble"])
def test_a_deflate_bomb_is_refused(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_dicom(make_dicom(RAMP), tmp_path / "film.dcm", uid.DeflatedExplicitVRLittleEndian)
    data = path.read_bytes()
    start = 144 + int.from_bytes(data[140:144], "little")
    monkeypatch.setattr("lungscope.readers.dicom.MAX_BYTES", 2**20)
    body = deflated(inflated(data[start:]) + bytes(2**20))
    lengths = {"group length 0": 0, "group length 2 ** 31": 2**31}
    length = lengths.get(form, start - 144).to_bytes(4, "little")
    path.write_bytes(data[132 * (form == "no preamble") : 140] + length + data[144:start] + body)
    with pytest.raises(UnsupportedImageError, match="inflates"):
        read(path)


def inflated(data: bytes) -> bytes:
    return zlib.decompress(data, -zlib.MAX_WBITS)


def deflated(data: bytes) -> bytes:
    deflater = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    return deflater.compress(data) + deflater.flush()


def test_the_real_chest_film_of_nema_is_upright_in_all_its_forms() -> None:
    """RG1 is a CR chest PA, MONOCHROME1, of 15 bits: its lungs must come out darker than its spine."""
    paths = [get_testdata_file(f"RG1_{form}.dcm", download=False) for form in ("UNCR", "J2KR", "J2KI")]
    plain, lossless, lossy = (read(str(path)) for path in paths)
    assert plain.shape == (1955, 1841) and plain.spacing_mm is None
    assert np.array_equal(plain.pixels, lossless.pixels)
    assert np.abs(plain.pixels - lossy.pixels).max() < 0.02
    lung, spine = plain.pixels[600:800, 1300:1500], plain.pixels[600:800, 860:960]
    assert lung.mean() + 0.1 < spine.mean()
    check = inspect(plain)
    assert check.view == "PA" and check.warnings == ()


def test_lookup_tables_of_real_files() -> None:
    """Two NEMA pictures show one SMPTE pattern, one through a VOI LUT and one through a modality LUT."""
    paths = [get_testdata_file(name, download=False) for name in ("vlut_04.dcm", "mlut_18.dcm")]
    one, other = (read(str(path)).pixels for path in paths)
    assert np.abs(one - other).max() < 0.02


def test_sixteen_bits_survive_every_lossless_syntax(tmp_path: Path) -> None:
    stored = as_integers(draw_chest(70, 66, np.random.default_rng(2)), 16)
    for number, syntax in enumerate((uid.RLELossless, uid.JPEGLSLossless, uid.JPEG2000Lossless, uid.JPEGLosslessSV1)):
        path = save_dicom(make_dicom(stored, 16), tmp_path / f"{number}.dcm", syntax)
        assert read(path).pixels == pytest.approx(stored / 65535, abs=1e-7), syntax.name


@pytest.mark.parametrize("syntax", [uid.JPEG2000Lossless, uid.JPEG2000])
@pytest.mark.parametrize("bits", [7, 8, 12, 15, 16])
@pytest.mark.parametrize("signed", [False, True])
def test_jpeg_2000_has_the_same_samples_by_either_decoder(
    tmp_path: Path, signed: bool, bits: int, syntax: uid.UID, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours for 8 to 16 unsigned bits is OpenCV's; pydicom's, pylibjpeg's."""
    size = 8 if bits <= 8 else 16
    stored = as_integers(draw_chest(70, 66, np.random.default_rng(2)), bits).astype(f"u{size // 8}")
    if signed:
        stored = (stored.astype(int) - 2 ** (bits - 1)).astype(f"i{size // 8}")
    path = save_dicom(make_dicom(stored, bits), tmp_path / "film.dcm", syntax)
    calls = []
    monkeypatch.setattr("lungscope.readers.dicom._jpeg_2000", lambda frame: calls.append(1) or _jpeg_2000(frame))
    found = read(path).pixels
    assert len(calls) == (not signed and bits >= 8)
    samples = dcmread(path).pixel_array.astype(int) + 2 ** (bits - 1) * signed
    assert found == pytest.approx(samples / (2**bits - 1), abs=1e-6)
    if syntax == uid.JPEG2000Lossless:
        assert (dcmread(path).pixel_array == stored).all()


def test_jpeg_2000_of_more_components_is_refused(tmp_path: Path) -> None:
    stored = np.zeros((64, 64), np.uint8)
    ds = make_dicom(stored, 8)
    ds.PixelData = encapsulate([cv2.imencode(".jp2", np.zeros((64, 64, 3), np.uint8))[1].tobytes()])
    ds["PixelData"].is_undefined_length = True
    ds.file_meta.TransferSyntaxUID = uid.JPEG2000Lossless
    ds.save_as(tmp_path / "film.dcm", enforce_file_format=True)
    with pytest.raises(UnreadableFileError, match=r"film\.dcm"):
        read(tmp_path / "film.dcm")
