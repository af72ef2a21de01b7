"""The tables of a benchmark, from results written by hand: what stands where, the same bytes twice, no torch."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from lungscope.errors import DataError
from lungscope.evaluation import plots
from lungscope.evaluation.benchmark import Kind, load_cells, tables
from lungscope.evaluation.tables import render
from programs import python

RESULTS = Path(__file__).parents[2] / "docs" / "results"

PHASES = [{"size": 96, "epochs": 2, "lr": 0.001, "films": 0}]
BUDGET = {"name": "cpu", "reason": "For tests.", "sha256": "ab" * 32, "recipe": {"phases": PHASES, "batch": 8}}


def cell(kind: Kind, network: str, variant: str | None = None, shown: str | None = None, **more: Any) -> dict[str, Any]:
    parts = (network, variant, shown if variant is None else None, "seed0")
    epochs = [{"seconds": 30.0, "metrics": {"val_dice": 0.8 + n / 20, "val_accuracy": 0.7 + n / 20}} for n in range(2)]
    return {
        "schema_version": "1",
        "kind": kind,
        "name": "-".join(part for part in parts if part),
        "network": network,
        "variant": variant,
        "reason": None if variant is None else f"{variant} of old",
        "changes": {},
        "crop": None,
        "members": None,
        "segmenter": None,
        "seed": 0,
        "input": shown,
        "budget": BUDGET,
        "parts": {"test": "cd"},
        "films": {"train": 10, "val": 4},
        "parameters": 12_340_000,
        "latency_ms": {"films": 2, "fastest": 21.4, "median": 25.0},
        "training": {
            "seconds": 120.0,
            "joules": {"processors": 1500.0, "gpus": None},
            "precision": "32-true",
            "epochs": epochs,
        },
        "hardware": {"processor": "A processor", "cores": 2},
        "commit": "0123456789abcdef",
        **more,
    }


def segmenter(network: str, dice: list[float], variant: str | None = None, **more: Any) -> dict[str, Any]:
    mean = sum(dice) / len(dice)
    score = {"mean": mean, "interval": [mean - 0.01, mean + 0.01], "p5": min(dice)}
    names = ("dice", "iou", "binary_accuracy", "hd95", "coverage", "precision")
    store = {
        "store": "films",
        "scores": dict.fromkeys(names, score),
        "per_film": [{"id": f"f{n}", "group": f"g{n}", "dice": value} for n, value in enumerate(dice)],
    }
    return cell("segmentation", network, variant, stores=[store, {**store, "store": "others"}], **more)


def classifier(
    network: str, predicted: str, shown: str = "lungs", variant: str | None = None, **more: Any
) -> dict[str, Any]:
    """Ten films whose true labels are ABABABABAB, so that a string of predictions says how many are right."""
    truth = "ABABABABAB"
    accuracy = sum(a == b for a, b in zip(truth, predicted, strict=True)) / len(truth)
    span = [accuracy - 0.1, accuracy + 0.1]
    rates = {"films": 5, "sensitivity": 0.5, "specificity": 0.6, "f1": 0.55}
    test = {
        "accuracy": accuracy,
        "macro_f1": accuracy,
        "macro_auc": 0.9,
        "ece": 0.02,
        "temperature": 1.5,
        "intervals": dict.fromkeys(("accuracy", "macro_f1", "macro_auc", "ece"), span),
        "uncalibrated": {"log_loss": 0.4, "ece": 0.05},
        "conformal": {"coverage": 0.96},
        "failed": [],
        "classes": {"A": rates, "B": rates},
        "class_intervals": {k: {n: [0.4, 0.7] for n in ("sensitivity", "specificity", "f1")} for k in "AB"},
        "per_film": [
            {"id": f"f{n}", "group": f"g{n}", "label": a, "predicted": b, "probabilities": [0.5, 0.5]}
            for n, (a, b) in enumerate(zip(truth, predicted, strict=True))
        ],
    }
    return cell("classification", network, variant, shown, val={"log_loss": 0.3, "accuracy": 0.8}, test=test) | more


def write(folder: Path, cells: list[dict[str, Any]]) -> Path:
    for one in cells:
        path = folder / one["kind"] / f"{one['name']}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(one))
    return folder


SEGMENTERS = [
    segmenter("fpn-vgg16", [0.90, 0.92]),
    segmenter("fpn-mobilenetv2", [0.94, 0.96]),
    segmenter("fpn-mobilenetv2", [0.1, 0.2], "keras"),
    segmenter("ensemble", [0.95, 0.97], "union", members=["fpn-vgg16", "fpn-mobilenetv2"]),
]


def test_the_papers_number_stands_beside_ours(tmp_path: Path) -> None:
    found = {
        table.title: table
        for table in tables(load_cells(write(tmp_path, SEGMENTERS) / "segmentation", "segmentation"), "segmentation")
    }
    fpn = found["Table 3: FPN"]
    assert [row[0] for row in fpn.rows] == ["mobilenetv2", "vgg16"], "in the paper's order"
    row = dict(zip(fpn.columns, fpn.rows[0], strict=True))
    assert (row["paper: accuracy"], row["paper: Dice"], row["paper: IoU"]) == ("0.6587", "0.4794", "0.7374")
    assert row["films: Dice [95 %]"] == "0.9500 [0.9400, 0.9600]"
    assert row["Dice, ours − paper"] == "+0.4706"
    ranking = found["All networks on films, by Dice"]
    assert [row[0] for row in ranking.rows] == ["fpn-mobilenetv2", "fpn-vgg16"]
    assert ranking.rows[1][2] == "-0.0400 [undefined, undefined]", "each film lost 0.04"
    assert [row[-1] for row in ranking.rows] == ["1.5", "1.5"], "kilojoules, of what was counted"
    assert [row[0] for row in found["The ensemble and its members"].rows] == [
        "fpn-mobilenetv2",
        "fpn-vgg16",
        "ensemble, union",
    ]
    changed = found["One thing changed"]
    assert [row[1] for row in changed.rows] == ["as in the grid", "keras"] and "keras of old" in changed.note


def test_stores_stand_under_their_own_names_in_whatever_order_they_were_given(tmp_path: Path) -> None:
    one, other = (segmenter(name, [0.5, 0.6]) for name in ("fpn-vgg16", "fpn-mobilenetv2"))
    for cell, turned in ((one, False), (other, True)):
        scores = {**cell["stores"][1]["scores"], "dice": {"mean": 0.25, "interval": [0.2, 0.3], "p5": 0.2}}
        cell["stores"][1] = {**cell["stores"][1], "scores": scores}
        cell["stores"] = cell["stores"][::-1] if turned else cell["stores"]
    found = load_cells(write(tmp_path, [one, other]) / "segmentation", "segmentation")
    (fpn,) = (table for table in tables(found, "segmentation") if table.title == "Table 3: FPN")
    for row in fpn.rows:
        at = dict(zip(fpn.columns, row, strict=True))
        assert at["films: Dice [95 %]"].startswith("0.5500") and at["others: Dice [95 %]"].startswith("0.2500")
    other["stores"][0] = {**other["stores"][0], "store": "else"}
    with pytest.raises(DataError, match="fpn-vgg16-seed0 is of the stores films, others"):
        load_cells(write(tmp_path, [one, other]) / "segmentation", "segmentation")


def test_pairs_gaps_and_table_4(tmp_path: Path) -> None:
    cells = [
        classifier("resnet50", "ABABABABBA"),  # 8 right
        classifier("coatnet0", "ABABABAAAB"),  # 9 right; both miss none together
        classifier("coatnet0", "ABABABABAB", "background"),
        classifier("coatnet0", "BABABABABA", "image", "cropped"),
    ]
    found = {
        table.title: table
        for table in tables(load_cells(write(tmp_path, cells) / "classification", "classification"), "classification")
    }
    table4 = found["Table 4: classifiers on the lungs alone"]
    assert [row[0] for row in table4.rows] == ["coatnet0", "resnet50"]
    assert table4.rows[0][1:5] == ("0.1590", "0.9580", "0.1440", "0.9549")
    assert table4.rows[0][-1] == "-0.0549"
    # coatnet0 alone is right on the last two, resnet50 alone on the eighth: 2 * (1 + 3) / 8 = 1.
    assert found["Pairs of networks, lungs alone"].rows == (("coatnet0", "resnet50", "10", "2", "1", "1"),)
    controls = found["What the networks see: lungs, film, background"]
    assert controls.rows[0][-1].startswith("+0.1000 [")
    assert controls.rows[1][-1] == "–"
    changed = found["One thing changed"].rows
    assert [row[1] for row in changed] == ["as in the grid", "cropped"]
    assert changed[1][2] == "0.0000 [undefined, undefined]" and changed[1][4].startswith("-0.9000 [")
    assert "What lowers the background's lead" not in found, "there is nothing beside the grid"


def test_a_change_stands_beside_the_same_change_of_the_background(tmp_path: Path) -> None:
    even = {"changes": {"balance": "even"}}
    cells = [
        classifier("coatnet0", "ABABABAAAB"),  # 9 right
        classifier("coatnet0", "ABABABABAB", "background"),
        classifier("coatnet0", "ABABABABBA", "lungs", "even", **even),  # 8 right
        classifier("coatnet0", "ABABABBABA", "background", "even-background", **even),  # 6 right
        classifier("coatnet0", "ABABABABAB", "lungs", "equalised", equalised=True),
    ]
    folder = write(tmp_path, cells) / "classification"
    found = {table.title: table for table in tables(load_cells(folder, "classification"), "classification")}
    lead = found["What lowers the background's lead"]
    assert [(row[1], row[2][:6], row[3][:6], row[4][:7]) for row in lead.rows] == [
        ("as in the grid", "0.9000", "1.0000", "+0.1000"), ("even", "0.8000", "0.6000", "-0.2000"),
    ]  # fmt: skip
    assert [row[1] for row in found["One thing changed"].rows] == ["as in the grid", "equalised", "even"]


def test_what_is_told_apart_within_one_source(tmp_path: Path) -> None:
    cells = [classifier("coatnet0", "ABABABABBA"), classifier("coatnet0", "ABBAABABAB", "background")]
    for variant, one in (("even", "ABABABABAB"), ("even-background", "BABABABABA")):
        shown = "background" if "background" in variant else "lungs"
        cells.append(classifier("coatnet0", one, shown, variant, changes={"balance": "even"}))
    for one in cells:
        for n, film in enumerate(one["test"]["per_film"]):
            film["source"] = "one place" if n < 4 else "A's" if film["label"] == "A" else ""
    folder = write(tmp_path, cells) / "classification"
    found = {table.title: table for table in tables(load_cells(folder, "classification"), "classification")}
    within = [title for title in found if title.startswith("Within")]
    assert within == ["Within one source: one place"], "others have one class"
    row = found[within[0]].rows[0]
    assert row[1].startswith("1.0000") and row[2].startswith("0.5000") and row[3].startswith("-0.5000")
    beside = found["What lowers the background's lead"]
    assert beside.columns[-1] == "background − lungs, one place alone"
    assert [row[-1].split()[0] for row in beside.rows] == ["-0.5000", "-1.0000"]


def test_times_stand_in_the_tables_and_an_ensembles_is_the_sum(tmp_path: Path) -> None:
    cells = [*SEGMENTERS, segmenter("ensemble", [0.9, 0.9], "mean", members=["fpn-vgg16", "unet-vgg16"])]
    folder = write(tmp_path, cells)
    pages = {path.name: path for path in render(folder, "segmentation")}
    assert (
        "segmentation-dice-latency.svg" not in pages
        and "One film in the network" not in pages["segmentation.md"].read_text()
    )
    rows = {name: {"median": ms, "calls": 30} for name, ms in (("fpn-vgg16", 20.04), ("unet-vgg16", 30.5))}
    found = {
        "schema_version": "1", "sizes": {"segmentation": 96}, "precision": "f32", "commit": "ab" * 20,
        "hardware": {"processor": "X", "cores": 2}, "ms": {"segmentation": rows},
    }  # fmt: skip
    (folder / "latency.json").write_text(json.dumps(found))
    pages = {path.name: path for path in render(folder, "segmentation")}
    assert "segmentation-dice-latency.svg" in pages
    page = pages["segmentation.md"].read_text(encoding="utf-8")
    assert "median of 30 calls, all networks in turn, at 96², f32, 2 cores of X, commit abababababab" in page
    by_network = {line.split(" | ")[0].removeprefix("| "): line for line in page.splitlines() if line.startswith("| ")}
    assert " 20.0 " in by_network["fpn-vgg16"] and by_network["ensemble, mean"].endswith("| 50.5 |")
    (folder / "latency.json").write_text(json.dumps(found | {"schema_version": "0"}))
    with pytest.raises(DataError, match=r"latency.json holds no times .*lungscope benchmark latency"):
        render(folder, "segmentation")


def test_a_film_that_failed_was_not_right(tmp_path: Path) -> None:
    one, other = classifier("resnet50", "ABABABABBA"), classifier("coatnet0", "ABABABABAB")
    other["test"]["failed"] = [other["test"]["per_film"].pop(0) | {"message": "no lungs"}]
    folder = write(tmp_path, [one, other]) / "classification"
    found = {table.title: table for table in tables(load_cells(folder, "classification"), "classification")}
    assert found["Table 4: classifiers on the lungs alone"].rows[0][8].startswith("0.9000")
    # coatnet0 alone is right on the last two; resnet50 alone on the first.
    assert found["Pairs of networks, lungs alone"].rows == (("coatnet0", "resnet50", "10", "2", "1", "1"),)


@pytest.mark.parametrize("kind", ["segmentation", "classification"])
def test_the_same_results_give_the_same_bytes(kind: Kind, tmp_path: Path) -> None:
    cells = (
        SEGMENTERS
        if kind == "segmentation"
        else [classifier("resnet50", "ABABABABBA"), classifier("xception", "A" * 10)]
    )
    one, other = write(tmp_path / "one", cells), write(tmp_path / "other", cells[::-1])
    for path in render(one, kind):
        assert (other / path.name) in render(other, kind)
        assert path.read_bytes() == (other / path.name).read_bytes()
        if path.suffix == ".svg":
            assert ElementTree.fromstring(path.read_text(encoding="utf-8")).tag.endswith("svg")
    assert "per_film" not in (one / f"{kind}.json").read_text()


@pytest.mark.parametrize("folder", sorted({path.parents[1] for path in RESULTS.glob("*/*/*-seed*.json")}), ids=str)
def test_the_pages_in_docs_are_made_of_the_results_beside_them(folder: Path, tmp_path: Path) -> None:
    if (folder / "latency.json").exists():
        shutil.copy(folder / "latency.json", tmp_path)
    for kind in ("segmentation", "classification"):
        if (folder / kind).is_dir():
            shutil.copytree(folder / kind, tmp_path / kind)
            pages = render(tmp_path, kind)
            assert {path.name for path in pages} == {path.name for path in folder.glob(f"{kind}*.*")}
            for path in pages:
                assert path.read_bytes() == (folder / path.name).read_bytes(), path.name


def test_rendering_needs_no_torch(tmp_path: Path) -> None:
    write(tmp_path, SEGMENTERS)
    done = python(
        "import sys\n"
        "sys.modules.update(dict.fromkeys(('torch', 'lightning', 'timm')))\n"
        f"sys.argv = ['lungscope', 'benchmark', 'segmentation', '--render', '--out', {str(tmp_path)!r}]\n"
        "from lungscope.cli.main import main\n"
        "main()\n"
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "segmentation.html").exists()


def test_results_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no results"):
        load_cells(tmp_path, "segmentation")
    write(tmp_path, [SEGMENTERS[0], {**SEGMENTERS[1], "parts": {"test": "ef"}}])
    with pytest.raises(DataError, match="differ in parts"):
        load_cells(tmp_path / "segmentation", "segmentation")
    cells = [{**one, **more} for one, more in zip(SEGMENTERS, ({"truth": "a"}, {}, {"truth": "a"}, {}), strict=True)]
    write(tmp_path, cells)
    assert len(load_cells(tmp_path / "segmentation", "segmentation")) == 4, "results of before do not say"
    write(tmp_path, [{**cells[1], "truth": "b"}])
    with pytest.raises(DataError, match="differ in truth"):
        load_cells(tmp_path / "segmentation", "segmentation")
    (tmp_path / "segmentation" / "fpn-vgg16-seed0.json").write_text("{")
    with pytest.raises(DataError, match=r"fpn-vgg16-seed0\.json is no benchmark result"):
        load_cells(tmp_path / "segmentation", "segmentation")


def test_lungs_found_otherwise_are_no_lungs_of_the_same_grid(tmp_path: Path) -> None:
    found = {"pool": "mean", "threshold": 0.5, "size": 224}
    cells = [classifier("resnet50", "A" * 10, lungs=found), classifier("xception", "A" * 10)]
    assert len(load_cells(write(tmp_path, cells) / "classification", "classification")) == 2, "one does not say"
    write(tmp_path, [{**cells[1], "lungs": {**found, "threshold": 0.4}}])
    with pytest.raises(DataError, match="differ in lungs"):
        load_cells(tmp_path / "classification", "classification")


@pytest.mark.parametrize("kind", ["segmentation", "classification"])
def test_trainings_of_several_seeds_are_told_apart(kind: Kind, tmp_path: Path) -> None:
    cells = [segmenter("fpn-vgg16", [0.9, 0.92]), segmenter("fpn-vgg16", [0.1, 0.2], "keras")]
    names = {"boxes-films": "fpn-vgg16", "dice-parameters": "vgg16", "curves": "fpn-vgg16"}
    if kind == "classification":
        cells = [classifier("resnet50", "ABABABABBA"), classifier("resnet50", "A" * 10, variant="keras")]
        names = {"inputs": "resnet50", "accuracy-parameters": "resnet50", "curves": "resnet50"}
    cells += [{**one, "seed": 1, "name": one["name"].replace("seed0", "seed1")} for one in cells]
    (changed,) = (
        table
        for table in tables(load_cells(write(tmp_path, cells) / kind, kind), kind)
        if table.title == "One thing changed"
    )
    rows = [row[:2] for row in changed.rows]
    assert len(rows) == len(set(rows)) == 4 and (f"{cells[0]['network']} (seed 1)", "keras") in rows
    drawn = {path.stem.partition("-")[2]: path for path in render(tmp_path, kind) if path.suffix == ".svg"}
    for plot, name in names.items():
        picture = ElementTree.fromstring(drawn[plot].read_text(encoding="utf-8"))
        shown = [(e.text or "").partition(",")[0] for e in picture.iter()]
        # The legend of a plot may have a network's name, too.
        assert name in shown and shown.count(f"{name} (seed 1)") == 1, plot


def test_names_have_the_room_that_they_need() -> None:
    name = "inceptionresnetv2, the background (seed 10)"
    line, point = plots.Line(name, "group", ((1, 0.5), (2, 0.9))), plots.Point(name, "group", 1.0, 0.5, 0.4, 0.6)
    curves = ElementTree.fromstring(plots.curves("Training", [line], "epoch", "Dice"))
    (place,) = (float(e.attrib["x"]) for e in curves.iter() if e.text == name)
    assert float(curves.attrib["width"]) - place >= plots.LETTER * len(name)
    (ends,) = (e.attrib["points"].split()[-1] for e in curves.iter() if "points" in e.attrib)
    assert float(ends.partition(",")[0]) < place, "the curve ends before its name"
    box = plots.Box(name, "group", (0.1, 0.2, 0.3, 0.4, 0.5))
    (place,) = (
        float(e.attrib["x"]) for e in ElementTree.fromstring(plots.boxes("", [box], "")).iter() if e.text == name
    )
    assert place >= plots.LETTER * len(name)
    points = [point, *(plots.Point(f"{n}{name[1:]}", "group", 1.0, 0.5, 0.4, 0.6) for n in range(3))]
    picture = ElementTree.fromstring(plots.intervals("Accuracy", points, "accuracy"))
    places = sorted(float(e.attrib["x"]) for e in picture.iter() if (e.text or "").endswith(name[1:]))
    assert min(b - a for a, b in itertools.pairwise(places)) >= plots.LETTER * len(name)


def test_ticks_are_round_and_hold_the_values() -> None:
    ticks = plots._ticks(0.913, 0.957)
    assert ticks == pytest.approx([0.91, 0.92, 0.93, 0.94, 0.95, 0.96])
    assert plots._ticks(0.5, 0.5)[0] <= 0.5 <= plots._ticks(0.5, 0.5)[-1]


def test_names_at_the_end_of_curves_do_not_overlap() -> None:
    lines = [plots.Line(f"network {n}", "group", ((1, 0.5), (2, 0.9 + n / 1000))) for n in range(15)]
    picture = ElementTree.fromstring(plots.curves("Training", lines, "epoch", "Dice"))
    places = sorted(float(e.attrib["y"]) for e in picture.iter() if (e.text or "").startswith("network "))
    assert len(places) == 15
    assert min(b - a for a, b in itertools.pairwise(places)) >= 13.9


@pytest.mark.parametrize("kind", ["segmentation", "classification"])
def test_a_score_without_an_interval_is_drawn_without_one(kind: Kind, tmp_path: Path) -> None:
    if kind == "segmentation":
        one = segmenter("fpn-vgg16", [0.0, 0.0])
        one["stores"][0]["scores"]["dice"] = {"mean": 0.0, "interval": [None, None], "p5": 0.0}
    else:
        one = classifier("coatnet0", "ABABABABAB")
        one["test"]["intervals"] = {**one["test"]["intervals"], "accuracy": [None, None]}
    pages = {path.name: path for path in render(write(tmp_path, [one]), kind)}
    assert "[undefined, undefined]" in pages[f"{kind}.md"].read_text(encoding="utf-8")
    for path in pages.values():
        assert not re.search(r"\bnan\b", path.read_text(encoding="utf-8"), re.IGNORECASE), path.name


def test_a_page_names_the_gpu_that_trained(tmp_path: Path) -> None:
    first, second = SEGMENTERS[:2]
    cells = [{**first, "training": {**first["training"], "gpu": "An NVIDIA GPU", "precision": "bf16-mixed"}}, second]
    pages = {path.name: path for path in render(write(tmp_path, cells), "segmentation")}
    page = pages["segmentation.md"].read_text(encoding="utf-8")
    assert "Trained on: 2 cores of A processor, 32-true; An NVIDIA GPU, 2 cores of A processor, bf16-mixed." in page
