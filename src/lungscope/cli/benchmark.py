"""`lungscope benchmark`: the paper's networks trained and measured under one budget, its tables made of that, how fast
a bundle is on this machine, and whether it finds there what eager PyTorch finds."""

from __future__ import annotations

import json
import logging
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler

from lungscope.bundle import Bundle, locate
from lungscope.cli.analyze import demo_film, formats_of
from lungscope.cli.evaluate import with_bar
from lungscope.cli.options import local
from lungscope.data.split import PARTS, Split
from lungscope.data.store import Store
from lungscope.errors import LungscopeError, MissingExtraError, UsageError, look_up, needs
from lungscope.evaluation import gate, speed
from lungscope.evaluation.benchmark import TIMES, Kind
from lungscope.evaluation.provenance import commit, facts
from lungscope.evaluation.tables import render
from lungscope.hardware import cores
from lungscope.pipeline import Analyzer
from lungscope.writers.atomic import write_text
from lungscope.writers.folder import DEFAULT_FORMATS
from lungscope.writers.json import dumps, write_json

app = typer.Typer(
    no_args_is_help=True,
    help="Compare networks under one budget (the same command goes on with a grid cut off; what is done is kept), or "
    "measure how fast a bundle runs here.",
)

Out = Annotated[
    Path,
    typer.Option(
        "--out", help="Folder of the results: a JSON for each cell under OUT/KIND/, tables beside.", parser=local
    ),
]
Render = Annotated[bool, typer.Option("--render", help="Only make tables and plots from the results that are there.")]
BudgetName = Annotated[str, typer.Option("--budget", help="A shipped budget's name (cpu, paper), or a TOML file.")]
Stores = Annotated[list[Path] | None, typer.Option("--data", help="A store; may be repeated.")]
Splits = Annotated[list[Path] | None, typer.Option("--split", help="A split; may be repeated.")]
Work = Annotated[
    Path, typer.Option("--work", help="Folder of trainings in the making; keep it to go on.", parser=local)
]
Only = Annotated[list[str] | None, typer.Option("--only", help="A cell's or a network's name; may be repeated.")]
Model = Annotated[str | None, typer.Option("--model", help="The bundle whose segmenter finds the lungs.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, gpu, cuda, … (see `lungscope doctor`).")]
Arithmetic = Annotated[str, typer.Option("--precision", help="auto, f32, bf16, f16 or int8.")]
Accelerator = Annotated[str, typer.Option("--accelerator", help="auto, cpu, gpu, …")]
Precision = Annotated[str, typer.Option("--precision", help="auto, or a Lightning precision such as bf16-mixed.")]
Workers = Annotated[int, typer.Option("--workers", min=0, help="Processes that load films.")]
Json = Annotated[bool, typer.Option("--json", help="Print what was done as JSON on standard output.")]


@app.command()
def segmentation(
    out: Out,
    only_render: Render = False,
    budget: BudgetName = "cpu",
    data: Stores = None,
    split: Splits = None,
    work: Work = Path("runs/benchmark"),
    only: Only = None,
    accelerator: Accelerator = "auto",
    precision: Precision = "auto",
    workers: Workers = 0,
    json_: Json = False,
) -> None:
    """Fifteen segmenters and their ensemble, on the films that have a lung mask (paper, Tables 1 to 3)."""
    failed = {}
    if not only_render:
        failed = _run("segmentation", out, budget, data, split, work, only, None, (accelerator, precision, workers))
    _finish("segmentation", out, failed, json_)


@app.command()
def classification(
    out: Out,
    only_render: Render = False,
    budget: BudgetName = "cpu",
    data: Stores = None,
    split: Splits = None,
    work: Work = Path("runs/benchmark"),
    only: Only = None,
    model: Model = None,
    accelerator: Accelerator = "auto",
    precision: Precision = "auto",
    workers: Workers = 0,
    json_: Json = False,
) -> None:
    """Four classifiers on the lungs alone, the whole film and the background alone (paper, Table 4)."""
    failed = {}
    if not only_render:
        failed = _run("classification", out, budget, data, split, work, only, model, (accelerator, precision, workers))
    _finish("classification", out, failed, json_)


@app.command()
def latency(
    out: Out,
    budget: BudgetName = "cpu",
    repeats: Annotated[int, typer.Option(min=1, help="How often each network is called.")] = 30,
    device: Device = "auto",
    json_: Json = False,
) -> None:
    """One film in every network of a budget, all in turn on this machine: what the tables' times are made of.

    Let nothing else run meanwhile. Render the tables again afterwards.
    """
    with needs("`lungscope benchmark latency`", "train"):
        from lungscope.training.budget import load_budget
        from lungscope.training.latency import time_networks
    console = Console(stderr=True)
    found = time_networks(
        load_budget(budget), repeats, device=device, progress=lambda network: console.print(f"making {network}")
    )
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / TIMES, dumps(found, indent=1) + "\n")
    if json_:
        typer.echo(dumps(found))
        return
    for kind, rows in found["ms"].items():
        for name, row in sorted(rows.items(), key=lambda item: float(item[1]["median"])):
            typer.echo(f"{kind}, {name}: {row['median']:.1f} ms [{row['p5']:.1f}, {row['p95']:.1f}]")


@app.command()
def runtime(
    out: Annotated[Path, typer.Option("--out", help="Folder of the result: runtime.json and two plots.", parser=local)],
    film: Annotated[
        list[Path] | None, typer.Option("--film", help="A film to measure with; may be repeated. Else the demo film.")
    ] = None,
    repeats: Annotated[
        int | None, typer.Option(min=1, help="How often each thing is measured: 30 times, 5 with --training.")
    ] = None,
    films: Annotated[int, typer.Option(min=1, help="Films of a batch.")] = 300,
    alone: Annotated[bool, typer.Option("--alone", help="Measure lungscope alone, without PyTorch beside it.")] = False,
    model: Model = None,
    device: Device = "auto",
    precision: Arithmetic = "auto",
    training: Annotated[
        bool, typer.Option("--training", help="Measure training, and nothing else; runtime.json keeps what it has.")
    ] = False,
    network: Annotated[
        list[str] | None,
        typer.Option(help="With --training: a network; may be repeated. Else CoAtNet-0 and the ensemble's members."),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="With --training: a store. Else one of the demo film.")] = None,
    size: Annotated[int, typer.Option(min=1, help="With --training: the films' side.")] = 256,
    batch: Annotated[int, typer.Option(min=1, help="With --training: films of a step.")] = 16,
    workers: Workers = 0,
    json_: Json = False,
) -> None:
    """How fast films are analysed here: one film by stage, batches, whole processes, and the processor's own limit.

    Beside lungscope, and interleaved with it, runs a pipeline of eager PyTorch and pytorch-grad-cam with the same
    weights, and ONNX Runtime where it is installed. Let nothing else run meanwhile.

    With --training: films a second of `lungscope train`'s loop, and of a plain loop in f32 that opens each film with
    PIL, in turns.
    """
    if training:
        _training(out, network, data, size, batch, workers, repeats or 5, json_)
        return
    repeats = repeats or 30
    if not alone and not all(map(find_spec, ("torch", "timm", "segmentation_models_pytorch", "safetensors", "onnx"))):
        raise MissingExtraError("`lungscope benchmark runtime` without --alone", "train")
    given = {path.name: path for path in film or []}
    if len(given) < len(film or []):
        raise UsageError("--film: two files have one name, and results go by names. Rename one of them.")
    bundle = Bundle.load(locate(model))
    starts = max(3, repeats // 5)
    result: dict[str, Any] = {"commit": commit(), "machine": speed.machine()}
    with TemporaryDirectory() as folder:
        measured = given or speed.demo_films(demo_film(), Path(folder))
        paths = list(measured.values())
        # Batches come before PyTorch is in this process, and counts as its memory.
        many = Analyzer(bundle, device=device, precision=precision, streams=cores())
        written = ((paths[-1], ("csv",)), (paths[-1], DEFAULT_FORMATS), (paths[0], ("csv",)))
        batches = [speed.batch(many, [path], films, formats) for path, formats in written]
        names = (f"{path.name}, {', '.join(formats)}" for path, formats in written)
        result["batches"] = dict(zip(names, batches, strict=True))
        eager, graphs, scripts = {}, {}, {}
        if not alone:
            scripts = {f"eager PyTorch, {next(iter(measured))}": ["-c", _EAGER, str(bundle.root), str(paths[0])]}
        result["processes"] = speed.cold_starts(measured, many, starts, scripts)
        chosen = many.precision
        del many
        if not alone:
            from lungscope.training import baselines

            eager, graphs = {"eager PyTorch": baselines.Eager(bundle).analyze}, baselines.graphs(bundle)
            for run, (path, formats) in zip(batches, written, strict=True):
                if formats == ("csv",):
                    run["beside"] = {name: speed.in_a_loop(work, path, films) for name, work in eager.items()}
        analyzer = speed.WatchedAnalyzer(bundle, device=device, precision=precision)
        result |= {"device": analyzer.device, "precision": analyzer.precision, "versions": analyzer.versions}
        result["networks"] = speed.networks(bundle, device, repeats, graphs, chosen)
        result["single_films"] = speed.single_films(analyzer, measured, repeats, eager, result["networks"]["graphs"])
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "runtime.json", result)
    write_text(out / "latency.svg", speed.latency_plot(result))
    write_text(out / "memory.svg", speed.memory_plot(result))
    if json_:
        print(dumps(result))
    else:
        for line in speed.lines(result):
            print(line)


@app.command()
def batch(
    out: Annotated[Path, typer.Option("--out", help="Folder of the result: batch.json and memory.svg.", parser=local)],
    film: Annotated[
        list[Path] | None,
        typer.Option("--film", help="A film; may be repeated, and they take turns. Else the demo film at three sizes."),
    ] = None,
    films: Annotated[int, typer.Option(min=1, help="Films of the batch.")] = 1000,
    write: Annotated[str, typer.Option("--write", help="What `lungscope analyze` writes of them.")] = "csv",
    model: Model = None,
    device: Device = "auto",
    precision: Arithmetic = "auto",
    json_: Json = False,
) -> None:
    """Films per second of one long batch, and this process's memory on the way."""
    formats = formats_of(write)
    bundle = Bundle.load(locate(model))
    with TemporaryDirectory() as folder:
        measured = film or list(speed.demo_films(demo_film(), Path(folder)).values())
        analyzer = Analyzer(bundle, device=device, precision=precision, streams=cores())
        result = {
            "commit": commit(),
            "machine": speed.machine(),
            "device": analyzer.device,
            "precision": analyzer.precision,
            "versions": analyzer.versions,
            "batches": {
                f"{', '.join(path.name for path in measured)}, {write}": speed.batch(analyzer, measured, films, formats)
            },
        }
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "batch.json", result)
    write_text(out / "memory.svg", speed.memory_plot(result))
    if json_:
        print(dumps(result))
    else:
        for line in speed.batch_lines(result):
            print(line)


@app.command()
def parity(
    data: Annotated[list[Path], typer.Option("--data", help="A store; its films of one part are compared.")],
    split: Annotated[list[Path], typer.Option("--split", help="A split of the stores.")],
    part: Annotated[str, typer.Option("--part", help=", ".join(PARTS))] = "test",
    films: Annotated[int, typer.Option(min=1, help="At most so many films of each store, evenly.")] = 1000,
    model: Model = None,
    device: Device = "auto",
    precision: Arithmetic = "auto",
    out: Annotated[Path | None, typer.Option("--out", help="Write the result as JSON.", parser=local)] = None,
    json_: Json = False,
) -> None:
    """Whether classes and masks are those of the same weights in eager PyTorch, f32.

    Exit status 1 where fewer than 99.8 % of films have one class, or masks have a mean Dice below 0.995.
    """
    look_up(part, PARTS, what="part")
    with needs("`lungscope benchmark parity`", "train"):
        from lungscope.training.baselines import Eager
    parts = Split.read_all(split)
    analyzer = Analyzer(locate(model), device=device, precision=precision)
    paths = [
        store.path_of(store.records[i])
        for store in map(Store.open, data)
        for i in gate.evenly(parts.select(store, part), films)
    ]
    reference = Eager(analyzer.bundle).classify
    found = with_bar("films", lambda progress: gate.parity(analyzer, reference, paths, progress))
    result = facts(analyzer, split) | {"why": analyzer.precision_why, "part": part} | found
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, result)
    if json_:
        print(dumps(result))
    else:
        print(
            f"{result['films']} films, {analyzer.precision} on {analyzer.device} ({analyzer.precision_why}): "
            f"{result['same_class']:.2%} have PyTorch's class; mean Dice with its masks {result['same_mask']:.5f}, "
            f"least {result['least_mask']:.4f}; {len(result['failed'])} failed"
        )
    raise typer.Exit(0 if result["passed"] else 1)


def _training(
    out: Path,
    network: list[str] | None,
    data: Path | None,
    size: int,
    batch: int,
    workers: int,
    repeats: int,
    json_: bool,
) -> None:
    with needs("`lungscope benchmark runtime --training`", "train"):
        from lungscope.training import speed as training
    with TemporaryDirectory() as folder:
        store = data or training.write_films(demo_film(), Path(folder))
        jobs = [training.Job(name, store, size, batch, workers) for name in network or training.networks()]
        training.check(jobs)
        facts = {"commit": commit(), "machine": speed.machine()}
        found = training.measure(jobs, repeats)
    path = out / "runtime.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, {**before, "training": {**facts, "networks": found}})
    print(dumps(found) if json_ else "\n".join(training.table(found)))


#: A whole script around the eager pipeline.
_EAGER = """
import sys
from pathlib import Path
from lungscope.bundle import Bundle
from lungscope.training.baselines import Eager
Eager(Bundle.load(Path(sys.argv[1]))).analyze(Path(sys.argv[2]))
"""


def _run(
    kind: Kind,
    out: Path,
    budget: str,
    data: list[Path] | None,
    split: list[Path] | None,
    work: Path,
    only: list[str] | None,
    model: str | None,
    hardware: tuple[str, str, int],
) -> dict[str, str]:
    """Run the cells; a cell that can not be run does not stop the others. Returns the reasons by cell."""
    with needs(f"`lungscope benchmark {kind}` without --render", "train"):
        from lungscope.training.benchmark import Bench
        from lungscope.training.budget import load_budget
        from lungscope.training.engine import Hardware
    if not data or not split:
        raise UsageError("Training needs --data and --split, each at least once. For tables of results alone: --render")
    logging.basicConfig(
        level=logging.INFO, format="%(message)s", handlers=[RichHandler(console=Console(stderr=True), show_path=False)]
    )
    parts, stores = Split.read_all(split), sorted(map(Store.open, data), key=lambda store: store.name)
    accelerator, precision, workers = hardware
    bench = Bench(
        budget=load_budget(budget),
        budget_name=Path(budget).stem,
        data=[(store, parts) for store in stores],
        split_files=split,
        out=out,
        work=work,
        hardware=Hardware(accelerator, precision=precision, workers=workers),
        segmenter=Bundle.load(locate(model)),
    )
    cells = list(bench.budget.cells(kind))
    names = {name for cell in cells for name in (cell.name, cell.network)}
    if unknown := sorted(set(only or []) - names):
        raise UsageError(f"--only {', '.join(unknown)}: the budget has no such cell. It has {', '.join(sorted(names))}")
    chosen = [cell for cell in cells if not only or {cell.name, cell.network} & set(only)]
    bench.cut(chosen)
    failed: dict[str, str] = {}
    for cell in chosen:
        try:
            bench.run(cell)
        except LungscopeError as error:
            failed[cell.name] = str(error)
            logging.getLogger(__name__).error("%s: %s", cell.name, error)
        except (RuntimeError, ValueError) as error:
            failed[cell.name] = str(error)
            logging.getLogger(__name__).exception("%s", cell.name)
    return failed


def _finish(kind: Kind, out: Path, failed: dict[str, str], as_json: bool) -> None:
    # Without a single result there is nothing to render, and what failed is the news.
    written = [] if failed and not any((out / kind).glob("*.json")) else render(out, kind)
    if as_json:
        print(dumps({"written": [str(path) for path in written], "failed": failed}))
    else:
        for path in written:
            print(path)
        for name, reason in failed.items():
            print(f"{name} failed: {reason}")
    if failed:
        raise typer.Exit(1)
