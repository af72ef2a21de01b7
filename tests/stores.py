"""Stores of drawn films, written by hand, as `lungscope data import` would write them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from films import LUNG, draw, save
from lungscope.data.store import Record, Store, write_records

SHAPE = (320, 288)
OPACITIES = ((0.35, 0.28, 0.09), (0.6, 0.72, 0.09))


def write_store(folder: Path) -> Store:
    """Films "a", "b", "c" with their true lungs and class ("b": COVID-19), and "broken", which is no image."""
    origin, root = folder / "films", folder / "store"
    names = ["a", "b", "c", "broken"]
    for name in names:
        film = draw(*SHAPE, opacities=OPACITIES if name == "b" else ())
        film[0, 0] = names.index(name) / len(names)  # no two files are the same
        save(origin / f"{name}.png", film)
        save(origin / f"{name}-lungs.png", (draw(*SHAPE) == np.float32(LUNG)).astype(np.float32))
    (origin / "broken.png").write_text("not an image")
    root.mkdir()
    for array in ("images", "masks"):
        np.save(root / f"{array}.npy", np.zeros((len(names), 64, 64), np.uint8))
    records = [
        Record(name, f"{name}.png", "COVID-19" if name == "b" else "Normal", f"{name}-lungs.png", "",
               hashlib.sha256((origin / f"{name}.png").read_bytes()).hexdigest(), *SHAPE)
        for name in names
    ]  # fmt: skip
    write_records(root / "records.csv", records)
    facts = {"schema_version": "1", "name": "films", "size": 64, "origin": str(origin)}
    (root / "store.json").write_text(json.dumps(facts))
    return Store.open(root)
