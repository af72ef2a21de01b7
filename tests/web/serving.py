"""`lungscope serve` as a process of its own, and files to send to it."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from pydicom.data import get_testdata_file

from lungscope.radiograph import Pixels
from programs import environment


def encoded(pixels: Pixels, suffix: str = ".png") -> bytes:
    """A film as the bytes of an 8-bit file."""
    ok, data = cv2.imencode(suffix, np.round(pixels * 255).astype(np.uint8))
    assert ok
    return data.tobytes()


def png_header(width: int, height: int) -> bytes:
    """A small PNG whose header promises `width` x `height` pixels."""
    file = io.BytesIO()
    Image.new("L", (1, 1)).save(file, "PNG")
    data = bytearray(file.getvalue())
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def ct_slice() -> bytes:
    return Path(str(get_testdata_file("CT_small.dcm", download=False))).read_bytes()


@dataclass(frozen=True)
class Server:
    """`lungscope serve` as a process of its own. url: with its last slash."""

    process: subprocess.Popen[str]
    url: str

    def memory(self) -> float:
        """Megabytes of memory that are the process's own, without mapped files."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("RssAnon"))


@contextmanager
def serving(
    *arguments: str | Path, program: tuple[str, ...] = ("-m", "lungscope.cli.main", "serve")
) -> Iterator[Server]:
    """Run `lungscope serve` on a free port until the block ends. program: what Python is to run for it."""
    command = [sys.executable, *program, "--port", "0", "--json", *map(str, arguments)]
    with subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None and process.stderr is not None
            line = process.stdout.readline()
            assert line, process.stderr.read()
            yield Server(process, json.loads(line)["url"])
        finally:
            process.terminate()
            process.wait(timeout=30)


Serve = Callable[..., Server]
