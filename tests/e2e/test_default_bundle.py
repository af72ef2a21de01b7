"""The weights that come with the package, on a real film and on a large folder with broken files in it."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from pydicom.data import get_testdata_file

from corpus import write_broken, write_films
from lungscope.bundle import Bundle
from lungscope.readers import read
from lungscope.report import DISCLAIMER
from programs import program, python

pytest.importorskip("data_store", reason="needs the extra [demo] (pydicom-data)")

BROKEN = 20
WHOLE = 180


def test_the_bundle_is_whole_small_and_papered() -> None:
    bundle = Bundle.load()
    assert bundle.classifier is not None
    assert bundle.classifier.labels == ("COVID-19", "Normal", "Viral Pneumonia")
    assert {"DATA_CARD.md", "LICENCE", "metrics.json"} <= set(bundle.files)
    assert sum(path.stat().st_size for path in bundle.root.iterdir()) < 80e6


def test_the_demo_shows_a_real_film(tmp_path: Path) -> None:
    done = program("analyze", "--demo", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "RG1_UNCR"
    assert {"report.json", "lungs.png", "saliency.npy", "overlay.png", "report.html"} <= {
        p.name for p in folder.iterdir()
    }
    report = json.loads((folder / "report.json").read_text())
    assert report["disclaimer"] == DISCLAIMER
    assert (report["image"]["height"], report["image"]["width"]) == (1955, 1841)
    # Each lung of this film fills about a sixth of it.
    for side in ("left", "right"):
        assert 0.12 < report["lungs"][side]["area_px"] / (1955 * 1841) < 0.22
    probabilities = report["classification"]["probabilities"]
    assert abs(sum(probabilities.values()) - 1) < 1e-3
    assert set(report["severity"]["zones"]) == set("ABCDEF")
    lungs = cv2.imread(str(folder / "lungs.png"), cv2.IMREAD_UNCHANGED)
    assert lungs.shape == (1955, 1841)
    assert set(np.unique(lungs)) == {0, 255}
    saliency = np.load(folder / "saliency.npy", allow_pickle=False)
    assert saliency.dtype == np.float32
    assert saliency.min() >= 0
    assert not saliency[lungs == 0].any()


def test_a_folder_of_two_hundred_with_twenty_broken(tmp_path: Path) -> None:
    film = read(Path(str(get_testdata_file("RG1_UNCR.dcm")))).pixels
    pictures = [
        cv2.resize(film, (384, 408), interpolation=cv2.INTER_AREA),
        cv2.resize(film, (301, 320), interpolation=cv2.INTER_AREA),
    ]
    source = tmp_path / "films"
    write_films(source / "whole", WHOLE, pictures=pictures)
    broken = write_broken(source / "broken")
    for path in list(broken.values())[BROKEN:]:
        path.unlink()
    out = tmp_path / "out"
    done = program("analyze", source, "--out", out, "--write", "json")
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    failed = [row for row in rows if row["status"] == "failed"]
    assert len(rows) == WHOLE + BROKEN
    assert {Path(row["path"]).parent.name for row in failed} == {"broken"}
    assert len(failed) == BROKEN
    assert len(list(out.glob("*/report.json"))) == WHOLE
    for row in failed:
        assert Path(row["path"]).name in row["error"]["message"]
        assert row["error"]["code"] in {"unreadable", "unsupported", "quality"}


def test_no_torch_where_films_are_analysed() -> None:
    done = python(
        "import sys, lungscope\n"
        "from pydicom.data import get_testdata_file\n"
        "lungscope.Analyzer().analyze(get_testdata_file('RG1_UNCR.dcm'))\n"
        "print(sorted({'torch', 'lightning', 'timm', 'scipy'} & set(sys.modules)))\n"
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_nothing_is_sent_anywhere() -> None:
    done = python(
        "import socket, sys\n"
        "def refuse(*args):\n    raise SystemExit(f'connects to {args[1:]}')\n"
        "socket.socket.connect = socket.socket.connect_ex = refuse\n"
        "socket.getaddrinfo = refuse\n"
        "import lungscope\n"
        "from pydicom.data import get_testdata_file\n"
        "lungscope.Analyzer().analyze(get_testdata_file('RG1_UNCR.dcm'))\n"
        "print('quiet')\n"
    )
    assert done.stdout.strip() == "quiet", done.stderr
