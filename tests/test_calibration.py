"""A calibration rises, is the same for one score and for many, and is judged on later payments than it was fitted on."""

import json
import math
import subprocess
import sys

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import brier_score_loss, log_loss

from fraudlab.evaluation import calibration
from fraudlab.evaluation.calibration import EDGE, FRAUDS, LAST, PARTS, Calibration, calibrated, cross_fit, figures, fit
from fraudlab.evaluation.metrics import simulate_scores

ODDS = (pl.col("score") / (1 - pl.col("score"))).log()


@pytest.fixture(scope="module")
def true() -> pl.DataFrame:
    """A month of scores that are probabilities."""
    return simulate_scores(120_000, 10_000, days=30, seed=3)


def bent(scores: pl.DataFrame, slope: float, shift: float) -> pl.DataFrame:
    return scores.with_columns(score=1 / (1 + (-slope * ODDS - shift).exp()))


@st.composite
def calibrations(draw) -> Calibration:
    inner = draw(st.lists(st.floats(-13, 13), max_size=8, unique=True))
    x = sorted({-LAST, LAST, *(round(v, 3) for v in inner)})
    steps = draw(st.lists(st.floats(0.01, 5), min_size=len(x), max_size=len(x)))
    return Calibration(tuple(zip(x, (np.cumsum(steps) - sum(steps) / 2).tolist(), strict=True)))


SCORES = st.floats(0, 1, width=32)


@given(calibrations(), st.lists(SCORES, min_size=2, max_size=20))
def test_it_rises_and_is_the_same_for_one_and_for_many(c, scores):
    scores = np.sort(np.array(scores, np.float32))
    found = c.probabilities(scores)
    assert found.tolist() == [c.probability(s) for s in scores.tolist()]
    assert ((found >= 0) & (found <= 1)).all()
    kept = np.clip(scores.astype(float), EDGE, 1 - EDGE)
    apart = np.diff(np.log(kept / (1 - kept))) > 1e-4
    assert (np.diff(found) >= -1e-12).all()
    odds = np.log(found / (1 - found), where=found < 1, out=np.full(len(found), np.inf))
    assert (np.diff(odds)[apart & np.isfinite(odds[1:])] > 0).all()


@given(calibrations(), SCORES)
def test_it_is_the_line_between_the_points(c, score):
    x, y = zip(*c.knots, strict=True)
    assert c.probability(score) == pytest.approx(1 / (1 + math.exp(-np.interp(calibration.log_odds(score), x, y))), rel=1e-9)


def test_without_points_a_score_stays_what_it_is():
    scores = np.linspace(0, 1, 1001)
    np.testing.assert_allclose(Calibration().probabilities(scores), scores.clip(EDGE, 1 - EDGE), rtol=1e-9)


@given(calibrations())
def test_as_json_it_comes_back(c):
    assert calibration.from_dict(json.loads(json.dumps(calibration.to_dict(c)))) == c


@pytest.mark.parametrize(
    "knots",
    [
        [[-14, -14]],
        [[-14, -14], [14, float("nan")]],
        [[-14, 1], [14, 1]],
        [[-14, 0], [3, 1], [3, 2], [14, 3]],
        [[-13, -14], [14, 14]],
        [[-14, -14, 0], [14, 14, 0]],
        None,
        [["a", "b"]],
    ],
)
def test_what_is_no_map_is_refused(knots):
    with pytest.raises(ValueError, match=r"calibration|could not convert|unpack"):
        calibration.from_dict({"knots": knots})


@pytest.mark.parametrize(("slope", "shift"), [(1, 0), (2, 3), (0.5, -2), (1, 2)])
def test_it_finds_the_way_back(true, slope, shift):
    """Scores that were probabilities, bent: most of what was lost is won again, and the order stays."""
    given_, wanted = bent(true, slope, shift)["score"].to_numpy(), true["score"].to_numpy()
    found = fit(bent(true, slope, shift)).probabilities(given_)
    off = np.abs(np.log(found / wanted))[wanted > 0.001]
    assert off.mean() < 0.25
    assert found.sum() == pytest.approx(true["is_fraud"].sum(), rel=0.1)
    assert (np.diff(found[np.argsort(given_, kind="stable")]) >= 0).all()


def test_points_rise_whatever_the_labels():
    """Labels by chance, or upside down: shares of bins are pooled until they rise."""
    for seed in range(5):
        scores = simulate_scores(4_000, 400, seed=seed)
        chance = scores.with_columns(is_fraud=pl.Series(np.random.default_rng(seed).random(len(scores)) < 0.05))
        upside_down = scores.with_columns(is_fraud=pl.col("score").rank("random", seed=seed) < 200)
        for frame in (chance, upside_down, chance.with_columns(pl.col("score").round(1))):
            assert len(fit(frame).knots) >= 3


def test_few_frauds_change_nothing():
    scores = simulate_scores(2_000, 200)
    few = scores.filter(~pl.col("is_fraud") | (pl.col("is_fraud").cum_sum() < FRAUDS))
    assert 0 < few["is_fraud"].sum() < FRAUDS
    assert fit(few) == Calibration()
    assert calibrated(few).calibration == Calibration()
    with pytest.raises(ValueError, match="take a longer test period"):
        cross_fit(few)


def test_scores_of_0_and_1_are_fitted():
    scores = simulate_scores(20_000).with_columns(score=pl.col("score").round(2))
    assert {0.0, 1.0} <= set(scores["score"])
    assert np.isfinite(fit(scores).probabilities(np.array([0, 1]))).all()


def edges(scores: pl.DataFrame) -> list:
    times = scores.filter("is_fraud")["event_time"].sort()
    return [times[len(times) * k // PARTS] for k in range(1, PARTS)]


def test_nothing_is_judged_by_a_map_that_saw_it(true):
    """Labels of a part, and of those after it, do not move its probabilities; those before it do."""
    scores = bent(true, 2, 3)
    before = cross_fit(scores)
    first, *_, last = edges(scores)
    assert before["payment_id"].to_list() == scores.filter(pl.col("event_time") >= first)["payment_id"].to_list()
    late = scores.with_columns(score=pl.when(pl.col("event_time") >= last).then(1 - pl.col("score")).otherwise("score"))
    moved = cross_fit(late).select("payment_id", now="probability").join(before, on="payment_id")
    same = pl.col("event_time") < last
    assert moved.filter(same)["now"].to_list() == moved.filter(same)["probability"].to_list()
    shuffled = pl.col("is_fraud").shuffle(1).over(pl.col("event_time") < first)  # as many frauds: the parts stay what they are
    early = cross_fit(scores.with_columns(is_fraud=pl.when(pl.col("event_time") < first).then(shuffled).otherwise("is_fraud")))
    part = pl.col("event_time") < edges(scores)[1]
    assert early.filter(part)["probability"].to_list() != before.filter(part)["probability"].to_list()


def test_a_part_is_fitted_on_all_before_it(true):
    scores, seen = bent(true, 2, 3), []
    cross_fit(scores, how=lambda frame: seen.append(frame) or Calibration())
    assert [frame["event_time"].max() < edge for frame, edge in zip(seen, edges(scores), strict=True)] == [True] * (PARTS - 1)
    assert [len(frame) for frame in seen] == [int((scores["event_time"] < edge).sum()) for edge in edges(scores)]


def test_figures_are_scikit_learns(true):
    found = figures(true)
    assert found["log_loss"] == pytest.approx(log_loss(true["is_fraud"], true["score"].clip(EDGE, 1 - EDGE)))
    assert found["brier"] == pytest.approx(brier_score_loss(true["is_fraud"], true["score"].clip(EDGE, 1 - EDGE)))


def test_what_is_served_is_fitted_on_all_and_only_where_it_helps(true):
    found = calibrated(bent(true, 2, 3))
    assert found.calibration == fit(bent(true, 2, 3))
    assert found.figures == {of: figures(found.judged, of) for of in ("score", "probability")}
    assert found.figures["probability"]["log_loss"] < found.figures["score"]["log_loss"]
    alone = calibrated(true)
    assert (alone.calibration == Calibration()) == (alone.figures["probability"]["log_loss"] >= alone.figures["score"]["log_loss"])
    harmed = calibrated(simulate_scores(30_000, skill=3.0, seed=1))
    assert harmed.calibration == Calibration()
    assert harmed.judged["probability"].to_list() == harmed.judged["score"].to_list()


def test_serving_needs_no_lab():
    """What a bento has applies a calibration: without scikit-learn and altair."""
    code = """
        import sys
        sys.modules["sklearn"] = sys.modules["altair"] = None
        from fraudlab.evaluation.calibration import Calibration
        from fraudlab.governance import policy, reason_texts
        from fraudlab.serving import bundle, reasons
        print(policy.compiled(policy.DEFAULT)({"amount": 5.0}, Calibration().probability(0.25)))
    """
    done = subprocess.run([sys.executable, "-c", "\n".join(line.strip() for line in code.splitlines())], capture_output=True, text=True)
    assert done.stdout == "challenge\n", done.stderr
