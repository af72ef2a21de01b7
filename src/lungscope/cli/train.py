"""`lungscope train`: from a recipe and stores to weights."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler

from lungscope.bundle import Bundle, locate, sha256_of
from lungscope.cli.options import local
from lungscope.data.split import Split
from lungscope.data.store import Store
from lungscope.errors import UsageError, look_up
from lungscope.stages.classification import INPUTS, Input
from lungscope.training import averaging
from lungscope.training.classifier import train_classifier, view_spec
from lungscope.training.engine import Hardware
from lungscope.training.films import rank_and_world_size
from lungscope.training.grades import fit_grades
from lungscope.training.recipe import Recipe, load_recipe
from lungscope.training.segmenter import train_segmenter
from lungscope.training.weights import imagenet_weights

app = typer.Typer(
    no_args_is_help=True,
    help="Train a segmenter or a classifier; the same command goes on with a run cut off. Average several runs. Fit "
    "severity to radiologists' scores.",
)

Stores = Annotated[list[Path], typer.Option("--data", help="A store made by `lungscope data import`; may be repeated.")]
Splits = Annotated[list[Path], typer.Option("--split", help="A split made by `lungscope data split`; may be repeated.")]
Out = Annotated[Path, typer.Option("--out", help="The run's folder.", parser=local)]
Name = Annotated[str, typer.Option("--recipe", help="A shipped recipe's name, or a TOML file.")]
Network = Annotated[str | None, typer.Option("--network", help="Train this network with the recipe's budget.")]
Seed = Annotated[int, typer.Option("--seed")]
Initial = Annotated[
    Path | None, typer.Option("--initial", help="Start from these weights: a run's .safetensors or a bundle's .onnx.")
]
Pretrained = Annotated[
    bool, typer.Option("--pretrained", help="Start from weights trained on ImageNet (extra `imagenet`).")
]
Encoder = Annotated[
    Path | None,
    typer.Option("--encoder", help="Start from a segmenter's encoder with the same layers: .safetensors or .onnx."),
]
Accelerator = Annotated[str, typer.Option("--accelerator", help="auto, cpu, gpu, …")]
Devices = Annotated[int, typer.Option("--devices", min=1)]
Nodes = Annotated[int, typer.Option("--num-nodes", min=1)]
Precision = Annotated[str, typer.Option("--precision", help="auto, f32, bf16, f16, or a name of Lightning's.")]
Workers = Annotated[int, typer.Option("--workers", min=0, help="Processes that load films.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]


@app.command()
def segmenter(
    data: Stores,
    split: Splits,
    out: Out,
    recipe: Name = "segmenter-cpu",
    network: Network = None,
    seed: Seed = 0,
    initial: Initial = None,
    pretrained: Pretrained = False,
    encoder: Encoder = None,
    accelerator: Accelerator = "auto",
    devices: Devices = 1,
    num_nodes: Nodes = 1,
    precision: Precision = "auto",
    workers: Workers = 0,
    json_: Json = False,
) -> None:
    """Train a lung segmenter on the films that have a lung mask."""
    _log_to_terminal()
    chosen = _recipe(recipe, network)
    start = _start(chosen, initial, encoder, pretrained)
    weights = train_segmenter(
        chosen,
        _open(data, split),
        out,
        seed=seed,
        initial=start,
        encoder_only=encoder is not None,
        hardware=Hardware(accelerator, devices, num_nodes, precision, workers),
    )
    _finish(weights, json_)


@app.command()
def classifier(
    data: Stores,
    split: Splits,
    out: Out,
    recipe: Name = "classifier-cpu",
    network: Network = None,
    input_: Annotated[str, typer.Option("--input", help=f"What the network is shown: {', '.join(INPUTS)}.")] = "lungs",
    crop: Annotated[
        bool | None,
        typer.Option(
            "--crop/--no-crop", help="Cut out the square around the lungs, or show the frame; lungs alone are cut."
        ),
    ] = None,
    equalise: Annotated[
        bool, typer.Option("--equalise", help="Give what is shown the same grey levels on every film.")
    ] = False,
    align: Annotated[
        bool, typer.Option("--align", help="Bring the lungs of every film to one pose and size. They must be cut out.")
    ] = False,
    model: Annotated[str | None, typer.Option("--model", help="The bundle whose segmenter finds the lungs.")] = None,
    seed: Seed = 0,
    initial: Initial = None,
    pretrained: Pretrained = False,
    encoder: Encoder = None,
    accelerator: Accelerator = "auto",
    devices: Devices = 1,
    num_nodes: Nodes = 1,
    precision: Precision = "auto",
    workers: Workers = 0,
    json_: Json = False,
) -> None:
    """Train a classifier on segmented lungs, or on one of the controls (whole film, background only)."""
    _log_to_terminal()
    look_up(input_, INPUTS, what="input")
    shown: Input = next(known for known in INPUTS if known == input_)
    chosen = _recipe(recipe, network)
    start = _start(chosen, initial, encoder, pretrained)
    weights = train_classifier(
        chosen,
        _open(data, split),
        Bundle.load(locate(model)),
        out,
        view=view_spec(shown, chosen, crop, equalised=equalise, aligned=align),
        seed=seed,
        initial=start,
        encoder_only=encoder is not None,
        hardware=Hardware(accelerator, devices, num_nodes, precision, workers),
    )
    _finish(weights, json_)


@app.command()
def severity(
    scores: Annotated[Path, typer.Option("--scores", help="Folder of films with Brixia scores: brixia.csv, images/.")],
    data: Stores,
    split: Splits,
    out: Out,
    model: Annotated[str | None, typer.Option("--model", help="The bundle whose one segmenter is to grade.")] = None,
    leave_unseen: Annotated[
        bool,
        typer.Option(
            "--leave-unseen",
            help="Fit on near-duplicates of training films alone, and leave the others for `evaluate pipeline`.",
        ),
    ] = False,
    seed: Seed = 0,
    json_: Json = False,
) -> None:
    """Fit grades of lung zones to a trained segmenter: its lungs and opacity stay, severity is made of the grades."""
    _log_to_terminal()
    weights = fit_grades(
        Bundle.load(locate(model)), scores, _open(data, split), out, leave_unseen=leave_unseen, seed=seed
    )
    _finish(weights, json_)


@app.command()
def average(
    runs: Annotated[list[Path], typer.Argument(help="Finished runs of one network, the newest last.")],
    data: Stores,
    split: Splits,
    out: Out,
    share: Annotated[
        list[float] | None, typer.Option("--share", help="How much each run counts, in their order. Default: alike.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Of classifiers: the bundle whose segmenter finds the lungs.")
    ] = None,
    accelerator: Accelerator = "auto",
    precision: Precision = "auto",
    json_: Json = False,
) -> None:
    """Make one network of several trainings of it: the mean of their weights, scored on the val parts."""
    _log_to_terminal()
    weights = averaging.average(
        runs,
        _open(data, split),
        out,
        bundle=Bundle.load(locate(model)),
        shares=share or (),
        hardware=Hardware(accelerator, precision=precision),
    )
    _finish(weights, json_)


def _recipe(name: str, network: str | None) -> Recipe:
    recipe = load_recipe(name)
    return recipe if network is None else dataclasses.replace(recipe, network=network)


def _start(recipe: Recipe, initial: Path | None, encoder: Path | None, pretrained: bool) -> Path | None:
    """The file of the weights to start from; None for random ones."""
    if (initial is not None) + (encoder is not None) + pretrained > 1:
        raise UsageError("--initial, --encoder and --pretrained each say what to start from. Give one of them.")
    return imagenet_weights(recipe.network) if pretrained else initial or encoder


def _open(data: list[Path], split: list[Path]) -> list[tuple[Store, Split]]:
    parts = Split.read_all(split)
    stores = [Store.open(path) for path in data]
    if len({store.name for store in stores}) != len(stores):
        raise UsageError(f"stores must have different names; got {', '.join(store.name for store in stores)}")
    if len({store.size for store in stores}) != 1:
        sizes = ", ".join(f"{store.name} {store.size}" for store in stores)
        raise UsageError(f"stores must have one size; got {sizes}. Import them again with one --size")
    return [(store, parts) for store in stores]


def _log_to_terminal() -> None:
    handler = RichHandler(console=Console(stderr=True), show_path=False)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler])


def _finish(weights: Path, as_json: bool) -> None:
    if rank_and_world_size()[0]:
        return
    facts = json.loads(weights.with_suffix(".json").read_text())
    result = {
        "weights": str(weights),
        "sha256": sha256_of(weights),
        "metrics": facts["metrics"],
        "epoch": facts.get("epoch"),
    }
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        print(f"{weights}  {result['sha256']}")
        for name, value in facts["metrics"].items():
            print(f"  {name:24} {value:.4f}")
