"""PNG, JPEG, TIFF and BMP: range, polarity, colour, transparency, orientation."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, TiffImagePlugin
from tests.corpus import as_integers, draw_chest, png_header

from lungscope.errors import UnreadableFileError, UnsupportedImageError
from lungscope.readers import read
from lungscope.readers.common import MAX_PIXELS
from lungscope.readers.raster import _upright

CHEST = draw_chest(120, 90, np.random.default_rng(3))
GREY = as_integers(CHEST, 8).astype(np.uint8)


def save(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)
    return path


def test_the_range_is_that_of_the_type_and_not_of_the_picture(tmp_path: Path) -> None:
    dim = np.full((80, 80), 51, np.uint8)
    assert read(save(Image.fromarray(dim), tmp_path / "dim.png")).pixels == pytest.approx(0.2)
    deep = np.full((80, 80), 4095, np.uint16)
    assert read(save(Image.fromarray(deep), tmp_path / "deep.png")).pixels == pytest.approx(4095 / 65535)
    full = np.full((80, 80), 65535, np.uint16)
    assert read(save(Image.fromarray(full), tmp_path / "full.png")).pixels.max() == 1.0


def test_twelve_bit_tiff_has_4095_as_white(tmp_path: Path) -> None:
    path = tmp_path / "twelve.tif"
    rows = np.full((4, 2), [4095, 2048], np.uint16)
    packed = b"".join(int(a << 12 | b).to_bytes(3, "big") for a, b in rows.tolist())
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    entries = {256: 2, 257: 4, 258: 12, 259: 1, 262: 1, 273: 0, 277: 1, 278: 4, 279: len(packed)}
    for tag, value in entries.items():
        tags[tag] = value
    path.write_bytes(b"II*\0\x08\0\0\0" + tags.tobytes(8) + packed)  # Pillow puts the strip behind the directory
    assert read(path).pixels == pytest.approx(np.full((4, 2), [1, 2048 / 4095]))


def test_white_is_zero_tiff_is_inverted_at_8_and_16_bits(tmp_path: Path) -> None:
    for bits in (8, 16):
        stored = as_integers(1 - CHEST, bits).astype(f"u{bits // 8}")
        path = save(Image.fromarray(stored), tmp_path / f"white{bits}.tif")
        raw = bytearray(path.read_bytes())
        at = raw.index(b"\x06\x01\x03\x00\x01\x00\x00\x00")  # tag 0x0106, one SHORT
        raw[at + 8 : at + 10] = b"\0\0"
        path.write_bytes(raw)
        assert read(path).pixels == pytest.approx(CHEST, abs=0.51 / (2**bits - 1) + 1e-6)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
def test_exif_orientation_is_applied(tmp_path: Path, suffix: str, orientation: int) -> None:
    turned = {1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}[orientation]  # the inverse of 6 is 8
    stored = _upright(GREY.astype(np.float32), turned).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    film = read(save(Image.fromarray(stored), tmp_path / f"turned{suffix}", exif=exif))
    assert film.shape == GREY.shape
    assert np.abs(film.pixels - GREY / 255).max() < 0.1


def colour_tiff(pixels: np.ndarray, orientation: int) -> bytes:
    """A TIFF of colour u16 [H, W, 3], uncompressed, little-endian, in one strip (TIFF 6.0, sections 2 and 6)."""
    height, width, _ = pixels.shape
    data = pixels.astype("<u2").tobytes()
    depth, start = struct.pack("<3H", 16, 16, 16), 8
    strip = start + len(depth)
    entries = [
        (256, 1, width), (257, 1, height), (258, 3, start), (259, 1, 1), (262, 1, 2), (273, 1, strip),
        (274, 1, orientation), (277, 1, 3), (278, 1, height), (279, 1, len(data)), (284, 1, 1),
    ]  # fmt: skip
    short = {259, 262, 274, 277, 284}
    directory = b"".join(
        struct.pack("<HHIHH", tag, 3, count, value, 0)
        if tag in short
        else struct.pack("<HHII", tag, 3 if tag == 258 else 4, count, value)
        for tag, count, value in entries
    )
    header = struct.pack("<2sHI", b"II", 42, strip + len(data))
    return header + depth + data + struct.pack("<H", len(entries)) + directory + struct.pack("<I", 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_once_to_colour_of_sixteen_bits(tmp_path: Path, orientation: int) -> None:
    deep = as_integers(CHEST, 16)
    turned = {1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}[orientation]
    stored = _upright(deep.astype(np.float32), turned).astype(np.uint16)
    path = tmp_path / "deep.tif"
    path.write_bytes(colour_tiff(np.dstack([stored] * 3), orientation))
    film = read(path)
    assert film.shape == deep.shape
    assert film.pixels == pytest.approx(deep / 65535, abs=1e-6)


def test_orientation_six_needs_a_clockwise_quarter_turn() -> None:
    stored = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
    assert _upright(stored, 6).tolist() == [[4, 1], [5, 2], [6, 3]]
    assert _upright(stored, 8).tolist() == [[3, 6], [2, 5], [1, 4]]


def test_colour_of_sixteen_bits_keeps_all_of_them(tmp_path: Path) -> None:
    deep = as_integers(CHEST, 16)
    for suffix in (".png", ".tif"):
        path = tmp_path / f"deep{suffix}"
        assert cv2.imwrite(str(path), np.dstack([deep] * 3))
        assert read(path).pixels == pytest.approx(deep / 65535, abs=1e-6)
    deep[:] = np.arange(deep.size).reshape(deep.shape)
    alpha = np.full_like(deep, 65535)
    cv2.imwrite(str(tmp_path / "alpha.png"), np.dstack([deep, deep, deep, alpha]))
    assert read(tmp_path / "alpha.png").pixels == pytest.approx(deep / 65535, abs=1e-6)


def test_colour_is_refused_and_a_coloured_marker_is_not(tmp_path: Path) -> None:
    film = np.dstack([GREY] * 3)
    film[:6, :6] = 250, 230, 20
    assert read(save(Image.fromarray(film), tmp_path / "marker.png")).shape == GREY.shape
    film[:30, :30] = 250, 230, 20
    with pytest.raises(UnsupportedImageError, match=r"tinted\.png.*colour"):
        read(save(Image.fromarray(film), tmp_path / "tinted.png"))
    with pytest.raises(UnsupportedImageError, match="CMYK"):
        read(save(Image.fromarray(film).convert("CMYK"), tmp_path / "press.jpg"))


def test_colour_of_sixteen_bits_is_refused_from_the_same_share_of_the_range_on(tmp_path: Path) -> None:
    deep = as_integers(CHEST, 16) // 2
    for name, apart in (("near", 1000), ("tinted", 4000)):
        cv2.imwrite(str(tmp_path / f"{name}.png"), np.dstack([deep, deep + apart, deep]).astype(np.uint16))
    assert read(tmp_path / "near.png").shape == deep.shape
    with pytest.raises(UnsupportedImageError, match=r"tinted\.png.*colour"):
        read(tmp_path / "tinted.png")


def test_transparent_is_black_and_opacity_multiplies(tmp_path: Path) -> None:
    alpha = np.full_like(GREY, 255)
    alpha[:40], alpha[40:80] = 0, 51
    expected = GREY / 255 * (alpha / 255)
    for name, bands in (("la", [GREY, alpha]), ("rgba", [GREY, GREY, GREY, alpha])):
        film = read(save(Image.fromarray(np.dstack(bands)), tmp_path / f"{name}.png"))
        assert film.pixels == pytest.approx(expected, abs=1e-6)
    keyed = read(save(Image.fromarray(GREY), tmp_path / "key.png", transparency=int(GREY[60, 45])))
    assert keyed.pixels[60, 45] == 0 and keyed.pixels.max() > 0.5
    deep = as_integers(CHEST, 16)
    keyed = read(save(Image.fromarray(deep), tmp_path / "deep.png", transparency=int(deep[60, 45])))
    assert keyed.pixels == pytest.approx(np.where(deep == deep[60, 45], 0, deep / 65535), abs=1e-6)


def test_a_palette_is_looked_up(tmp_path: Path) -> None:
    image = Image.fromarray(GREY).convert("P")
    image.putpalette([255 - index // 3 for index in range(768)])
    assert read(save(image, tmp_path / "inverted.png")).pixels == pytest.approx(1 - GREY / 255, abs=1e-6)


def test_floats_must_be_finite_and_within_0_and_1(tmp_path: Path) -> None:
    assert read(save(Image.fromarray(CHEST), tmp_path / "float.tif")).pixels == pytest.approx(CHEST)
    for name, value, reason in (
        ("nan", np.nan, "NaN"),
        ("inf", np.inf, "infinite"),
        ("low", -0.1, "-0.1"),
        ("high", 2, "2"),
    ):
        broken = CHEST.copy()
        broken[5, 5] = value
        with pytest.raises(UnsupportedImageError, match=reason) as caught:
            read(save(Image.fromarray(broken), tmp_path / f"{name}.tif"))
        assert f"{name}.tif" in str(caught.value)


def test_signed_and_32_bit_integers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedImageError, match="32-bit"):
        read(save(Image.fromarray(np.full((80, 80), 70000, np.int32)), tmp_path / "wide.tif"))


def test_signed_eight_bits_are_refused(tmp_path: Path) -> None:
    path = save(Image.fromarray(GREY), tmp_path / "film.tif", tiffinfo={339: 1})
    data = bytearray(path.read_bytes())
    entry = data.index(struct.pack("<HHI", 339, 3, 1))
    data[entry + 8] = 2
    path.write_bytes(data)
    with pytest.raises(UnsupportedImageError, match=r"film\.tif.*signed"):
        read(path)


@pytest.mark.parametrize("side", [20_000, 9_200])
def test_a_large_header_is_refused_before_decoding(tmp_path: Path, side: int) -> None:
    """9,200 squared is what Pillow itself would still decode."""
    assert side**2 > MAX_PIXELS
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(side, side))
    with pytest.raises(UnsupportedImageError, match=r"bomb\.png.*80,000,000"):
        read(path)


def test_an_animation_is_refused(tmp_path: Path) -> None:
    frames = [Image.fromarray(GREY // 2)]
    with pytest.raises(UnsupportedImageError, match="at least 2 pages or frames"):
        read(save(Image.fromarray(GREY), tmp_path / "moving.png", save_all=True, append_images=frames))


def test_pages_are_refused_without_counting_them(tmp_path: Path) -> None:
    """A TIFF whose second page is empty and stands where no third can be read."""
    path = save(Image.fromarray(GREY), tmp_path / "pages.tif")
    data = bytearray(path.read_bytes())
    (start,) = struct.unpack_from("<I", data, 4)
    (entries,) = struct.unpack_from("<H", data, start)
    struct.pack_into("<I", data, start + 2 + 12 * entries, len(data))
    path.write_bytes(data + struct.pack("<HI", 0, 2**31))
    with pytest.raises(UnsupportedImageError, match="at least 2 pages"):
        read(path)


def repeated_scans(count: int, comment: bytes = b"") -> bytes:
    """A progressive JPEG of GREY whose last scan stands there `count` times, behind a comment."""
    file = BytesIO()
    Image.fromarray(GREY).save(file, "JPEG", progressive=True)
    whole = file.getvalue()
    start = whole.rindex(b"\xff\xda")
    note = b"\xff\xfe" + struct.pack(">H", 2 + len(comment)) + comment
    return whole[:2] + note + whole[2:start] + count * whole[start:-2] + whole[-2:]


def test_a_jpeg_of_many_scans_is_refused_before_decoding(tmp_path: Path) -> None:
    path = tmp_path / "scans.jpg"
    path.write_bytes(repeated_scans(1, b"\xff\xda" * 200) + b"\xff\xda" * 200)
    assert np.abs(read(path).pixels - GREY / 255).max() < 0.1
    path.write_bytes(repeated_scans(101))
    with pytest.raises(UnsupportedImageError, match=r"scans\.jpg.*more than 100 scans"):
        read(path)


def tiled_tiff(sides: list[tuple[int, int, int]]) -> bytes:
    """A TIFF of 256 x 256 white pixels in one deflated tile; `sides`: tag, type and value of what its size is."""
    data = zlib.compress(b"\xff" * 256 * 256)
    entries = [(256, 3, 256), (257, 3, 256), (258, 3, 8), (259, 3, 8), (262, 3, 1), (277, 3, 1), *sides]
    start = 8 + 2 + 12 * (len(entries) + 2) + 4
    entries += [(324, 4, start), (325, 4, len(data))]
    directory = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    return struct.pack("<2sHIH", b"II", 42, 8, len(entries)) + directory + bytes(4) + data


def test_a_tile_beyond_the_largest_film_is_refused_before_decoding(tmp_path: Path) -> None:
    path = tmp_path / "tiled.tif"
    path.write_bytes(tiled_tiff([(322, 4, 256), (323, 3, 256)]))
    assert (read(path).pixels == 1).all()
    path.write_bytes(tiled_tiff([(322, 4, 16384), (323, 4, 16384)]))
    with pytest.raises(UnsupportedImageError, match="promises 16384 x 16384"):
        read(path)


def test_a_big_tiff_is_read(tmp_path: Path) -> None:
    assert read(save(Image.fromarray(GREY), tmp_path / "big.tif", big_tiff=True)).pixels == pytest.approx(GREY / 255)


@pytest.mark.parametrize("sides", [[(322, 4, 16384), (322, 4, 256), (323, 4, 256)], [(322, 17, 16384), (323, 4, 256)]])
def test_a_tile_of_which_readers_take_different_sizes_is_refused(
    tmp_path: Path, sides: list[tuple[int, int, int]]
) -> None:
    (tmp_path / "tiled.tif").write_bytes(tiled_tiff(sides))
    with pytest.raises(UnreadableFileError, match="not one number a side"):
        read(tmp_path / "tiled.tif")


def test_every_cut_of_a_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    whole = save(Image.fromarray(GREY), tmp_path / "whole.png").read_bytes()
    path = tmp_path / "cut.png"
    for cut in range(1, len(whole) - 16, 97):
        path.write_bytes(whole[:cut])
        with pytest.raises(UnreadableFileError, match=r"cut\.png"):
            read(path)


def _filtered(rows: np.ndarray, kind: int, step: int) -> bytes:
    """Bytes [H, B] of a picture whose pixels are `step` bytes, filtered (PNG, third edition, section 9)."""
    wide = rows.astype(int)
    left = np.pad(wide, ((0, 0), (step, 0)))[:, : wide.shape[1]]
    up = np.pad(wide, ((1, 0), (0, 0)))[:-1]
    corner = np.pad(left, ((1, 0), (0, 0)))[:-1]
    estimate = left + up - corner
    near = np.stack([abs(estimate - side) for side in (left, up, corner)]).argmin(0)
    paeth = np.choose(near, [left, up, corner])
    guess = (0 * wide, left, up, (left + up) // 2, paeth)[kind]
    lines = ((wide - guess) % 256).astype(np.uint8)
    return b"".join(bytes([kind]) + line.tobytes() for line in lines)


def grey_png(pixels: np.ndarray, kind: int, *, interlaced: bool = False) -> bytes:
    """A PNG of grey u8 or u16 [H, W], every row filtered by `kind`."""
    height, width = pixels.shape
    step = pixels.dtype.itemsize
    whole = [(0, 0, 1, 1)]
    adam7 = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    parts = [pixels[top::down, left::along] for top, left, down, along in (adam7 if interlaced else whole)]
    stream = b"".join(
        _filtered(np.frombuffer(part.astype(f">u{step}").tobytes(), np.uint8).reshape(len(part), -1), kind, step)
        for part in parts
    )
    header = struct.pack(">IIBBBBB", width, height, 8 * step, 0, 0, 0, int(interlaced))
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(stream)), (b"IEND", b"")]
    body = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("kind", range(5))
def test_grey_png_of_every_filter_is_read_exactly(tmp_path: Path, kind: int, interlaced: bool, bits: int) -> None:
    pixels = as_integers(CHEST, bits).astype(f"u{bits // 8}")
    path = tmp_path / "film.png"
    path.write_bytes(grey_png(pixels, kind, interlaced=interlaced))
    assert read(path).pixels == pytest.approx(pixels / (2**bits - 1), abs=1e-6)


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


XMP = b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="3"/>'


@pytest.mark.parametrize(
    ("text", "is_turned"),
    [
        (chunk(b"iTXt", b"XML:com.adobe.xmp" + bytes(5) + XMP), True),
        (chunk(b"tEXt", b"Comment\0" + b"XML:com.adobe.xmp" + bytes(5) + XMP), False),
    ],
)
def test_what_text_in_a_png_says_of_orientation_is_applied(tmp_path: Path, text: bytes, is_turned: bool) -> None:
    plain = grey_png(GREY, 2)
    path, end_of_header = tmp_path / "film.png", 33
    path.write_bytes(plain[:end_of_header] + text + plain[end_of_header:])
    expected = GREY[::-1, ::-1] if is_turned else GREY
    np.testing.assert_allclose(read(path).pixels, expected / 255, atol=1e-6)


@pytest.mark.parametrize("bits", [8, 16])
def test_a_grey_png_whose_sums_do_not_fit_is_refused(tmp_path: Path, bits: int) -> None:
    good = grey_png(as_integers(CHEST, bits).astype(f"u{bits // 8}"), 1)
    path = tmp_path / "film.png"
    data, last = good.index(b"IDAT") + 4, good.rindex(b"IEND") - 8
    for at in (data + 2, (data + last) // 2, last - 6, last - 1, last + 2):
        path.write_bytes(good[:at] + bytes([good[at] ^ 0x55]) + good[at + 1 :])
        with pytest.raises(UnreadableFileError, match=r"film\.png"):
            read(path)
