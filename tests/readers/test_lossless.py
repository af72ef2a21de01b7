"""The lossless JPEG decoder against a plain encoder and against files of other makers."""

from __future__ import annotations

import hashlib
import tracemalloc

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.encaps import get_frame
from tests.corpus import as_integers, draw_chest, jpeg_lossless

from lungscope.readers.lossless import decode


@pytest.mark.parametrize("restart_rows", [0, 7])
@pytest.mark.parametrize("predictor", range(1, 8))
@pytest.mark.parametrize("bits", [8, 12, 16])
def test_what_was_encoded_comes_back(bits: int, predictor: int, restart_rows: int) -> None:
    rng = np.random.default_rng(bits + predictor)
    stored = as_integers(draw_chest(40, 37, rng), bits)
    stored[3:9] = rng.integers(0, 2**bits, (6, 37))
    assert np.array_equal(decode(jpeg_lossless(stored, bits, predictor, restart_rows)), stored)


def test_the_difference_of_32768_has_a_category_without_bits() -> None:
    stored = np.array([[0, 32768, 0, 65535]], np.uint16)
    assert np.array_equal(decode(jpeg_lossless(stored, 16)), stored)


def test_a_point_transform_is_undone() -> None:
    """Samples of 12 bits that were divided by 2 were encoded as those of 11 bits are (B.2.2, B.2.3, H.1.2.1)."""
    stored = as_integers(draw_chest(20, 17, np.random.default_rng(0)), 11)
    stream = bytearray(jpeg_lossless(stored, 11))
    stream[stream.index(b"\xff\xc3") + 4] = 12
    stream[stream.index(b"\xff\xda") + 9] = 1
    assert np.array_equal(decode(bytes(stream)), stored << 1)


def test_a_file_of_another_maker() -> None:
    """The digest is of the pixels that GDCM 3.2.6 and libjpeg decode from it."""
    path = get_testdata_file("JPGLosslessP14SV1_1s_1f_8b.dcm", download=False)
    pixels = decode(get_frame(dcmread(path).PixelData, 0, number_of_frames=1))
    assert pixels.shape == (768, 1024)
    assert hashlib.sha256(pixels.astype(np.uint8).tobytes()).hexdigest() == DIGEST


DIGEST = "36e27e4f1e87a7d50407463323ddc3736736ecff35eb4e4a4c1b74646938835d"


def test_fill_bytes_before_a_marker_are_passed_over() -> None:
    stored = np.arange(12, dtype=np.uint16).reshape(3, 4)
    stream = jpeg_lossless(stored, 8)
    assert np.array_equal(decode(stream[:2] + b"\xff\xff" + stream[2:]), stored)


@pytest.mark.parametrize("more", [bytes(2**22), b"\x00\x00\xff\xd0" * 2**20], ids=["data", "segments"])
def test_no_more_is_decoded_than_the_film_holds(more: bytes) -> None:
    stored = as_integers(draw_chest(40, 37, np.random.default_rng(0)), 12)
    stream = jpeg_lossless(stored, 12)[:-2] + more
    tracemalloc.start()
    found = decode(stream)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array_equal(found, stored)
    assert peak < 4 * len(more)


def test_broken_streams_raise_and_nothing_else() -> None:
    whole = jpeg_lossless(as_integers(draw_chest(30, 30, np.random.default_rng(0)), 12), 12)
    for cut in range(2, len(whole) - 4, 61):
        with pytest.raises((ValueError, IndexError)):
            decode(whole[:cut])
    with pytest.raises(ValueError, match="lossless"):
        decode(whole.replace(b"\xff\xc3", b"\xff\xc0", 1))
