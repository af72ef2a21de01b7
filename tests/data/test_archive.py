"""Zip files that are broken, hostile, or unpacked only in part."""

from __future__ import annotations

import stat
import struct
import zipfile
from pathlib import Path

import pytest

from lungscope.data import archive
from lungscope.data.archive import MARKER, unpack
from lungscope.data.importing import import_films
from lungscope.errors import DataError


def pack(path: Path, members: dict[str, bytes], *, method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as bundle:
        for name, data in members.items():
            bundle.writestr(name, data)
    return path


def quiet(done: int, total: int) -> None:
    """No progress bar."""


def files(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != MARKER
    }


def refuse(bundle: Path, folder: Path, match: str) -> None:
    before = sorted(folder.parent.rglob("*"))
    with pytest.raises(DataError, match=match):
        unpack(bundle, folder, quiet)
    assert sorted(folder.parent.rglob("*")) == before


@pytest.mark.parametrize("name", ["../evil.png", "a/../../evil.png", "/tmp/evil.png", "..\\evil.png", "C:\\evil.png"])
def test_members_that_would_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    refuse(pack(tmp_path / "a.zip", {"ok.png": b"x", name: b"x"}), tmp_path / "out", "outside the folder")


def test_links_are_refused(tmp_path: Path) -> None:
    info = zipfile.ZipInfo("link")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as bundle:
        bundle.writestr(info, "/etc/passwd")
    refuse(tmp_path / "a.zip", tmp_path / "out", "link")


def test_bombs_are_refused(tmp_path: Path) -> None:
    one = pack(tmp_path / "a.zip", {"a.png": bytes(30 * 2**20)}, method=zipfile.ZIP_DEFLATED)
    refuse(one, tmp_path / "out", "grows from")
    many = pack(tmp_path / "b.zip", {f"{i}.png": bytes(2**20) for i in range(12)}, method=zipfile.ZIP_DEFLATED)
    refuse(many, tmp_path / "out", "would grow to")


def test_too_many_and_repeated_members_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(tmp_path / "a.zip", "w") as bundle:
        bundle.writestr("a.png", b"1")
        bundle.writestr("a.png", b"2")
    refuse(tmp_path / "a.zip", tmp_path / "out", "twice")
    refuse(pack(tmp_path / "b.zip", {"a": b"1", "a/b": b"2"}), tmp_path / "out", "both a file and a folder")
    monkeypatch.setattr(archive, "MAX_MEMBERS", 1)
    refuse(pack(tmp_path / "c.zip", {"a": b"1", "b": b"2"}), tmp_path / "out", "2 members")


def test_encrypted_members_are_refused(tmp_path: Path) -> None:
    bundle = pack(tmp_path / "a.zip", {"a.png": b"x"})
    data = bytearray(bundle.read_bytes())
    data[6] |= 1
    data[data.index(b"PK\x01\x02") + 8] |= 1
    bundle.write_bytes(bytes(data))
    refuse(bundle, tmp_path / "out", "encrypted")


def test_what_is_no_zip_is_refused(tmp_path: Path, zipped: Path) -> None:
    (tmp_path / "text.zip").write_text("not a zip")
    cut = tmp_path / "cut.zip"
    cut.write_bytes(zipped.read_bytes()[:-200])
    for path in (tmp_path / "text.zip", cut):
        with pytest.raises(DataError, match="not a whole zip"):
            import_films(path, tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_more_than_the_disk_holds_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = pack(tmp_path / "a.zip", {"a.png": b"12345"})
    usage = archive.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(archive.shutil, "disk_usage", lambda path: usage._replace(free=4))
    refuse(bundle, tmp_path / "out", "Make room")


def test_a_folder_of_someone_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    refuse(pack(tmp_path / "a.zip", {"a.png": b"1"}), tmp_path / "out", "something else")


def test_names_of_windows_tools_become_folders(tmp_path: Path) -> None:
    unpack(pack(tmp_path / "a.zip", {"COVID\\images\\a.png": b"1"}), tmp_path / "out", quiet)
    assert files(tmp_path / "out") == {"COVID/images/a.png": b"1"}


def test_a_broken_member_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    bundle = pack(tmp_path / "a.zip", {"a.png": b"first" * 20, "b.png": b"second" * 20})
    bundle.write_bytes(bundle.read_bytes().replace(b"firstfirst", b"firstFIRST", 1))
    for _ in range(2):
        assert list(unpack(bundle, tmp_path / "out", quiet)) == ["a.png"]
        assert list(files(tmp_path / "out")) == ["b.png"]


def test_broken_members_are_in_the_rejected_list(zipped: Path, tmp_path: Path) -> None:
    data = bytearray(zipped.read_bytes())
    with zipfile.ZipFile(zipped) as bundle:
        info = bundle.getinfo("COVID-19_Radiography_Dataset/COVID/images/COVID-1.png")
    name_length, extra_length = struct.unpack("<HH", data[info.header_offset + 26 : info.header_offset + 30])
    data[info.header_offset + 30 + name_length + extra_length + 60] ^= 0xFF
    zipped.write_bytes(bytes(data))
    result = import_films(zipped, tmp_path / "store", size=32)
    assert [(item.kind, Path(item.path).name) for item in result.rejected] == [
        ("archive", "COVID-1.png"),
        ("mask", "COVID-1.png"),
    ]
    assert result.films == 8
    assert result.unreadable == 1
    assert import_films(zipped, tmp_path / "store", size=32).up_to_date


def test_a_repeat_unpacks_only_what_is_missing_or_changed(tmp_path: Path) -> None:
    members = {"x/a.png": b"11", "x/b.png": b"22", "c.png": b"33"}
    bundle = pack(tmp_path / "a.zip", members)
    unpack(bundle, tmp_path / "out", quiet)
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.png")}
    unpack(bundle, tmp_path / "out", quiet)
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps
    (tmp_path / "out" / "c.png").unlink()
    changed = pack(tmp_path / "a.zip", {"x/a.png": b"11", "x/b.png": b"!!", "c.png": b"33"})
    told: list[tuple[int, int]] = []
    unpack(changed, tmp_path / "out", lambda *step: told.append(step))
    assert told[-1] == (2, 2)
    fewer = pack(tmp_path / "a.zip", {"x/a.png": b"11"})
    unpack(fewer, tmp_path / "out", quiet)
    assert files(tmp_path / "out") == {"x/a.png": b"11"}


def test_an_interrupted_unpacking_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = {f"{i}.png": bytes([i]) * 50 for i in range(4)}
    bundle = pack(tmp_path / "a.zip", members)
    replace, count, stop = Path.replace, 0, 0

    def failing(source: Path, target: Path) -> Path:
        nonlocal count
        count += 1
        if count == stop:
            raise KeyboardInterrupt
        return replace(source, target)

    for stop in range(1, 7):
        folder, count = tmp_path / f"out{stop}", 0
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", failing)
            with pytest.raises(KeyboardInterrupt):
                unpack(bundle, folder, quiet)
        told: list[tuple[int, int]] = []
        unpack(bundle, folder, lambda done, total, told=told: told.append((done, total)))
        assert told[-1] == (4 - max(0, stop - 2),) * 2
        assert files(folder) == members
