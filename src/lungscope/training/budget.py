"""A benchmark's budget: which networks are trained how, to be compared. One TOML file under `budgets/`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from lungscope.errors import RecipeError, look_up
from lungscope.evaluation.benchmark import PAPER_CLASSIFIERS, PAPER_SEGMENTERS, Cell, Kind
from lungscope.stages.classification import INPUTS
from lungscope.stages.segmentation import POOLS
from lungscope.training.recipe import Recipe, as_table, changed, load_recipe, load_toml, read_table

NETWORKS: dict[Kind, tuple[str, ...]] = {
    "segmentation": tuple(PAPER_SEGMENTERS),
    "classification": tuple(PAPER_CLASSIFIERS),
}


@dataclass(frozen=True)
class Variant:
    """Some of the networks once more with one thing changed: keys of the recipe, or what a classifier is shown.

    crop, equalised, aligned: as in `ViewSpec`; None is what the input comes with.
    """

    name: str
    reason: str
    networks: tuple[str, ...]
    changes: dict[str, Any] = field(default_factory=dict)
    input: str = "lungs"
    crop: bool | None = None
    equalised: bool = False
    aligned: bool = False


@dataclass(frozen=True)
class Grid:
    """Every network of the paper is trained with `recipe`, once for each seed and, a classifier, for each input.

    ensemble: segmenters that are pooled (the paper's: paper, "Selection"). pools: how, a row each.
    """

    recipe: str
    seeds: tuple[int, ...]
    inputs: tuple[str, ...] = ()
    ensemble: tuple[str, ...] = ()
    pools: tuple[str, ...] = ()
    variants: tuple[Variant, ...] = ()


@dataclass(frozen=True)
class Budget:
    """See the shipped files for what each one is for."""

    reason: str
    segmentation: Grid
    classification: Grid

    def grid(self, kind: Kind) -> Grid:
        return self.segmentation if kind == "segmentation" else self.classification

    def cells(self, kind: Kind) -> Iterator[Cell]:
        """Every cell of a grid. The members of the ensemble come first and the ensemble after them, so that a grid cut
        short has it."""
        grid = self.grid(kind)
        for seed in grid.seeds:
            if kind == "segmentation":
                yield from (Cell(kind, name, seed) for name in grid.ensemble)
                yield from (Cell(kind, "ensemble", seed, pool) for pool in grid.pools)
                yield from (Cell(kind, name, seed) for name in NETWORKS[kind] if name not in grid.ensemble)
            for shown in grid.inputs:
                yield from (Cell(kind, name, seed, input=shown) for name in NETWORKS[kind])
            for variant in grid.variants:
                yield from (Cell(kind, name, seed, variant.name, variant.input) for name in variant.networks)

    def variant(self, cell: Cell) -> Variant | None:
        """What a cell changes; None for one that changes nothing, and for an ensemble."""
        return next((row for row in self.grid(cell.kind).variants if row.name == cell.variant), None)

    def recipe(self, cell: Cell) -> Recipe:
        """The recipe of a cell, its network and changes in place."""
        variant = self.variant(cell)
        changes = {"network": cell.network} | ({} if variant is None else variant.changes)
        return changed(load_recipe(self.grid(cell.kind).recipe), changes, f"cell {cell.name}")


def shared_recipe(grid: Grid) -> tuple[dict[str, Any], str]:
    """What the cells of a grid share of their recipe, as JSON has it, and its SHA-256."""
    table = as_table(load_recipe(grid.recipe))
    shared = json.loads(json.dumps({key: value for key, value in table.items() if key not in ("network", "reason")}))
    return shared, hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()


def load_budget(name_or_path: str) -> Budget:
    """A shipped budget by name, or any TOML file by path. Raises RecipeError with what is wrong and where."""
    budget: Budget = read_table(Budget, load_toml(name_or_path, "budget"), name_or_path)
    for kind, networks in NETWORKS.items():
        grid = budget.grid(kind)
        foreign = grid.inputs if kind == "segmentation" else grid.pools + grid.ensemble
        if foreign or not grid.seeds or bool(grid.pools) != bool(grid.ensemble):
            raise RecipeError(
                f"{name_or_path}: {kind} needs seeds; inputs are for classification, an ensemble with pools "
                "for segmentation"
            )
        if load_recipe(grid.recipe).kind != {"segmentation": "segmenter", "classification": "classifier"}[kind]:
            raise RecipeError(f"{name_or_path}: recipe {grid.recipe!r} is not one for {kind}")
        for pool in grid.pools:
            look_up(pool, POOLS, what=f"{name_or_path}: pool", error=RecipeError)
        for shown in (*grid.inputs, *(row.input for row in grid.variants)):
            look_up(shown, INPUTS, what=f"{name_or_path}: input", error=RecipeError)
        for network in (*grid.ensemble, *(name for row in grid.variants for name in row.networks)):
            look_up(network, networks, what=f"{name_or_path}: network", error=RecipeError)
        cells = [cell.name for cell in budget.cells(kind)]
        if len(set(cells)) != len(cells):
            raise RecipeError(f"{name_or_path}: two cells of {kind} have one name; names of variants must differ")
        for cell in budget.cells(kind):
            if cell.network in networks:
                budget.recipe(cell)
    return budget
