"""`--engine ray`: the local engine's table row for row, from paths and URLs, whatever befalls the workers."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import pytest

from films import TISSUE, draw, save
from lungscope import batch
from lungscope.cluster import TRIES, Worker, _given_up, _row, _until, connect, run_films
from lungscope.errors import ClusterError
from lungscope.pipeline import Analyzer
from lungscope.readers import remote
from lungscope.writers.json import read_rows
from programs import environment, program, python

WORKERS = 2


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A Ray of two cores on this machine."""
    with connect(workers=WORKERS) as workers:
        import ray  # reads what `connect` sets

        assert workers == WORKERS
        assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
        yield ray.get_runtime_context().gcs_address


def mixed(folder: Path, count: int = 12) -> list[Path]:
    """Films in folders, of which three can not be used."""
    for n in range(count):
        save(folder / "abc"[n % 3] / f"{n}.png", draw(200 + 8 * n, 200, opacities=[(0.6, 0.28, 0.01 * n)]))
    (folder / "b" / "empty.png").touch()
    (folder / "text.png").write_text("no image")
    save(folder / "blank.png", np.full((300, 300), TISSUE, np.float32))
    save(folder / ".hidden" / "none.png", draw())
    return sorted(path for path in folder.glob("*/*") if path.is_file() and ".hidden" not in path.parts)


def rows(out: Path) -> list[dict[str, Any]]:
    """All that a run says of its films, but for the time that they took."""
    return [{key: value for key, value in row.items() if key != "ms"} for row in read_rows(out / "results.jsonl")]


def local(analyzer: Analyzer, films: list[Path], out: Path) -> list[dict[str, Any]]:
    batch.run_films(analyzer, films, out, ["parquet", "csv"])
    return rows(out)


@pytest.mark.slow
def test_the_table_is_that_of_the_local_engine(address: str, tiny: Path, tmp_path: Path) -> None:
    mixed(tmp_path / "in")
    inputs = ["in", "missing.png", "--model", tiny, "--write", "parquet,csv", "--json"]
    runs = {}
    for name, more in {"local": [], "ray": ["--engine", "ray", "--ray-address", address, "--workers", WORKERS]}.items():
        done = subprocess.run(
            [sys.executable, "-m", "lungscope.cli.main", "analyze", *map(str, [*inputs, "--out", name, *more])],
            capture_output=True,
            text=True,
            env=environment(),
            cwd=tmp_path,  # relative paths mean the same to a worker
            timeout=300,
            check=False,
        )
        assert done.returncode == 1, done.stderr
        assert "Traceback" not in done.stderr
        runs[name] = json.loads(done.stdout)
    assert (runs["ray"]["engine"], runs["ray"]["workers"]) == ("ray", WORKERS)
    assert (runs["ray"]["done"], runs["ray"]["failed"], runs["ray"]["interrupted"]) == (12, 4, False)
    assert rows(tmp_path / "ray") == rows(tmp_path / "local")
    first, second = (parquet.read_table(tmp_path / name / "results.parquet") for name in runs)
    assert first.schema.equals(second.schema, check_metadata=True)
    assert first.drop_columns("time_ms").equals(second.drop_columns("time_ms"))
    assert second["path"].to_pylist()[-1] == "missing.png"
    assert {path.name for path in (tmp_path / "ray").iterdir()} == {
        "results.jsonl",
        "results.parquet",
        "results.csv",
        "run.json",
    }


@pytest.mark.slow
def test_a_killed_worker_loses_nothing_and_a_deadly_film_ends_nothing_else(
    address: str, analyzer: Analyzer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    films = [save(tmp_path / f"{n:02}.png", draw(200 + 4 * n, 200)) for n in range(20)]
    victim, deadly = map(str, (films[5], films[14]))
    note = tmp_path / "pid"

    class Watched(Worker):
        def _row(self, film: str, known: str, data: Any) -> dict[str, Any] | None:
            if film == victim and not note.exists():
                note.with_suffix(".part").write_text(str(os.getpid()))
                note.with_suffix(".part").rename(note)
                time.sleep(600)
            if film == deadly:
                os.kill(os.getpid(), signal.SIGKILL)
            return super()._row(film, known, data)

    killed: list[str] = []

    def kill() -> None:
        while not note.exists():
            time.sleep(0.05)
        pid = int(note.read_text())
        os.kill(pid, signal.SIGKILL)
        while (state := _state(pid)) not in ("", "Z"):
            time.sleep(0.05)
        killed.append(state)

    monkeypatch.setattr("lungscope.cluster.Worker", Watched)
    watcher = threading.Thread(target=kill, daemon=True)
    watcher.start()
    run = run_films(analyzer, list(map(str, films)), tmp_path / "ray", ["parquet"], WORKERS)
    watcher.join(10)
    assert killed, "the worker is gone"
    assert (run["done"], run["failed"], run["interrupted"]) == (19, 1, False)
    expected = local(analyzer, films, tmp_path / "local")
    for row, there in zip(rows(tmp_path / "ray"), expected, strict=True):
        if row["path"] == deadly:
            assert row["error"]["code"] == "worker-lost"
            assert f"{TRIES} workers ended" in row["error"]["message"]
        else:
            assert {**row, "made_with": ""} == {**there, "made_with": ""}


def test_the_row_of_a_url_has_the_url() -> None:
    url = "s3://bucket/film.png"
    assert _row(url, _given_up(url))["path"] == url
    assert "Copy it to this machine" in _given_up(url).message
    assert "Copy" not in _given_up("film.png").message


@pytest.mark.slow
def test_a_deadly_film_behind_a_url_ends_no_run(
    address: str, analyzer: Analyzer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    urls = [save(tmp_path / f"{n}.png", draw()).as_uri() for n in range(3)]
    deadly = urls[1]

    class Watched(Worker):
        def _row(self, film: str, known: str, data: Any) -> dict[str, Any] | None:
            if film == deadly:
                os.kill(os.getpid(), signal.SIGKILL)
            return super()._row(film, known, data)

    monkeypatch.setattr("lungscope.cluster.Worker", Watched)
    run = run_films(analyzer, urls, tmp_path / "out", ["parquet"], WORKERS)
    assert (run["done"], run["failed"], run["interrupted"]) == (2, 1, False)
    assert [row["path"] for row in rows(tmp_path / "out")] == urls
    assert rows(tmp_path / "out")[1]["error"]["code"] == "worker-lost"
    assert parquet.read_table(tmp_path / "out" / "results.parquet")["path"].to_pylist() == urls
    monkeypatch.undo()

    # A row of a URL that this run was not given stays.
    run = run_films(analyzer, urls[:1], tmp_path / "out", ["csv"], WORKERS, resume=True)
    assert (run["done"], run["failed"], run["others"]) == (1, 0, 2)
    assert [row["path"] for row in rows(tmp_path / "out")] == urls


@pytest.mark.slow
def test_a_run_over_urls_is_interrupted_and_goes_on(
    address: str, tiny: Path, analyzer: Analyzer, tmp_path: Path
) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    for n in range(30):
        save(folder / f"{n:02}.png", draw(1200, 1200, opacities=[(0.6, 0.28, 0.003 * n)]))
    (folder / "00.png").write_text("no image")
    urls = remote.find([folder.as_uri()])
    assert len(urls) == 30
    arguments = ["--engine", "ray", "--ray-address", address, "--workers", WORKERS, "--model", tiny, "--out", out]
    command = [sys.executable, "-m", "lungscope.cli.main", "analyze", folder.as_uri(), *arguments]
    process = subprocess.Popen(
        list(map(str, command)), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and not ((out / "results.jsonl").exists() and (out / "results.jsonl").stat().st_size):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Interrupted: " in output
    first = json.loads((out / "run.json").read_bytes())
    assert first["interrupted"]
    assert 1 <= first["done"] + first["failed"] == len(rows(out)) < 30
    assert parquet.read_table(out / "results.parquet").num_rows == len(rows(out))

    done = [row["path"] for row in rows(out) if row["status"] == "done"]
    changed = Path(done[-1].removeprefix("file://"))
    save(changed, draw(1300, 1200))
    save(folder / "00.png", draw(1100, 1200))
    second = run_films(
        analyzer, [*urls[:-1], (folder / "missing.png").as_uri()], out, ["parquet"], WORKERS, resume=True
    )
    assert (second["done"], second["failed"], second["kept"]) == (29, 1, first["done"] - 1)
    paths = [*(folder / f"{n:02}.png" for n in range(29)), folder / "missing.png"]
    for row, there in zip(rows(out), local(analyzer, paths, tmp_path / "local"), strict=True):
        assert row.pop("path") == Path(there.pop("path")).as_uri()
        for entry in (row, there):
            entry.pop("error", None)
            entry.pop("made_with")
        assert row == there
    assert rows(out)[-1]["error"]["message"] == f"{folder.as_uri()}/missing.png: does not exist. Check the address."


@pytest.mark.slow
def test_a_run_whose_films_never_come_is_interrupted(address: str, analyzer: Analyzer, tmp_path: Path) -> None:
    import ray

    film = str(save(tmp_path / "film.png", draw()))
    cores = ray.util.placement_group([{"CPU": WORKERS}])  # no worker can start, as after the loss of a machine
    ray.get(cores.ready(), timeout=120)
    stop, runs = threading.Event(), []

    def work() -> None:
        runs.append(run_films(analyzer, [film], tmp_path / "out", ["csv"], WORKERS, stop=stop))

    runner = threading.Thread(target=work, daemon=True)
    runner.start()
    runner.join(3)
    assert runner.is_alive()
    stop.set()
    runner.join(30)
    ray.util.remove_placement_group(cores)
    for thread in threading.enumerate():
        if thread.name == "rows":
            thread.join(120)
            assert not thread.is_alive(), "what was begun ends with the rows that come next"
    assert [(run["done"], run["interrupted"]) for run in runs] == [(0, True)]
    assert rows(tmp_path / "out") == []


def test_a_stop_is_seen_while_nothing_comes() -> None:
    stop = threading.Event()

    def items() -> Iterator[int]:
        yield 1
        stop.set()
        threading.Event().wait()

    assert list(_until(stop, items())) == [1]


def test_items_that_go_on_coming_end_with_the_stop_and_are_not_taken_ahead_of_need() -> None:
    stop, taken = threading.Event(), []

    def items() -> Iterator[int]:
        for n in itertools.count():
            taken.append(n)
            yield n

    found = []
    for n in _until(stop, items()):
        found.append(n)
        if n == 20:
            assert len(taken) <= 20 + 4
            stop.set()
    assert found[:21] == list(range(21)) and len(found) <= 21 + 3


def test_what_comes_is_handed_on_to_its_end_and_so_is_an_error() -> None:
    def items() -> Iterator[int]:
        yield from range(3)
        raise ClusterError("lost")

    assert list(_until(None, range(3))) == [0, 1, 2]
    found = _until(threading.Event(), items())
    assert [next(found) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ClusterError, match="lost"):
        next(found)


@pytest.mark.slow
def test_workers_that_would_compute_something_else_are_refused(
    address: str, tiny: Path, analyzer: Analyzer, tmp_path: Path
) -> None:
    other = Analyzer(tiny, device="cpu")
    other.versions = {**analyzer.versions, "openvino": "1.0"}
    film = str(save(tmp_path / "film.png", draw()))
    with pytest.raises(ClusterError, match=r"another versions.*1\.0.*Install the same"):
        run_films(other, [film], tmp_path / "out", ["parquet"], WORKERS)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense", "ray://127.0.0.1:10001", "[::1]:99999"])
def test_a_bad_address_is_refused_at_once(address: str) -> None:
    begun = time.monotonic()
    with pytest.raises(ClusterError, match=r"can not be joined.*ray start") as caught, connect(address):
        pass
    assert address in str(caught.value)
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["s3://bucket/films"], "is a URL. Those are read with --engine ray"),
        (["films", "--workers", "2"], "--workers and --ray-address are about --engine ray"),
        (["films", "--engine", "dask"], "Allowed: local, ray"),
        (["films", "--engine", "ray", "--write", "json,parquet"], "--engine ray writes tables: --write parquet,csv"),
        (["films", "--engine", "ray", "--device", "cuda"], "--engine ray computes on processors, not on 'cuda'"),
        (["nowhere://bucket/films", "--engine", "ray"], "nowhere://bucket/films: Protocol not known"),
    ],
)
def test_usage(tmp_path: Path, arguments: list[str], message: str) -> None:
    done = program("analyze", *arguments, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


def test_without_its_extra_it_says_what_to_install(tiny: Path, tmp_path: Path) -> None:
    film = save(tmp_path / "film.png", draw())
    done = python(
        "import sys\nsys.modules['ray'] = None\nfrom lungscope.cli.main import main\n"
        f"sys.argv = ['lungscope', 'analyze', {str(film)!r}, '--out', {str(tmp_path / 'out')!r}, '--engine', 'ray',"
        f" '--model', {str(tiny)!r}]\nmain()"
    )
    assert done.returncode == 3
    assert "pip install 'lungscope[cluster]'" in done.stderr
    assert not (tmp_path / "out").exists()


def test_ray_is_imported_only_when_it_is_asked_for() -> None:
    done = python(
        "import sys, lungscope.cli.analyze, lungscope.cluster\n"
        "print({'ray', 'fsspec', 'pyarrow', 'pandas'} & set(sys.modules))"
    )
    assert done.stdout.strip() == "set()", done.stderr


def _state(pid: int) -> str:
    """Of a process, as Linux has it: Z for one that has ended; "" for none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
    except FileNotFoundError:
        return ""
