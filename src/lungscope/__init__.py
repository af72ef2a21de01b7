"""lungscope: a chest X-ray goes in; lungs, a calibrated class, its evidence and a severity per lung zone come out.

    from lungscope import Analyzer
    report = Analyzer().analyze("film.dcm")
    print(report.classification.label, report.classification.probabilities)
    print(report.lungs.mask.shape, report.severity.extent_percent)
    report.to_json()  # the same facts, as a JSON-ready dict

Research software, not a medical device. Not for diagnosis.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lungscope.pipeline import Analyzer
    from lungscope.readers import read
    from lungscope.report import Report

__version__ = "0.1.0"
__all__ = ["Analyzer", "Report", "__version__", "read"]

_HOME = {"Analyzer": "lungscope.pipeline", "Report": "lungscope.report", "read": "lungscope.readers"}


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `import lungscope` itself loads nothing heavy."""
    if name not in _HOME:
        raise AttributeError(f"module 'lungscope' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
