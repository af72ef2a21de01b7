"""The queue on disk: nothing acknowledged is lost, nothing is sent twice, whenever the process is killed."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from lungscope.errors import UsageError
from lungscope.pacs.spool import FACTS, STARTS, TRIED, Spool
from programs import environment

STEPS = Path(__file__).with_name("steps.py")
UID, FILM = "1.2.3", b"a film"
KEY = f"{UID}-{hashlib.sha256(FILM).hexdigest()[:16]}"


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path / "spool")


def ready(spool: Spool, uid: str = UID, data: bytes = FILM) -> str:
    key, is_new = spool.receive(uid, data)
    assert is_new
    spool.release(key)
    return key


def files(spool: Spool, stage: str) -> list[str]:
    return sorted(path.name for path in (spool.root / stage).iterdir())


def test_killed_before_every_step(tmp_path: Path) -> None:
    command = [sys.executable, str(STEPS), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    runs = json.loads(done.stdout)
    assert len(runs) > 40, "every step on the way is a step to be killed at"
    bad = f"1.2.4-{hashlib.sha256(b'a broken film').hexdigest()[:16]}"
    partly = f"1.2.5-{hashlib.sha256(b'a film that is taken in part').hexdigest()[:16]}"
    left = [f"failed/{partly}.json", *(f"failed/{partly}/{name}" for name in ("1-lungs.dcm", "2-report.sent", FACTS))]
    put_away = [f"failed/{bad}.dcm", f"failed/{bad}.json", *left]
    for step, run in enumerate(runs):
        assert sorted(run["arrived"]) == ["SEG", "SR", "another"], step
        assert run["files"] == [*put_away, "lock", f"sent/{KEY}.json"], step


def test_a_film_is_known_by_what_it_is(spool: Spool) -> None:
    assert spool.receive(UID, FILM) == (KEY, True)
    assert spool.receive(UID, FILM) == (KEY, False)
    corrected, is_new = spool.receive(UID, b"a corrected film")
    assert is_new
    assert corrected != KEY
    assert spool.depth("incoming") == 2


def test_a_film_that_was_answered_is_not_analysed_again(spool: Spool) -> None:
    ready(spool)
    film = spool.take()
    assert film is not None
    assert not spool.receive(UID, FILM)[1], "in hand"
    spool.keep(film, {"report": b"SR"}, {"bundle": "tiny"})
    assert not spool.receive(UID, FILM)[1], "analysed"
    (delivery,) = spool.deliveries()
    (item,) = spool.objects(delivery)
    spool.acknowledge(spool.mark_tried(item))
    spool.finish(delivery, {"destination": "there"})
    assert not spool.receive(UID, FILM)[1], "sent"
    assert spool.take() is None
    journal = json.loads((spool.root / "sent" / f"{KEY}.json").read_text())
    assert journal == {"bundle": "tiny", "destination": "there"}


def test_the_oldest_film_comes_first(spool: Spool) -> None:
    keys = [ready(spool, f"1.2.{number}", bytes([number])) for number in (9, 3, 5)]
    taken = []
    while film := spool.take():
        assert spool.take() == film, "what is in hand comes before what waits"
        taken.append(film.stem)
        spool.fail(film, "quality", "Too dark.")
    assert taken == keys


def test_objects_are_sent_in_their_order(spool: Spool) -> None:
    ready(spool)
    film = spool.take()
    assert film is not None
    spool.keep(film, {"report": b"3", "lungs": b"1", "overlay": b"2"}, {})
    (delivery,) = spool.deliveries()
    assert [path.read_bytes() for path in spool.objects(delivery)] == [b"3", b"1", b"2"]
    assert spool.mark_tried(spool.objects(delivery)[0]).suffix == TRIED
    assert [path.read_bytes() for path in spool.objects(delivery)] == [b"1", b"2", b"3"], "it may break off again"


def test_what_was_sent_and_what_was_not_is_noted(spool: Spool) -> None:
    key = ready(spool)
    film = spool.take()
    assert film is not None
    spool.keep(film, {"lungs": b"1", "overlay": b"2", "report": b"3"}, {})
    (delivery,) = spool.deliveries()
    lungs, overlay, _ = spool.objects(delivery)
    spool.mark_tried(lungs)
    spool.acknowledge(overlay)
    assert spool.refuse(delivery, "refused", "No.") == ["report", "lungs"]
    note = json.loads((spool.root / "failed" / f"{key}.json").read_text())
    error = {"code": "refused", "message": "No."}
    assert note == {"error": error, "sent": ["overlay"], "not_sent": ["report", "lungs"]}


def test_results_that_wait_are_not_made_again(spool: Spool) -> None:
    for data in (b"SR", b"another"):
        (spool.root / "ready" / f"{KEY}.dcm").write_bytes(FILM)
        film = spool.take()
        assert film is not None
        spool.keep(film, {"report": data}, {})
        assert spool.take() is None
    (delivery,) = spool.deliveries()
    assert [path.read_bytes() for path in spool.objects(delivery)] == [b"SR"]


@pytest.mark.parametrize("uid", ["../../x", "", ".1", "1.2/3", "1" * 65, "1.2.3\0"])
def test_what_is_no_uid_is_no_file_name(spool: Spool, uid: str) -> None:
    with pytest.raises(ValueError, match="is no UID"):
        spool.receive(uid, FILM)
    assert spool.depth("incoming") == 0


def test_a_film_that_ends_processes_is_put_away(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    ready(spool)
    for _ in range(STARTS):
        assert spool.take() is not None
        spool.close()
        spool = Spool(tmp_path)
    assert spool.take() is None
    assert files(spool, "failed") == [f"{KEY}.dcm", f"{KEY}.json"]
    assert files(spool, "analysing") == []
    assert json.loads((tmp_path / "failed" / f"{KEY}.json").read_text())["error"]["code"] == "crashed"


def test_what_is_moved_back_by_hand_is_taken_up_again(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    ready(spool)
    film = spool.take()
    assert film is not None
    spool.fail(film, "quality", "Too dark.")
    assert spool.depth("failed") == 1
    (tmp_path / "failed" / f"{KEY}.dcm").rename(tmp_path / "ready" / f"{KEY}.dcm")
    film = spool.take()
    assert film is not None
    spool.keep(film, {"report": b"SR"}, {})
    spool.refuse(spool.deliveries()[0], "refused", "No.")
    assert spool.deliveries() == []
    (tmp_path / "failed" / KEY).rename(tmp_path / "results" / KEY)
    assert len(spool.deliveries()) == 1
    spool.close()
    assert files(Spool(tmp_path), "failed") == [], "a reason without what it stands beside is gone with the next start"


def test_a_film_that_is_put_back_by_hand_and_answered_leaves_no_note(spool: Spool) -> None:
    key = ready(spool)
    film = spool.take()
    assert film is not None
    spool.fail(film, "memory", "too large")
    (spool.root / "failed" / f"{key}.dcm").rename(spool.root / "ready" / f"{key}.dcm")
    film = spool.take()
    assert film is not None
    spool.keep(film, {"report": b"an SR"}, {})
    assert spool.depth("failed") == 0 and files(spool, "failed") == []


def test_results_that_are_put_back_by_hand_and_sent_leave_no_note(spool: Spool) -> None:
    key = ready(spool)
    film = spool.take()
    assert film is not None
    spool.keep(film, {}, {})
    spool.refuse(spool.deliveries()[0], "refused", "No.")
    assert spool.depth("failed") == 1
    (spool.root / "failed" / key).rename(spool.root / "results" / key)
    spool.finish(spool.deliveries()[0], {})
    assert spool.depth("failed") == 0 and files(spool, "failed") == []


def test_one_process_at_a_time(spool: Spool, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="in use by another process"):
        Spool(spool.root)
    spool.close()
    Spool(spool.root).close()
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="can not be written"):
        Spool(tmp_path / "file")
