"""RLE (PS3.5 Annex G), which DICOM packs the bytes of a film by.

Written here because pydicom's decoder goes on for as long as there are data, whatever the film's header says: each two
bytes may become 128.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray


def decode(frame: bytes, rows: int, columns: int, itemsize: int) -> NDArray[np.unsignedinteger[Any]]:
    """Decode one frame to u8 or u16 [H, W], by `itemsize` (bytes). Raises ValueError where it is broken or cut short;
    what follows behind the last pixel is not looked at."""
    # G.5: how many segments there are, and where each of 15 begins. G.2: a segment for each byte, the highest first.
    count, *starts = struct.unpack("<16I", frame[:64].ljust(64, b"\0"))
    if count != itemsize:
        raise ValueError(f"{count} RLE segments for pixels of {itemsize} bytes")
    planes = np.empty((rows * columns, itemsize), np.uint8)
    for index, (start, end) in enumerate(zip(starts, [*starts[1:itemsize], len(frame)], strict=False)):
        planes[:, index] = np.frombuffer(_segment(frame[start:end], rows * columns), np.uint8)
    return planes.view(f">u{itemsize}").reshape(rows, columns).astype(f"u{itemsize}", copy=False)


def _segment(data: bytes, count: int) -> bytearray:
    """The first `count` bytes that a segment stands for (G.3.1, G.3.2)."""
    out, at = bytearray(), 0
    try:
        while len(out) < count:
            head = data[at]
            if head < 128:
                out += data[at + 1 : at + 2 + head]
                at += 2 + head
            elif head > 128:
                out += data[at + 1 : at + 2] * (257 - head)
                at += 2
            else:
                at += 1
    except IndexError:
        raise ValueError(f"an RLE segment ends after {len(out)} of {count} bytes") from None
    return out[:count]
