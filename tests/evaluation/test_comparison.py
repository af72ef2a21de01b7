"""McNemar's exact test against scipy's binomial test."""

from __future__ import annotations

import pytest
from scipy.stats import binomtest

from lungscope.evaluation.comparison import mcnemar


@pytest.mark.parametrize(("first", "second"), [(0, 1), (3, 9), (10, 10), (0, 30), (41, 12), (1800, 2000)])
def test_it_is_the_two_sided_binomial_test(first: int, second: int) -> None:
    expected = binomtest(first, first + second, 0.5).pvalue
    assert mcnemar(first, second) == pytest.approx(expected, rel=1e-9)
    assert mcnemar(second, first) == mcnemar(first, second)


def test_without_a_film_that_tells_them_apart_p_is_one() -> None:
    assert mcnemar(0, 0) == 1


def test_a_negative_number_is_refused() -> None:
    with pytest.raises(ValueError, match="must not be negative"):
        mcnemar(-1, 3)
