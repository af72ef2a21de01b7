"""PNG, JPEG, TIFF and BMP films, through Pillow; plain grey PNG through kornia-rs.

Range: 0 is black and the largest number that the sample's bits can hold is white: 255, 4095 (12-bit TIFF) or 65535.
The picture's own maximum is never looked at. Floating-point TIFF must be within 0..1 as it is.
Grey that was saved as colour is accepted when its channels agree (see `CHROMA_TOLERANCE`); real colour is refused.
Transparency: what is transparent is no film, so it is black; grey values are multiplied by their opacity.
EXIF orientation is applied. Gamma and colour profiles are not: they speak about screens. Resolution (pHYs, dpi) is not
taken for pixel spacing, as it is about paper.
"""

from __future__ import annotations

import struct
from io import BytesIO
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from lungscope.errors import InputError, UnreadableFileError, UnsupportedImageError
from lungscope.radiograph import Pixels
from lungscope.readers.common import MAX_PIXELS, Decoded, check_scans, check_size, tell_memory

FORMATS = ("PNG", "JPEG", "TIFF", "BMP")

#: How far the channels of a grey pixel may be apart, as a share of the range (JPEG rounds chroma in coarse steps), and
#: the share of pixels that may be further apart (a coloured side marker).
CHROMA_TOLERANCE = 8 / 255
COLOURED_SHARE = 0.01

#: Pixels up to which no other thread of Python runs while a PNG is decoded: a few hundredths of a second.
_QUICK = 2**24
#: Where a PNG may say how it is to be turned, besides the Exif chunk: the keys of text chunks, and these chunks' types.
_TURNED_BY = (b"Raw profile type", b"XML:com.adobe.xmp")
_TEXT = (b"tEXt", b"zTXt", b"iTXt")
_ORIENTATION = 0x0112
_BITS_PER_SAMPLE = 258
_PHOTOMETRIC = 262
_SAMPLE_FORMAT, _SIGNED = 339, 2
_TILE = (322, 323)  # TileWidth, TileLength
_SHORT, _LONG = 3, 4

Samples = NDArray[np.integer[Any] | np.floating[Any]]


def decode(data: bytes, name: str, max_pixels: int = MAX_PIXELS) -> Decoded:
    """Decode the bytes of a raster file; `name` is what errors call it.

    Raises UnreadableFileError (no such image, or a broken one) or UnsupportedImageError (colour, several pages, 1 or
    32 bits, floats beyond 0..1, too large); MemoryError and ImportError, which say nothing of the film.
    """
    try:
        return _decode(data, name, max_pixels)
    except (InputError, ImportError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnsupportedImageError(
            f"{name}: its header promises more than the {max_pixels:,} pixels that are decoded at most. "
            "Give a chest film at its detector's resolution."
        ) from error
    except UnidentifiedImageError as error:
        raise UnreadableFileError(
            f"{name}: is not an image: its {len(data):,} bytes begin with {data[:8]!r}. "
            f"Films are read from {', '.join(FORMATS)} and DICOM."
        ) from error
    except Exception as error:  # Pillow's plugins let nearly every type escape from a broken file
        tell_memory(error, name)
        raise UnreadableFileError(
            f"{name}: begins like an image but is broken or cut short ({error}). Export or copy the film again."
        ) from error


def _decode(data: bytes, name: str, max_pixels: int) -> Decoded:
    with Image.open(BytesIO(data), formats=FORMATS) as image:
        check_size(*image.size, name, max_pixels)
        if getattr(image, "is_animated", False):  # not `n_frames`, which reads every page of a TIFF
            raise UnsupportedImageError(f"{name}: holds at least 2 pages or frames. Give one film per file.")
        if image.format == "JPEG":
            check_scans(data, name)
        bits, mode = _bits(image, data), image.mode
        tags = {"Format": image.format or "", "Mode": mode, "BitsPerSample": str(bits)}
        if image.format == "TIFF":
            _check_signs(image, name)
            _check_tiles(image, data, name, max_pixels)
            tags["Compression"] = str(image.info.get("compression", "raw"))
        inverted = image.format == "TIFF" and mode in ("I;16", "I;16B", "F") and _tiff(image, _PHOTOMETRIC) == 0
        if image.format == "PNG" and _is_plain_grey(image, data):
            return Decoded(_scale(_grey_png(data, image.size, bits), 2**bits - 1, name), "PNG", tags)
        orientation = image.getexif().get(_ORIENTATION, 1)
        if bits > 8 and len(image.getbands()) > 1:
            samples = _deep_colour(data)
            if image.format == "TIFF":
                orientation = 1  # OpenCV has already turned it
        else:
            samples = _samples(image, name)
            orientation = image.getexif().get(_ORIENTATION, 1)  # Pillow has already turned a TIFF
    pixels = _in_range(samples, name) if samples.dtype.kind == "f" else _scale(samples, 2**bits - 1, name)
    return Decoded(_upright(1 - pixels if inverted else pixels, orientation), tags["Format"], tags)


def _bits(image: Image.Image, data: bytes) -> int:
    """Bits of one decoded sample."""
    if image.mode == "P":
        return 8
    if image.format == "PNG":
        return max(8, data[24])  # IHDR: Pillow widens 2 and 4 bits to 8
    if image.format == "TIFF":
        stored = _tiff(image, _BITS_PER_SAMPLE)
        return max(8, *stored) if isinstance(stored, tuple) else 8
    return 8


def _check_signs(image: Image.Image, name: str) -> None:
    """Refuse signed samples, which Pillow takes for unsigned ones where they have 8 bits."""
    kinds = _tiff(image, _SAMPLE_FORMAT)
    if isinstance(kinds, tuple) and _SIGNED in kinds and image.mode != "I":
        raise UnsupportedImageError(f"{name}: has signed integers. Give grey of 8 or 16 unsigned bits.")


def _check_tiles(image: Image.Image, data: bytes, name: str, max_pixels: int) -> None:
    """Refuse tiles of more than `max_pixels`, which take memory whatever the picture's size (TIFF 6.0, section 15).

    Their sides may stand there once, as one SHORT or LONG each: of others, Pillow and libtiff take different ones.
    """
    order, is_big = "<" if data.startswith(b"II") else ">", 43 in data[2:4]
    first, count, entry, at, step = ("Q", "Q", "HHQ", 8, 20) if is_big else ("I", "H", "HHI", 4, 12)
    (start,) = struct.unpack_from(order + first, data, at)
    (length,) = struct.unpack_from(order + count, data, start)
    start += struct.calcsize(order + count)
    entries = (struct.unpack_from(order + entry, data, start + step * index) for index in range(length))
    tiles = [(tag, kind, values) for tag, kind, values in entries if tag in _TILE]
    if len({tag for tag, _, _ in tiles}) < len(tiles) or any(
        kind not in (_SHORT, _LONG) or values != 1 for _, kind, values in tiles
    ):
        raise ValueError("the size of its tiles is not one number a side")
    width, height = (_tiff(image, tag) for tag in _TILE)
    if isinstance(width, int) and isinstance(height, int):
        check_size(width, height, name, max_pixels)


def _tiff(image: Image.Image, tag: int) -> object:
    return image.tag_v2.get(tag) if hasattr(image, "tag_v2") else None


def _is_plain_grey(image: Image.Image, data: bytes) -> bool:
    """Whether a PNG is grey of 8 or 16 bits, without transparency and word of how it is to be turned, and not so large
    that other threads should not wait for it."""
    grey = (image.mode, data[24]) in (("L", 8), ("I;16", 16)) and image.width * image.height <= _QUICK
    return grey and "transparency" not in image.info and not _may_be_turned(data)


def _may_be_turned(data: bytes) -> bool:
    """Whether a chunk of a PNG may say how it is to be turned (PNG, third edition, 5.3: length, type, data, CRC)."""
    start = 8
    while start < len(data):
        kind = data[start + 4 : start + 8]
        if kind == b"eXIf" or (kind in _TEXT and data.startswith(_TURNED_BY, start + 8)):
            return True
        start += 12 + int.from_bytes(data[start : start + 4], "big")
    return False


def _grey_png(data: bytes, size: tuple[int, int], bits: int) -> Samples:
    """Decode in a half to a third of Pillow's time, with the interpreter's lock held, and check the sums of all chunks
    of pixels, where Pillow gives wrong pixels for some broken files."""
    from kornia_rs import io  # not for whoever reads DICOM

    width, height = size
    decode = io.decode_image_png_u8 if bits == 8 else io.decode_image_png_u16
    samples: Samples = decode(data, (height, width), "mono")
    return samples[..., 0]


def _samples(image: Image.Image, name: str) -> Samples:
    """Decode with Pillow: grey [H, W], grey and alpha [H, W, 2], or colour [H, W, 3 or 4]."""
    mode, key = image.mode, image.info.get("transparency")
    if mode in ("P", "PA"):
        image = image.convert("RGB" if mode == "P" and key is None else "RGBA")
    elif mode in ("L", "RGB") and key is not None:
        image = image.convert("LA" if mode == "L" else "RGBA")
    elif mode in ("1", "I", "CMYK", "LAB", "YCbCr", "HSV"):
        kinds = {"1": "has one bit per pixel, which holds no grey values", "I": "has 32-bit or signed integers"}
        raise UnsupportedImageError(
            f"{name}: {kinds.get(mode, f'is a colour picture ({mode})')}. Give grey of 8 or 16 unsigned bits."
        )
    elif mode not in ("L", "LA", "RGB", "RGBA", "I;16", "I;16B", "F"):
        raise UnsupportedImageError(f"{name}: its pixel mode {mode} is not read. Give grey of 8 or 16 unsigned bits.")
    samples: Samples = np.asarray(image)
    if mode.startswith("I;16") and isinstance(key, int):
        samples = np.where(samples == key, np.uint16(0), samples)
    return samples


def _deep_colour(data: bytes) -> Samples:
    """Decode colour of 16 bits per channel, which Pillow would cut to 8."""
    decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if decoded is None:
        raise ValueError("the decoder of 16-bit colour gave up")
    if decoded.ndim == 2:
        return decoded
    return cv2.cvtColor(decoded, cv2.COLOR_BGRA2RGBA if decoded.shape[2] == 4 else cv2.COLOR_BGR2RGB)


def _scale(samples: Samples, white: int, name: str) -> Pixels:
    """Unsigned samples [H, W] or [H, W, channels] to f32 [H, W], with `white` as 1."""
    if samples.ndim == 2 and samples.dtype == np.uint8:
        return np.asarray(cv2.LUT(samples, np.arange(256, dtype=np.float32) / np.float32(white)), np.float32)
    if samples.ndim == 2:
        return np.divide(samples, np.float32(white), dtype=np.float32)
    channels = cv2.split(samples)
    if len(channels) == 2:
        grey = channels[0]
    else:
        red, green, blue = channels[:3]
        apart = cv2.subtract(cv2.max(cv2.max(red, green), blue), cv2.min(cv2.min(red, green), blue))
        coloured = np.count_nonzero(apart > CHROMA_TOLERANCE * white) / apart.size
        if coloured > COLOURED_SHARE:
            raise UnsupportedImageError(
                f"{name}: is a colour picture: in {coloured:.0%} of its pixels red, green and blue differ by more than "
                f"{CHROMA_TOLERANCE:.0%} of the range; at most {COLOURED_SHARE:.0%} may. Give a grey radiograph."
            )
        grey = cv2.cvtColor(np.ascontiguousarray(samples[..., :3]), cv2.COLOR_RGB2GRAY)
    pixels: Pixels = np.divide(grey, np.float32(white), dtype=np.float32)
    if len(channels) in (2, 4) and channels[-1].min() < white:
        pixels *= np.divide(channels[-1], np.float32(white), dtype=np.float32)
    return pixels


def _in_range(samples: Samples, name: str) -> Pixels:
    pixels = samples.astype(np.float32)
    broken = pixels.size - np.count_nonzero(np.isfinite(pixels))
    if broken:
        raise UnsupportedImageError(
            f"{name}: {broken:,} of its {pixels.size:,} pixels are NaN or infinite. Save finite values within 0..1."
        )
    low, high = float(pixels.min()), float(pixels.max())
    if low < 0 or high > 1:
        raise UnsupportedImageError(
            f"{name}: its floating-point pixels run from {low:g} to {high:g}. Only 0..1 has a known meaning; "
            "scale them by the detector's full range, or save 16-bit integers."
        )
    return pixels


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    """Undo EXIF orientation 1..8 (Exif 2.32, 4.6.4 A): 5 to 8 are transposed, then each is a pair of flips."""
    if orientation >= 5:
        pixels = pixels.T
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)
