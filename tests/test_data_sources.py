"""Sources: the simulated world keeps its rules and its rows, the published files are read to the last row."""

import hashlib
from datetime import UTC, date, datetime

import numpy as np
import polars as pl
import pytest
from conftest import ROOT, shared

from fraudlab.data.contract import check, profile
from fraudlab.data.sources.handbook import World, by_rule, handbook, simulate
from fraudlab.data.sources.handbook_file import handbook_file, read
from fraudlab.data.sources.mapped import mapped
from fraudlab.data.sources.ulb import ulb

SMALL = {"customers": 300, "terminals": 600, "days": 40, "compromised_terminals": 1, "compromised_customers": 2}


def test_same_seed_same_rows_for_ever():
    """The golden rows: a change here changes every simulated result, and must be meant."""
    tables = handbook(**SMALL, seed=7)
    text = (
        tables.payments.join(tables.labels, "payment_id", maintain_order="left")
        .with_columns(pl.col("event_time", "known_at").cast(pl.Int64))
        .write_csv()
    )
    assert hashlib.sha256(text.encode()).hexdigest() == "4cba24c4675354e9627e4d02d6559fadd2ea9f78b77e75bb79d7bd892fc91403"
    assert not handbook(**SMALL, seed=8).payments.equals(tables.payments)


def test_a_longer_world_has_the_same_people():
    short, long = (simulate(World(**SMALL | {"days": d}), seed=3) for d in (20, 40))
    honest = (rows.filter(pl.col("scenario") == 0).group_by("payer_id").agg(pl.col("amount").mean(), pl.len()) for rows in (short, long))
    a, b = (means.filter(pl.col("len") > 30) for means in honest)
    both = a.join(b, "payer_id")
    assert np.corrcoef(both["amount"], both["amount_right"])[0, 1] > 0.9


def test_frauds_leave_honest_payments_as_they_are():
    calm = simulate(World(**SMALL | {"compromised_terminals": 0, "compromised_customers": 0}), seed=5)
    rough = simulate(World(**SMALL), seed=5)
    assert calm.drop("amount", "scenario").equals(rough.drop("amount", "scenario"))
    untouched = (rough["scenario"] != 3).to_numpy()
    assert calm.filter(untouched)["amount"].equals(rough.filter(untouched)["amount"])
    before, after = (rows.filter(~untouched)["amount"] * 100 for rows in (calm, rough))
    assert all(round(a) in (5 * round(b), 25 * round(b)) for a, b in zip(after, before, strict=True))
    assert set(calm["scenario"]) <= {0, 1}


def test_the_rules_of_the_world():
    rows = simulate(World(customers=400, terminals=800, days=60, compromised_terminals=1, compromised_customers=1), seed=1)
    assert (rows.filter(pl.col("scenario") == 1)["amount"] > 220).all()
    assert (rows.filter(pl.col("amount") > 220)["scenario"] > 0).all()
    assert rows["event_time"].is_sorted()
    assert rows["event_time"].min() >= datetime(2018, 4, 1, tzinfo=UTC)
    assert rows["event_time"].max() < datetime(2018, 5, 31, tzinfo=UTC)
    assert (rows["amount"] >= 0).all()
    assert rows["amount"].equals(rows["amount"].round(2))


def test_all_payments_at_a_compromised_terminal_are_frauds_for_28_days():
    rows = simulate(World(customers=2000, terminals=2000, days=60, radius=200.0, compromised_terminals=1, compromised_customers=0), seed=1)
    day = (pl.col("event_time") - datetime(2018, 4, 1, tzinfo=UTC)).dt.total_days()
    theirs = rows.select("payee_id", "scenario", day=day)
    spans = theirs.filter(scenario=2).group_by("payee_id").agg(first=pl.col("day").min(), last=pl.col("day").max())
    whole = spans.filter(pl.col("first") < 30, pl.col("last") - pl.col("first") < 28)  # drawn once, and not cut off by the end
    assert len(whole) > 20
    assert (whole["last"] - whole["first"]).median() == 27
    inside = theirs.join(whole, "payee_id").filter(pl.col("day").is_between("first", "last"))
    assert (inside["scenario"] > 0).all()


def test_a_third_of_a_stolen_customers_payments_are_frauds():
    """One customer is stolen on each of the days; where all are, a third of all payments are frauds from the first day on."""
    rows = simulate(World(customers=40, terminals=4000, days=10, compromised_terminals=0, compromised_customers=40), seed=1)
    last = rows.filter(pl.col("event_time").dt.date() == date(2018, 4, 10))
    assert (last["scenario"] == 3).mean() > 0.8  # drawn ten times over, each time a third (rounded down)
    once = simulate(World(customers=40, terminals=4000, days=1, compromised_terminals=0, compromised_customers=40), seed=1)
    expected = once.group_by("payer_id").len().select((pl.col("len") // 3).sum()).item()
    assert (once["scenario"] == 3).sum() == expected > 10


def test_customers_pay_near_home():
    """Within the radius, evenly: no customer uses more terminals than lie in the circle, and all that lie there are used alike."""
    rows = simulate(World(customers=50, terminals=10_000, days=183, compromised_terminals=0, compromised_customers=0), seed=2)
    used = rows.group_by("payer_id").agg(pl.col("payee_id").n_unique(), pl.len()).filter(pl.col("len") > 400)
    assert used["payee_id"].min() > 15
    assert used["payee_id"].max() < 130  # pi 25 of 10,000 terminals are 79 on average
    busiest = rows.filter(payer_id=rows["payer_id"].mode()[0])["payee_id"].value_counts()["count"].to_numpy()
    expected = busiest.mean()
    assert ((busiest - expected) ** 2 / expected).sum() < len(busiest) + 5 * np.sqrt(2 * len(busiest))


def test_a_full_world_is_like_the_published_one():
    """Within what chance does to a world of 5,000 customers."""
    published = profile(handbook_file(path=str(shared("handbook_raw.parquet").resolve()))) | by_rule(
        read(str(shared("handbook_raw.parquet").resolve()))
    )
    ours = profile(handbook(seed=0)) | by_rule(simulate(seed=0))
    assert (published["payments"], published["payers"], published["payees"], published["frauds"]) == (1_754_155, 4_990, 10_000, 14_681)
    for name in (
        "payments",
        "frauds",
        "fraud_rate",
        "payers",
        "payees",
        "mean_amount",
        "median_amount",
        "night_share",
        "fraud_payers",
        "frauds_by_rule_2",
        "frauds_by_rule_3",
    ):
        assert ours[name] == pytest.approx(published[name], rel=0.05), name
    for name in ("mean_fraud_amount", "frauds_by_rule_1", "mean_amount_by_rule_1", "mean_amount_by_rule_2", "mean_amount_by_rule_3"):
        assert ours[name] == pytest.approx(published[name], rel=0.12), name


def test_the_published_file_by_hand_and_by_mapping(monkeypatch):
    monkeypatch.chdir(ROOT)
    path = shared("handbook_raw.parquet").resolve()
    ours, theirs = handbook_file(path=str(path)), mapped(mapping="params/mappings/handbook.yaml", path=str(path))
    assert ours.payments.equals(theirs.payments)
    assert ours.labels.equals(theirs.labels)
    raw = pl.read_parquet(path)
    assert (ours.payments["amount"].to_numpy() == raw["TX_AMOUNT_CENTS"].to_numpy() / 100).all()
    assert (ours.payments["event_time"].to_physical().to_numpy() == raw["TX_DATETIME"].dt.timestamp("us").to_numpy()).all()
    assert ours.quarantined.is_empty()


def test_ulb_is_read_to_the_last_row():
    path = shared("ulb_creditcard.parquet").resolve()
    tables, raw = ulb(path=str(path)), pl.read_parquet(path)
    assert not tables.entities
    assert len(tables.payments) == 284_807
    assert tables.labels["is_fraud"].sum() == 492
    assert tables.payments["V28"].to_numpy().astype(np.float32).tolist() == raw["V28"].to_list()
    assert (tables.payments["amount"].to_numpy() == raw["Amount_cents"].to_numpy() / 100).all()
    again = check(tables.payments, tables.labels, tables.fields, tables.entities)
    assert again.quarantined.is_empty()


def test_s_ffsd_by_mapping(monkeypatch):
    monkeypatch.chdir(ROOT)
    tables = mapped(mapping="params/mappings/s_ffsd.yaml", path=str(shared("s_ffsd.csv").resolve()))
    assert (len(tables.payments), len(tables.labels), tables.labels["is_fraud"].sum()) == (77_881, 29_643, 5_256)
    assert [f.name for f in tables.fields] == ["location", "type"]
    assert tables.quarantined.is_empty()
