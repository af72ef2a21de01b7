"""DICOM CR, DX and secondary capture films, through pydicom.

The grey scale follows PS3.4 N.2 and PS3.3 C.11, in this order:

1. Modality: Modality LUT Sequence, or Rescale Slope and Intercept (C.11.1).
2. VOI: the first VOI LUT Sequence item if there is one, else the first Window (LINEAR, LINEAR_EXACT, SIGMOID;
   C.11.2.1). Where both are present they are alternatives (C.11.2.1.1); the LUT is the vendor's film curve, the window
   its straight approximation. Where neither is, or the width is illegal, the range is everything that Bits Stored can
   hold, after step 1.
3. Polarity: inverted for MONOCHROME1 (C.7.6.3.1.2) or Presentation LUT Shape INVERSE (C.11.6.1.2). Both together say
   the same thing once (C.8.11.3), so they invert once. MONOCHROME1 with IDENTITY contradicts itself; it is inverted
   too, since scanners are known that write IDENTITY regardless.
4. Pixel Padding Value, up to Pixel Padding Range Limit (C.7.5.1.1.2), is no film: 0.

Stored values have at most 16 bits, so all of that is computed once for each possible value and looked up per pixel.
Each transfer syntax has exactly one decoder, so that what comes out does not depend on what else is installed; JPEG
2000 has OpenCV's for 8 to 16 unsigned bits, which lets other threads go on meanwhile, and pylibjpeg's for the rest.
Both are OpenJPEG.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from contextlib import suppress
from io import BytesIO
from typing import Any

import cv2
import numpy as np
import pydicom.uid as uid
from numpy.typing import NDArray
from pydicom import Dataset, dcmread
from pydicom.encaps import get_frame
from pydicom.errors import InvalidDicomError
from pydicom.multival import MultiValue
from pydicom.pixels.decoders.base import get_decoder

from lungscope.errors import InputError, UnreadableFileError, UnsupportedImageError
from lungscope.radiograph import Pixels
from lungscope.readers import lossless, rle
from lungscope.readers.common import MAX_BYTES, MAX_PIXELS, Decoded, check_scans, check_size, tell_memory

#: Kinds of device that make films: computed and digital radiography, digitised film, and secondary captures of them.
MODALITIES = ("CR", "DX", "DR", "RG", "SC", "OT")

#: SOP classes that speak for a file without a Modality.
SOP_CLASSES = (
    uid.ComputedRadiographyImageStorage,
    uid.DigitalXRayImageStorageForPresentation,
    uid.DigitalXRayImageStorageForProcessing,
    uid.SecondaryCaptureImageStorage,
)

#: The decoder of each transfer syntax that is read: pydicom's name of a plugin, "" where none is needed, "own" for
#: lossless.py and rle.py. 12-bit JPEG Extended is missing: no decoder under a permissive licence has it.
DECODERS: dict[str, str] = {
    uid.ImplicitVRLittleEndian: "",
    uid.ExplicitVRLittleEndian: "",
    uid.ExplicitVRBigEndian: "",
    uid.DeflatedExplicitVRLittleEndian: "",
    uid.RLELossless: "own",
    uid.JPEGBaseline8Bit: "pillow",
    uid.JPEGExtended12Bit: "pillow",
    uid.JPEGLossless: "own",
    uid.JPEGLosslessSV1: "own",
    uid.JPEGLSLossless: "pyjpegls",
    uid.JPEGLSNearLossless: "pyjpegls",
    uid.JPEG2000Lossless: "pylibjpeg",
    uid.JPEG2000: "pylibjpeg",
    uid.HTJ2KLossless: "pylibjpeg",
    uid.HTJ2KLosslessRPCL: "pylibjpeg",
    uid.HTJ2K: "pylibjpeg",
}

#: Where spacing may stand, best first (PS3.3 10.7.1.3): calibrated to the patient, at the detector, at the scanner.
SPACINGS = ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing")

#: What is kept as `Source.tags`. Nothing that names or dates the patient.
KEYWORDS = (
    "SOPClassUID",
    "SOPInstanceUID",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "Modality",
    "ConversionType",
    "Manufacturer",
    "ManufacturerModelName",
    "BodyPartExamined",
    "ViewPosition",
    "PatientOrientation",
    "PatientPosition",
    "ImageLaterality",
    "PresentationIntentType",
    "PixelIntensityRelationship",
    "PhotometricInterpretation",
    "PresentationLUTShape",
    "BitsAllocated",
    "BitsStored",
    "PixelRepresentation",
    "RescaleSlope",
    "RescaleIntercept",
    "RescaleType",
    "WindowCenter",
    "WindowWidth",
    "VOILUTFunction",
    "PixelSpacing",
    "PixelSpacingCalibrationType",
    "ImagerPixelSpacing",
    "NominalScannedPixelSpacing",
    "EstimatedRadiographicMagnificationFactor",
    "PixelAspectRatio",
    "LossyImageCompression",
    "BurnedInAnnotation",
)

_NEEDED = ("Rows", "Columns", "BitsAllocated", "BitsStored", "PixelRepresentation", "PhotometricInterpretation")
_JPEG_2000 = (uid.JPEG2000Lossless, uid.JPEG2000, uid.HTJ2KLossless, uid.HTJ2KLosslessRPCL, uid.HTJ2K)
_JPEG_LS = (uid.JPEGLSLossless, uid.JPEGLSNearLossless)
#: Markers of JPEG before its scan: SOF0..SOF15 without DHT, JPG and DAC; DHT, DAC, DQT, DRI, APPn, COM. JPEG-LS has
#: SOF55 and LSE as well.
_SOF = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_TABLES = {0xC4, 0xCC, 0xDB, 0xDD, *range(0xE0, 0xF0), 0xFE}
_SOF_LS, _TABLES_LS = {0xF7}, {*_TABLES, 0xF8}

Values = NDArray[np.float64]


def decode(data: bytes, name: str, max_pixels: int = MAX_PIXELS) -> Decoded:
    """Decode the bytes of a DICOM file; `name` is what errors call it.

    Raises UnreadableFileError (broken, cut short) or UnsupportedImageError (another modality, colour, several frames,
    a compression that is not read, more than 16 bits, too large); MemoryError and ImportError, which say nothing of the
    film.
    """
    try:
        return _decode(data, name, max_pixels)
    except (InputError, ImportError, MemoryError):
        raise
    except InvalidDicomError as error:
        raise UnreadableFileError(f"{name}: begins like DICOM but is not. Export the film again.") from error
    except Exception as error:  # pydicom and the codecs let nearly every type escape from a broken file
        tell_memory(error, name)
        raise UnreadableFileError(
            f"{name}: is a DICOM file that is broken or cut short ({error}). Export or copy the film again."
        ) from error


def _decode(data: bytes, name: str, max_pixels: int) -> Decoded:
    ds = dcmread(_File(data, name), force=True)
    _check_kind(ds, name)
    if "PixelData" not in ds:
        raise UnreadableFileError(f"{name}: is a DICOM file without pixels, or was cut short. Export the film again.")
    missing = [keyword for keyword in _NEEDED if ds.get(keyword) is None]
    if missing:
        raise UnreadableFileError(f"{name}: its DICOM header lacks {', '.join(missing)}. Export the film again.")
    _check_pixels(ds, name, max_pixels)
    table, how = grey_scale(ds)
    codes = _codes(ds, name)
    unused = _unused_bits(ds, codes)
    # Repeated over the unused bits: retired overlays may live in them (PS3.5 8.1.2), and sign bits do; neither is part
    # of the value.
    pixels = np.asarray(cv2.LUT(codes, np.resize(table, 2 ** (8 * codes.itemsize))), np.float32)
    spacing, origin = _spacing(ds)
    tags = {key: text for key in KEYWORDS if (text := _text(_optional(ds, key)))}
    tags |= {"TransferSyntaxUID": str(_transfer_syntax(ds)), "GreyScale": how}
    if unused:
        tags["UnusedBits"] = f"{unused:#x}"
    if views := ds.get("ViewCodeSequence"):
        tags["ViewCode"], tags["ViewCodeMeaning"] = (
            _text(_optional(views[0], key)) for key in ("CodeValue", "CodeMeaning")
        )
    return Decoded(pixels, "DICOM", tags, spacing, origin)


def grey_scale(ds: Dataset) -> tuple[Pixels, str]:
    """What each stored value looks like, and in words how that came about.

    The table is f32 [2 ** BitsStored] in 0..1, bright = dense, indexed by the stored bits read as an unsigned number.
    Raises ValueError where the rescale or a LUT is illegal.
    """
    bits = int(ds.BitsStored)
    stored = np.arange(2**bits)
    if ds.PixelRepresentation == 1:
        stored[2 ** (bits - 1) :] -= 2**bits
    swapped = _transfer_syntax(ds) == uid.ExplicitVRBigEndian
    if modality := ds.get("ModalityLUTSequence"):
        values, (low, high) = _look_up(stored, modality[0], swapped)
    else:
        values = _rescale(stored, ds)
        low, high = float(values.min()), float(values.max())
    if voi := _voi_lut(ds):
        values, (low, high) = _look_up(values, voi, swapped)
        shades, how = (values - low) / (high - low), "VOI LUT"
    elif (window := _window(values, ds)) is not None:
        shades, how = window, f"window {_text(ds.WindowCenter)} / {_text(ds.WindowWidth)}"
    else:
        shades, how = (values - low) / (high - low), f"all of {low:g} to {high:g}"
    shape = _text(ds.get("PresentationLUTShape")).upper()
    if ds.PhotometricInterpretation == "MONOCHROME1" or shape == "INVERSE":
        shades, how = 1 - shades, how + ", inverted"
    if (padding := _padding(ds, "PixelPaddingValue")) is not None:
        limit = _padding(ds, "PixelPaddingRangeLimit")
        limit = padding if limit is None else limit
        shades[(stored >= min(padding, limit)) & (stored <= max(padding, limit))] = 0
        how += f", padding {padding} to {limit} as 0"
    return np.clip(shades, 0, 1).astype(np.float32), how


def _padding(ds: Dataset, keyword: str) -> int | None:
    """The value of a padding element, which may be absent or empty. Its VR need not have the sign of the pixels."""
    if (value := ds.get(keyword)) is None:
        return None
    count = 1 << int(ds.BitsAllocated)
    low = -count // 2 if ds.PixelRepresentation == 1 else 0
    return (int(value) - low) % count + low


class _File(BytesIO):
    """A file for pydicom, which reads all that is left in one go only to inflate it (PS3.5 A.5), without a limit."""

    def __init__(self, data: bytes, name: str) -> None:
        super().__init__(data)
        self._name = name

    def read(self, size: int | None = -1, /) -> bytes:
        """Raises UnsupportedImageError where what is read without a size inflates to more than MAX_BYTES."""
        data = super().read(size)
        if size is None or size < 0:
            with suppress(zlib.error):  # pydicom says what is wrong
                _check_deflated(data, self._name)
        return data


def _check_deflated(data: bytes, name: str) -> None:
    inflater, size = zlib.decompressobj(-zlib.MAX_WBITS), 0
    while data and not inflater.eof:
        size += len(inflater.decompress(data, 2**24))
        data = inflater.unconsumed_tail
        if size > MAX_BYTES:
            raise UnsupportedImageError(f"{name}: inflates to more than {MAX_BYTES:,} bytes. Give a single film.")


def _check_kind(ds: Dataset, name: str) -> None:
    modality = _text(ds.get("Modality")).upper()
    sop_class = uid.UID(_text(ds.get("SOPClassUID") or ds.file_meta.get("MediaStorageSOPClassUID")))
    if modality in MODALITIES or (not modality and sop_class in SOP_CLASSES):
        return
    if not modality and not sop_class:
        raise UnreadableFileError(
            f"{name}: says neither which modality nor which kind of DICOM object it is; it is broken or no DICOM file. "
            "Export the film again."
        )
    kind = f"modality {modality}" if modality else "no modality"
    raise UnsupportedImageError(
        f"{name}: is no radiograph ({kind}, {sop_class.name or 'unknown object'}). "
        f"Give a chest film of modality {', '.join(MODALITIES)}."
    )


def _check_pixels(ds: Dataset, name: str, max_pixels: int) -> None:
    check_size(int(ds.Columns), int(ds.Rows), name, max_pixels)
    photometric, samples = str(ds.PhotometricInterpretation), int(ds.get("SamplesPerPixel", 1))
    if samples != 1 or photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise UnsupportedImageError(
            f"{name}: is a colour picture ({photometric}, {samples} samples per pixel). "
            "Give a film with MONOCHROME1 or MONOCHROME2."
        )
    if (frames := int(ds.get("NumberOfFrames") or 1)) != 1:
        raise UnsupportedImageError(f"{name}: holds {frames} frames. Give one film per file.")
    allocated, stored = int(ds.BitsAllocated), int(ds.BitsStored)
    if allocated not in (8, 16) or not 2 <= stored <= allocated:
        raise UnsupportedImageError(
            f"{name}: stores {stored} of {allocated} bits per pixel. Films with 8 or 16 bits allocated, "
            "and no more than that stored, are read."
        )
    if int(ds.get("HighBit", stored - 1)) != stored - 1:
        raise UnsupportedImageError(
            f"{name}: its High Bit is {ds.HighBit} with {stored} bits stored; {stored - 1} is needed (PS3.5 8.1.1). "
            "Export it again."
        )


def _codes(ds: Dataset, name: str) -> NDArray[np.unsignedinteger[Any]]:
    """Each pixel as an unsigned number, [H, W], with the stored bits in its lower ones."""
    syntax = _transfer_syntax(ds)
    bits = int(ds.BitsStored)
    if syntax not in DECODERS or (syntax == uid.JPEGExtended12Bit and bits > 8):
        raise UnsupportedImageError(
            f"{name}: its compression, {syntax.name} ({syntax}) of {bits} bits, is not read. Send it "
            "uncompressed or as JPEG Lossless, JPEG-LS, JPEG 2000 or RLE (for example with dcmtk or gdcmconv --raw)."
        )
    plugin = DECODERS[syntax]
    frame = _frame(ds, name) if syntax.is_encapsulated else b""
    if syntax == uid.RLELossless:
        array: NDArray[Any] = rle.decode(frame, int(ds.Rows), int(ds.Columns), int(ds.BitsAllocated) // 8)
    elif plugin == "own":
        array = lossless.decode(frame)
    elif syntax in (uid.JPEG2000Lossless, uid.JPEG2000) and ds.PixelRepresentation == 0 and _is_unsigned(frame):
        array = _jpeg_2000(frame)
    else:
        if plugin == "pillow":
            check_scans(frame, name)
        # Uncompressed ones are looked up where they lie; what is in unused bits does not matter (`_decode`).
        options: Any = {} if plugin else {"view_only": True, "correct_unused_bits": False}
        array, _ = get_decoder(syntax).as_array(ds, index=0, decoding_plugin=plugin, **options)
        array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.shape != (ds.Rows, ds.Columns):
        raise ValueError(f"{ds.Rows} rows of {ds.Columns} pixels came out as {array.shape}")
    codes: NDArray[np.unsignedinteger[Any]] = array.view(f"u{array.itemsize}")
    has_depth = syntax.is_encapsulated and syntax != uid.RLELossless
    if has_depth and ds.PixelRepresentation == 0 and int(codes.max()) >> bits:
        raise UnreadableFileError(
            f"{name}: its header says {bits} bits are stored, its compressed data hold more. Export it again."
        )
    return codes


def _unused_bits(ds: Dataset, codes: NDArray[np.unsignedinteger[Any]]) -> int:
    """The bits above Bits Stored that are set in any pixel and no overlay of the header has (PS3.5 8.1.2), as a number;
    0 for signed pixels, whose sign stands there, too."""
    bits = int(ds.BitsStored)
    if ds.PixelRepresentation == 1 or not int(codes.max()) >> bits:
        return 0
    found = int(np.bitwise_or.reduce(codes, axis=None)) >> bits << bits
    for group in range(0x6000, 0x6020, 2):
        with suppress(Exception):  # absent, or of a value that is no bit; pydicom lets nearly every type escape
            found &= ~(1 << int(ds[group, 0x0102].value))
    return found


def _frame(ds: Dataset, name: str) -> bytes:
    """The one compressed frame, whose own header promises as many pixels as that of the film."""
    # Of one frame it says nothing that is needed, and pydicom would go by it to other bytes than are looked at here.
    for keyword in ("ExtendedOffsetTable", "ExtendedOffsetTableLengths"):
        ds.pop(keyword, None)
    frame, syntax = get_frame(ds.PixelData, 0, number_of_frames=1), _transfer_syntax(ds)
    if syntax == uid.RLELossless:  # has no size of its own
        return frame
    size = _jpeg_2000_size(frame) if syntax in _JPEG_2000 else _jpeg_size(frame, syntax in _JPEG_LS)
    if size is None:
        raise UnreadableFileError(
            f"{name}: its compressed data do not begin with how many pixels of one grey they hold, as {syntax.name} "
            "does. Export it again."
        )
    if size != (ds.Columns, ds.Rows):
        raise UnreadableFileError(
            f"{name}: its header says {ds.Columns} x {ds.Rows} pixels, its compressed data {size}. Export it again."
        )
    return frame


def _is_unsigned(frame: bytes) -> bool:
    """Whether the samples of a JPEG 2000 frame have 8 to 16 unsigned bits (ISO 15444-1 A.5.1: Ssiz)."""
    start = _siz(frame)
    return start is not None and 8 <= frame[start + 40] + 1 <= 16


def _jpeg_2000(codestream: bytes) -> NDArray[Any]:
    """Decode by OpenCV, whose messages on the terminal are off from then on: it has one for every grey picture."""
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    array = cv2.imdecode(np.frombuffer(codestream, np.uint8), cv2.IMREAD_UNCHANGED)
    if array is None or array.ndim != 2:
        raise ValueError("the JPEG 2000 decoder gave up")
    return array


def _transfer_syntax(ds: Dataset) -> uid.UID:
    """The transfer syntax; for files from before PS3.10, without a header, the one that pydicom found by reading."""
    syntax = ds.file_meta.get("TransferSyntaxUID")
    if syntax is None:
        syntax = uid.ImplicitVRLittleEndian if ds.original_encoding[0] else uid.ExplicitVRLittleEndian
        ds.file_meta.TransferSyntaxUID = syntax
    return uid.UID(syntax)


# Codecs allocate by the size that a codestream announces, so a small file could claim any amount of memory behind an
# honest DICOM header. It is looked for where they find it and nowhere else.


def _jpeg_size(frame: bytes, is_ls: bool) -> tuple[int, int] | None:
    """(columns, rows) of a JPEG or JPEG-LS frame of one component; None where it is none.

    ISO 10918-1 B.2 and ISO 14495-1 C.2: before the scan come tables, and once the frame's own header.
    """
    size, offset = None, 2
    headers, tables = (_SOF_LS, _TABLES_LS) if is_ls else (_SOF, _TABLES)
    while frame.startswith(b"\xff\xd8") and offset + 4 <= len(frame) and frame[offset] == 0xFF:
        marker, length = frame[offset + 1], _number_at(frame, offset + 2, 2)
        if marker == 0xFF:  # fill
            offset += 1
            continue
        if marker == 0xDA:
            return size
        if marker in headers and size is None and frame[offset + 9 : offset + 10] == b"\x01":
            size = _number_at(frame, offset + 7, 2), _number_at(frame, offset + 5, 2)
        elif marker not in tables:
            return None
        if length < 2:
            return None
        offset += 2 + length
    return None


def _jpeg_2000_size(frame: bytes) -> tuple[int, int] | None:
    """(columns, rows) of a JPEG 2000 frame of one component; None where it is none."""
    start = _siz(frame)
    # ISO 15444-1 A.5.1: the far and the near corner of the image, then those of a tile, then how many components.
    if start is None or frame[start + 38 : start + 40] != b"\x00\x01":
        return None
    right, bottom, left, top = (_number_at(frame, start + at, 4) for at in (6, 10, 14, 18))
    return right - left, bottom - top


def _siz(frame: bytes) -> int | None:
    """Where a JPEG 2000 frame has its SIZ marker: behind SOC, at once or in the first codestream box of a JP2 file."""
    start = 0
    if frame[4:8] == b"jP  ":  # ISO 15444-1 I.4: each box has its length, its type and perhaps a longer length
        while (kind := frame[start + 4 : start + 8]) != b"jp2c":
            length, least = _number_at(frame, start, 4), 8
            if length == 1:
                length, least = _number_at(frame, start + 8, 8), 16
            if length < least or not kind:
                return None
            start += length
        start += 16 if _number_at(frame, start, 4) == 1 else 8
    return start + 2 if frame.startswith(b"\xff\x4f\xff\x51", start) and start + 43 <= len(frame) else None


def _number_at(data: bytes, offset: int, length: int) -> int:
    return int.from_bytes(data[offset : offset + length], "big")


def _rescale(stored: NDArray[np.int_], ds: Dataset) -> Values:
    slope, intercept = _number(ds, "RescaleSlope", 1.0), _number(ds, "RescaleIntercept", 0.0)
    if slope == 0 or not math.isfinite(slope) or not math.isfinite(intercept):
        raise ValueError(f"Rescale Slope {slope} and Intercept {intercept} turn every pixel into the same or no value")
    return stored.astype(np.float64) * slope + intercept


def _window(values: Values, ds: Dataset) -> Values | None:
    """PS3.3 C.11.2.1.2 and C.11.2.1.3, with an output range of 0..1; None without a legal window."""
    center, width = _number(ds, "WindowCenter", math.nan), _number(ds, "WindowWidth", math.nan)
    function = _text(ds.get("VOILUTFunction")).upper() or "LINEAR"
    if not math.isfinite(center) or not math.isfinite(width) or width <= 0 or (function == "LINEAR" and width < 1):
        return None
    if function == "SIGMOID":
        # The standard's 1 / (1 + exp(-4 (x - c) / w)), in a form that can not overflow.
        return 0.5 + 0.5 * np.tanh(2 * (values - center) / width)
    if function == "LINEAR":
        # A width of 1 is a step (C.11.2.1.2.1, note 2).
        center, width = center - 0.5, max(width - 1, 1e-6)
    elif function != "LINEAR_EXACT":
        raise ValueError(f"VOI LUT Function {function} is none of LINEAR, LINEAR_EXACT, SIGMOID")
    shades: Values = np.clip((values - center) / width + 0.5, 0, 1)
    return shades


def _voi_lut(ds: Dataset) -> Dataset | None:
    items = ds.get("VOILUTSequence")
    return items[0] if items and "LUTDescriptor" in items[0] and "LUTData" in items[0] else None


def _look_up(values: NDArray[Any], item: Dataset, swapped: bool) -> tuple[Values, tuple[float, float]]:
    """Map `values` through a LUT (PS3.3 C.11.1.1 and C.11.2.1.1); also the range that its entries can have.

    swapped: whether the file is big endian, which pydicom leaves to us where the LUT's VR is OW.
    """
    count, first, bits = (int(number) for number in item.LUTDescriptor)
    count = (count & 0xFFFF) or 2**16
    # The first number mapped is signed where what is mapped can be; in Implicit VR pydicom goes by the stored samples.
    other = first + 2**16 if first < 0 else first - 2**16
    first = next((at for at in (first, other) if at <= values.max() and at + count > values.min()), first)
    raw: bytes | Sequence[int] = item.LUTData
    if isinstance(raw, bytes):
        raw += b"\0" * (len(raw) % 2)
        entries: NDArray[Any] = np.frombuffer(raw, ">u2" if swapped else "<u2").astype("<u2")
    else:
        entries = np.asarray(raw, "<u2")
    if entries.size < count:  # for up to 8 bits two entries a word
        entries = entries.view(np.uint8)
    if not 1 <= bits <= 16 or entries.size < count:
        raise ValueError(f"a LUT of {count} entries of {bits} bits holds {entries.size}")
    index = np.clip(np.rint(values).astype(np.int64) - first, 0, count - 1)
    return entries[:count][index].astype(np.float64), (0.0, float(2**bits - 1))


def _spacing(ds: Dataset) -> tuple[tuple[float, float] | None, str | None]:
    found: dict[str, tuple[float, float]] = {}
    for keyword in SPACINGS:
        value = _optional(ds, keyword)
        if isinstance(value, MultiValue) and len(value) == 2:
            with suppress(ValueError):
                rows, columns = float(value[0]), float(value[1])
                if 0 < rows < math.inf and 0 < columns < math.inf:
                    found[keyword] = rows, columns
    # The same at both means that nothing was calibrated to the patient (PS3.3 10.7.1.1).
    if found.get("PixelSpacing") == found.get("ImagerPixelSpacing"):
        found.pop("PixelSpacing", None)
    return next(((spacing, keyword) for keyword, spacing in found.items()), (None, None))


def _optional(ds: Dataset, keyword: str) -> Any:
    """The value of an element; None also where its VR can not hold it."""
    try:
        return ds.get(keyword)
    except Exception:  # pydicom lets nearly every type escape
        return None


def _number(ds: Dataset, keyword: str, default: float) -> float:
    """The first number of an element, which may be absent or empty. Raises ValueError, with the element's name."""
    try:
        value = ds.get(keyword)
        if isinstance(value, MultiValue):
            value = value[0] if value else None
        return default if value is None or value == "" else float(value)
    except Exception as error:  # pydicom lets nearly every type escape
        raise ValueError(f"{keyword} holds no number: {error}") from error


def _text(value: Any) -> str:
    if value is None:
        return ""
    values = value if isinstance(value, MultiValue) else [value]
    return "\\".join(str(each).strip() for each in values)
