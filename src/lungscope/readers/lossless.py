"""Lossless JPEG with Huffman coding (ISO/IEC 10918-1, process 14, Annex H), as DICOM's JPEG Lossless uses it.

Written here because the decoders that exist are either GPL (libjpeg of Thomas Richter) or end the whole process on a
broken file (GDCM). One component; 2 to 16 bits; all seven predictors; restart intervals.
"""

from __future__ import annotations

import itertools
import re
from array import array
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]

_RESTART = re.compile(rb"\xff+[\xd0-\xd7]")
_END = re.compile(rb"\xff+[^\x00\xd0-\xd7\xff]")


@dataclass
class _Header:
    bits: int = 0
    rows: int = 0
    columns: int = 0
    restart: int = 0
    predictor: int = 0
    shift: int = 0
    table: int = 0
    tables: dict[int, tuple[NDArray[np.uint8], NDArray[np.uint8]]] = field(default_factory=dict)


def decode(stream: bytes) -> NDArray[np.uint16]:
    """Decode one frame to u16 [H, W]. Raises ValueError where it is broken, cut short, or of another process."""
    header, start = _parse(stream)
    end = found.start() if (found := _END.search(stream, start)) else len(stream)
    per_segment = header.restart // header.columns if header.restart else header.rows
    if header.restart % header.columns:
        raise ValueError("the restart interval is not a whole number of rows")
    image = np.empty((header.rows, header.columns), np.uint16)
    top = 0
    for segment in _RESTART.split(stream[start:end], -(-header.rows // per_segment)):
        rows = min(per_segment, header.rows - top)
        if rows <= 0:
            break
        differences = _differences(segment.replace(b"\xff\x00", b"\xff"), rows * header.columns, header)
        image[top : top + rows] = _predict(differences.reshape(rows, header.columns), header) << header.shift
        top += rows
    if top < header.rows:
        raise ValueError(f"the data end after {top} of {header.rows} rows")
    return image


def _parse(stream: bytes) -> tuple[_Header, int]:
    """The headers (B.2) up to the scan, and where its entropy-coded data begin."""
    header, offset = _Header(), 2
    if stream[:2] != b"\xff\xd8":
        raise ValueError("a JPEG begins with FF D8")
    while offset + 4 <= len(stream):
        if stream[offset : offset + 2] == b"\xff\xff":  # fill (B.1.1.2)
            offset += 1
            continue
        marker, length = stream[offset + 1], int.from_bytes(stream[offset + 2 : offset + 4], "big")
        body = stream[offset + 4 : offset + 2 + length]
        if stream[offset] != 0xFF or len(body) != length - 2:
            break
        offset += 2 + length
        if marker == 0xC3:
            header.bits, components = body[0], body[5]
            header.rows, header.columns = int.from_bytes(body[1:3], "big"), int.from_bytes(body[3:5], "big")
            if components != 1 or not 2 <= header.bits <= 16 or not header.rows or not header.columns:
                raise ValueError(f"{components} components of {header.bits} bits, {header.rows} x {header.columns}")
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            raise ValueError(f"JPEG process SOF{marker - 0xC0} is not the lossless one")
        elif marker == 0xC4:
            while body:
                count = sum(body[1:17])
                header.tables[body[0]] = _table(body[1:17], body[17 : 17 + count])
                body = body[17 + count :]
        elif marker == 0xDD:
            header.restart = int.from_bytes(body[:2], "big")
        elif marker == 0xDA:
            header.table, header.predictor, header.shift = body[2] >> 4, body[3], body[5] & 15
            if not header.rows or header.table not in header.tables or not 1 <= header.predictor <= 7:
                raise ValueError("the scan has no frame, no Huffman table or no predictor")
            return header, offset
    raise ValueError("the headers end before a scan begins")


def _table(counts: bytes, symbols: bytes) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Annex C: for each 16 bits that may come, the length of the code that they begin with (0: none) and its symbol."""
    lengths, categories = np.zeros(2**16, np.uint8), np.zeros(2**16, np.uint8)
    code, taken = 0, 0
    for length, count in enumerate(counts, 1):
        for symbol in symbols[taken : taken + count]:
            first, span = code << (16 - length), 1 << (16 - length)
            if symbol > 16 or first + span > 2**16:
                raise ValueError("the Huffman table is not one for lossless JPEG")
            lengths[first : first + span], categories[first : first + span] = length, symbol
            code += 1
        taken += count
        code <<= 1
    return lengths, categories


def _differences(data: bytes, count: int, header: _Header) -> Integers:
    """Decode `count` differences (H.1.2.2).

    Where a code begins is known only after the one before it. So the length of the step is looked up for every bit
    position at once, the positions are then a walk, and the values are again computed all at once.
    """
    lengths, categories = header.tables[header.table]
    data = data[: 4 * count]  # a code has at most 16 bits, and so have the ones after it
    padded = np.frombuffer(data + bytes(4), np.uint8).astype(np.uint32)
    words = padded[:-2] << 16 | padded[1:-1] << 8 | padded[2:]  # 24 bits from each byte on
    step_of = lengths + np.where(categories < 16, categories, 0).astype(np.uint8)
    step_of[lengths == 0] = 0
    steps = np.empty((words.size, 8), np.uint8)
    for phase in range(8):
        steps[:, phase] = step_of[words >> (8 - phase) & 0xFFFF]
    walk, limit, position, starts = steps.tobytes(), 8 * len(data), 0, array("q")
    for _ in range(count):
        if position >= limit:
            raise ValueError("the data end too early")
        starts.append(position)
        position += walk[position]
    if position > limit:
        raise ValueError("the data end too early")
    at = np.array(starts)
    window = words[at >> 3] >> (8 - (at & 7)) & 0xFFFF
    size = categories[window].astype(np.int64)
    length = lengths[window]
    if not length.all():
        raise ValueError("the data hold a code that is in no Huffman table")
    at += length
    size_of_extra = np.where(size < 16, size, 0)
    extra = words[at >> 3].astype(np.int64) >> (24 - (at & 7) - size_of_extra) & ((1 << size_of_extra) - 1)
    # F.1.2.1.1: a leading 0 marks a negative number.
    value = np.where(extra < (1 << size_of_extra) >> 1, extra - (1 << size_of_extra) + 1, extra)
    return np.where(size == 16, 2**15, value)


def _predict(differences: Integers, header: _Header) -> Integers:
    """Undo the prediction (H.1.2.1, Table H.1), modulo 2 ** 16. Left, above and above-left are Ra, Rb, Rc there."""
    differences[0, 0] += 1 << (header.bits - header.shift - 1)
    out = differences
    predictor = header.predictor
    if predictor == 1:
        out[:, 0] = np.cumsum(out[:, 0])
        return np.cumsum(out, axis=1) & 0xFFFF
    out[0] = np.cumsum(out[0]) & 0xFFFF
    if predictor == 2:
        return np.cumsum(out, axis=0) & 0xFFFF
    for above, row in itertools.pairwise(out):
        if predictor == 3:
            row += np.concatenate([above[:1], above[:-1]])
        elif predictor == 4:
            row[:] = above + np.cumsum(row)
        elif predictor == 5:
            row[0] += above[0]
            row[1:] += np.diff(above) >> 1
            row[:] = np.cumsum(row)
        else:
            row[:] = _predict_row(row.tolist(), above.tolist(), predictor)
        row &= 0xFFFF
    return out


def _predict_row(row: list[int], above: list[int], predictor: int) -> list[int]:
    left = row[0] = row[0] + above[0] & 0xFFFF
    for x in range(1, len(row)):
        guess = above[x] + (left - above[x - 1] >> 1) if predictor == 6 else left + above[x] >> 1
        left = row[x] = row[x] + guess & 0xFFFF
    return row
