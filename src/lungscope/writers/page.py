"""What the HTML pages share: each is one file, closed to the network, with no script and no style but its own."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable
from functools import cache
from html import escape
from importlib.resources import files


@cache
def asset(*names: str) -> str:
    """The text of files in writers/assets, one after the other."""
    folder = files(__package__) / "assets"
    return "".join((folder / name).read_text(encoding="utf-8") for name in names)


def opening(title: str, style: str, script: str = "") -> str:
    """A page from its first byte to `<main>`. `style` and `script` are trusted text; nothing else may run or load."""
    policy = (
        f"default-src 'none'; img-src data:; style-src {_digest(style)}; script-src {_digest(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<title>{escape(title)} · lungscope</title><style>{style}</style></head>\n<body><main>\n"
    )


def closing(script: str = "") -> str:
    """A page from `</main>` to its last byte."""
    return "</main>\n" + (f"<script>{script}</script>" if script else "") + "</body></html>\n"


def facts(rows: Iterable[tuple[str, str]]) -> str:
    """A table of a name and its value, a row each. Names are escaped here; values are markup."""

    def breakable(name: str) -> str:
        """DICOM keywords are long and have no spaces."""
        return re.sub("(?<=[a-z])(?=[A-Z])", "<wbr>", escape(name))

    body = "".join(f'<tr><th scope="row">{breakable(name)}</th><td>{value}</td></tr>' for name, value in rows)
    return f'<table class="facts">{body}</table>'


def bar(share: float, mark: float | None = None) -> str:
    """A bar of `share` 0..1, with a line across it at `mark` 0..1. Its number stands beside it as text."""
    line = "" if mark is None else f'<line x1="{100 * mark:.2f}%" x2="{100 * mark:.2f}%" y1="0" y2="100%"/>'
    return f'<svg class="bar" aria-hidden="true"><rect width="{100 * share:.2f}%" height="100%"/>{line}</svg>'


def _digest(text: str) -> str:
    """A Content-Security-Policy hash source (CSP Level 3, section 2.3.1) for an inline element with this text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}'"
