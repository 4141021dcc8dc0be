"""The walk of one payment decides at every node as the library does that grew the trees, and adds up the same leaves."""

import math
from functools import cache

import numpy as np
import pytest

from fraudlab.features.encoding import Column
from fraudlab.models.steps import make_stepper
from fraudlab.models.trees import ensemble, leaves
from fraudlab.models.walk import LANES, make_trees
from fraudlab.models.zoo.boosted import flat

COLUMNS = tuple(Column(name) for name in ("amount", "night", "count", "mean", "risk"))
LARGEST = np.finfo(np.float32).max


def payments(n: int = 3000) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    risk = rng.random(n) * (rng.random(n) < 0.3)
    numbers = [rng.lognormal(3, 1, n), rng.integers(0, 2, n), rng.poisson(5, n), -rng.lognormal(-9, 3, n), risk]
    rows = np.column_stack(numbers).astype(np.float32)
    odds = (rows[:, 0] > 60) + rows[:, 1] + 3 * rows[:, 4] - 3 + rng.normal(size=n)
    return rows, odds > 0


@cache
def grown(trees: int, width: int = len(COLUMNS)):
    """LightGBM's model of payments' first numbers, and its arrays."""
    lightgbm = pytest.importorskip("lightgbm")
    rows, fraud = payments()
    options = {"objective": "binary", "num_leaves": 31, "use_missing": False, "verbosity": -1, "num_threads": 1}
    booster = lightgbm.train(options, lightgbm.Dataset(rows[:, :width].astype(float), fraud.astype(float)), trees)
    return booster, ensemble([flat(tree["tree_structure"]) for tree in booster.dump_model()["tree_info"]])


def hard_rows(weights: dict, width: int, n: int = 2000) -> np.ndarray:
    """Numbers on the thresholds, one float32 number beside them, of any size, and the largest there are."""
    rng, inner = np.random.default_rng(1), weights["child"][:, 0] != np.arange(len(weights["child"]))
    at = np.stack(
        [rng.choice(np.append(weights["threshold"][inner & (weights["feature"] == f)], np.float32(0)), n) for f in range(width)], 1
    )
    beside = np.nextafter(at, rng.choice(np.float32([-np.inf, np.inf]), at.shape))
    anywhere = (rng.normal(size=at.shape) * 10.0 ** rng.integers(-30, 30, at.shape)).astype(np.float32)
    far = rng.choice([-LARGEST, LARGEST], at.shape)
    return np.choose(rng.choice(4, at.shape, p=[0.4, 0.4, 0.1, 0.1]), [at, beside, anywhere, far])


def scores_of(trees, rows: np.ndarray) -> np.ndarray:
    return trees.steps(np.empty((1, 0), np.uint8), np.zeros(len(rows), np.int64), rows, np.zeros(len(rows), np.int64))


@pytest.mark.parametrize(("trees", "width"), [(1, 5), (LANES - 1, 5), (LANES, 3), (LANES + 1, 1), (120, 5)])
def test_every_decision_and_sum_is_lightgbms(trees, width):
    booster, weights = grown(trees, width)
    values = [[leaf["leaf_value"] for leaf in in_order(tree["tree_structure"])] for tree in booster.dump_model()["tree_info"]]
    ours = make_trees("boosted", COLUMNS[:width], weights)
    for rows in (payments()[0][:, :width].copy(), hard_rows(weights, width)):
        scores, found = scores_of(ours, rows), booster.predict(rows.astype(float), pred_leaf=True).reshape(len(rows), trees)
        sums = [sum(float(np.float32(of[leaf])) for of, leaf in zip(values, which, strict=True)) for which in found]
        np.testing.assert_allclose(scores, [1 / (1 + math.exp(-x)) for x in sums], rtol=1e-15, atol=0)
        raw, rounded = booster.predict(rows.astype(float), raw_score=True), sum(max(map(abs, of)) for of in values) / 2**24
        np.testing.assert_allclose(np.log(scores / (1 - scores)), raw, rtol=0, atol=rounded + 1e-12)


def in_order(node: dict) -> list[dict]:
    """Leaves by their number."""
    if "leaf_index" in node:
        return [node]
    if "left_child" not in node:
        return [{"leaf_index": 0, **node}]
    return sorted(in_order(node["left_child"]) + in_order(node["right_child"]), key=lambda leaf: leaf["leaf_index"])


def test_thresholds_are_met_from_both_sides():
    """So that the test above asks what it says: LightGBM's own decisions change between neighbouring float32 numbers."""
    booster, weights = grown(120)
    rows, inner = payments()[0], np.flatnonzero((weights["child"][:, 0] != np.arange(len(weights["child"]))) & (weights["feature"] == 3))
    at = weights["threshold"][inner]
    on, above = np.repeat(rows[:1], len(at), 0), np.repeat(rows[:1], len(at), 0)
    on[:, 3], above[:, 3] = at, np.nextafter(at, np.float32(np.inf))
    ways = [booster.predict(r.astype(float), pred_leaf=True) for r in (on, above)]
    assert (ways[0] != ways[1]).any(1).mean() > 0.5


def test_a_forest_scores_by_the_mean_of_full_grown_trees():
    from sklearn.ensemble import RandomForestClassifier

    rows, fraud = payments()
    forest = RandomForestClassifier(21, random_state=0).fit(rows, fraud)
    trees = [e.tree_ for e in forest.estimators_]
    weights = ensemble(
        [
            {"feature": t.feature, "threshold": t.threshold, "left": t.children_left, "right": t.children_right, "value": t.value[:, 0, 1]}
            for t in trees
        ]
    )
    assert weights["depth"] > 10
    given = hard_rows(weights, len(COLUMNS)).clip(-1e30, 1e30)  # scikit-learn adds up rows to see that they are finite
    np.testing.assert_allclose(scores_of(make_trees("forest", COLUMNS, weights), given), forest.predict_proba(given)[:, 1], atol=1e-7)


def test_it_is_the_walk_of_whole_tables():
    """Random trees, single leaves among them; the same leaves as `models.trees.leaves`."""
    rng = np.random.default_rng(2)

    def random_tree(depth: int) -> dict[str, list]:
        lists = {key: [] for key in ("feature", "threshold", "left", "right", "value")}

        def add(left: int) -> int:
            at, inner = len(lists["left"]), left > 0 and rng.random() < 0.8
            for key, value in zip(lists, (rng.integers(5), rng.normal(), -1, -1, rng.normal()), strict=True):
                lists[key].append(value)
            if inner:
                lists["left"][at], lists["right"][at] = add(left - 1), add(left - 1)
            return at

        add(depth)
        return lists

    weights = ensemble([random_tree(depth) for depth in (0, 1, 9, 3, 0, 6, 2, 2, 5, 0, 1)])
    rows = rng.normal(size=(500, 5)).astype(np.float32)
    expected = np.asarray(leaves(weights, rows)).astype(float)
    np.testing.assert_allclose(scores_of(make_trees("forest", COLUMNS, weights), rows), expected.mean(1), rtol=1e-14)
    alone = ensemble([{"feature": [0], "threshold": [0.0], "left": [-1], "right": [-1], "value": [0.25]}])
    assert scores_of(make_trees("forest", COLUMNS, alone), rows[:3]).tolist() == [0.25] * 3


def test_one_step_is_one_of_many_and_has_no_memory_and_no_embedding():
    _, weights = grown(120)
    trees, rows = make_stepper("boosted", {"trees": 120}, COLUMNS, weights), payments()[0][:200]
    assert (trees.size, trees.width, trees.empty().shape, trees.empty().dtype) == (0, 0, (0,), np.uint8)
    found = [trees.step(trees.empty(), row, 0) for row in rows]
    assert [score for score, _ in found] == scores_of(trees, rows).tolist()
    assert {embedding.shape for _, embedding in found} == {(0,)}
    frozen = rows[0].copy()
    frozen.flags.writeable = False
    assert trees.step(trees.empty(), frozen, 0)[0] == found[0][0]


def test_what_does_not_fit_is_refused():
    _, weights = grown(LANES + 1)
    trees, row = make_trees("boosted", COLUMNS, weights), payments()[0][0]
    for memory, wrong in ((np.zeros(1, np.uint8), row), (trees.empty(), row[:4])):
        with pytest.raises(ValueError, match=r"this model has 0 and 5\. Give a memory that began as empty"):
            trees.step(memory, wrong, 0)
    for wrong in (row.astype(float), np.repeat(row, 2)[::2]):
        with pytest.raises(TypeError, match="rows of float32"):
            trees.step(trees.empty(), wrong, 0)
    with pytest.raises(ValueError, match="Trees read number 4 of 3"):
        make_trees("boosted", COLUMNS[:3], weights)
    with pytest.raises(ValueError, match="There is no weight 'value'"):
        make_trees("boosted", COLUMNS, {k: v for k, v in weights.items() if k != "value"})
    circle, outside, twice = (weights["child"].copy() for _ in range(3))
    circle[2], outside[0, 1], twice[0, 1] = 0, len(circle), twice[0, 0]
    for child in (circle, outside, twice, -weights["child"]):
        with pytest.raises(ValueError, match="are no trees, with one way from a root to each"):
            make_trees("boosted", COLUMNS, weights | {"child": child})
