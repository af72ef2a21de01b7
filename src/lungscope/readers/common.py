"""What the readers share: how large a stranger's file may be, and what each of them hands back."""

from __future__ import annotations

from dataclasses import dataclass, field

import cv2

from lungscope.errors import UnsupportedImageError
from lungscope.radiograph import Pixels

#: Most pixels that are decoded. A 35 x 43 cm film digitised at 50 micrometres has 60 million; Pillow itself starts to
#: warn of decompression bombs at 89 million. Checked on the header, before memory is asked for.
MAX_PIXELS = 80_000_000

#: Most bytes that are read of one file, and that a deflated one may grow to: MAX_PIXELS as f32, and a header.
MAX_BYTES = 4 * MAX_PIXELS + 2**24

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
