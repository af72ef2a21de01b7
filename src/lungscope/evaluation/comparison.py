"""Two networks on the same films."""

from __future__ import annotations

import math


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
