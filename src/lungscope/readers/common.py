"""What the readers share: how large a stranger's file may be, and what each of them hands back."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import cv2

from lungscope.errors import UnsupportedImageError
from lungscope.radiograph import Pixels

#: Most pixels that are decoded. A 35 x 43 cm film digitised at 50 micrometres has 60 million; Pillow itself starts to
#: warn of decompression bombs at 89 million. Checked on the header, before memory is asked for.
MAX_PIXELS = 80_000_000

#: Most bytes that are read of one file, and that a deflated one may grow to: MAX_PIXELS as f32, and a header.
MAX_BYTES = 4 * MAX_PIXELS + 2**24

#: Most scans of a JPEG, libtiff's limit. A progressive film has about ten; each costs time by the picture's size, even
#: where it holds nothing.
MAX_SCANS = 100
#: What ends a scan's data: a marker that is no stuffed zero, fill byte or restart (ISO 10918-1, B.1.1.2 and B.1.1.5).
_MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")
_END, _SCAN = b"\xd9", b"\xda"

#: What systems leave in folders of films, and is none.
NO_FILM = frozenset({"dicomdir", "thumbs.db", "desktop.ini"})


@dataclass(frozen=True)
class Decoded:
    """A film out of its container.

    pixels: f32 [H, W], 0..1, bright = dense. The other fields are those of `Radiograph` and `Source`.
    """

    pixels: Pixels
    format: str
    tags: dict[str, str] = field(default_factory=dict)
    spacing_mm: tuple[float, float] | None = None
    spacing_origin: str | None = None


def tell_memory(error: Exception, name: str) -> None:
    """Raise MemoryError where `error` is OpenCV's way to say that there was too little, which is no film's fault."""
    if isinstance(error, cv2.error) and error.code == cv2.Error.StsNoMem:
        raise MemoryError(f"{name}: {error.err}") from error


def check_size(width: int, height: int, name: str, limit: int = MAX_PIXELS) -> None:
    """Raise UnsupportedImageError if the header promises more than `limit` pixels."""
    if width * height > limit:
        raise UnsupportedImageError(
            f"{name}: its header promises {width} x {height} pixels; at most {limit:,} are decoded. "
            "Give a chest film at its detector's resolution."
        )


def check_scans(jpeg: bytes, name: str) -> None:
    """Raise UnsupportedImageError if a JPEG has more than `MAX_SCANS` scans."""
    at, scans = 2, 0
    while (marker := _MARKER.search(jpeg, at)) and marker[1] != _END:
        scans += marker[1] == _SCAN
        if scans > MAX_SCANS:
            raise UnsupportedImageError(
                f"{name}: is a JPEG of more than {MAX_SCANS} scans, the most that are decoded. Save it as PNG, or as a "
                "JPEG that is not progressive."
            )
        length = int.from_bytes(jpeg[marker.end() : marker.end() + 2], "big")
        at = marker.end() + max(2, length)
