"""Models against other implementations of the same formula, and against numbers published or seen before."""

import jax
import numpy as np
import polars as pl
import pytest
from conftest import shared
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score

from fraudlab.core.registry import resolve
from fraudlab.features.encoding import Column
from fraudlab.features.sequences import Dataset, alone, inputs, plan
from fraudlab.models.contract import embed_all, example, score_all
from fraudlab.models.trees import ensemble, leaves, round_down

DATA, FRAUD = example(800)


def some_payments(seed=0):
    """Two payers' 24 payments, of which some fall into one second: encoded rows, payers, seconds since 1970."""
    rng = np.random.default_rng(seed)
    rows = np.column_stack([rng.gamma(4, 20, 24), rng.integers(0, 24, 24), rng.integers(0, 6, 24)]).astype(np.float32)
    seconds = np.sort(rng.choice(40, 24)) * 7 * 3600 + 1_525_000_000
    return rows, rng.integers(0, 2, 24), seconds


ROWS, PAYER, SECONDS = some_payments()
SMALL = Dataset(ROWS, DATA.columns, pl.Series(PAYER), pl.Series(SECONDS * 1_000_000).cast(pl.Datetime("us")))


def init(model, seed=3):
    """First weights, with no vector left at 0 or 1, so that each of them counts."""
    weights = model.init(inputs(SMALL, p := plan(SMALL, np.arange(24), 24, 32), np.arange(len(p))), seed=seed)
    rng = np.random.default_rng(seed)
    nudge = lambda k, v: v + rng.normal(0, 0.1, np.shape(v)).astype(np.float32) if np.ndim(v) == 1 and "fixed" not in k else v  # noqa: E731
    return {k: nudge(k, np.asarray(v)) for k, v in weights.items()}


class ByHand:
    """The networks' formulas for one payer's payments in time order, in float64, payment by payment and head by head."""

    def __init__(self, weights, heads=2):
        self.w, self.heads = {k: np.asarray(v, np.float64) for k, v in weights.items()}, heads

    def embed(self, rows, gaps):
        """A column is a number (0, 1 and the gap) or a category (2)."""
        tokens = []
        for row, gap in zip(rows.astype(np.float64), gaps, strict=True):
            token = self.w["embed.bias"] + self.w["embed.tables.0"][int(row[2])]
            for n, x in enumerate([row[0], row[1], gap]):
                edges, parts = self.w["fixed.embed.edges"][n], self.w["embed.numbers"][n]
                whole = (np.array([x, np.log1p(x)]) - self.w["fixed.embed.mean"][n]) / self.w["fixed.embed.deviation"][n]
                token = token + np.clip(whole, -5, 5) @ parts[:2]
                for k in range(len(edges) - 1):
                    low, high = edges[k], edges[k + 1]
                    token = token + (0 if high == low else min(max((x - low) / (high - low), 0), 1)) * parts[k + 2]
            tokens.append(token)
        return np.array(tokens)

    def norm(self, x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * self.w[f"{name}.scale"]

    def linear(self, x, name):
        return x @ self.w[f"{name}.kernel"] + self.w.get(f"{name}.bias", 0)

    def turn(self, x, seconds):
        """Pairs of numbers as complex ones, turned by time."""
        half = x.shape[-1] // 2
        periods = 2.0 ** np.round(np.linspace(10, 27, half))
        turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(2j * np.pi * (np.asarray(seconds, np.float64)[:, None] % periods) / periods)
        return np.concatenate([turned.real, turned.imag], -1)

    def attention(self, x, name, seconds, sees, memory=None):
        """`sees[i]` lists what payment i looks at."""
        source = x if memory is None else memory
        query, key, value = self.linear(x, f"{name}.query"), self.linear(source, f"{name}.key"), self.linear(source, f"{name}.value")
        size = query.shape[1] // self.heads
        shared_by = self.heads // (key.shape[1] // size)
        heads = []
        for h in range(self.heads):
            of = slice(h // shared_by * size, (h // shared_by + 1) * size)
            q, k, v = self.turn(query[:, h * size : (h + 1) * size], seconds), self.turn(key[:, of], seconds), value[:, of]
            out = np.zeros((len(x), size))
            for i, seen in enumerate(sees):
                fit = np.exp(np.array([k[j] @ q[i] for j in seen]) / np.sqrt(size))
                out[i] = fit / fit.sum() @ v[seen]
            heads.append(out)
        return self.linear(np.concatenate(heads, 1), f"{name}.out")

    def block(self, x, name, seconds, sees):
        x = x + self.attention(self.norm(x, f"{name}.before_attention"), f"{name}.attention", seconds, sees)
        return x + self.gated(self.norm(x, f"{name}.before_gated"), f"{name}.gated")

    def gated(self, x, name):
        gate = self.linear(x, f"{name}.gate")
        return self.linear(gate * sigmoid(gate) * self.linear(x, f"{name}.up"), f"{name}.down")

    def blocks(self, x, name, seconds, sees):
        for layer in range(len({k.split(".")[1] for k in self.w if k.startswith(f"{name}.")})):
            x = self.block(x, f"{name}.{layer}", seconds, sees)
        return x

    def transformer(self, tokens, seconds, sees):
        return self.norm(self.blocks(tokens, "blocks", seconds, sees), "norm")


def payers():
    """Each payer's positions in time order, seconds, and seconds since the payer's instant before (0 at the first)."""
    for payer in np.unique(PAYER):
        of = np.flatnonzero(payer == PAYER)
        seconds = SECONDS[of]
        earlier = [seconds[seconds < s] for s in seconds]
        gaps = np.array([s - e[-1] if len(e) else 0 for s, e in zip(seconds, earlier, strict=True)])
        assert len(np.unique(seconds)) < len(seconds)
        yield of, seconds, gaps


def test_decoder_is_its_formula():
    model = resolve("model", "decoder")(DATA.columns, width=16, layers=2, heads=2, key_heads=1, window=4, pieces=8)
    weights = init(model)
    found, hand = embed_all(model, weights, SMALL, np.arange(24)), ByHand(weights)
    for of, seconds, gaps in payers():
        sees = [[*np.flatnonzero(seconds < seconds[i])[-3:], i] for i in range(len(of))]
        np.testing.assert_allclose(found[of], hand.transformer(hand.embed(ROWS[of], gaps), seconds, sees), atol=2e-5)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def strictly_before(seconds):
    """For each payment, how many are strictly earlier."""
    return [int((seconds < s).sum()) for s in seconds]


def test_recurrent_is_its_formula():
    model = resolve("model", "recurrent")(DATA.columns, width=16, layers=2, pieces=8)
    weights = init(model)
    found, hand = embed_all(model, weights, SMALL, np.arange(24)), ByHand(weights)
    for of, seconds, gaps in payers():
        x = hand.embed(ROWS[of], gaps)
        for layer in range(2):
            name, n = f"memory.{layer}", hand.norm(x, f"before_memory.{layer}")
            value = hand.linear(n, f"{name}.value")
            stays = np.exp(-8 * np.log1p(np.exp(hand.w[f"{name}.rate"])) * sigmoid(hand.linear(value, f"{name}.stay")))
            adds = np.sqrt(1 - stays**2) * sigmoid(hand.linear(value, f"{name}.take")) * value
            after, memory = [np.zeros(16)], []
            for t, earlier in enumerate(strictly_before(seconds)):
                memory.append(stays[t] * after[earlier] + adds[t])
                after.append(stays[t] * after[-1] + adds[t])
            opened = hand.linear(n, f"{name}.open")
            x = x + hand.linear(opened * sigmoid(opened) * np.array(memory), f"{name}.out")
            x = x + hand.gated(hand.norm(x, f"before_gated.{layer}"), f"gated.{layer}")
        np.testing.assert_allclose(found[of], hand.norm(x, "norm"), atol=2e-5)


def test_gru_is_its_formula():
    model = resolve("model", "gru")(DATA.columns, width=16, layers=2, pieces=8)
    weights = init(model)
    found, hand = embed_all(model, weights, SMALL, np.arange(24)), ByHand(weights)
    for of, seconds, gaps in payers():
        x = hand.embed(ROWS[of], gaps)
        for layer in range(2):
            payment, after = hand.linear(x, f"units.{layer}.payment"), [np.zeros(16)]
            for t, earlier in enumerate(strictly_before(seconds)):
                (r, z, n), (hr, hz, hn) = np.split(payment[t], 3), np.split(hand.linear(after[earlier], f"units.{layer}.memory"), 3)
                z = sigmoid(z + hz)
                after.append((1 - z) * np.tanh(n + sigmoid(r + hr) * hn) + z * after[earlier])
            x = x + np.array(after[1:])
        np.testing.assert_allclose(found[of], hand.norm(x, "norm"), atol=2e-5)


@pytest.mark.parametrize("field_layers", [0, 1])
def test_encoder_is_its_formula(field_layers):
    options = {"width": 16, "layers": 1 + (not field_layers), "heads": 2, "key_heads": 1, "history": 4, "pieces": 8}
    model = resolve("model", "encoder")(DATA.columns, **options, field_layers=field_layers)
    weights = init(model)
    found, hand = embed_all(model, weights, SMALL, np.arange(24)), ByHand(weights)
    for of, seconds, gaps in payers():
        tokens = hand.embed(ROWS[of], gaps)
        if field_layers:
            tokens = tokens + fields_by_hand(weights, ROWS[of], gaps)
        for i in range(len(of)):
            window = [*np.flatnonzero(seconds < seconds[i])[-4:], i]
            everything = [list(range(len(window)))] * len(window)
            by_hand = hand.transformer(tokens[window], seconds[window], everything)[-1]
            np.testing.assert_allclose(found[of[i]], by_hand, atol=2e-5)


def fields_by_hand(weights, rows, gaps):
    """What attention among a payment's columns adds to its token: numbers first (two columns, the gap), then the country."""
    hand = ByHand({k.removeprefix("embed."): v for k, v in weights.items() if k.startswith("embed.") and "tables" not in k})
    embed = {k: weights[k] for k in weights if "embed." in k}

    def of_column(c):
        """The column's part of the token: all other columns' weights, and the bias, are 0."""
        numbers = embed["embed.numbers"] * (np.arange(3) == c)[:, None, None]
        one = {"embed.bias": np.zeros(16), "embed.numbers": numbers, "embed.tables.0": embed["embed.tables.0"] * (c == 3)}
        return ByHand(embed | one).embed(rows, gaps)

    parts = np.stack([of_column(c) for c in range(4)], 1) @ hand.w["narrow.kernel"] + hand.w["which"]
    added = []
    for payment in parts:
        out = hand.norm(hand.blocks(payment, "blocks", np.zeros(4), [[0, 1, 2, 3]] * 4), "norm")
        added.append(out.reshape(-1) @ hand.w["wide.kernel"])
    return np.array(added)


def test_what_seq2seq_tells_is_its_formula():
    options = {"width": 16, "layers": 1, "told_layers": 2, "heads": 2, "key_heads": 1, "history": 7, "pieces": 8}
    model = resolve("model", "seq2seq")(DATA.columns, **options)
    weights = init(model)
    whole = plan(SMALL, np.arange(24), 24, 32)
    seen = inputs(SMALL, whole, np.arange(1))
    shown = np.zeros(seen.gap.shape, bool)
    hand, expected = ByHand(weights), {}
    for of, seconds, gaps in payers():
        first = seconds <= seconds[len(of) // 2]  # of what is shown
        place = [int(np.flatnonzero((SMALL.order[whole.at[0]] == p) & (whole.at[0] >= 0))[0]) for p in of]
        shown[0, place] = first
        tokens, memory = hand.embed(ROWS[of], gaps), np.zeros((len(of), 16))
        memory[first] = hand.transformer(tokens[first], seconds[first], [list(range(first.sum()))] * first.sum())
        sees = [[j for j in range(i) if seconds[j] < seconds[i] and not first[j]] + [i] for i in range(len(of))]
        asks = [list(np.flatnonzero(first))] * len(of)
        for layer in range(2):
            asking = hand.norm(tokens, f"before_cross.{layer}")
            tokens = tokens + hand.attention(asking, f"cross.{layer}", seconds, asks, memory)
            tokens = hand.block(tokens, f"told_blocks.{layer}", seconds, sees)
        expected |= dict(zip(place, hand.linear(hand.norm(tokens, "told_norm"), "told"), strict=True))
    found = np.asarray(jax.jit(model.tell)(weights, seen, shown))[0]
    assert len(expected) == 24
    for place, told in expected.items():
        np.testing.assert_allclose(found[place], told, atol=5e-5)


def test_late_fusion_is_trees_on_columns_and_embedding():
    lightgbm = pytest.importorskip("lightgbm")
    options = {"width": 16, "layers": 1, "heads": 2, "key_heads": 1, "window": 4}
    model = resolve("model", "late_fusion")(DATA.columns, base_options=options, trees=20, smallest_leaf=20)
    network = resolve("model", "decoder")(DATA.columns, **options)
    assert model.network == network
    start = network.init(inputs(DATA, p := plan(DATA, np.arange(800), 9, 64), np.arange(len(p))), 0)
    weights = model.fit_on(DATA, np.arange(500), FRAUD[:500], 0, start)
    columns = np.column_stack([DATA.rows, embed_all(network, start, DATA, np.arange(800))]).astype(np.float64)
    settings = {"objective": "binary", "learning_rate": 0.02, "num_leaves": 15, "min_data_in_leaf": 20, "verbosity": -1, "num_threads": 1}
    library = lightgbm.train(settings, lightgbm.Dataset(columns[:500], FRAUD[:500].astype(float)), 20).predict(columns[500:])
    np.testing.assert_allclose(score_all(model, weights, DATA, np.arange(500, 800)), library, atol=1e-5)


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
    weights = model.fit(DATA.rows[train], FRAUD[train], 0)
    numbers, country = DATA.rows[:, :2].astype(np.float64), DATA.rows[:, 2].astype(int)
    design = np.column_stack([(numbers - numbers[train].mean(0)) / numbers[train].std(0), np.eye(6)[country]])
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
    rows, fraud, train, test = handbook
    assert (len(train), len(test)) == (67_240, 58_264)
    model = resolve("model", name)(tuple(Column(f"c{i}") for i in range(15)))
    weights = model.fit(rows[train], fraud[train], seed=0)
    scores = np.concatenate([np.asarray(model.score(weights, alone(rows[part])))[:, 0] for part in np.array_split(test, 8)])
    seen = roc_auc_score(fraud[test], scores), average_precision_score(fraud[test], scores)
    print(f"{name}: AUC {seen[0]:.4f}, average precision {seen[1]:.4f}")
    np.testing.assert_allclose(seen, (auc, ap), atol=0.005)
