"""The Handbook oracle: its rules are those of the published file, its filter is exact, it sees no future, and nothing beats it."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import lightgbm as lgb
import numpy as np
import polars as pl
import pytest
from conftest import ROOT, shared
from hypothesis import given, settings
from hypothesis import strategies as st

from fraudlab.core.registry import resolve
from fraudlab.data.contract import check, delay
from fraudlab.data.sources import handbook, handbook_file
from fraudlab.data.sources.handbook import DAY, World, simulate
from fraudlab.data.splits import Backtest, backtest
from fraudlab.evaluation.metrics import ap, auc, card_precision
from fraudlab.evaluation.oracle import LEVELS, decidable, density, in_window, mean_amounts, of_card, oracle, stolen_ratio
from fraudlab.features.audit import audit
from fraudlab.features.offline import compute

SMALL = World(customers=300, terminals=600, days=120, radius=8.0, compromised_terminals=1, compromised_customers=2)
TINY = World(customers=40, terminals=60, days=45, radius=40.0, compromised_terminals=1, compromised_customers=1)
FRAUD = pl.col("scenario") > 0


def labelled(rows: pl.DataFrame, days: float = 7.0) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Rows with payment_id, and their labels."""
    rows = rows.with_columns(payment_id=pl.int_range(pl.len()).cast(pl.String), currency=pl.lit("EUR"), is_fraud=FRAUD)
    return rows, rows.select("payment_id", "is_fraud", "scenario", known_at=pl.col("event_time") + delay(days))


def true_means(world: World, seed: int) -> pl.DataFrame:
    """The generator draws them after the customers' places."""
    people = np.random.default_rng(seed).spawn(4)[0]
    people.uniform(0, 100, (world.customers, 2))
    return pl.DataFrame({"payer_id": np.arange(world.customers).astype(str), "mean": people.uniform(5, 100, world.customers)})


@pytest.fixture(scope="module")
def worlds() -> list[pl.DataFrame]:
    """Six small worlds after their first forty days: rows with the oracle's numbers, and the features of the Handbook."""
    found = []
    for seed in range(6):
        rows, labels = labelled(simulate(SMALL, seed))
        features = compute(resolve("features", "handbook_strict"), rows, labels)
        means = true_means(SMALL, seed)
        blind = oracle(rows, labels, means, SMALL, whole_cents=False).select("payment_id", continuous="score")
        late = oracle(rows, labels.with_columns(pl.col("known_at") + delay(7)), means, SMALL).select("payment_id", late="score")
        for more in (oracle(rows, labels, means, SMALL), blind, late, features):
            rows = rows.join(more, "payment_id", maintain_order="left")
        rows = rows.with_columns((pl.col("amount") * 100).round().mod(5).alias("last_digit"), seed=pl.lit(seed))
        found.append(rows.filter(pl.col("event_time") >= pl.col("event_time").min() + delay(40)))
    return found


# the rules


def test_the_rules_are_those_of_the_published_file():
    """The file's terminals and customers were drawn with the day as seed, so every label can be derived."""
    rows = handbook_file.read(str(shared("handbook_raw.parquet").resolve()))
    day = rows["event_time"].dt.epoch("d").to_numpy()
    day, days = day - day[0], int(day[-1] - day[0])
    terminals, customers = np.zeros((10_000, days + 1), bool), np.zeros((5000, days + 1), bool)
    for d in range(days):
        terminals[np.random.RandomState(d).choice(10_000, 2, replace=False), d : d + 28] = True
        customers[np.random.RandomState(d).choice(5000, 3, replace=False), d : d + 14] = True
    at_terminal, of_customer = terminals[rows["payee_id"].cast(int), day], customers[rows["payer_id"].cast(int), day]
    scenario, amount = rows["scenario"].to_numpy(), rows["amount"].to_numpy()
    assert np.array_equal(scenario == 2, at_terminal & (scenario != 3))
    assert of_customer[scenario == 3].all()
    assert (scenario == 3).sum() == pytest.approx(of_customer.sum() / 3, rel=0.01)
    assert np.array_equal(scenario == 1, (amount > 220) & (scenario != 3) & ~at_terminal)
    cents = np.rint(amount * 100).astype(int)
    assert not (cents[scenario == 3] % 5).any()
    assert (cents[scenario == 0] % 5 == 0).mean() == pytest.approx(0.2, abs=0.002)


def test_amounts_have_the_density_that_the_oracle_takes():
    rows, means = simulate(World(customers=400, terminals=800, days=60, compromised_customers=0), 3), true_means(World(customers=400), 3)
    shares = rows.join(means, "payer_id").select(pl.col("amount") / pl.col("mean")).to_series().to_numpy()
    edges = np.linspace(0, 2.6, 14)
    grid = np.linspace(0, 2.6, 13 * 200 + 1)
    middle = (grid[1:] + grid[:-1]) / 2
    expected = density(middle, np.ones(len(middle))).reshape(13, 200).mean(1) * 0.2
    counts = np.histogram(shares, edges)[0]
    assert (np.abs(counts - len(shares) * expected) < 5 * np.sqrt(len(shares) * expected)).all()
    estimated = mean_amounts(rows).join(means, "payer_id", suffix="_true")
    assert np.median(np.abs(estimated["mean"] / estimated["mean_true"] - 1)) < 0.04
    assert (estimated["mean"] / estimated["mean_true"]).mean() == pytest.approx(1, abs=0.01)


def test_stolen_amounts_are_multiples_of_five_cents():
    amounts, mean = np.array([120.0, 120.01, 4000.0]), np.array([60.0, 60.0, 60.0])
    assert stolen_ratio(amounts, mean)[1] == 0
    assert stolen_ratio(amounts, mean)[0] == pytest.approx(5 * stolen_ratio(amounts, mean, whole_cents=False)[0])
    assert stolen_ratio(amounts, mean)[2] == 1e12


# the filter

LENGTH, CHANCE = 2, 0.3
# half-day, half-days until the label is known, likelihood ratio without a label, and the likelihoods with it
seen = st.tuples(
    st.integers(0, 10), st.integers(0, 8), st.sampled_from([0.5, 1.0, 3.0]), st.sampled_from([(1.0, 0.0), (0.0, 1.0), (0.4, 0.7)])
)


def enumerated(rows: list[tuple], i: int) -> float | None:
    """Sum over all 2^days draws; None where the evidence is impossible."""
    time = rows[i][0]
    inside = total = 0.0
    for draws in product([False, True], repeat=rows[i][0] // 2 + 1):
        state = [any(draws[max(0, d - LENGTH + 1) : d + 1]) for d in range(len(draws))]
        weight = np.prod([CHANCE if drawn else 1 - CHANCE for drawn in draws])
        for at, late, ratio, (a, b) in rows:
            if at >= time:
                continue
            known = at + late < time
            weight *= (a if known else ratio) if state[at // 2] else (b if known else 1.0)
        total += weight
        inside += weight * state[-1]
    return inside / total if total else None


@settings(deadline=None, max_examples=60)
@given(st.lists(seen, min_size=1, max_size=7), st.lists(seen, max_size=4))
def test_the_filter_equals_the_sum_over_all_draws(rows, others):
    """Two entities, equal instants, labels that come late, at once or out of order."""
    rows, others = sorted(rows, key=lambda r: r[0]), sorted(others, key=lambda r: r[0])
    both = sorted([(r, "a") for r in rows] + [(r, "b") for r in others] + [((0, 0, 1.0, (1.0, 1.0)), "first")], key=lambda x: x[0][0])
    values = [r for r, _ in both]
    time = np.array([r[0] for r in values]) * (DAY // 2) * 1_000_000
    known = time + np.array([r[1] for r in values]) * (DAY // 2) * 1_000_000
    evidence = (np.array([r[2] for r in values]), *np.array([r[3] for r in values]).T.copy())
    found = in_window(pl.Series([name for _, name in both]), time, known, evidence, LENGTH, CHANCE)
    for name, own in (("a", rows), ("b", others)):
        expected = [enumerated(own, i) for i in range(len(own))]
        for p, e in zip(found[[n == name for _, n in both]], expected, strict=True):
            if e is None:
                break  # what the rules exclude
            assert p == pytest.approx(e, abs=1e-12)


def test_all_three_rules_by_hand():
    """One payment each on days 0 and 8; chances of a terminal 2 in 10,000 and of a customer 3 in 5,000 a day."""
    rows = pl.DataFrame({"payer_id": ["1", "1"], "payee_id": ["7", "7"], "amount": [60.01, 150.0], "scenario": [0, 0]}).with_columns(
        event_time=pl.datetime(2018, 4, pl.Series([1, 9]), 12, time_zone="UTC")
    )
    payments, labels = labelled(rows)
    means = pl.DataFrame({"payer_id": ["1"], "mean": [60.0]})
    found = oracle(payments, labels, means)
    terminal, r = 1 - (1 - 2e-4) ** 8, stolen_ratio(np.array([150.0]), np.array([60.0]))[0]
    began_first = 6e-4 * 2 / 3 / (6e-4 * 2 / 3 + 1 - 6e-4)  # on day 0, and not seen there
    window = 1 - (1 - began_first) * (1 - 6e-4) ** 8
    stolen = window / 3 * r / (window / 3 * r + 1 - window / 3)
    assert found["terminal"].to_list() == pytest.approx([2e-4, terminal])
    assert found["stolen"].to_list() == pytest.approx([0, stolen])
    assert found["score"][1] == pytest.approx(1 - (1 - terminal) * (1 - stolen))
    large = oracle(payments.with_columns(amount=pl.lit(220.01)), labels, means)
    assert large["score"].to_list() == [1, 1]
    unknown = oracle(payments, labels.clear(), means.clear())  # nothing is known of the customer, nor of the first payment
    assert unknown["terminal"][1] == pytest.approx(1 - (1 - 2e-4) ** 9)


def test_payments_out_of_order_are_refused():
    rows, labels = labelled(simulate(TINY, 0))
    with pytest.raises(ValueError, match="not in time order"):
        oracle(rows.reverse(), labels, mean_amounts(rows), TINY)


# as of


@pytest.mark.parametrize("whole_cents", [True, False])
def test_the_oracle_sees_nothing_that_is_not_known(whole_cents):
    rows, labels = labelled(simulate(TINY, 1), days=3.0)
    means = mean_amounts(rows)
    tables = check(rows.drop("scenario", "is_fraud"), labels.drop("scenario"))

    def subject(payments, labels):
        """The auditor flips labels: a scenario that fits."""
        rule = pl.when(~pl.col("is_fraud")).then(0).when(FRAUD).then("scenario").otherwise(2 + pl.col("payment_id").hash() % 2)
        return oracle(payments, labels.with_columns(scenario=rule.cast(pl.Int8)), means, TINY, whole_cents)

    assert audit(subject, (tables.payments, labels), cuts=8) == []
    early = labels.with_columns(pl.col("known_at") - delay(3))
    leaks = audit(lambda p, lab: subject(p, lab.with_columns(pl.col("known_at") - delay(3))), (tables.payments, labels), effort=0, cuts=8)
    assert {leak.column for leak in leaks} >= {"score", "terminal"}
    assert not subject(tables.payments, early).equals(subject(tables.payments, labels))


def test_the_rest_of_the_world_changes_nothing():
    rows, labels = labelled(simulate(SMALL, 2))
    means, half = true_means(SMALL, 2), len(rows) // 2
    until = rows["event_time"][half - 1]
    known = labels.filter(pl.col("known_at") < until)
    whole = oracle(rows, labels, means, SMALL)[:half]
    assert oracle(rows[:half], known, means, SMALL).equals(whole)
    assert not oracle(rows[:half], known.filter(pl.col("known_at") < until - pl.duration(days=20)), means, SMALL).equals(whole)


# the best


def bins(rows: pl.DataFrame, score: str) -> pl.DataFrame:
    """A row a world and bin of the score: expected frauds and frauds."""
    level = np.digitize(rows[score], [0.015, 0.03, 0.1, 0.3, 0.6, 0.9, 0.99])
    return rows.with_columns(level=level).group_by("level").agg(pl.len(), expected=pl.col(score).sum(), frauds=FRAUD.sum()).sort("level")


def test_the_oracle_is_calibrated(worlds):
    """Within .1 of the expected number in each bin, or four standard deviations of it where that is more; a wrong chance is seen."""
    found = bins(pl.concat(worlds), "score")
    assert len(found) == 8
    allowed = pl.max_horizontal(0.1 * pl.col("expected"), 4 * pl.col("expected").sqrt())
    assert found.select(((pl.col("frauds") - pl.col("expected")).abs() < allowed).all()).item()
    rows, labels = labelled(simulate(SMALL, 0))
    wrong = oracle(rows, labels, true_means(SMALL, 0), replace(SMALL, compromised_terminals=3))
    off = bins(rows.join(wrong, "payment_id", maintain_order="left").tail(len(worlds[0])), "score")
    assert not off.select(((pl.col("frauds") - pl.col("expected")).abs() < allowed).all()).item()


def log_loss(fraud: np.ndarray, log_odds: np.ndarray) -> float:
    return float(np.mean(np.logaddexp(0, np.where(fraud, -log_odds, log_odds))))


def corrected(train: pl.DataFrame, test: pl.DataFrame, score: str, columns: list[str]) -> float:
    """Relative gain in log loss on `test` of boosted trees that start from `score` and may correct it by `columns`."""

    def prepared(rows):
        given = rows[score].clip(1e-9, 1 - 1e-9).to_numpy()
        return rows.select(pl.col(columns).cast(pl.Float64)).to_numpy(), rows["is_fraud"].to_numpy(), np.log(given / (1 - given))

    (x, y, start), (x_test, y_test, start_test) = prepared(train), prepared(test)
    options = {"objective": "binary", "learning_rate": 0.05, "num_leaves": 7, "min_data_in_leaf": 300, "verbose": -1, "num_threads": 1}
    trees = lgb.train(options, lgb.Dataset(x, y.astype(float), init_score=start), 40)
    before = log_loss(y_test, start_test)
    return 1 - log_loss(y_test, start_test + trees.predict(x_test, raw_score=True)) / before


def test_trees_that_know_the_features_cannot_mend_it(worlds):
    """Neither from amounts and features nor from the score itself; where the oracle was told less, they can."""
    columns = [*resolve("features", "handbook_strict").names, "amount", "last_digit"]
    train, test = pl.concat(worlds[:4]), pl.concat(worlds[4:])
    assert corrected(train, test, "score", [*columns, "score", "terminal", "stolen"]) < 0.01
    assert corrected(train, test, "continuous", columns) > 0.01
    assert corrected(train, test, "late", columns) > 0.1


def test_no_score_ranks_better(worlds):
    rows = pl.concat([w.with_columns(payment_id=pl.format("{}:{}", "seed", "payment_id")) for w in worlds[:3]])
    best = {"auc": auc(rows), "ap": ap(rows)}
    for other in ("continuous", "late", "terminal", "stolen", "amount"):
        scored = rows.with_columns(score=other)
        assert auc(scored) < best["auc"]
        assert ap(scored) < best["ap"]


# cards, and what is decidable


def test_a_card_is_as_suspect_as_its_payments_of_the_day_together():
    times = pl.datetime(2024, 1, pl.Series([1, 1, 1, 2]), pl.Series([1, 2, 3, 1]), time_zone="UTC", time_unit="us")
    rows = pl.DataFrame({"payer_id": ["a", "a", "b", "a"], "score": [0.5, 0.2, 1.0, 0.1]}).with_columns(event_time=times)
    assert of_card(rows).to_list() == pytest.approx([0.5, 0.6, 1.0, 0.1])


def test_every_fraud_has_one_level():
    edges = [0.0, 0.049, 0.05, 0.49, 0.5, 0.98, 0.99, 1.0]
    rows = pl.DataFrame({"scenario": [3] * 8 + [2, 0], "score": [*edges, 0.7, 0.7]})
    table = decidable(rows)
    assert table.rows() == [("2", 1, 0, 1, 0, 0), ("3", 8, 2, 2, 2, 2), ("all", 9, 2, 3, 2, 2)]
    assert table.columns[2:] == list(LEVELS)


# the flow, and the published data


def test_the_flow_runs_on_its_defaults(tmp_path):
    """In a lab of its own; its scores have the columns of a trained model's, and give the metrics that it records."""
    command = [Path(sys.executable).parent / "fraudlab", "run", "oracle"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"FRAUDLAB_RUNS": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (tmp_path / "oracle").glob("[0-9]*")
    metrics = json.loads((folder / "result.json").read_text())["metrics"]
    scores = pl.read_parquet(folder / "scores.parquet")
    assert {"payment_id", "event_time", "payer_id", "amount", "is_fraud", "part", "score", "fold", "scenario"} <= set(scores.columns)
    folds = [scores.filter(part="test", fold=number) for number in range(2)]
    assert [metrics["fold0.ap"], metrics["fold1.ap"]] == [ap(fold) for fold in folds]
    assert metrics["oracle.ap"] == pytest.approx(np.mean([ap(fold) for fold in folds]))
    assert metrics["oracle.ap.std"] == pytest.approx(np.std([ap(fold) for fold in folds]))
    assert metrics["test_rows"] == sum(map(len, folds)) < len(scores)
    assert metrics["rule_all.frauds"] == sum(metrics[f"rule_all.{level}"] for level in LEVELS) == metrics["test_frauds"]


def test_the_recorded_numbers_of_the_published_data():
    file = str(shared("handbook_raw.parquet").resolve())
    recorded = json.loads((ROOT / "docs" / "results" / "handbook_oracle.json").read_text())["metrics"]
    rows = handbook_file.read(file)
    means = mean_amounts(rows)
    rows = rows.filter(pl.col("event_time") < pl.datetime(2018, 8, 15, time_zone="UTC"))
    labels = rows.select("payment_id", "is_fraud", "scenario", known_at=pl.col("event_time") + delay(7))
    scores = rows.join(oracle(rows, labels, means, handbook.World()), "payment_id", maintain_order="left")
    for number, fold in enumerate(backtest(rows, labels, Backtest("2018-07-25", folds=4))):
        test = scores[fold.test]
        found = {"auc": auc(test), "ap": ap(test), "cp100": card_precision(test.with_columns(of_card(test)))}
        for name, value in found.items():
            assert value == pytest.approx(recorded[f"fold{number}.{name}"], abs=1e-6)
