"""Films behind URLs: listed as folders are, brought as they are, and what is wrong said."""

from __future__ import annotations

import zipfile
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from films import draw, save
from lungscope.errors import LungscopeError, UnreadableFileError, UnsupportedImageError, UsageError
from lungscope.readers import find, remote

fsspec = pytest.importorskip("fsspec", reason="the extra 'cluster' (fsspec) is not installed")


def messy(folder: Path) -> Path:
    """Folders and files whose names sort one way as texts and another way as paths, hidden ones, and no films."""
    for name in ("b/2.png", "b/10.png", "b.png", "b-1/x", "B/z.png", ".hidden/x.png", "a/.x", "a/deep/er/1", "é/ü.png"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    (folder / "a" / "DICOMDIR").touch()
    (folder / "empty").mkdir()
    return folder


def test_a_folder_has_the_films_and_the_order_of_a_local_one(tmp_path: Path) -> None:
    folder = messy(tmp_path / "in")
    expected = [f"file://{path}" for path in find([folder])]
    assert len(expected) == 7
    assert remote.find([f"file://{folder}"]) == remote.find([f"file://{folder}/", f"file://{folder}/b"]) == expected


def test_other_protocols(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe({"/films/b/1.png": b"one", "/films/a.png": b"two", "/films/.c": b"no"})
    assert remote.find(["memory://films"]) == ["memory:///films/a.png", "memory:///films/b/1.png"]
    assert remote.fetch("memory:///films/b/1.png") == b"one"
    with zipfile.ZipFile(tmp_path / "films.zip", "w") as archive:
        archive.writestr("x/1.png", b"in it")
    (film,) = remote.find([f"zip://x::file://{tmp_path}/films.zip"])
    assert film == f"zip://x/1.png::file://{tmp_path}/films.zip"
    assert remote.fetch(film) == b"in it"


def test_what_is_not_there_stays_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    save(tmp_path / ".film.png", draw())
    urls = [f"file://{tmp_path}/{name}" for name in ("missing.png", "empty", ".film.png")]
    assert remote.find(urls) == urls
    with pytest.raises(UnreadableFileError, match=r"missing.png: does not exist"):
        remote.fetch(urls[0])
    with pytest.raises(UnreadableFileError, match=r"empty: cannot be read: .*directory"):
        remote.fetch(urls[1])
    assert remote.fetch(urls[2]) == (tmp_path / ".film.png").read_bytes()


def test_what_is_too_large_is_not_brought(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    film = save(tmp_path / "film.png", draw())
    monkeypatch.setattr(remote, "MAX_BYTES", 10)
    with pytest.raises(UnsupportedImageError, match="at most 10 are read"):
        remote.fetch(f"file://{film}")


def test_a_server_that_states_no_length_is_read_up_to_the_largest_film(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("aiohttp", reason="fsspec's http needs aiohttp")
    film = bytes(range(256)) * 1000

    class Server(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(200)
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            with suppress(ConnectionError):
                for start in range(0, len(film), 1000):
                    self.wfile.write(film[start : start + 1000])

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/film.dcm"
        monkeypatch.setattr(remote, "MAX_BYTES", len(film))
        assert remote.fetch(url) == film
        monkeypatch.setattr(remote, "MAX_BYTES", 10)
        with pytest.raises(UnsupportedImageError, match="has at least 11 bytes; at most 10 are read"):
            remote.fetch(url)
        server.shutdown()


def test_protocols_that_can_not_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="nowhere://a: Protocol not known"):
        remote.find(["nowhere://a"])
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
    with pytest.raises(LungscopeError, match=r"s3://a: .*Install s3fs .*every machine") as caught:
        remote.find(["s3://a"])
    assert caught.value.code == "missing-extra"


def test_a_listing_that_fails_is_no_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = fsspec.filesystem("file")
    whole = files.ls

    def refuse(path: str, *arguments: object, **options: object) -> object:
        if path.endswith("/b"):
            raise PermissionError("no credentials")
        return whole(path, *arguments, **options)

    monkeypatch.setattr(files, "ls", refuse)
    with pytest.raises(UsageError, match=r"file://.*/in: can not be listed: no credentials. Check"):
        remote.find([f"file://{messy(tmp_path / 'in')}"])


@pytest.mark.parametrize(
    ("text", "url"),
    [("s3://a/b", True), ("zip://x::file://y", True), ("C:/films", False), ("c://films", False), ("a/b://c", False)],
)
def test_urls_and_paths(text: str, url: bool) -> None:
    assert remote.is_url(text) is url
