"""What a film's power spectrum alone tells of its class: averaged over directions, it says how fine and how strong what
is seen is, and nothing of where.

    python benchmarks/spectrum.py stores/radiography splits/radiography.csv

A logistic regression (extra `dev`) on the train part, its accuracy on the test part with Wilson's interval; over all
films, and within the one source that has films of several classes.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from lungscope.data.split import Split
from lungscope.data.store import Store
from lungscope.evaluation.comparison import mixed_sources
from lungscope.readers import read

#: Side of a corner of a film of 224 pixels, and from which share of the finest detail on detail is fine.
CORNER, FINE = 48, 0.5


def spectrum(picture: np.ndarray, bins: int) -> np.ndarray:
    """Logarithm of the mean power f64 [bins] of a square picture by spatial frequency, coarse to fine; the last bins
    are those of the diagonals."""
    side = len(picture)
    window = np.outer(np.hanning(side), np.hanning(side))
    power = np.abs(np.fft.rfft2((picture - picture.mean()) * window)) ** 2
    frequency = 2 * np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side))
    place = np.minimum((frequency * bins / math.sqrt(2)).astype(int), bins - 1).ravel()
    return np.log(np.bincount(place, power.ravel(), bins) / np.bincount(place, minlength=bins) + 1e-2)


def wilson(right: int, n: int) -> str:
    share, z = right / n, 1.96
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return f"{share:.3f} [{middle - half:.3f}, {middle + half:.3f}]"


def main(store: Store, split: Split) -> None:
    films = [255 * read(store.path_of(record)).pixels for record in store.records]
    corner = (slice(0, CORNER), slice(-CORNER, None))
    whole = np.array([spectrum(film, 46) for film in films])
    corners = np.array([[spectrum(film[y, x], 16) for y in corner for x in corner] for film in films])

    def shape(values: np.ndarray) -> np.ndarray:
        """The fine part, its level left out."""
        fine = values[..., round(FINE * values.shape[-1] / math.sqrt(2)) :]
        return (fine - fine.mean(-1, keepdims=True)).reshape(len(values), -1)

    labels = np.array([record.label for record in store.records])
    sources = np.array([record.source for record in store.records])
    kinds = {"whole film": whole, "whole film, fine, shape": shape(whole), "corners, fine, shape": shape(corners)}
    for source in (None, *mixed_sources(zip(sources.tolist(), labels.tolist(), strict=True))):
        train, test = (
            [i for i in split.select(store, part) if source in (None, sources[i])] for part in ("train", "test")
        )
        names, counts = np.unique(labels[test], return_counts=True)
        most = counts.max() / len(test)
        print(f"{source or 'all films'}: {len(test)} films; all called {names[counts.argmax()]}: {most:.3f}")
        for name, values in kinds.items():
            model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=3000)).fit(values[train], labels[train])
            print(f"  {name}: {wilson(int((model.predict(values[test]) == labels[test]).sum()), len(test))}")


if __name__ == "__main__":
    main(Store.open(Path(sys.argv[1])), Split.read(Path(sys.argv[2])))
