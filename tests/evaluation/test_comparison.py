"""Two networks on the same films: McNemar's exact test against scipy's, and differences worked out by hand."""

from __future__ import annotations

import pytest
from scipy.stats import binomtest

from lungscope.evaluation.comparison import accuracy_less, mcnemar, mixed_sources, paired, signed


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


def test_a_difference_is_of_the_films_that_both_have() -> None:
    one = {"a": (1.0, "g"), "b": (0.0, "g"), "c": (1.0, "h"), "only": (1.0, "i")}
    found = paired(one, {"c": (0.0, "h"), "b": (0.0, "g"), "a": (0.0, "g"), "other": (1.0, "j")})
    assert (found.value, found.films, found.groups) == (pytest.approx(2 / 3), 3, 2)
    assert (found.low, found.high) == (0.5, 1), "group g alone, and group h alone"
    assert signed(found.value, (-0.1, found.high)) == "+0.6667 [-0.1000, +1.0000]"
    with pytest.raises(ValueError, match="at least one film"):
        paired({}, one)


def test_mixed_sources_have_several_classes_and_a_name() -> None:
    films = [("A", "x"), ("A", "y"), ("A", "y"), ("B", "x"), ("", "x"), ("", "y")]
    assert mixed_sources(films) == {"A": ["x", "y"]}


def result(predicted: str, *, without: str = "") -> dict[str, object]:
    """Six films, the first four of one source with both classes, and what was predicted of each."""
    films = zip("abcdef", "xyxyxx", predicted, "AAAABB", strict=True)
    return {
        "per_film": [
            {"id": id_, "group": id_, "label": label, "predicted": found, "source": source}
            for id_, label, found, source in films
            if id_ not in without
        ]
    }


def test_accuracy_is_compared_on_what_both_answered_and_within_mixed_sources() -> None:
    found = accuracy_less(result("xyyyxx"), result("xxxxyx", without="f"))
    # a: both right; b, d, e: the control alone; c: the bundle alone.
    assert (found["all"]["films"], found["all"]["difference"]) == (5, pytest.approx((3 - 1) / 5))
    low, high = found["all"]["interval"]
    assert low < 0.4 < high
    assert list(found["sources"]) == ["A"]
    assert (found["sources"]["A"]["films"], found["sources"]["A"]["difference"]) == (4, pytest.approx(1 / 4))
    assert accuracy_less(result("xyyyxx", without="abcdef"), result("xxxxyx")) == {"all": None, "sources": {"A": None}}


def test_a_difference_without_an_interval_is_said_so() -> None:
    assert signed(0.0, (float("nan"), float("nan"))) == signed(0.0, (None, None)) == "+0.0000 [undefined, undefined]"
    assert signed(0.01, (-0.005, 0.025)) == "+0.0100 [-0.0050, +0.0250]"
