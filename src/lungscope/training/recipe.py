"""A training recipe: everything that decides a run but the data, as one TOML file under `recipes/`."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from lungscope.errors import RecipeError, look_up


@dataclass(frozen=True)
class Phase:
    """A part of training at one input size; several phases in a row raise the resolution progressively.

    films: how many films an epoch draws; 0 is as many as there are.
    """

    size: int
    epochs: int
    lr: float
    films: int = 0


@dataclass(frozen=True)
class Schedule:
    """`plateau`: multiply the rate by `factor` after `patience` epochs without a better validation loss, down to
    `floor`.
    `one-cycle`: warm up over the first `warmup` share of the steps, then anneal by a cosine to almost zero."""

    name: Literal["plateau", "one-cycle"]
    factor: float = 0.5
    patience: int = 4
    floor: float = 1e-6
    warmup: float = 0.15


@dataclass(frozen=True)
class Best:
    """Which epoch's weights are kept."""

    monitor: str
    mode: Literal["min", "max"]


@dataclass(frozen=True)
class Augment:
    """Random changes to training films. Zero turns a change off.

    rotation: degrees; shift, shear, zoom: shares of the side; aspect: log of the side ratio; flip: chance of a mirror
    image;
    fill: what comes in from outside (`nearest` repeats the edge); gamma: log2 of the exponent; contrast, brightness:
    shares;
    noise: standard deviation in 0..1; blur: chance; opacity: chance that synthetic opacities are painted into the
    lungs.
    """

    rotation: float = 0.0
    shift: float = 0.0
    shear: float = 0.0
    zoom: float = 0.0
    aspect: float = 0.0
    flip: float = 0.0
    fill: Literal["nearest", "zero"] = "nearest"
    gamma: float = 0.0
    contrast: float = 0.0
    brightness: float = 0.0
    noise: float = 0.0
    blur: float = 0.0
    opacity: float = 0.0


#: Sides must be a multiple of this, so that every decoder's skip connections line up.
STRIDE = 32

#: By kind: its losses, what it may monitor, and what belongs to the other kind.
KINDS = {
    "segmenter": (("bce", "bce+dice"), ("val_loss", "val_dice"), ("label_smoothing", "drop", "drop_path")),
    "classifier": (("cross-entropy",), ("val_loss", "val_accuracy", "val_f1"), ("opacity", "soft")),
}


@dataclass(frozen=True)
class Recipe:
    """See the fields of the shipped files for what each one is for.

    balance: `even` draws each epoch's films evenly over labels: a segmenter's over those of each store, a classifier's
    over those of all stores together; `source`, of a classifier, evenly over the sources of every label, so that a
    label of two is drawn twice as often as one of one; `natural` takes every film once, but for the last ones where
    they do not fill a batch.
    batch_norm_batches: training batches over which batch-norm statistics are recomputed before each validation; 0 keeps
    the running averages. batch_norm_momentum: the weight of the newest batch in these averages; 0 is the network's own.
    ema: of an exponential moving average of the weights, the share that stays at each step; validation, and the weights
    that are kept, are of the average. 0 keeps the weights themselves.
    soft: a segmenter learns which share of a pixel is lung, or how sure those were who labelled it; else yes or no.
    """

    kind: Literal["segmenter", "classifier"]
    reason: str
    network: str
    phases: tuple[Phase, ...]
    batch: int
    optimizer: Literal["adam", "adamw"]
    weight_decay: float
    loss: Literal["bce", "bce+dice", "cross-entropy"]
    schedule: Schedule
    best: Best
    augment: Augment = field(default_factory=Augment)
    stop_after: int = 0
    balance: Literal["natural", "even", "source"] = "natural"
    label_smoothing: float = 0.0
    drop: float = 0.0
    drop_path: float = 0.0
    batch_norm_batches: int = 0
    batch_norm_momentum: float = 0.0
    clip_gradient: float = 0.0
    soft: bool = False
    ema: float = 0.0


#: Keys of a recipe that came after the first runs were made with it, and the values that change nothing.
_LATER = {"soft": False, "ema": 0.0}


def shipped(what: Literal["recipe", "budget"]) -> list[str]:
    """Names of the shipped recipes or budgets."""
    folder = resources.files("lungscope.training") / f"{what}s"
    return sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_recipe(name_or_path: str) -> Recipe:
    """Read a shipped recipe by name, or any TOML file by path. Raises RecipeError with what is wrong and where."""
    recipe: Recipe = read_table(Recipe, load_toml(name_or_path, "recipe"), name_or_path)
    _check(recipe, name_or_path)
    return recipe


def load_toml(name_or_path: str, what: Literal["recipe", "budget"]) -> dict[str, Any]:
    """A shipped recipe or budget by name, or any TOML file by path. Raises RecipeError where there is none."""
    path = Path(name_or_path)
    known = shipped(what)
    if path.suffix != ".toml":
        path = Path(str(resources.files("lungscope.training"))) / f"{what}s"
        path /= look_up(name_or_path, known, what=what, error=RecipeError) + ".toml"
    if not path.is_file():
        raise RecipeError(f"{path}: no such {what} file. Shipped {what}s: {', '.join(known)}")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{name_or_path}: not valid TOML: {error}") from error


def changed(recipe: Recipe, changes: dict[str, Any], where: str) -> Recipe:
    """`recipe` with some of its keys set to other values. Raises RecipeError as `load_recipe` does."""
    table = dataclasses.asdict(recipe)
    for key in changes:
        look_up(key, table, what=f"{where}: key", error=RecipeError)
    other: Recipe = read_table(Recipe, json.loads(json.dumps(table | changes)), where)
    _check(other, where)
    return other


def _check(recipe: Recipe, where: str) -> None:
    """Refuse what would only fail, or be passed over in silence, once training runs."""
    if not recipe.phases:
        raise RecipeError(f"{where}: a recipe needs at least one [[phases]]")
    for phase in recipe.phases:
        if phase.size % STRIDE or min(phase.size, phase.epochs, recipe.batch) < 1:
            raise RecipeError(
                f"{where}: sizes are multiples of {STRIDE}, epochs and batch at least 1; got size {phase.size}, epochs "
                f"{phase.epochs}, batch {recipe.batch}"
            )
    if wrong := [phase.lr for phase in recipe.phases if not phase.lr > 0]:
        raise RecipeError(f"{where}: a learning rate is above 0; got {wrong[0]}")
    if not 0 <= recipe.schedule.warmup < 1:
        raise RecipeError(f"{where}: warmup is a share of the steps, 0 up to but not 1; got {recipe.schedule.warmup}")
    if recipe.balance == "source" and recipe.kind == "segmenter":
        raise RecipeError(f"{where}: balance 'source' is a classifier's; a segmenter takes natural or even")
    if not 0 <= recipe.ema < 1:
        raise RecipeError(f"{where}: ema is a share, 0 up to but not 1; got {recipe.ema}")
    losses, monitors, others = KINDS[recipe.kind]
    look_up(recipe.loss, losses, what=f"{where}: loss of a {recipe.kind}:", error=RecipeError)
    look_up(recipe.best.monitor, monitors, what=f"{where}: monitor of a {recipe.kind}:", error=RecipeError)
    if unused := [name for name in others if getattr(recipe, name, 0) or getattr(recipe.augment, name, 0)]:
        raise RecipeError(f"{where}: a {recipe.kind} has no {', '.join(unused)}; leave it out")


def as_table(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain values, for the JSON beside a checkpoint and the digest of a budget.

    Keys in `_LATER` are left out at their defaults: runs and results from before they came are of the same recipe.
    """
    table = dataclasses.asdict(recipe)
    return {key: value for key, value in table.items() if key not in _LATER or value != _LATER[key]}


def read_table(kind: Any, value: Any, where: str) -> Any:
    """Turn a TOML value into `kind`, a dataclass or a type of one of its fields.

    Raises RecipeError for unknown and missing keys, wrong types and values outside a Literal.
    """
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise RecipeError(f"{where}: expected a table, got {value!r}")
        hints = get_type_hints(kind)
        for key in value:
            look_up(key, hints, what=f"{where}: key", error=RecipeError)
        required = {
            f.name
            for f in dataclasses.fields(kind)
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        }
        if missing := sorted(required - set(value)):
            raise RecipeError(f"{where}: missing {', '.join(missing)}")
        return kind(**{key: read_table(hints[key], item, f"{where}: {key}") for key, item in value.items()})
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise RecipeError(f"{where}: expected a list, got {value!r}")
        return tuple(read_table(get_args(kind)[0], item, where) for item in value)
    if get_origin(kind) is dict:
        if not isinstance(value, dict):
            raise RecipeError(f"{where}: expected a table, got {value!r}")
        return value
    if get_origin(kind) is Literal:
        return look_up(str(value), get_args(kind), what=where, error=RecipeError)
    if get_origin(kind) is UnionType:
        return read_table(next(inner for inner in get_args(kind) if inner is not type(None)), value, where)
    if kind is bool and isinstance(value, bool):
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise RecipeError(f"{where}: expected {kind.__name__}, got {value!r}")
    return value
