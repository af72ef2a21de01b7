"""Scores against numbers worked out by hand, slow references, and other people's implementations."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lungscope.evaluation import metrics

P = np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]], bool)
T = np.array([[0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]], bool)
EMPTY = np.zeros_like(P)

pairs_of_masks = st.tuples(st.integers(2, 12), st.integers(2, 12)).flatmap(
    lambda shape: st.tuples(arrays(bool, shape), arrays(bool, shape))
)


def random_masks(n: int, side: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two stacks of blobs that overlap in part."""
    rng = np.random.default_rng(seed)
    grid = np.mgrid[:side, :side]
    stacks = []
    for _ in range(2):
        centre = rng.uniform(side * 0.3, side * 0.7, (n, 2, 1, 1))
        radius = rng.uniform(side * 0.1, side * 0.4, (n, 1, 1))
        stacks.append(np.sqrt(((grid[None] - centre) ** 2).sum(axis=1)) + rng.normal(0, 0.7, (n, side, side)) < radius)
    return stacks[0], stacks[1]


def slow_hd95(p: np.ndarray, t: np.ndarray) -> float:
    """Every distance between every two surface pixels."""

    def surface(mask: np.ndarray) -> list[tuple[int, int]]:
        height, width = mask.shape
        out = []
        for r, c in zip(*np.nonzero(mask), strict=True):
            around = [(r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1)]
            if any(not (0 <= y < height and 0 <= x < width) or not mask[y, x] for y, x in around):
                out.append((int(r), int(c)))
        return out

    a, b = surface(p), surface(t)
    if not a or not b:
        return math.nan
    directed = []
    for here, there in ((a, b), (b, a)):
        nearest = [min(math.hypot(r - y, c - x) for y, x in there) for r, c in here]
        directed.append(float(np.percentile(nearest, 95)))
    return max(directed)


def test_masks_by_hand() -> None:
    scores = {name: value.item() for name, value in metrics.score_masks(P, T).items()}
    assert scores == pytest.approx(
        {"dice": 0.5, "iou": 1 / 3, "binary_accuracy": 8 / 12, "hd95": 1.0, "coverage": 0.5, "precision": 0.5}
    )


def test_a_stack_gives_one_value_a_film() -> None:
    scores = metrics.dice(np.stack([P, T, EMPTY]), np.stack([T, T, EMPTY]))
    assert scores[:2].tolist() == [0.5, 1.0]
    assert math.isnan(scores[2])


def test_empty_masks_follow_monais_ignore_empty() -> None:
    predicted, truth = np.stack([EMPTY, P, EMPTY]), np.stack([EMPTY, EMPTY, T])
    for score in (metrics.dice, metrics.iou):
        assert np.isnan(score(predicted, truth)).tolist() == [True, True, False]
        assert score(predicted, truth)[2] == 0
        assert score(predicted, truth, ignore_empty=False).tolist() == [1, 0, 0]
    assert np.isnan(metrics.hd95(predicted, truth)).all()
    assert np.isnan(metrics.coverage(predicted, truth)).tolist() == [True, True, False]
    assert np.isnan(metrics.precision(predicted, truth)).tolist() == [True, False, True]
    assert metrics.binary_accuracy(predicted, truth).tolist() == pytest.approx([1, 8 / 12, 8 / 12])


def test_what_is_not_a_pair_of_masks_is_refused() -> None:
    with pytest.raises(ValueError, match="one grid"):
        metrics.dice(P, T[:2])
    with pytest.raises(ValueError, match="Threshold"):
        metrics.dice(P.astype(np.float32), T)
    with pytest.raises(ValueError, match="Threshold"):
        metrics.hd95(P.astype(np.uint8), T)
    with pytest.raises(ValueError):
        metrics.hd95(np.stack([P, P]), np.stack([T, T, T]))


@given(pairs_of_masks)
@settings(max_examples=150, deadline=None)
def test_properties_of_mask_scores(pair: tuple[np.ndarray, np.ndarray]) -> None:
    p, t = pair
    scores = metrics.score_masks(p, t)
    for name, value in scores.items():
        if name != "hd95":
            assert math.isnan(value[0]) or 0 <= value[0] <= 1
    np.testing.assert_allclose(scores["iou"], scores["dice"] / (2 - scores["dice"]))
    assert not scores["iou"] > scores["dice"]
    if p.any() and t.any():
        for name in ("dice", "iou", "hd95", "binary_accuracy"):
            score = getattr(metrics, name)
            assert score(p, t) == pytest.approx(score(t, p))
            assert score(p, t) == pytest.approx(score(p[::-1, ::-1].copy(), t[::-1, ::-1].copy()))
            assert score(p, t) == pytest.approx(score(p.T.copy(), t.T.copy()))
        assert scores["hd95"][0] <= math.hypot(*p.shape)
    if t.any():
        assert metrics.dice(t, t) == metrics.iou(t, t) == metrics.coverage(t, t) == 1
        assert metrics.hd95(t, t) == 0


@given(pairs_of_masks)
@settings(max_examples=100, deadline=None)
def test_hausdorff_equals_brute_force(pair: tuple[np.ndarray, np.ndarray]) -> None:
    np.testing.assert_allclose(metrics.hd95(*pair), slow_hd95(*pair), rtol=1e-6)


def test_hausdorff_of_a_shift_and_in_millimetres() -> None:
    p, t = np.zeros((2, 40, 40), bool)
    p[5:15, 5:15] = True
    t[5:15, 12:22] = True
    assert metrics.hd95(p, t) == 7
    assert metrics.hd95(p, t, spacing=0.2) == pytest.approx(1.4)


def test_masks_against_monai() -> None:
    monai = pytest.importorskip("monai.metrics")
    torch = pytest.importorskip("torch")
    p, t = random_masks(12, 48)
    t[3], p[4] = False, False
    a, b = (torch.tensor(m[:, None].astype(np.float32)) for m in (p, t))
    for ignore in (True, False):
        want = monai.DiceMetric(ignore_empty=ignore, reduction="none")(a, b).numpy()[:, 0]
        np.testing.assert_allclose(metrics.dice(p, t, ignore_empty=ignore), want, rtol=1e-6)
    want = monai.MeanIoU(reduction="none")(a, b).numpy()[:, 0]
    np.testing.assert_allclose(metrics.iou(p, t), want, rtol=1e-6)
    full = [i for i in range(12) if i not in (3, 4)]
    want = monai.compute_hausdorff_distance(a[full], b[full], include_background=True, percentile=95).numpy()[:, 0]
    np.testing.assert_allclose(metrics.hd95(p[full], t[full]), want, rtol=1e-5)


# Classification -------------------------------------------------------------------------------------------------------

#: Rows: true class. 10 films.
CONFUSION = np.array([[3, 1, 0], [0, 2, 1], [0, 0, 3]])


def random_films(n: int = 400, classes: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, classes)) * 1.5
    truth = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
    odds = np.exp(logits)
    return truth, odds / odds.sum(axis=1, keepdims=True)


def test_confusion_by_hand() -> None:
    truth = [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]
    predicted = [0, 0, 0, 1, 1, 1, 2, 2, 2, 2]
    assert metrics.confusion_matrix(truth, predicted, 3).tolist() == CONFUSION.tolist()
    rates = metrics.per_class(CONFUSION)
    assert rates.sensitivity == pytest.approx([3 / 4, 2 / 3, 1])
    assert rates.specificity == pytest.approx([1, 6 / 7, 6 / 7])
    assert rates.precision == pytest.approx([1, 2 / 3, 3 / 4])
    assert rates.f1 == pytest.approx([6 / 7, 2 / 3, 6 / 7])
    assert metrics.accuracy(CONFUSION) == pytest.approx(0.8)
    assert metrics.balanced_accuracy(CONFUSION) == pytest.approx((3 / 4 + 2 / 3 + 1) / 3)
    assert metrics.macro_f1(CONFUSION) == pytest.approx((6 / 7 + 2 / 3 + 6 / 7) / 3)


def test_confusion_scores_work_on_stacks_and_leave_undefined_classes_out() -> None:
    absent = np.array([[5, 0, 0], [0, 5, 0], [0, 0, 0]])
    assert metrics.macro_f1(np.stack([CONFUSION, absent])).tolist() == pytest.approx([50 / 63, 1])
    rates = metrics.per_class(absent)
    assert np.isnan(rates.sensitivity).tolist() == np.isnan(rates.f1).tolist() == [False, False, True]
    assert rates.specificity[2] == 1
    assert math.isnan(metrics.accuracy(np.zeros((3, 3), int)))


def test_auc_by_hand() -> None:
    assert metrics.auc([0.1, 0.4, 0.35, 0.8], [False, False, True, True]) == 0.75
    assert metrics.auc([1, 1, 1, 1], [False, False, True, True]) == 0.5
    assert metrics.auc([1, 2, 2, 3], [False, True, False, True]) == pytest.approx(3.5 / 4)
    assert math.isnan(metrics.auc([1, 2], [True, True]))
    assert math.isnan(metrics.auc([1, math.nan], [True, False]))


@given(arrays(np.int8, st.integers(2, 30)), st.data())
@settings(deadline=None)
def test_auc_equals_counting_pairs(score: np.ndarray, data: st.DataObject) -> None:
    positive = data.draw(arrays(bool, score.size))
    wins = [float(a > b) + 0.5 * float(a == b) for a in score[positive] for b in score[~positive]]
    got = metrics.auc(score, positive)
    assert math.isnan(got) if not wins else got == pytest.approx(np.mean(wins))
    if wins:
        assert metrics.auc(np.exp(score / 64.0), positive) == pytest.approx(got)
        assert metrics.auc(-score.astype(int), positive) == pytest.approx(1 - got)


def test_probability_scores_by_hand() -> None:
    probabilities = [[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6], [0.0, 0.0, 1.0]]
    truth = [0, 1, 0, 2]
    assert metrics.log_loss(truth, probabilities) == pytest.approx(-np.log([0.5, 0.8, 0.2, 1.0]).mean())
    squares = [0.25 + 0.125, 0.01 + 0.04 + 0.01, 0.64 + 0.04 + 0.36, 0]
    assert metrics.brier(truth, probabilities) == pytest.approx(np.mean(squares))
    assert metrics.ece(truth, probabilities) == pytest.approx((0.5 + 0.2 + 0.6 + 0) / 4)
    table = metrics.reliability(truth, probabilities)
    assert len(table) == metrics.ECE_BINS
    assert table[-1].films == 1
    assert table[-1].accuracy == 1
    assert sum(row.films for row in table) == 4
    assert math.isnan(table[0].confidence)


def test_a_certain_mistake_costs_a_finite_log_loss() -> None:
    assert metrics.log_loss([0], [[0.0, 1.0]]) == pytest.approx(-math.log(np.finfo(float).eps))


def test_bins_are_closed_above() -> None:
    table = metrics.reliability([0, 0], [[0.5, 0.5], [0.75, 0.25]], bins=4)
    assert [row.films for row in table] == [0, 1, 1, 0]


def test_chance_alone_gives_an_ece() -> None:
    """In one bin of n films of p = 0.8 it is |hits - 0.8 n| / n, of which normal distributions know the quantiles."""
    probabilities = np.tile([0.8, 0.2], (2000, 1))
    median, high = metrics.ece_by_chance(probabilities)
    spread = math.sqrt(0.8 * 0.2 / 2000)
    assert median == pytest.approx(0.6745 * spread, rel=0.1) and high == pytest.approx(1.96 * spread, rel=0.1)
    assert metrics.ece_by_chance(probabilities) == (median, high)
    assert metrics.ece_by_chance(np.tile([1.0, 0.0], (5, 1))) == (0, 0)
    assert all(math.isnan(value) for value in metrics.ece_by_chance(np.zeros((0, 2))))


def test_ece_sees_overconfidence() -> None:
    truth, p = random_films(4000)
    sharper = p**3 / (p**3).sum(axis=1, keepdims=True)
    assert metrics.ece(truth, p) < 0.03
    assert metrics.ece(truth, sharper) > 0.1


def test_no_films_is_undefined_not_zero() -> None:
    none = np.zeros((0, 3))
    scores = metrics.score_classification(np.zeros(0, int), none, ("a", "b", "c"))
    assert math.isnan(scores.log_loss) and math.isnan(scores.ece) and math.isnan(scores.brier)
    assert math.isnan(scores.accuracy) and math.isnan(scores.macro_auc)
    assert scores.to_json()["accuracy"] is None


@pytest.mark.parametrize(
    ("truth", "probabilities", "match"),
    [
        ([0], [[2.0, -1.0]], "softmax"),
        ([0], [[0.2, 0.2]], "softmax"),
        ([2], [[0.5, 0.5]], r"0\.\.1"),
        ([0, 1], [[0.5, 0.5]], "2 true classes"),
        ([0.5], [[0.5, 0.5]], "whole numbers"),
        ([0], [0.5], r"\[N, K\]"),
    ],
)
def test_wrong_inputs_are_refused(truth: list[float], probabilities: list[object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        metrics.log_loss(truth, probabilities)


def test_labels_must_fit() -> None:
    with pytest.raises(ValueError, match="2 probabilities a film but 1 labels"):
        metrics.score_classification([0], [[0.5, 0.5]], ("a",))


def test_classification_against_scikit_learn() -> None:
    sk = pytest.importorskip("sklearn.metrics")
    truth, p = random_films()
    called = p.argmax(axis=1)
    scores = metrics.score_classification(truth, p, ("a", "b", "c", "d"))
    assert scores.confusion.tolist() == sk.confusion_matrix(truth, called).tolist()
    assert scores.accuracy == pytest.approx(sk.accuracy_score(truth, called))
    assert scores.balanced_accuracy == pytest.approx(sk.balanced_accuracy_score(truth, called))
    precision, recall, f1, _ = sk.precision_recall_fscore_support(truth, called)
    assert scores.rates.precision == pytest.approx(precision)
    assert scores.rates.sensitivity == pytest.approx(recall)
    assert scores.rates.f1 == pytest.approx(f1)
    assert scores.macro_f1 == pytest.approx(sk.f1_score(truth, called, average="macro"))
    assert scores.macro_auc == pytest.approx(sk.roc_auc_score(truth, p, multi_class="ovr", average="macro"))
    assert scores.log_loss == pytest.approx(sk.log_loss(truth, p))
    coarse = np.round(p[:, 0], 1)
    assert metrics.auc(coarse, truth == 0) == pytest.approx(sk.roc_auc_score(truth == 0, coarse))


def test_ece_and_specificity_against_torchmetrics() -> None:
    tm = pytest.importorskip("torchmetrics.functional.classification")
    torch = pytest.importorskip("torch")
    truth, p = random_films()
    a, b = torch.tensor(p), torch.tensor(truth)
    assert metrics.ece(truth, p) == pytest.approx(float(tm.multiclass_calibration_error(a, b, 4, n_bins=15)), abs=1e-6)
    rates = metrics.per_class(metrics.confusion_matrix(truth, p.argmax(axis=1), 4))
    want = tm.multiclass_specificity(a, b, 4, average="none").numpy()
    np.testing.assert_allclose(rates.specificity, want, rtol=1e-6)


def test_scores_become_json() -> None:
    truth, p = random_films(50, 3)
    out = metrics.score_classification(np.minimum(truth, 1), p, ("a", "b", "c")).to_json()
    assert out["films"] == 50
    assert out["classes"]["c"]["sensitivity"] is None
    assert out["classes"]["c"]["films"] == 0
    assert out["classes"]["a"]["auc"] > 0.5


# Shared ---------------------------------------------------------------------------------------------------------------


def test_spearman_by_hand_and_undefined() -> None:
    assert metrics.spearman([1, 2, 3], [10, 100, 1000]) == pytest.approx(1)
    assert metrics.spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert metrics.spearman([1, 2, math.nan, 3], [1, 2, 9, 3]) == pytest.approx(1)
    assert math.isnan(metrics.spearman([1, 1, 1], [1, 2, 3]))
    assert math.isnan(metrics.spearman([1], [1]))
    with pytest.raises(ValueError, match=r"\[N\]"):
        metrics.spearman([1, 2], [1])


def test_spearman_against_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    x = rng.integers(0, 18, 90)
    y = x + rng.integers(-5, 6, 90)
    assert metrics.spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
    assert metrics.ranks(y.astype(float)).tolist() == stats.rankdata(y).tolist()


def test_summary_counts_what_is_defined() -> None:
    summary = metrics.summarise([1.0, math.nan, 3.0])
    assert (summary.films, summary.defined, summary.mean, summary.std, summary.minimum) == (3, 2, 2, 1, 1)
    nothing = metrics.summarise([math.nan])
    assert (nothing.films, nothing.defined) == (1, 0)
    assert nothing.to_json()["mean"] is None
