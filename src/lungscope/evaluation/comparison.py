"""Two networks on the same films."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lungscope.evaluation.bootstrap import Interval, bootstrap_mean

#: By film: what was found, as a number, and the film's group.
Scored = Mapping[str, tuple[float, str]]


def paired(one: Scored, other: Scored) -> Interval:
    """Mean of one's values less the other's, over the films that both have, with its interval over groups. Raises
    ValueError where that is none."""
    both = [film for film in one if film in other]
    return bootstrap_mean([one[film][0] - other[film][0] for film in both], [one[film][1] for film in both])


def signed(difference: float, interval: Sequence[float | None]) -> str:
    """A difference and its interval: `+0.0100 [-0.0050, +0.0250]`."""
    low, high = ("undefined" if end is None or math.isnan(end) else f"{end:+.4f}" for end in interval)
    return f"{difference:+.4f} [{low}, {high}]"


def mixed_sources(films: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """The sources that have films of several classes, and which, from each film's source and class."""
    classes: dict[str, set[str]] = {}
    for source, label in films:
        classes.setdefault(source, set()).add(label)
    return {name: sorted(labels) for name, labels in sorted(classes.items()) if name and len(labels) > 1}


def accuracy_less(control: Mapping[str, Any], bundle: Mapping[str, Any]) -> dict[str, Any]:
    """Accuracy of one result of `scoring.score_classifier` less another's, over the films that both answered, with a
    95 % interval over groups (null where it is undefined); the same within each source of several classes. None where
    there is no such film."""

    def within(source: str | None) -> dict[str, Any] | None:
        one, other = (
            {
                film["id"]: (float(film["label"] == film["predicted"]), film["group"])
                for film in result["per_film"]
                if source in (None, film["source"])
            }
            for result in (control, bundle)
        )
        if not one.keys() & other.keys():
            return None
        found = paired(one, other)
        return {"films": found.films, "difference": found.value, "interval": list(found.ends)}

    names = mixed_sources((film["source"], film["label"]) for film in bundle["per_film"])
    return {"all": within(None), "sources": {name: within(name) for name in names}}


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided p of McNemar's exact test, from the films that only one of two networks got right; 1 where there is
    none.

    Under the null hypothesis each such film goes to either with chance 1/2 (McNemar 1947; Dietterich 1998, section
    3.1). Raises ValueError for a negative number.
    """
    if min(only_first, only_second) < 0:
        raise ValueError(f"numbers of films must not be negative; got {only_first} and {only_second}")
    n, fewer = only_first + only_second, min(only_first, only_second)
    # In logarithms: the coefficients of some thousand films are beyond what a float holds.
    tail = math.fsum(math.exp(_log_binomial(n, k) - n * math.log(2)) for k in range(fewer + 1))
    return min(1.0, 2 * tail)


def _log_binomial(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
