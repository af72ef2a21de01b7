"""Films behind URLs: whatever fsspec reaches, s3://, gs://, az://, https://, file://, …"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from lungscope.errors import LungscopeError, UnreadableFileError, UnsupportedImageError, UsageError, needs
from lungscope.readers.common import MAX_BYTES, NO_FILM

#: A protocol has two letters at least: one is a drive of Windows.
_URL = re.compile(r"[a-z][a-z0-9+.-]+(://|::)", re.IGNORECASE)


def is_url(text: str) -> bool:
    """Whether an input is a URL and no path."""
    return _URL.match(text) is not None


def find(urls: Iterable[str]) -> list[str]:
    """Expand URLs of folders into those of the files in them, each once, as `readers.find` does: all of them, in the
    order of their names, without what is hidden.

    A URL that nothing lies behind stays in the list, so that `fetch` says so. Raises UsageError for one that can not be
    listed, and what `fetch` raises for a protocol.
    """
    found: dict[str, None] = {}
    for url in urls:
        files, path = _reach(url)
        try:
            names = [] if files.isfile(path) else _below(files, path)
        except FileNotFoundError:
            names = []
        except Exception as error:  # each protocol's library has its own
            raise UsageError(f"{url}: can not be listed: {_reason(error)}. Check it and its credentials.") from error
        # A chain (zip://::s3://…) goes on behind the first "::".
        rest = "".join(url.partition("::")[1:])
        found |= dict.fromkeys(files.unstrip_protocol(name) + rest for name in names) or {url: None}
    return list(found)


def fetch(url: str) -> bytes:
    """The bytes of one film. Raises UnreadableFileError where they can not be had, UnsupportedImageError where there
    are too many, UsageError for a protocol that does not exist, LungscopeError for one whose package is not
    installed."""
    files, path = _reach(url)
    try:
        size = files.size(path)
        if not size:  # not stated
            with files.open(path, "rb") as file:
                data = _begin(file, MAX_BYTES + 1)
            size = len(data)
        else:
            data = b"" if size > MAX_BYTES else files.cat_file(path)
    except FileNotFoundError as error:
        raise UnreadableFileError(f"{url}: does not exist. Check the address.") from error
    except Exception as error:
        raise UnreadableFileError(f"{url}: cannot be read: {_reason(error)}. Check it and its credentials.") from error
    if size > MAX_BYTES:
        least = "at least " if data else ""
        raise UnsupportedImageError(
            f"{url}: has {least}{size:,} bytes; at most {MAX_BYTES:,} are read. Give a single film."
        )
    return bytes(data)


def _begin(file: Any, most: int) -> bytes:
    """The first `most` bytes of a file, which may bring fewer at once than it is asked for."""
    data = bytearray()
    while len(data) < most and (part := file.read(most - len(data))):
        data += part
    return bytes(data)


def _reach(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it."""
    with needs(f"{url}: a URL", "cluster"):
        import fsspec.core
    try:
        files, path = fsspec.core.url_to_fs(url)
    except ImportError as error:  # fsspec names the package
        raise LungscopeError(
            f"{url}: its protocol needs another package. {error} (pip install), on every machine of the cluster.",
            code="missing-extra",
        ) from error
    except ValueError as error:
        raise UsageError(f"{url}: {error}. Allowed are the protocols of fsspec: s3://, gs://, az://, …") from error
    return files, str(path)


def _below(files: Any, path: str) -> list[str]:
    """The files in a folder and those in it, in order."""
    # An object store lists all of them at once; elsewhere fsspec would pass over a folder that can not be listed.
    names = files.find(path) if files.async_impl else list(_walk(files, path))
    parts = {name: name[len(path.rstrip("/")) :].strip("/").split("/") for name in names}
    films = [name for name in names if not name.endswith("/") and all(map(_counts, parts[name]))]
    return sorted(films, key=parts.__getitem__)


def _walk(files: Any, folder: str) -> Iterator[str]:
    for entry in files.ls(folder, detail=True):
        if entry["type"] == "directory":
            yield from _walk(files, entry["name"])
        else:
            yield entry["name"]


def _counts(name: str) -> bool:
    return not name.startswith(".") and name.lower() not in NO_FILM


def _reason(error: Exception) -> str:
    return str(error).strip().rstrip(".") or type(error).__name__
