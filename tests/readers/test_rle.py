"""The RLE decoder against pydicom's encoder, by the rules of PS3.5 Annex G."""

from __future__ import annotations

import struct
import tracemalloc

import numpy as np
import pytest
from pydicom import Dataset
from pydicom.encaps import get_frame
from pydicom.uid import RLELossless
from tests.corpus import as_integers, draw_chest, make_dicom

from lungscope.readers.rle import decode


def encoded(stored: np.ndarray, bits: int) -> bytes:
    ds: Dataset = make_dicom(stored, bits)
    ds.compress(RLELossless, generate_instance_uid=False)
    return get_frame(ds.PixelData, 0, number_of_frames=1)


def frame(*segments: bytes) -> bytes:
    starts = [64 + sum(map(len, segments[:index])) for index in range(len(segments))]
    return struct.pack("<16I", len(segments), *starts, *[0] * (15 - len(segments))) + b"".join(segments)


@pytest.mark.parametrize("bits", [8, 16])
def test_what_was_encoded_comes_back(bits: int) -> None:
    rng = np.random.default_rng(bits)
    stored = as_integers(draw_chest(40, 37, rng), bits).astype(f"u{bits // 8}")
    stored[3:9] = rng.integers(0, 2**bits, (6, 37))
    stored[9:20] = 0
    found = decode(encoded(stored, bits), 40, 37, bits // 8)
    assert found.dtype == stored.dtype
    np.testing.assert_array_equal(found, stored)


def test_runs_by_hand() -> None:
    """Three bytes as they are, nothing, one byte three times."""
    assert decode(frame(b"\x02\x01\x02\x03\x80\xfe\x09"), 2, 3, 1).tolist() == [[1, 2, 3], [9, 9, 9]]
    assert decode(frame(b"\xff\x01", b"\x01\x02\x03"), 1, 2, 2).tolist() == [[0x102, 0x103]]


def test_no_more_is_decoded_than_the_film_holds() -> None:
    data = frame(b"\x81\x55" * 2**20)
    tracemalloc.start()
    found = decode(data, 64, 64, 1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (found == 0x55).all()
    assert peak < 2**22


def test_broken_frames_raise_and_nothing_else() -> None:
    whole = encoded(as_integers(draw_chest(30, 30, np.random.default_rng(0)), 12), 12)
    for cut in range(0, len(whole) - 4, 61):
        with pytest.raises(ValueError, match="RLE"):
            decode(whole[:cut], 30, 30, 2)
    with pytest.raises(ValueError, match="2 RLE segments for pixels of 1 bytes"):
        decode(whole, 30, 30, 1)
