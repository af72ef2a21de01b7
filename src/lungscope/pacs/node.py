"""The node: what is received is analysed, what was analysed is sent, until it is told to stop."""

from __future__ import annotations

import logging
import ssl
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from threading import Event, Thread
from time import monotonic
from typing import Any

from pydicom import dcmread

from lungscope.errors import DeliveryError, RefusedError
from lungscope.pacs.deidentify import Deidentifier
from lungscope.pacs.receive import Receiver
from lungscope.pacs.send import Destination
from lungscope.pacs.spool import STAGES, TRIED, Spool, kind_of
from lungscope.pacs.status import Metrics, StatusServer
from lungscope.pipeline import Analyzer, failure
from lungscope.readers.common import tell_memory
from lungscope.writers.dicom import encode, objects

LOGGER = logging.getLogger(__name__)

#: Seconds between looks for what no thread is woken for: quiet studies, and what was moved by hand.
LOOK = 0.5
#: Seconds before the second try of what went wrong; twice as long with each try, up to the longest.
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 300.0
#: No film and no result is to blame for these: a full disk, a broken installation, too little memory.
FAULTS = (OSError, ImportError, MemoryError)
#: A film that could not be read from the disk, or held in memory, this often is put away.
TRIES = 10
#: A delivery that was refused this often is put away.
REFUSALS = 10
#: So many deliveries in a row that fail before any gets through mean that the destination is away.
FIRST_ONES = 3


@dataclass(frozen=True)
class Address:
    """Where the node answers, and to whom.

    aet: the title by which it has to be called. allow: titles that may call; none lets every one. status_port: on this
    machine alone. A port 0 is chosen by the system.
    """

    host: str
    port: int
    status_port: int
    aet: str
    allow: Sequence[str] = ()
    tls: ssl.SSLContext | None = None


class Node:
    """Receives films into `spool`, analyses them, and sends the results to `destination`.

    quiet_seconds: a study whose association stays open is complete after that time without a film. deidentifier:
    applied to what is sent; None leaves the film's patient and study in it.
    """

    def __init__(
        self,
        spool: Spool,
        analyzer: Analyzer,
        destination: Destination,
        *,
        quiet_seconds: float = 10,
        deidentifier: Deidentifier | None = None,
    ) -> None:
        self._spool, self._analyzer, self._destination = spool, analyzer, destination
        self._quiet_seconds, self._deidentifier = quiet_seconds, deidentifier
        self._metrics = Metrics(spool)
        self._stop, self._films, self._results = Event(), Event(), Event()
        #: By the key of a delivery that failed: when it is due again, how often it failed, how often it was refused.
        self._waits: dict[str, tuple[float, int, int]] = {}
        #: By the name of a film: how often it could not be read, or held in memory.
        self._faults: Counter[str] = Counter()
        self._threads = [
            Thread(target=self._repeat, args=(step, wake, relief), name=name, daemon=True)
            for name, step, wake, relief in (
                ("analysis", self._analyse_next, self._films, self._stop),
                ("delivery", self._deliver_due, self._results, self._results),
            )
        ]

    def run(self, address: Address, *, ready: Callable[[int, int], None] = lambda port, status_port: None) -> None:
        """Work until `stop` is called; then finish what is in hand.

        ready: called with both ports once films can come. Raises UsageError where a port can not be had.
        """
        receiver = Receiver(
            self._spool, self._metrics, aet=address.aet, allow=address.allow, quiet_seconds=self._quiet_seconds,
            wake=self._films.set,
        )  # fmt: skip
        status = StatusServer(address.status_port, self._metrics, self.health)
        try:
            port = receiver.start(address.host, address.port, address.tls)
            for thread in self._threads:
                thread.start()
            ready(port, status.port)
            while not self._stop.wait(LOOK):
                receiver.release_quiet()
            receiver.stop()
            for thread in self._threads:
                thread.join()
        finally:
            status.stop()

    def stop(self) -> None:
        """Let `run` end. May be called from another thread and from a signal handler."""
        self._stop.set()
        self._films.set()
        self._results.set()

    def health(self) -> tuple[bool, dict[str, Any]]:
        """Whether the node works, and what there is to say about it."""
        works = {thread.name: thread.is_alive() for thread in self._threads}
        well = all(works.values())
        queue = {stage: self._spool.depth(stage) for stage in STAGES if stage != "sent"}
        return well, {"status": "ok" if well else "broken", "works": works, "queue": queue}

    def _repeat(self, step: Callable[[], bool], wake: Event, relief: Event) -> None:
        """Do `step` until the node stops, as fast as it finds work, with pauses where the machine does not do its part
        (`FAULTS`) or the destination is away. relief: ends a pause before its time, but for the first seconds."""
        pause = FIRST_PAUSE
        while not self._stop.is_set():
            wake.clear()
            try:
                found = step()
            except (DeliveryError, *FAULTS) as error:
                LOGGER.error("%s (pause of %.0f s)", _words(error), pause)
                self._metrics.pauses.labels(_code(error)).inc()
            else:
                pause = FIRST_PAUSE
                if not found:
                    wake.wait(LOOK)
                continue
            # Here, where the error and what it holds of a film are gone.
            if not self._stop.wait(FIRST_PAUSE):
                relief.wait(pause - FIRST_PAUSE)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _analyse_next(self) -> bool:
        """Analyse the film that waited longest. False where none waits."""
        film = self._spool.take()
        if film is None:
            return False
        try:
            self._answer(film)
        except FAULTS:
            with suppress(OSError):  # `take` finds it where it is
                self._spool.put_back(film)
            raise
        return True

    def _answer(self, film: Path) -> None:
        """Put the results of a film in line, or the film away. Raises `FAULTS`; but what goes wrong with reading and
        analysing may be the film's own, and others wait behind it, so that it is put away after `TRIES`."""
        try:
            with self._metrics.analysis_seconds.time():
                files, facts = self._analyse(film)
        except ImportError:
            raise
        except (OSError, MemoryError) as error:
            self._faults[film.name] += 1
            if self._faults[film.name] < TRIES:
                raise
            self._put_away(
                film,
                _code(error),
                f"{TRIES} tries to read and analyse this film failed ({_words(error)}). Look after the machine's disk "
                "and memory, then move the film to ready/.",
            )
        except Exception as error:
            result = failure(film, error)
            self._put_away(film, result.code, result.message)
        else:
            self._spool.keep(film, files, facts)
            self._metrics.analysed.inc()
            LOGGER.info("analysed %s", film.stem)
            self._results.set()
        del self._faults[film.name]

    def _put_away(self, film: Path, code: str, message: str) -> None:
        self._spool.fail(film, code, message)
        self._metrics.failed.labels(code).inc()
        LOGGER.warning("failed (%s): %s", code, message)

    def _analyse(self, film: Path) -> tuple[dict[str, bytes], dict[str, Any]]:
        """The files to send for a film, by kind, and what the journal is to say of it."""
        try:
            report = self._analyzer.analyze(film)
            data = film.read_bytes()  # `objects` would take a fault of the disk for one of the film
            made = (self._deidentifier.objects if self._deidentifier else objects)(report, film=data)
        except Exception as error:
            tell_memory(error, str(film))
            raise
        facts = {
            "sop_instance_uid": report.source.tags.get("SOPInstanceUID"),
            "sha256": report.source.sha256,
            "analysed": report.run.created,
            "bundle": report.run.bundle,
            "bundle_version": report.run.bundle_version,
            "deidentified": self._deidentifier is not None,
            "objects": {kind: str(item.SOPInstanceUID) for kind, item in made.items()},
        }
        return {kind: encode(item) for kind, item in made.items()}, facts

    def _deliver_due(self) -> bool:
        """Send every delivery that is due. False where none is. Raises DeliveryError where the destination is away: the
        first ones fail, and none gets through. Each that fails waits alone, and those that failed least come first.
        """
        due = [path for path in self._spool.deliveries() if self._waits.get(path.name, (0, 0, 0))[0] <= monotonic()]
        due.sort(key=lambda path: self._waits.get(path.name, (0, 0, 0))[1])
        failed: dict[Path, Exception] = {}
        through = False
        for delivery in due:
            if self._stop.is_set():
                break
            try:
                with self._metrics.delivery_seconds.time():
                    self._deliver(delivery)
                self._waits.pop(delivery.name, None)
                through = True
                LOGGER.info("sent %s", delivery.name)
            except RefusedError as error:
                through = True
                self._refused(delivery, error)
            except (DeliveryError, *FAULTS) as error:
                failed[delivery] = error
                if not through and len(failed) == FIRST_ONES:
                    break
            except Exception as error:  # an object that was altered on the disk; the others are none the worse for it
                self._refused(delivery, RefusedError(f"{type(error).__name__}: {error}", code="internal"))
        for delivery, reason in failed.items():
            self._later(delivery, reason)
        if failed and not through:
            raise next(iter(failed.values()))
        return bool(due)

    def _deliver(self, delivery: Path) -> None:
        """Send what is left of a delivery. An object that may have arrived before is asked for before it is sent.

        One that is refused holds back no other: raises RefusedError about all of them when the others are there.
        """
        items = {path: dcmread(path) for path in self._spool.objects(delivery)}
        refused: dict[str, RefusedError] = {}
        if items:
            with self._destination.connect(list(items.values())) as link:
                for path, item in items.items():
                    try:
                        if path.suffix != TRIED or not link.has(item):
                            link.check(item)  # what can not be sent is not marked as if it were
                            path = self._spool.mark_tried(path)
                            link.store(item)
                    except RefusedError as error:
                        refused[kind_of(path)] = error
                        continue
                    self._spool.acknowledge(path)
                    self._metrics.sent.labels(kind_of(path)).inc()
        if refused:
            raise RefusedError("Not taken: " + " ".join(f"{kind} ({error})" for kind, error in refused.items()))
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self._spool.finish(delivery, {"sent": now, "destination": self._destination.name})

    def _later(self, delivery: Path, error: Exception) -> None:
        """Let a delivery wait, longer each time, without the others waiting for it."""
        _, times, refusals = self._waits.get(delivery.name, (0.0, 0, 0))
        pause = min(FIRST_PAUSE * 2 ** min(times + 1, 10), LONGEST_PAUSE)
        self._metrics.pauses.labels(_code(error)).inc()
        LOGGER.warning("%s (%s again in %.0f s)", _words(error), delivery.name, pause)
        self._waits[delivery.name] = monotonic() + pause, times + 1, refusals + isinstance(error, RefusedError)

    def _refused(self, delivery: Path, error: RefusedError) -> None:
        """Try a delivery later, without the others waiting for it; or, after `REFUSALS`, never."""
        times = self._waits.get(delivery.name, (0.0, 0, 0))[2] + 1
        if times < REFUSALS:
            self._later(delivery, error)
            return
        self._metrics.pauses.labels(error.code).inc()
        LOGGER.error("%s (%s put away after %d tries)", error, delivery.name, times)
        self._waits.pop(delivery.name, None)
        for kind in self._spool.refuse(delivery, error.code, str(error)):
            self._metrics.refused.labels(kind).inc()
        self._metrics.failed.labels(error.code).inc()


def _code(error: Exception) -> str:
    """What the numbers and failed/ call an error that the node pauses for."""
    return "memory" if isinstance(error, MemoryError) else getattr(error, "code", "os")


def _words(error: Exception) -> str:
    """MemoryError has none of its own where Python raises it."""
    return str(error) or type(error).__name__
