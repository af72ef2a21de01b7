"""Small data sets on disk, in every layout that is imported."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lungscope.data.importing import import_films
from lungscope.data.store import Store

Draw = Callable[..., np.ndarray]


def _film(seed: int, height: int = 60, width: int = 60) -> np.ndarray:
    """A grey picture u8 [H, W] that no other seed gives."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(30, 255, (6, 6), dtype=np.uint8))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


def _mask(height: int = 64, width: int = 64) -> np.ndarray:
    mask = np.zeros((height, width), np.uint8)
    mask[height // 4 : 3 * height // 4, width // 8 : 3 * width // 8] = 255
    mask[height // 4 : 3 * height // 4, 5 * width // 8 : 7 * width // 8] = 255
    return mask


def _save(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def draw() -> Draw:
    return _film


@pytest.fixture
def draw_mask() -> Draw:
    return _mask


@pytest.fixture
def save() -> Callable[[Path, np.ndarray], Path]:
    return _save


@pytest.fixture
def kaggle(tmp_path: Path) -> Path:
    """A miniature of the COVID-19 Radiography Database, wrapped and accompanied as Kaggle ships it."""
    root = tmp_path / "kaggle" / "COVID-19_Radiography_Dataset"
    folders = {"Normal": 4, "COVID": 3, "Viral Pneumonia": 2, "Lung_Opacity": 2}
    for k, (folder, n) in enumerate(folders.items()):
        for i in range(1, n + 1):
            _save(root / folder / "images" / f"{folder}-{i}.png", _film(100 * k + i))
            _save(root / folder / "masks" / f"{folder}-{i}.png", _mask())
        (root / f"{folder}.metadata.xlsx").write_bytes(b"PK not a film")
    (root / "README.md.txt").write_text("about")
    return root.parent


@pytest.fixture
def zipped(kaggle: Path, tmp_path: Path) -> Path:
    archive = tmp_path / "archive.zip"
    with zipfile.ZipFile(archive, "w") as bundle:
        for path in sorted(kaggle.rglob("*")):
            bundle.write(path, path.relative_to(kaggle))
        bundle.writestr("__MACOSX/COVID-19_Radiography_Dataset/COVID/images/._COVID-1.png", b"junk")
    return archive


@pytest.fixture
def make_store(tmp_path: Path) -> Callable[..., Store]:
    """Import films given as {name: pixels} (and labels, patients, masks by name) into a store."""

    def make(
        name: str,
        films: dict[str, np.ndarray],
        *,
        labels: dict[str, str] | None = None,
        patients: dict[str, str] | None = None,
        masks: dict[str, np.ndarray] | None = None,
        size: int = 64,
        folder: str = "",
    ) -> Store:
        dest = tmp_path / (folder or name)
        source = dest.with_name(f"{dest.name}-source")
        lines = ["path,label,mask,patient"]
        for film, pixels in films.items():
            _save(source / f"{film}.png", pixels)
            mask = ""
            if masks and film in masks:
                mask = f"masks/{film}.png"
                _save(source / mask, masks[film])
            lines.append(f"{film}.png,{(labels or {}).get(film, '')},{mask},{(patients or {}).get(film, '')}")
        table = source / "films.csv"
        table.write_text("\n".join(lines) + "\n")
        import_films(table, dest, name=name, size=size)
        return Store.open(dest)

    return make
