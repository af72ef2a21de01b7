"""Film files for tests, made from nothing: whole ones of every kind that is read, and broken ones of every kind."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
import pydicom.uid as uid
from numpy.typing import NDArray
from PIL import Image
from pydicom import Dataset, FileMetaDataset
from pydicom.data import get_testdata_file
from pydicom.encaps import encapsulate

Picture = NDArray[np.float32]


def draw_chest(height: int, width: int, rng: np.random.Generator) -> Picture:
    """A drawn chest film, f32 [H, W] in 0..1, bright = dense: body, spine, heart, ribs, two dark lungs, noise."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    y, x = y / height, x / width
    jitter = rng.uniform(-0.015, 0.015, 6)

    def ellipse(cy: float, cx: float, ry: float, rx: float) -> Picture:
        return (((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 < 1).astype(np.float32)

    film = 0.08 + 0.5 * np.maximum(ellipse(0.75, 0.5, 0.72, 0.49), (np.abs(x - 0.5) < 0.1).astype(np.float32))
    domes = 0.80 + jitter[0] - 0.08 * np.cos((x - 0.5) * 14)
    lungs = np.maximum(
        ellipse(0.52 + jitter[1], 0.29 + jitter[2], 0.36, 0.165), ellipse(0.52, 0.71 + jitter[3], 0.36, 0.155)
    )
    lungs *= y < domes
    film -= 0.36 * lungs
    ribs = np.sin(2 * np.pi * (9 * y - 2.2 * np.abs(x - 0.5) + jitter[4] * 10)) > 0.45
    film += 0.07 * (ribs & (np.abs(x - 0.5) > 0.06))
    film += 0.22 * (np.abs(x - 0.5) < 0.045) + 0.25 * ellipse(0.66, 0.56 + jitter[5], 0.16, 0.15)
    film = cv2.GaussianBlur(film, (0, 0), 0.008 * height)
    film += rng.normal(0, 0.01, film.shape)
    return np.clip(film, 0, 1).astype(np.float32)


def as_integers(picture: Picture, bits: int) -> NDArray[np.uint16]:
    """0..1 to 0..2 ** bits - 1."""
    return np.rint(picture * (2**bits - 1)).astype(np.uint16)


def make_dicom(stored: NDArray[np.integer], bits: int = 12, **elements: object) -> Dataset:
    """A DX film of the stored values [H, W]; `elements` are set, or left out where None."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    allocated = 8 if bits <= 8 else 16
    signed = stored.dtype.kind == "i"
    defaults: dict[str, object] = {
        "SOPClassUID": uid.DigitalXRayImageStorageForPresentation,
        "SOPInstanceUID": uid.generate_uid(),
        "StudyInstanceUID": uid.generate_uid(),
        "SeriesInstanceUID": uid.generate_uid(),
        "Modality": "DX",
        "PatientName": "Nobody^Nemo",
        "BodyPartExamined": "CHEST",
        "ViewPosition": "PA",
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "Rows": stored.shape[0],
        "Columns": stored.shape[1],
        "BitsAllocated": allocated,
        "BitsStored": bits,
        "HighBit": bits - 1,
        "PixelRepresentation": int(signed),
        "ImagerPixelSpacing": [0.5, 0.5],
    }
    for keyword, value in (defaults | elements).items():
        if value is not None:
            setattr(ds, keyword, value)
    ds.file_meta.MediaStorageSOPClassUID = defaults["SOPClassUID"]
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    ds.PixelData = stored.astype(f"<{'iu'[not signed]}{allocated // 8}").tobytes()
    ds["PixelData"].VR = "OB" if allocated == 8 else "OW"
    return ds


def save_dicom(ds: Dataset, path: Path, syntax: uid.UID = uid.ExplicitVRLittleEndian) -> Path:
    """Write an uncompressed data set under another transfer syntax."""
    if syntax in (uid.RLELossless, uid.JPEG2000Lossless, uid.JPEG2000, uid.JPEGLSLossless, uid.JPEGLSNearLossless):
        options = {uid.JPEG2000: {"j2k_cr": [5]}, uid.JPEGLSNearLossless: {"jls_error": 2}}
        ds.compress(syntax, generate_instance_uid=False, **options.get(syntax, {}))
    elif syntax == uid.JPEGBaseline8Bit:
        buffer = BytesIO()
        Image.fromarray(np.frombuffer(ds.PixelData, np.uint8).reshape(ds.Rows, ds.Columns)).save(
            buffer, "JPEG", quality=95
        )
        ds.PixelData = encapsulate([buffer.getvalue()])
        ds["PixelData"].is_undefined_length = True
    elif syntax in (uid.JPEGLossless, uid.JPEGLosslessSV1):
        stored = np.frombuffer(ds.PixelData, f"u{ds.BitsAllocated // 8}").reshape(ds.Rows, ds.Columns)
        ds.PixelData = encapsulate([jpeg_lossless(stored, ds.BitsStored, 1 if syntax == uid.JPEGLosslessSV1 else 7)])
        ds["PixelData"].is_undefined_length = True
    elif syntax == uid.ExplicitVRBigEndian and ds.BitsAllocated == 16:
        ds.PixelData = np.frombuffer(ds.PixelData, "<u2").astype(">u2").tobytes()
    ds.file_meta.TransferSyntaxUID = syntax
    ds.save_as(path, enforce_file_format=True)
    return path


def jpeg_lossless(stored: NDArray[np.integer], bits: int, predictor: int = 1, restart_rows: int = 0) -> bytes:
    """Encode [H, W] as lossless JPEG, one sample after the other as ISO 10918-1 H.1 says it; slow and plain.

    The Huffman table gives each of the 17 categories a code of 5 bits.
    """
    rows, columns = stored.shape
    samples = (stored.astype(np.int64) & 0xFFFF).tolist()
    segments, pieces = [], []
    for y in range(rows):
        first_row = y == 0 or (restart_rows and y % restart_rows == 0)
        if first_row and pieces:
            segments.append("".join(pieces))
            pieces = []
        for x in range(columns):
            left = samples[y][x - 1] if x else 0
            above, corner = (samples[y - 1][x], samples[y - 1][x - 1] if x else 0) if not first_row else (0, 0)
            if first_row:
                guess = left if x else 1 << (bits - 1)
            elif x == 0:
                guess = above
            else:
                guess = {
                    1: left,
                    2: above,
                    3: corner,
                    4: left + above - corner,
                    5: left + ((above - corner) >> 1),
                    6: above + ((left - corner) >> 1),
                    7: (left + above) >> 1,
                }[predictor]
            difference = (samples[y][x] - guess + 2**15 - 1) % 2**16 - 2**15 + 1
            size = abs(difference).bit_length()
            pieces.append(f"{size:05b}")
            if 0 < size < 16:
                pieces.append(f"{difference if difference > 0 else difference + 2**size - 1:0{size}b}")
    segments.append("".join(pieces))

    def segment(marker: int, body: bytes) -> bytes:
        return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body

    def pack(digits: str) -> bytes:
        digits += "1" * (-len(digits) % 8)
        return int(digits, 2).to_bytes(len(digits) // 8, "big").replace(b"\xff", b"\xff\x00")

    out = b"\xff\xd8" + segment(0xC3, struct.pack(">BHHB", bits, rows, columns, 1) + b"\x01\x11\x00")
    out += segment(0xC4, bytes([0, 0, 0, 0, 0, 17, *[0] * 11, *range(17)]))
    if restart_rows:
        out += segment(0xDD, struct.pack(">H", restart_rows * columns))
    out += segment(0xDA, bytes([1, 1, 0, predictor, 0, 0]))
    for index, digits in enumerate(segments):
        out += (bytes([0xFF, 0xD0 + (index - 1) % 8]) if index else b"") + pack(digits)
    return out + b"\xff\xd9"


def _raster(
    suffix: str, to_image: Callable[[Picture], Image.Image], **options: object
) -> Callable[[Picture, Path], Path]:
    def write(picture: Picture, path: Path) -> Path:
        path = path.with_suffix(suffix)
        to_image(picture).save(path, **options)
        return path

    return write


def _dicom(
    bits: int, syntax: uid.UID = uid.ExplicitVRLittleEndian, inverted: bool = False, **elements: object
) -> Callable[[Picture, Path], Path]:
    def write(picture: Picture, path: Path) -> Path:
        stored = as_integers(1 - picture if inverted else picture, bits)
        photometric = "MONOCHROME1" if inverted else "MONOCHROME2"
        ds = make_dicom(stored, bits, PhotometricInterpretation=photometric, **elements)
        return save_dicom(ds, path.with_suffix(".dcm"), syntax)

    return write


def _grey(picture: Picture) -> Image.Image:
    return Image.fromarray(as_integers(picture, 8).astype(np.uint8))


def _deep(picture: Picture) -> Image.Image:
    return Image.fromarray(as_integers(picture, 16))


#: How a valid film [H, W] is written, by kind. Each takes (picture, path without suffix) and returns the path.
WRITERS: dict[str, Callable[[Picture, Path], Path]] = {
    "png16": _raster(".png", _deep),
    "png8": _raster(".png", _grey),
    "jpeg": _raster(".jpg", _grey, quality=95),
    "bmp": _raster(".bmp", _grey),
    "tiff8": _raster(".tif", _grey, compression="tiff_lzw"),
    "tiff16": _raster(".tiff", _deep),
    "tiff-float": _raster(".tif", Image.fromarray),
    "palette": _raster(".png", lambda picture: _grey(picture).convert("P")),
    "rgb-jpeg": _raster(".jpeg", lambda picture: _grey(picture).convert("RGB"), quality=90),
    "rgba": _raster(".png", lambda picture: _grey(picture).convert("RGBA")),
    "grey-alpha": _raster(".png", lambda picture: _grey(picture).convert("LA")),
    "dicom": _dicom(12),
    "dicom-mono1": _dicom(14, inverted=True, PresentationLUTShape="INVERSE"),
    "dicom-implicit": _dicom(10, uid.ImplicitVRLittleEndian, WindowCenter=512, WindowWidth=1024),
    "dicom-big-endian": _dicom(16, uid.ExplicitVRBigEndian),
    "dicom-deflated": _dicom(12, uid.DeflatedExplicitVRLittleEndian),
    "dicom-rle": _dicom(12, uid.RLELossless),
    "dicom-j2k": _dicom(12, uid.JPEG2000Lossless),
    "dicom-j2k-lossy": _dicom(12, uid.JPEG2000, inverted=True),
    "dicom-jpegls": _dicom(16, uid.JPEGLSLossless),
    "dicom-jpegls-near": _dicom(12, uid.JPEGLSNearLossless),
    "dicom-jpeg": _dicom(8, uid.JPEGBaseline8Bit, Modality="OT", SOPClassUID=uid.SecondaryCaptureImageStorage),
    "dicom-jpeg-lossless": _dicom(12, uid.JPEGLossless),
    "dicom-jpeg-lossless-sv1": _dicom(16, uid.JPEGLosslessSV1, Modality="CR"),
}


def write_films(folder: Path, n: int, seed: int = 0, pictures: Sequence[Picture] = ()) -> list[Path]:
    """Write `n` valid films, the kinds of WRITERS in turn, of drawn chests or of `pictures` (f32 [H, W], 0..1)."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    kinds = list(WRITERS)
    paths = []
    for index in range(n):
        height, width = (int(side) for side in rng.integers(256, 420, 2))
        picture = pictures[index % len(pictures)] if pictures else draw_chest(height, width, rng)
        kind = kinds[index % len(kinds)]
        paths.append(WRITERS[kind](picture, folder / f"film-{index:03d}-{kind}"))
    return paths


def png_header(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises width x height grey pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


def colour_photograph(side: int = 256) -> Image.Image:
    """A picture [side, side, 3] with sky, meadow and sun."""
    pixels = np.zeros((side, side, 3), np.uint8)
    pixels[: side // 2], pixels[side // 2 :] = (90, 150, 230), (60, 140, 50)
    cv2.circle(pixels, (side // 4, side // 4), side // 8, (250, 220, 60), -1)
    return Image.fromarray(cv2.GaussianBlur(pixels, (0, 0), 3))


def write_broken(folder: Path) -> dict[str, Path]:
    """Write one file of each kind that must be refused, by `readers.read` or by `quality.inspect`; kind to path."""
    folder.mkdir(parents=True, exist_ok=True)
    film = draw_chest(256, 256, np.random.default_rng(7))
    stored = as_integers(film, 12)
    made: dict[str, Path] = {}

    def put(kind: str, suffix: str, data: bytes) -> None:
        made[kind] = folder / f"broken-{kind}{suffix}"
        made[kind].write_bytes(data)

    def picture(kind: str, suffix: str, image: Image.Image, **options: object) -> bytes:
        made[kind] = folder / f"broken-{kind}{suffix}"
        image.save(made[kind], **options)
        return made[kind].read_bytes()

    def dicom(kind: str, ds: Dataset, syntax: uid.UID = uid.ExplicitVRLittleEndian) -> bytes:
        made[kind] = save_dicom(ds, folder / f"broken-{kind}.dcm", syntax)
        return made[kind].read_bytes()

    put("empty", ".png", b"")
    put("text", ".png", b"This is no picture at all.\n")
    put("text-dicom", ".dcm", b"Nor is this a DICOM file.\n" * 20)
    put("bomb", ".png", png_header(20_000, 20_000))
    for kind, suffix, cut in (
        ("truncated-png", ".png", 0.6),
        ("truncated-jpeg", ".jpg", 0.5),
        ("truncated-tiff", ".tif", 0.5),
    ):
        whole = picture(kind, suffix, _grey(film))
        put(kind, suffix, whole[: int(len(whole) * cut)])
    picture("one-pixel", ".png", Image.new("L", (1, 1), 128))
    picture("black", ".png", Image.new("L", (256, 256), 0))
    picture("white", ".jpg", Image.new("L", (256, 256), 255))
    picture("strip", ".png", _grey(film[:64]))
    picture("faint", ".png", Image.fromarray(stored >> 1))
    picture("one-bit", ".png", _grey(film).convert("1"))
    picture("photograph", ".jpg", colour_photograph())
    nan = film.copy()
    nan[100:110, 100:110] = np.nan
    picture("nan", ".tif", Image.fromarray(nan))
    picture("float-range", ".tif", Image.fromarray(film * 4095))
    picture("pages", ".tif", _grey(film), save_all=True, append_images=[_grey(film)])
    picture("animated", ".png", _grey(film), save_all=True, append_images=[_grey(1 - film)])

    put("ct", ".dcm", Path(str(get_testdata_file("CT_small.dcm"))).read_bytes())
    dicom("lateral", make_dicom(stored, ViewPosition="LL"))
    frames = make_dicom(stored, NumberOfFrames=2)
    frames.PixelData = frames.PixelData * 2
    dicom("frames", frames)
    colour = make_dicom(stored, bits=8, SamplesPerPixel=3, PhotometricInterpretation="RGB", PlanarConfiguration=0)
    colour.PixelData = np.asarray(colour_photograph(256)).tobytes()
    dicom("dicom-colour", colour)
    whole = dicom("truncated-dicom", make_dicom(stored))
    put("truncated-dicom", ".dcm", whole[: len(whole) // 2])
    whole = dicom("truncated-header", make_dicom(stored))
    put("truncated-header", ".dcm", whole[:300])
    whole = dicom("truncated-j2k", make_dicom(stored), uid.JPEG2000Lossless)
    put("truncated-j2k", ".dcm", whole[: int(len(whole) * 0.6)])
    dicom("dicom-black", make_dicom(np.zeros_like(stored)))
    huge = make_dicom(stored)
    huge.Rows = huge.Columns = 20_000
    dicom("dicom-bomb", huge)
    no_pixels = make_dicom(stored)
    del no_pixels.PixelData
    dicom("no-pixels", no_pixels)
    return made
