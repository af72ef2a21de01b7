"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path

from lungscope.errors import UsageError


def local(name: str) -> Path:
    """The path of what is written. Raises UsageError for a URL, which as a path would be a folder here that is called
    so."""
    if "://" in str(name):  # a default comes as the path that it is
        raise UsageError(
            f"{name} is a URL, and what is written goes to this machine. Name a path here, and copy it from there."
        )
    return Path(name)
