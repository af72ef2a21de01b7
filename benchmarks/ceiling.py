"""How high segmenters could score on a store at most: of several networks, each film's best one, chosen with hindsight.

    python benchmarks/ceiling.py docs/results/paper

reads the cells of `lungscope benchmark segmentation` that lie there and prints, for each store, the Dice of the best
cell, of the best cell for each film, and by how much the worst films pull the mean down.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np


def main(folder: Path) -> None:
    cells = [json.loads(path.read_text()) for path in sorted((folder / "segmentation").glob("*.json"))]
    if not cells:
        raise SystemExit(f"{folder}/segmentation holds no cell. Name a folder of `lungscope benchmark segmentation`")
    for name in (row["store"] for row in cells[0]["stores"]):
        scores = [
            {film["id"]: film["dice"] for row in cell["stores"] if row["store"] == name for film in row["per_film"]}
            for cell in cells
        ]
        dice = np.array([[found[film] for film in sorted(scores[0])] for found in scores])
        best, chosen = dice[dice.mean(1).argmax()], np.sort(dice.max(0))
        few = len(chosen) // 20
        print(
            f"{name}: {dice.shape[1]} films, {len(cells)} cells. "
            f"Best cell {best.mean():.4f} (median {np.median(best):.4f}); "
            f"each film's best cell {chosen.mean():.4f} (median {np.median(chosen):.4f}), "
            f"{chosen[few:].mean():.4f} without the {few} films that even so are lowest ({chosen[:few].mean():.3f})"
        )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]))
