"""`lungscope data` end to end: what it prints, writes, and answers to the shell."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from lungscope.cli.data import app
from lungscope.data.split import Split
from lungscope.data.store import Store
from lungscope.errors import DataError, UsageError

Draw = Callable[..., np.ndarray]


def run(*arguments: object, status: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, result.output
    return result.stdout


def test_import_audit_split(kaggle: Path, tmp_path: Path) -> None:
    store, out = tmp_path / "store", tmp_path / "splits" / "s.csv"
    text = run("import", kaggle, store, "--size", 64, "--name", "radiography")
    assert "9 films, 9 with a lung mask (9 read, 0 reused)" in text
    assert "--with-lung-opacity" in text
    assert "up to date, nothing to do" in run("import", kaggle, store, "--size", 64)
    text = run("audit", store, "--out", tmp_path / "audit")
    assert "radiography: 3 films of COVID-19; the public release has 3,616 (-3,613)." in text
    assert (tmp_path / "audit" / "audit.html").is_file()
    text = run("split", store, "--out", out)
    assert "9 films in 9 groups, seed 2024" in text
    split = Split.read(out)
    assert len(split.select(Store.open(store), "train")) in (6, 7, 8)


def test_patients_that_two_stores_may_share_are_said(
    make_store: Callable[..., Store], draw: Draw, tmp_path: Path
) -> None:
    stores = [make_store(name, {"x": draw(n)}, patients={"x": "7"}).root for n, name in enumerate("ab")]
    command = ("split", *stores, "--out", tmp_path / "s.csv")
    told = "1 patient identifiers stand in more than one store"
    apart, together = (CliRunner().invoke(app, [*map(str, command), *more]) for more in ((), ("--same-patients",)))
    assert (apart.exit_code, together.exit_code) == (0, 0)
    assert told in apart.stderr and told not in together.stderr
    assert "2 films in 1 groups" in together.stdout


def test_json_on_every_command(kaggle: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    facts = json.loads(run("import", kaggle, store, "--size", 64, "--with-lung-opacity", "--json"))
    assert facts["films"] == 11
    assert facts["by_label"]["Lung Opacity"] == 2
    facts = json.loads(run("audit", store, "--out", tmp_path / "audit", "--json"))
    assert facts["stores"][0]["films"] == 11
    facts = json.loads(run("split", store, "--out", tmp_path / "s.csv", "--fractions", "0.5,0.25,0.25", "--json"))
    assert facts["fractions"] == [0.5, 0.25, 0.25]
    assert sum(facts["counts"].values()) == 11


def test_unreadable_films_give_status_1_each_time(kaggle: Path, tmp_path: Path) -> None:
    (kaggle / "COVID-19_Radiography_Dataset" / "COVID" / "images" / "COVID-1.png").write_text("x")
    for _ in range(2):
        text = run("import", kaggle, tmp_path / "store", "--size", 32, status=1)
        assert "1 films not taken" in text
        assert "rejected.csv" in text


def test_names_in_brackets_are_printed_as_they_are(tmp_path: Path, draw: Draw, save: Callable[..., Path]) -> None:
    save(tmp_path / "set" / "[red]x" / "images" / "a.png", draw(1))
    assert "[red]x" in run("import", tmp_path / "set", tmp_path / "store", "--size", 32)


@pytest.mark.parametrize("fractions", ["0.5,0.5", "a,b,c", "0.5,0.5,0.5", "1.5,-0.5,0"])
def test_wrong_fractions_are_a_usage_error(tmp_path: Path, fractions: str) -> None:
    with pytest.raises(UsageError, match="--fractions"):
        run("split", tmp_path, "--out", tmp_path / "s.csv", "--fractions", fractions)


def test_a_split_is_a_csv(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"s\.csv"):
        run("split", tmp_path, "--out", tmp_path / "s.json")


def test_what_is_no_store_is_said(tmp_path: Path) -> None:
    for command in ("split", "audit"):
        with pytest.raises(DataError, match="not a finished store"):
            run(command, tmp_path, "--out", tmp_path / "s.csv")
