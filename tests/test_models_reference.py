"""Models against other implementations of the same formula, and against numbers published or seen before."""

from itertools import pairwise

import numpy as np
import polars as pl
import pytest
from conftest import shared
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score

from fraudlab.core.registry import resolve
from fraudlab.models.contract import example, score_all
from fraudlab.models.trees import ensemble, leaves, round_down

DATA, FRAUD = example(800)


def decoder_by_hand(weights: dict, rows, history, elapsed, mask, heads: int):
    """Log-odds of ONE payment by the formulas of `history`, in float64 with plain loops; columns 0 and 1 are numbers, 2 a category."""
    w = {key: np.asarray(value, np.float64) for key, value in weights.items()}
    rms = lambda x, name: x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * w[f"{name}.scale"]  # noqa: E731
    tokens = []
    for payment, seconds in [*zip(history[mask], elapsed[mask], strict=True), (rows, 0.0)]:
        numbers, pieces = [payment[0], payment[1], np.log1p(seconds)], []
        for x, edges in zip(numbers, w["fixed.embed.edges"], strict=True):
            for low, high in pairwise(edges):
                pieces.append(0.0 if high == low else min(max((x - low) / (high - low), 0.0), 1.0))
        scaled = np.clip((np.array(numbers) - w["fixed.embed.mean"]) / w["fixed.embed.deviation"], -5, 5)
        token = np.array(pieces) @ w["embed.pieces.kernel"] + w["embed.pieces.bias"] + scaled @ w["embed.whole.kernel"]
        tokens.append(token + w["embed.tables.0.embedding"][int(payment[2])])
    x = np.array(tokens)
    x[-1] += w["scored"]
    for layer in range(sum(key.endswith("attention.query.kernel") for key in w)):
        block, n, mixed = f"blocks.{layer}", rms(x, f"blocks.{layer}.before_attention"), np.zeros_like(x)
        q, k, v = (np.split(n @ w[f"{block}.attention.{part}.kernel"], heads, axis=1) for part in ("query", "key", "value"))
        for t in range(len(x)):
            parts = []
            for h in range(heads):
                fit = np.exp(k[h][: t + 1] @ q[h][t] / np.sqrt(q[h].shape[1]))
                parts.append(fit / fit.sum() @ v[h][: t + 1])
            mixed[t] = np.concatenate(parts) @ w[f"{block}.attention.out.kernel"]
        x = x + mixed
        n = rms(x, f"{block}.before_gated")
        gate, up = n @ w[f"{block}.gated.gate.kernel"], n @ w[f"{block}.gated.up.kernel"]
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w[f"{block}.gated.down.kernel"]
    return rms(x[-1], "norm") @ w["head.kernel"][:, 0] + w["head.bias"][0]


@pytest.mark.parametrize("layers", [1, 2])
def test_history_is_its_formula(layers):
    model = resolve("model", "history")(DATA.columns, history=5, width=16, layers=layers, heads=4)
    inputs = DATA.inputs(np.r_[0:10, 790:800], model.history)
    weights = model.init(inputs, seed=3)
    by_hand = [decoder_by_hand(weights, *payment, heads=4) for payment in zip(*inputs, strict=True)]
    assert not inputs.mask[0].any()
    assert inputs.mask[-1].all()
    np.testing.assert_allclose(model.logits(weights, inputs), by_hand, atol=2e-5)


def test_walked_trees_decide_as_float64_does_at_and_around_each_threshold():
    rng = np.random.default_rng(0)
    thresholds = np.concatenate([rng.normal(size=200), 10.0 ** rng.uniform(-30, 30, 200), [0.0, 0.1, 220.0, 1e-35]])
    near = thresholds.astype(np.float32)
    for x in (near, np.nextafter(near, np.float32(np.inf)), np.nextafter(near, np.float32(-np.inf))):
        np.testing.assert_array_equal(x <= round_down(thresholds), x.astype(np.float64) <= thresholds)


def test_a_chain_of_a_tree_and_a_bare_leaf_are_walked_to_their_ends():
    deep = {"feature": [0] * 9, "threshold": [1, 0, 2, 0, 3, 0, 4, 0, 0], "value": [0, 1, 0, 2, 0, 3, 0, 4, 5]}
    deep |= {"left": [1, -1, 3, -1, 5, -1, 7, -1, -1], "right": [2, -1, 4, -1, 6, -1, 8, -1, -1]}
    bare = {"feature": [0], "threshold": [0], "value": [7], "left": [-1], "right": [-1]}
    values = leaves(ensemble([bare, deep, bare]), np.array([[0.5], [1.5], [2.5], [3.5], [9]], np.float32))
    np.testing.assert_array_equal(values, np.array([[7, leaf, 7] for leaf in (1, 2, 3, 4, 5)], np.float32))


def test_logistic_is_scikit_learns_on_standardised_and_one_hot_columns():
    model, train = resolve("model", "logistic")(DATA.columns), np.arange(500)
    weights = model.fit(DATA.inputs(train, 0), FRAUD[train])
    numbers, country = DATA.rows[:, :2].astype(np.float64), DATA.rows[:, 2].astype(int)
    design = np.column_stack([(numbers - numbers[train].mean(0)) / numbers[train].std(0), np.eye(5)[country]])
    library = LogisticRegression(max_iter=1000).fit(design[train], FRAUD[train]).predict_proba(design)[:, 1]
    np.testing.assert_allclose(score_all(model, weights, DATA, np.arange(800)), library, atol=1e-5)


@pytest.fixture(scope="module")
def handbook():
    """Rows, frauds, train and test positions of the Fraud Detection Handbook's chapter 3, with its published features."""
    raw = pl.read_parquet(shared("handbook_raw.parquet"))
    table = raw.join(pl.read_parquet(shared("handbook_features.parquet")), on="TRANSACTION_ID", maintain_order="left")
    amount, features = table["TX_AMOUNT_CENTS"].to_numpy() / 100, table[:, raw.width :].to_numpy()
    payer, day, fraud = (table[c].to_numpy() for c in ("CUSTOMER_ID", "TX_TIME_DAYS", "TX_FRAUD"))
    start, fraud = 115, fraud.astype(bool)  # 2018-07-25
    tests = []
    for today in range(start + 14, start + 21):
        compromised = np.unique(payer[(day >= start) & (day <= today - 8) & fraud])
        tests.append(np.flatnonzero((day == today) & ~np.isin(payer, compromised)))
    train = np.flatnonzero((day >= start) & (day < start + 7))
    return np.column_stack([amount, features]).astype(np.float32), fraud, train, np.concatenate(tests)


@pytest.mark.parametrize(("name", "auc", "ap"), [("forest", 0.867, 0.658), ("boosted", 0.873, 0.653)])
def test_published_figures_are_met(handbook, name, auc, ap):
    """The handbook's random forest, and our boosted trees as they were when their defaults were chosen."""
    from fraudlab.features.encoding import Column
    from fraudlab.features.sequences import Inputs

    rows, fraud, train, test = handbook
    assert (len(train), len(test)) == (67_240, 58_264)
    none = lambda positions: Inputs(rows[positions], np.zeros((len(positions), 0, 15)), np.zeros((len(positions), 0)), None)  # noqa: E731
    model = resolve("model", name)(tuple(Column(f"c{i}") for i in range(15)))
    weights = model.fit(none(train), fraud[train], seed=0)
    scores = np.concatenate([np.asarray(model.score(weights, none(part))) for part in np.array_split(test, 8)])
    seen = roc_auc_score(fraud[test], scores), average_precision_score(fraud[test], scores)
    print(f"{name}: AUC {seen[0]:.4f}, average precision {seen[1]:.4f}")
    np.testing.assert_allclose(seen, (auc, ap), atol=0.005)
