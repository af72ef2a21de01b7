"""Films that wait, the threads that analyse them, and results that are kept for a visit."""

from __future__ import annotations

import asyncio
import logging
import secrets
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import monotonic
from typing import Any, BinaryIO, Literal, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from lungscope.errors import BusyError, LungscopeError, NotFoundError
from lungscope.pipeline import Analyzer
from lungscope.readers import decode
from lungscope.report import Report
from lungscope.web.limits import Limits
from lungscope.web.metrics import Metrics

Status = Literal["queued", "running", "done", "failed", "deleted"]

FINISHED = ("done", "failed", "deleted")

#: Seconds after which an event stream says that it is still there, so that no proxy closes it.
KEEP_ALIVE = 15.0
#: How often results that nobody asked for any longer are looked for, in seconds.
SWEEP = 15.0
#: Seconds that a closing server waits for the next film that is worked on, so that one without end does not hold it.
PATIENCE = 20.0
#: What the names of the threads that analyse films begin with.
THREADS = "lungscope-analyze"

Array = TypeVar("Array", bound=NDArray[Any])

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Upload:
    """A film's file as it came. name: what the client calls it. file: open, at its start; closed by who reads it."""

    name: str
    file: BinaryIO


@dataclass(eq=False)
class Job:
    """One film from its upload to its removal. Changed on the event loop's thread alone.

    key: its secret name in addresses. name: of the film, as the client called it. folder: of its files.
    stage: that is running. document: the content of report.json. error: why it failed. stored: bytes of its files.
    touched: when it was last asked for, in monotonic seconds. unwanted: a client deleted it, so that nothing of it is
    to be written for good; what goes with time, for newer ones or with the server is not.
    """

    key: str
    name: str
    folder: Path
    status: Status = "queued"
    stage: str | None = None
    error: LungscopeError | None = None
    report: Report | None = None
    document: dict[str, Any] | None = None
    touched: float = field(default_factory=monotonic)
    stored: int = 0
    unwanted: bool = False
    _history: list[dict[str, Any]] = field(default_factory=lambda: [{"status": "queued", "stage": None}])
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def upload(self) -> Path:
        """The film's file as it came, kept for what only it has (DICOM's patient and study); there for DICOM alone."""
        return self.folder / "film"

    @property
    def finished(self) -> bool:
        return self.status in FINISHED

    def note(self, status: Status, stage: str | None = None) -> None:
        """Go on to `status`, and tell those who listen."""
        if self.status == "deleted":
            return
        self.status, self.stage = status, stage
        self._history.append({"status": status, "stage": stage})
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def events(self) -> AsyncIterator[dict[str, Any] | None]:
        """Every step so far, then each as it comes, to the first that finishes it; None whenever `KEEP_ALIVE` seconds
        brought none."""
        told = 0
        while True:
            while told < len(self._history):
                step = self._history[told]
                yield step
                if step["status"] in FINISHED:
                    return
                told += 1
            try:
                async with asyncio.timeout(KEEP_ALIVE):
                    await self._changed.wait()
            except TimeoutError:
                yield None

    async def wait(self) -> None:
        """Until it is finished."""
        async for _ in self.events():
            pass


Keep = Callable[[Job, Report], Path]


class Jobs:
    """A bounded queue before a bounded pool of threads, and the results of a visit.

    Results stay until `Limits.kept_seconds` after they were last asked for, or until newer ones need their place in
    `Limits.kept_bytes`. Their arrays lie in files of a private temporary folder and are mapped, so that memory holds
    only what is in use. keep: called with each result, on one of the pool's threads, to write what is to stay; it
    returns the folder that it wrote, which goes where a client deleted the film meanwhile.
    Methods are called on the event loop's thread.
    """

    def __init__(
        self, analyzer: Analyzer, limits: Limits, metrics: Metrics, *, workers: int, keep: Keep | None = None
    ) -> None:
        self._analyzer = analyzer
        self._limits = limits
        self._metrics = metrics
        self._keep = keep
        self._jobs: dict[str, Job] = {}
        self._taken = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix=THREADS)
        self._folder = tempfile.TemporaryDirectory(prefix="lungscope-serve-", ignore_cleanup_errors=True)
        metrics.watch("lungscope_films_waiting", "Films that arrive, wait or are analysed.", lambda: self._taken)
        metrics.watch("lungscope_results_kept", "Results that can be asked for.", lambda: len(self._jobs))
        metrics.watch("lungscope_results_kept_bytes", "Bytes of their files.", lambda: self._stored())

    @property
    def waiting(self) -> int:
        """Films that arrive, wait or are analysed."""
        return self._taken

    async def accept(self, arriving: Callable[[], Awaitable[Upload]]) -> Job:
        """Await an upload and queue it. Its place is taken before a byte of it is read.

        Raises BusyError where no place is free, and what `arriving` raises.
        """
        if self._taken >= self._limits.waiting:
            raise BusyError(
                f"{self._limits.waiting} films are waiting, the most that are taken. Send this one again later.",
                retry_after=5,
            )
        self._taken += 1
        try:
            upload = await arriving()
        except BaseException:
            self._taken -= 1
            raise
        key = secrets.token_urlsafe(16)
        job = self._jobs[key] = Job(key, upload.name, Path(self._folder.name) / key)
        task = asyncio.get_running_loop().create_task(self._run(job, upload))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return job

    def get(self, key: str) -> Job:
        """Raises NotFoundError where there is none, or none any longer."""
        job = self._jobs.get(key)
        if job is None:
            raise NotFoundError(
                f"There is no analysis {key!r}. Results go {self._limits.kept_seconds / 60:g} minutes after they were "
                "last asked for. Send the film again."
            )
        job.touched = monotonic()
        return job

    def delete(self, job: Job) -> None:
        """Forget a film that a client does not want, and remove its files; those of one that a thread still works on go
        when that is done, and so does what `keep` has begun to write."""
        job.unwanted = True
        self._forget(job)

    def _forget(self, job: Job) -> None:
        self._jobs.pop(job.key, None)
        job.note("deleted")
        job.report = job.document = None
        if job.stored:
            shutil.rmtree(job.folder, ignore_errors=True)

    async def sweep(self) -> None:
        """Remove, for ever, what was not asked for in time."""
        while True:
            await asyncio.sleep(SWEEP)
            oldest = monotonic() - self._limits.kept_seconds
            for job in [job for job in self._jobs.values() if job.finished and job.touched < oldest]:
                self._forget(job)

    async def close(self) -> None:
        """Forget films that wait, finish those that are worked on, write what is to stay, and remove every file.

        Where none of them is finished for `PATIENCE` seconds the rest is given up, and threads are left at work.
        """
        for job in [job for job in self._jobs.values() if not job.finished]:
            self._forget(job)
        while self._tasks:
            ended, _ = await asyncio.wait(self._tasks, timeout=PATIENCE, return_when=asyncio.FIRST_COMPLETED)
            if not ended:
                _log.warning("%d films were given up: none was finished in %g seconds", len(self._tasks), PATIENCE)
                break
        for job in list(self._jobs.values()):
            self._forget(job)
        self._pool.shutdown(wait=not self._tasks, cancel_futures=True)
        self._folder.cleanup()

    async def _run(self, job: Job, upload: Upload) -> None:
        loop = asyncio.get_running_loop()
        try:
            made = await loop.run_in_executor(self._pool, self._analyze, job, upload, loop.call_soon_threadsafe)
        except LungscopeError as error:
            self._fail(job, error)
        except Exception as error:
            _log.exception("A film failed in a way that nobody foresaw")
            kind = type(error).__name__
            self._fail(
                job, LungscopeError(f"{job.name}: failed ({kind}). The server's log says where.", code="internal")
            )
        else:
            if made is not None:
                self._done(job, *made)
                # Before its files count as stored, so that they are there for as long as they are written from.
                kept = await loop.run_in_executor(self._pool, self._write, job, made[0])
                if job.unwanted and kept is not None:  # asked here, where no deletion can come in between
                    await loop.run_in_executor(self._pool, _remove, kept)
                if job.status == "done":
                    job.stored = sum(path.stat().st_size for path in job.folder.iterdir())
                    self._make_room(job)
        finally:
            self._taken -= 1
            if job.status in ("failed", "deleted"):
                shutil.rmtree(job.folder, ignore_errors=True)

    def _done(self, job: Job, report: Report, document: dict[str, Any]) -> None:
        if job.status == "deleted":
            return
        self._metrics.analyses.labels("done").inc()
        self._metrics.stages(report.run.timings_ms)
        job.report, job.document = report, document
        job.note("done")

    def _fail(self, job: Job, error: LungscopeError) -> None:
        self._metrics.analyses.labels(error.code).inc()
        # Its traceback would keep the arrays of its frames alive for as long as the job.
        error.__traceback__ = error.__cause__ = error.__context__ = None
        job.error, job.report, job.document = error, None, None
        job.note("failed")

    def _analyze(
        self, job: Job, upload: Upload, on_loop: Callable[..., object]
    ) -> tuple[Report, dict[str, Any]] | None:
        """Analyse a film and put its report into files; that and its document, None where the film was deleted before.

        Runs on one of the pool's threads. Raises what the reader and the analyzer do, and OSError where a disk is full.
        """

        def progress(stage: str) -> None:
            on_loop(job.note, "running", stage)

        with upload.file as file:
            if job.status == "deleted":
                return None
            progress("read")
            data = file.read()
        film = decode(data, job.name, path=Path(job.name), max_pixels=self._limits.pixels)
        job.folder.mkdir()
        if film.source.format == "DICOM":
            job.upload.write_bytes(data)
        del data
        report = self._analyzer.analyze(film, progress=progress)
        return park(report, job.folder), report.to_json()

    def _write(self, job: Job, report: Report) -> Path | None:
        """Write what is to stay; the folder that it is in. Where that fails the result can still be asked for, and the
        log says why."""
        if self._keep is None or job.unwanted:
            return None
        try:
            return self._keep(job, report)
        except Exception:
            _log.exception("A result could not be written")
            return None

    def _make_room(self, job: Job) -> None:
        """Delete what was asked for longest ago until the rest, and `job`, is within the limit."""
        for other in sorted((one for one in self._jobs.values() if one.stored), key=lambda one: one.touched):
            if self._stored() <= self._limits.kept_bytes:
                break
            if other is not job:
                self._forget(other)

    def _stored(self) -> int:
        return sum(job.stored for job in self._jobs.values())


def _remove(folder: Path) -> None:
    """Remove what was written of a film that nobody wants. The log says where that fails."""
    try:
        shutil.rmtree(folder)
    except OSError:
        _log.exception("%s is of a film that was deleted, and could not be removed. Remove it by hand", folder)


def park(report: Report, folder: Path) -> Report:
    """The same report with its arrays in .npy files of `folder`, mapped and read only."""

    def mapped(name: str, array: Array) -> Array:
        path = folder / f"{name}.npy"
        np.save(path, array, allow_pickle=False)
        return cast(Array, np.asarray(np.load(path, mmap_mode="r", allow_pickle=False)))

    lungs, saliency = report.lungs, report.saliency
    opacity, grades = lungs.opacity, lungs.grades
    return replace(
        report,
        film=replace(report.film, pixels=mapped("film", report.film.pixels)),
        lungs=replace(
            lungs,
            mask=mapped("lungs", lungs.mask),
            left=mapped("left", lungs.left),
            right=mapped("right", lungs.right),
            probability=mapped("probability", lungs.probability),
            opacity=None if opacity is None else replace(opacity, map=mapped("opacity", opacity.map)),
            grades=None if grades is None else replace(grades, map=mapped("grades", grades.map)),
        ),
        saliency=None if saliency is None else replace(saliency, map=mapped("saliency", saliency.map)),
    )
