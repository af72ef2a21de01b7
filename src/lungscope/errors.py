"""Every error that lungscope raises on purpose, in one tree.

An error says what came, what is allowed, and what to do next. The library never prints and never exits:
`EXIT_STATUS` and `HTTP_STATUS` are the only places where an error becomes a number.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class LungscopeError(Exception):
    """Base of all errors raised on purpose.

    `code` is stable and machine-readable; it is what `results.jsonl` and the web API carry.
    """

    code = "error"

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        if code is not None:
            self.code = code


class InputError(LungscopeError):
    """The film cannot be used: missing, broken, of a kind that is not supported, or not a radiograph."""

    code = "input"


class UnreadableFileError(InputError):
    """The bytes are not a whole image of a format that is read here."""

    code = "unreadable"


class UnsupportedImageError(InputError):
    """A whole image, but not one that this software is for (colour photograph, CT slice, multi-frame, …)."""

    code = "unsupported"


class QualityError(InputError):
    """An image of the right kind with nothing usable in it (blank, too small, no lungs found)."""

    code = "quality"


class DataError(LungscopeError):
    """A data set, a store or a split breaks a rule that training and evaluation rely on."""

    code = "data"


class BundleError(LungscopeError):
    """A weights bundle is missing, incomplete, altered, or of another schema."""

    code = "bundle"


class RecipeError(LungscopeError):
    """A training recipe asks for something that does not exist or contradicts itself."""

    code = "recipe"


class MissingExtraError(LungscopeError):
    """A command needs an optional dependency that is not installed."""

    code = "missing-extra"

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} needs an optional part of lungscope. Install it: pip install 'lungscope[{extra}]'")


@contextmanager
def needs(what: str, extra: str) -> Iterator[None]:
    """Imports that the optional part `extra` brings: one that is missing becomes MissingExtraError about `what`. A
    missing module of lungscope itself is a fault of ours, and stays one."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "lungscope":
            raise
        raise MissingExtraError(what, extra) from error


class UsageError(LungscopeError):
    """Options that do not go together, or a path that cannot be written."""

    code = "usage"


class ClusterError(LungscopeError):
    """A Ray cluster can not be reached, or can not go on with a run."""

    code = "cluster"


class WorkerLostError(LungscopeError):
    """The process that analysed a film ended, each time it was tried."""

    code = "worker-lost"


class DeliveryError(LungscopeError):
    """A destination of results could not be reached, or can not take them now: worth another try later."""

    code = "delivery"


class RefusedError(DeliveryError):
    """A destination answered that it will not take this object."""

    code = "refused"


class RequestError(UsageError):
    """A request to the web API that is refused before a film is looked at."""

    code = "request"


class ForbiddenError(RequestError):
    """A request that another site's page made the browser send."""

    code = "forbidden"


class NotFoundError(RequestError):
    """An address that there is not, or an analysis that is not kept any longer."""

    code = "not-found"


class SlowUploadError(RequestError):
    """An upload that did not arrive in the time allowed."""

    code = "slow-upload"


class NotReadyError(RequestError):
    """A part of an analysis that is still running."""

    code = "not-ready"


class TooLargeError(RequestError):
    """An upload with more bytes than are taken."""

    code = "too-large"


class MediaTypeError(RequestError):
    """A body, or an uploaded file, that says it is of another kind than is taken."""

    code = "media-type"


class MisdirectedError(RequestError):
    """A request for a host name that this server does not answer to."""

    code = "misdirected"


class BusyError(RequestError):
    """More requests than are taken at once or in a minute. retry_after: seconds to wait before the next."""

    code = "busy"

    def __init__(self, message: str, *, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


#: Exit status of the command line for each kind of error. 0: all done; 1: some inputs failed.
EXIT_STATUS: dict[type[LungscopeError], int] = {
    InputError: 1,
    DataError: 3,
    UsageError: 2,
    RecipeError: 2,
    MissingExtraError: 3,
    BundleError: 3,
    LungscopeError: 3,
}

#: HTTP status for each kind of error.
HTTP_STATUS: dict[type[LungscopeError], int] = {
    InputError: 422,
    UsageError: 400,
    ForbiddenError: 403,
    NotFoundError: 404,
    SlowUploadError: 408,
    NotReadyError: 409,
    TooLargeError: 413,
    MediaTypeError: 415,
    MisdirectedError: 421,
    BusyError: 429,
    MissingExtraError: 501,
    BundleError: 503,
    LungscopeError: 500,
}


def status_of(error: LungscopeError, table: dict[type[LungscopeError], int]) -> int:
    """Look `error` up in `table` by its nearest ancestor."""
    for kind in type(error).__mro__:
        if kind in table:
            return table[kind]
    raise KeyError(type(error))


def look_up(name: str, allowed: Iterable[str], *, what: str, error: type[LungscopeError] = UsageError) -> str:
    """Return `name` if it is one of `allowed`; else raise `error` naming what came, what is allowed, and the
    nearest."""
    options = list(allowed)
    if name in options:
        return name
    near = difflib.get_close_matches(name, options, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise error(f"{what} {name!r} does not exist. Allowed: {', '.join(options)}.{hint}")


def printable(text: str) -> str:
    """`text` without what a terminal would obey: characters that are not printable become "\\x1b" and the like."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
