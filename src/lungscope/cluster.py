"""The films of a run on many processes and machines: `batch.run_films` as a Ray Data pipeline."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import socket
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Empty, Full, Queue
from tempfile import TemporaryDirectory
from threading import Event, Thread
from typing import Any, TypeVar

import cv2

from lungscope.batch import computes_with, content_of, in_order, record
from lungscope.bundle import EMBEDDED, MANIFEST, Bundle
from lungscope.errors import ClusterError, InputError, MissingExtraError, WorkerLostError
from lungscope.hardware import cores
from lungscope.pipeline import Analyzer, failure
from lungscope.readers import decode
from lungscope.readers.remote import fetch, is_url
from lungscope.report import Failure, Report
from lungscope.writers.claim import claimed
from lungscope.writers.json import dumps, row

#: Films of a task, at most: what a worker that ends has to do again, and what a row waits for before it is written.
BLOCK = 16
#: How often a film may end its worker before it is given up.
TRIES = 3
#: Seconds to wait for the head of a cluster.
PATIENCE = 10
#: Seconds between looks for a stop while no rows come.
LOOK = 0.5

Item = TypeVar("Item")


@contextmanager
def connect(address: str | None = None, workers: int | None = None) -> Iterator[int]:
    """Join a Ray cluster, or start a Ray on this machine; give the number of workers, and leave or end it after.

    address: host:port of the cluster's head, or "auto" on one of its machines; None for RAY_ADDRESS, and where that is
    not set for a Ray of our own. workers: None for one on each core that there is. Ray changes what SIGTERM does.
    Raises MissingExtraError without Ray, ClusterError where there is no cluster that can be joined.
    """
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    # A thread that still waits for rows when Ray is left would start another.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    if address == "local" and "ray" not in sys.modules:  # which reads them when it is imported
        # Its ports are open to the network: let in nobody else. And it is no background work.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        os.environ.setdefault("RAY_worker_niceness", "0")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise MissingExtraError("`--engine ray`", "cluster") from error
    # Ray's sockets lie in there, and their names may have a hundred letters.
    place = "/tmp" if os.name == "posix" else None
    with TemporaryDirectory(prefix="ray-", dir=place, ignore_cleanup_errors=True) as folder:
        options: dict[str, Any] = {}
        if address == "local":
            options = {"num_cpus": workers or cores(), "num_gpus": 0, "include_dashboard": False, "_temp_dir": folder}
        elif address != "auto":
            _look_for(address)
        try:
            ray.init(address, log_to_driver=False, logging_level=logging.CRITICAL, **options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            reason = str(error).strip().rstrip(".")
            if address == "local":
                raise ClusterError(f"Ray can not be started here: {reason}.") from error
            raise ClusterError(
                f"Ray at {address!r} can not be joined: {reason}. Versions of Ray and Python, and the token "
                "(RAY_AUTH_TOKEN), must be those of its head."
            ) from error
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        try:
            yield workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        finally:
            ray.shutdown()


def run_films(
    analyzer: Analyzer,
    films: Sequence[str],
    out: Path,
    formats: Sequence[str],
    workers: int,
    *,
    resume: bool = False,
    stop: Event | None = None,
    progress: Callable[[], object] | None = None,
) -> dict[str, Any]:
    """Analyse `films`, paths or URLs, as `batch.run_films` does, inside `connect`.

    analyzer: what every worker must compute with, too; it analyses nothing itself. formats: of the run, not of films.
    stop: once set, rows of films that are done are written, and the run is closed with "interrupted" true.
    Raises ClusterError where the cluster fails: what was done stays in `out`, and can be resumed; and as
    `batch.run_films` does.
    """

    def entries(known: Mapping[str, str]) -> Iterator[dict[str, Any] | None]:
        return _entries(analyzer, films, known, workers, stop)

    engine = {"engine": "ray", "workers": workers}
    folders = dict.fromkeys(films)
    with claimed(out, formats):
        return record(entries, folders, analyzer, out, formats, engine, resume=resume, progress=progress)


def _entries(
    analyzer: Analyzer,
    films: Sequence[str],
    known: Mapping[str, str],
    workers: int,
    stop: Event | None,
) -> Iterator[dict[str, Any] | None]:
    import ray
    import ray.data

    block = max(1, min(BLOCK, len(films) // (4 * workers)))
    blocks = -(-len(films) // block)
    # A path may hold bytes that are no text.
    items = [{"film": os.fsencode(film), "known": known.get(film, "")} for film in films]
    attempts = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Attempts).remote()
    bundle = ray.put(_packed(analyzer.bundle))
    ray.data.DataContext.get_current().enable_progress_bars = False
    rows = ray.data.from_items(items, override_num_blocks=blocks).map_batches(
        Worker,
        fn_constructor_args=(bundle, computes_with(analyzer), str(Path.cwd()), attempts),
        batch_size=None,
        compute=ray.data.ActorPoolStrategy(size=min(workers, blocks)),
        num_cpus=1,
        max_restarts=-1,
        max_task_retries=-1,
    )
    try:
        for batch in _until(stop, rows.iter_batches(batch_size=None)):
            for text in batch["row"].tolist():
                entry = json.loads(text)
                if isinstance(entry, str):
                    raise ClusterError(entry)
                yield entry
    except ray.exceptions.RayError as error:
        raise ClusterError(f"Ray can not go on: {error}. What was done can be resumed.") from error


def _until(stop: Event | None, items: Iterable[Item]) -> Iterator[Item]:
    """`items` as they come, until `stop` is set, even while none comes. What they raise is raised here.

    They are taken on a thread that nothing waits for: of a machine that is lost the next may never come. It is never
    more than two items ahead.
    """
    come: Queue[Item | BaseException | None] = Queue(maxsize=1)
    gone = Event()

    def hand(what: Item | BaseException | None) -> None:
        while not gone.is_set():
            with suppress(Full):
                come.put(what, timeout=LOOK)
                return

    def take() -> None:
        try:
            for item in items:
                hand(item)
                if gone.is_set():
                    return
            hand(None)
        except BaseException as error:
            hand(error)

    Thread(target=take, name="rows", daemon=True).start()
    try:
        while True:
            if stop is not None and stop.is_set():
                gone.set()
            try:
                item = come.get(timeout=LOOK)
            except Empty:
                if gone.is_set():
                    return
                continue
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        gone.set()


class Attempts:
    """An actor that counts how often each film was begun and not ended: as often as it took its worker along."""

    def __init__(self) -> None:
        self._begun: Counter[str] = Counter()

    def begin(self, film: str) -> int:
        """Count another attempt; gives how many were made before and did not end."""
        self._begun[film] += 1
        return self._begun[film] - 1

    def end(self, film: str) -> None:
        self._begun.pop(film, None)


class Worker:
    """An actor with the networks in its memory, on one core.

    bundle: reference to what `_packed` gives. expected: what `computes_with` must give here as well. folder: where
    relative paths begin, if it exists here. attempts: handle of `Attempts`.
    """

    def __init__(self, bundle: Any, expected: Mapping[str, Any], folder: str, attempts: Any) -> None:
        self._attempts = attempts
        self._broken = ""
        try:
            self._load(bundle, expected, folder)
        except Exception as error:  # raised here, it would have Ray start the next one
            self._broken = str(error)

    def _load(self, bundle: Any, expected: Mapping[str, Any], folder: str) -> None:
        import ray

        with suppress(OSError):
            os.chdir(folder)
        cv2.setNumThreads(1)
        name, files = ray.get(bundle)
        with TemporaryDirectory(prefix="lungscope-") as unpacked:
            for file, data in files.items():
                Path(unpacked, file).write_bytes(data)
            root = Path(unpacked) if files else EMBEDDED / name
            self._analyzer = Analyzer(
                root, device=expected["device"], precision=expected["precision"], streams=1, threads=1
            )
            self._analyzer.load_all()  # while its files are there
        here = computes_with(self._analyzer)
        for what in [what for what in expected if here[what] != expected[what]]:
            values = "" if what == "bundle" else f": {here[what]} there, {expected[what]} here"
            raise ClusterError(f"it would compute with another {what}{values}. Install the same on all machines.")

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[str]]:
        """The rows of a batch of films as JSON, null for one that is kept; a text alone for what ends the run."""
        try:
            if self._broken:
                raise ClusterError(self._broken)
            return {"row": [dumps(entry, indent=None) for entry in self._rows(batch)]}
        except Exception as error:
            return {"row": [json.dumps(f"A worker on {socket.gethostname()} can not work: {error}")]}

    def _rows(self, batch: Mapping[str, Any]) -> Iterator[dict[str, Any] | None]:
        import ray

        films = [os.fsdecode(film) for film in batch["film"]]
        # What a network brings is brought while the film before is analysed.
        for film, known, data in zip(films, batch["known"], in_order(_bring, films, workers=1), strict=True):
            before = ray.get(self._attempts.begin.remote(film))
            yield self._row(film, str(known), data) if before < TRIES else _row(film, _given_up(film))
            self._attempts.end.remote(film)

    def _row(self, film: str, known: str, data: Path | bytes | InputError) -> dict[str, Any] | None:
        if known and known == _sha256(data):
            return None
        result: Report | Failure
        try:
            if isinstance(data, InputError):
                raise data
            result = self._analyzer.analyze(decode(data, film) if isinstance(data, bytes) else data)
        except ImportError:  # a broken installation, not a broken film
            raise
        except Exception as error:
            result = failure(Path(film), error)
        return _row(film, result)


def _bring(film: str) -> Path | bytes | InputError:
    """A path, which the analyzer reads itself, or what lies behind a URL."""
    try:
        return fetch(film) if is_url(film) else Path(film)
    except InputError as error:
        return error


def _sha256(data: Path | bytes | InputError) -> str | None:
    """None where there is nothing to be read."""
    if isinstance(data, bytes):
        return hashlib.sha256(data).hexdigest()
    return content_of(data) if isinstance(data, Path) else None


def _row(film: str, result: Report | Failure) -> dict[str, Any]:
    """A film's row under the very text that it was named by: a path has a URL's two slashes as one."""
    return {**row(result, None), "path": film}


def _given_up(film: str) -> Failure:
    alone = "Copy it to this machine and analyse it" if is_url(film) else "Analyse it"
    error = WorkerLostError(
        f"{film}: {TRIES} workers ended while they analysed it, killed or crashed. {alone} alone with --engine "
        "local; where the machines are short of memory, ask for fewer --workers."
    )
    return failure(Path(film), error)


def _packed(bundle: Bundle) -> tuple[str, dict[str, bytes]]:
    """Name of the bundle's folder, and its files; none of one that came with the package, which every machine has."""
    names = [] if bundle.root.parent == EMBEDDED else [MANIFEST, *bundle.files]
    return bundle.root.name, {name: (bundle.root / name).read_bytes() for name in names}


def _look_for(address: str) -> None:
    """Raise ClusterError where nothing answers at `address`: Ray itself would wait for minutes."""
    host, _, port = address.rpartition(":")
    try:
        if "://" in address:
            raise ValueError("Ray Client is not supported")
        with socket.create_connection((host.strip("[]"), int(port)), timeout=PATIENCE):
            pass
    except (OSError, ValueError, OverflowError) as error:
        raise ClusterError(
            f"Ray at {address!r} can not be joined: {error}. Give host:port of its head, as `ray start "
            "--head` prints it, or auto on one of its machines; with neither this nor RAY_ADDRESS, Ray is started here."
        ) from error
