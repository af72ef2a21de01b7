"""Unpacking a zip file that may be broken or hostile."""

from __future__ import annotations

import hashlib
import json
import shutil
import stat
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

from lungscope.errors import DataError

#: A whole archive or one member that grows by more than this, and to more than `SMALL` bytes, counts as a bomb. Films
#: and masks are compressed already; deflate itself reaches about 1030.
MAX_RATIO = 200
SMALL = 10 * 2**20
MAX_MEMBERS = 1_000_000
MARKER = ".lungscope-archive.json"


def unpack(archive: Path, folder: Path, progress: Callable[[int, int], None]) -> dict[str, str]:
    """Unpack `archive` into `folder`, which nothing else writes to; return the broken members with the reason of each.

    A file appears whole or not at all, what is unpacked already is kept, and files of an earlier archive are removed,
    so the call may be repeated after any interruption. `progress` is told members done and in all.
    Raises DataError where the file is not a zip, or where a member would leave the folder, is not a plain file, is
    encrypted, collides with another, or is out of proportion. Nothing is written then.
    """
    try:
        with zipfile.ZipFile(archive) as bundle:
            members = _checked(bundle.infolist(), archive)
            return _extract(bundle, members, archive, folder, progress)
    except zipfile.BadZipFile as error:
        raise DataError(f"{archive} is not a whole zip file ({error}). Download it again") from error


def _checked(infos: Sequence[zipfile.ZipInfo], archive: Path) -> dict[str, zipfile.ZipInfo]:
    """The plain files of the archive by their path in it, after every check that needs no unpacking."""

    def refuse(why: str) -> DataError:
        return DataError(f"{archive} is refused: {why}. Nothing was unpacked; get the archive from its own publisher")

    if len(infos) > MAX_MEMBERS:
        raise refuse(f"{len(infos)} members, at most {MAX_MEMBERS} are read")
    members: dict[str, zipfile.ZipInfo] = {}
    for info in infos:
        name = info.filename.replace("\\", "/")
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or any(":" in part for part in path.parts[:1]):
            raise refuse(f"member {info.filename!r} would be written outside the folder")
        kind = stat.S_IFMT(info.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise refuse(f"member {info.filename!r} is a link or a special file")
        if info.flag_bits & 0x1:
            raise refuse(f"member {info.filename!r} is encrypted")
        if info.file_size > SMALL and info.file_size > MAX_RATIO * max(info.compress_size, 1):
            raise refuse(f"member {info.filename!r} grows from {info.compress_size} to {info.file_size} bytes")
        if name.endswith("/") or "__MACOSX" in path.parts:
            continue
        if str(path) in members:
            raise refuse(f"member {info.filename!r} is there twice")
        members[str(path)] = info
    for name in members:
        for above in PurePosixPath(name).parents:
            if str(above) in members:
                raise refuse(f"{str(above)!r} is both a file and a folder")
    total, packed = sum(info.file_size for info in members.values()), archive.stat().st_size
    if total > SMALL and total > MAX_RATIO * packed:
        raise refuse(f"{packed} bytes would grow to {total}")
    return members


def _extract(
    bundle: zipfile.ZipFile,
    members: dict[str, zipfile.ZipInfo],
    archive: Path,
    folder: Path,
    progress: Callable[[int, int], None],
) -> dict[str, str]:
    listing = [(name, info.file_size, info.CRC) for name, info in sorted(members.items())]
    digest = hashlib.sha256(json.dumps(listing).encode()).hexdigest()
    marker = folder / MARKER
    unmarked = folder.is_dir() and not marker.is_file()
    if unmarked and any(path != marker.with_suffix(".part") for path in folder.iterdir()):
        raise DataError(f"{folder} is in the way of unpacking {archive.name}: it holds something else. Move it")
    known = json.loads(marker.read_text()) if marker.is_file() else {}
    trusted = known.get("digest") == digest and known.get("done")
    broken: dict[str, str] = dict(known["broken"]) if trusted else {}
    wanted = {
        name: info
        for name, info in members.items()
        if name not in broken and not _unpacked(folder / name, info, trusted=bool(trusted))
    }
    if trusted and not wanted:
        return broken
    _check_space(sum(info.file_size for info in wanted.values()), archive, folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write_marker(marker, {"digest": digest, "done": False, "broken": {}})
    for done, (name, info) in enumerate(wanted.items()):
        progress(done, len(wanted))
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        part = folder / ".part"
        try:
            with bundle.open(info) as source, part.open("wb") as sink:
                shutil.copyfileobj(source, sink, 2**20)
        # NotImplementedError is zipfile's word for a compression that it does not know.
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
            broken[name] = f"the archive is broken here: {error}"
            target.unlink(missing_ok=True)
            continue
        part.replace(target)
    progress(len(wanted), len(wanted))
    for path in folder.rglob("*"):
        if path.is_file() and path != marker and path.relative_to(folder).as_posix() not in members:
            path.unlink()
    _write_marker(marker, {"digest": digest, "done": True, "broken": broken})
    return broken


def _unpacked(path: Path, info: zipfile.ZipInfo, *, trusted: bool) -> bool:
    """Whether `path` holds the member. Where the folder is not known to be of this archive its content is compared."""
    if not path.is_file() or path.stat().st_size != info.file_size:
        return False
    return trusted or zlib.crc32(path.read_bytes()) == info.CRC


def _check_space(needed: int, archive: Path, folder: Path) -> None:
    free = shutil.disk_usage(folder.parent).free
    if needed > free:
        raise DataError(f"{archive} needs {needed} bytes unpacked, {folder.parent} has {free} left. Make room there")


def _write_marker(path: Path, facts: dict[str, object]) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(facts))
    part.replace(path)
