"""What a feature set is: plain data with a stable hash, fitted as of a moment, and refused where it cannot be computed."""

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import polars as pl
import pytest
from features_reference import EVERYTHING, MIXED, Decay, Encoded, FeatureSet, Risk, Row, Since, Window, reference
from hypothesis import given, settings
from hypothesis import strategies as st

from fraudlab.features.definitions import check_table, describe, diff, duration, fit, need_fitted, needs

START = datetime(2026, 1, 1, tzinfo=UTC)
TIME = pl.Datetime("us", "UTC")
COUNT = Window("w", "payer", "count", "1d")


def table(n=6, **columns):
    names = pl.Series([f"p{i}" for i in range(n)])
    times = pl.Series([START + timedelta(days=i) for i in range(n)], dtype=TIME)
    plain = {
        "payment_id": names,
        "event_time": times,
        "payer_id": ["a"] * n,
        "payee_id": ["x", "y"] * (n // 2),
        "amount": [1.0] * n,
        "currency": ["EUR"] * n,
    }
    return pl.DataFrame(plain | columns)


def fraud_labels(days, n=6):
    """Every payment is a fraud, known `days` after it."""
    return table(n).select("payment_id", is_fraud=pl.lit(True), known_at=pl.col("event_time") + timedelta(days=days))


@pytest.mark.parametrize("features", [EVERYTHING, MIXED, FeatureSet()])
def test_a_set_comes_back_from_json(features):
    back = FeatureSet.from_dict(json.loads(json.dumps(features.to_dict())))
    assert back == features
    assert back.hash == features.hash
    assert not len(diff(features, back))


def test_the_hash_is_that_of_the_canonical_json():
    # bundles carry it: it may change only with the meaning of a definition
    assert FeatureSet((COUNT,)).hash == "92711b3c3093015ad3400a5bf2c4da442d41f60c2f947e79bab50e618c1a4cd8"


@pytest.mark.parametrize("i", range(0, len(EVERYTHING.features), 7))
def test_every_option_moves_the_hash_and_shows_in_the_diff(i):
    f = EVERYTHING.features[i]
    other = replace(f, name=f"{f.name}'") if not hasattr(f, "empty") else replace(f, empty=-7.0)
    changed = FeatureSet((*EVERYTHING.features[:i], other, *EVERYTHING.features[i + 1 :]))
    assert changed.hash != EVERYTHING.hash
    found = diff(EVERYTHING, changed).rows()
    if hasattr(f, "empty"):
        assert found == [(f.name, "empty", str(f.empty), "-7.0")]
    else:
        assert [(r[0], r[1]) for r in found] == [(f.name, "removed"), (other.name, "added")]


def test_order_is_part_of_a_set():
    assert FeatureSet(EVERYTHING.features[::-1]).hash != EVERYTHING.hash


def test_every_feature_has_a_unit():
    about = describe(EVERYTHING)
    assert about["name"].to_list() == EVERYTHING.names
    assert about["unit"].str.len_chars().min() > 0


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 10**6), st.sampled_from(["us", "ms", "s", "m", "h", "d", "w"]))
def test_durations_are_microseconds(n, unit):
    parts = {"us": {"microseconds": n}, "ms": {"milliseconds": n}, "s": {"seconds": n}, "m": {"minutes": n}}
    parts |= {"h": {"hours": n}, "d": {"days": n}, "w": {"weeks": n}}
    assert duration(f"{n}{unit}") == timedelta(**parts[unit]) // timedelta(microseconds=1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: replace(COUNT, length="0d"), "'0d': it must be longer than 0"),
        (lambda: replace(COUNT, length="1M"), "'1M': write a number and a unit"),
        (lambda: replace(COUNT, delay="-1s"), "would see the future"),
        (lambda: replace(COUNT, length="all", closed="right"), "Leave closed='left'"),
        (lambda: replace(COUNT, closed="both"), "'both' is no choice of 'closed'"),
        (lambda: replace(COUNT, entity="payer+"), "join different names"),
        (lambda: replace(COUNT, take="distinct"), "give the category in 'of'"),
        (lambda: replace(COUNT, value="x"), "nothing else does"),
        (lambda: replace(COUNT, take="distinct", of="payee", length="all"), "no bounded state holds"),
        (lambda: Risk("r", "payee", "rate", "7d", prior_rate=2), "rate from 0 to 1"),
        (lambda: Decay("d", "payer", "sum", "0s"), "half-life of 'd' is '0s'"),
        (lambda: Since("s", "payer", "same"), "needs the field in 'of'"),
        (lambda: Row("h", "hour", "Mars/Base"), "is no time zone"),
        (lambda: Encoded("e", "payee", "frequency", prior_weight=-1), "must be 0 or more"),
        (lambda: FeatureSet((COUNT, COUNT)), "Two features are called 'w'"),
        (lambda: FeatureSet.from_dict([{"kind": "Window", "name": "w", "span": "1d"}]), "'span' is no option of a Window"),
    ],
)
def test_definitions_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message.replace("+", r"\+")):
        make()


SUM, PLACE = FeatureSet((replace(COUNT, take="sum"),)), FeatureSet((Window("w", "country", "count", "1d"),))


@pytest.mark.parametrize(
    ("features", "payments", "message"),
    [
        (PLACE, table(), "read 'country'"),
        (PLACE, table(country=[1.5] * 6), "'country' is Float64: a category or key"),
        (SUM, table(amount=["1"] * 6), "'amount' is String: .* must be a number"),
        (SUM, table(payer_id=[None, *"abcde"]), "payer_id is null in 1 of 6 payments"),
        (SUM, table(amount=[None, *range(5)]), "amount is null or NaN in 1 of 6 payments"),
        (SUM, table(amount=[float("nan")] * 2 + [1.0] * 4), "amount is null or NaN in 2 of 6 payments"),
        (SUM, table(currency=[None, "EUR", "JPY"] * 2), "payments are in EUR, JPY. Use an entity with the currency"),
        (SUM, table(currency=["EUR", "JPY"] * 3), "payments are in EUR, JPY. Use an entity with the currency"),
        (SUM, table().reverse(), "not in time order"),
        (SUM, table().with_columns(pl.col("event_time").dt.replace_time_zone(None)), "must be in UTC"),
        (SUM, table().with_columns(pl.col("event_time").cast(pl.Datetime("ms", "UTC"))), "in microseconds"),
    ],
)
def test_tables_that_do_not_fit_are_refused(features, payments, message):
    with pytest.raises(ValueError, match=message):
        check_table(features, payments)


def test_what_a_set_does_not_read_may_be_anything():
    check_table(PLACE, table(country=[None, *"abcde"], payer_id=[None] * 6, amount=["?"] * 6).drop("currency"))
    check_table(FeatureSet((replace(COUNT, entity="payer+currency", take="sum"),)), table(currency=["EUR", "JPY"] * 3))
    assert needs(FeatureSet((COUNT,))) == (["payer_id"], [])


ENCODED = FeatureSet((Encoded("often", "payee", "frequency"), Encoded("risky", "payee", "fraud_rate", prior_weight=0.0), COUNT))


@given(st.integers(1, 5), st.integers(0, 6))
@settings(max_examples=30, deadline=None)
def test_fitting_sees_what_was_known_before_until(day, delay):
    until = START + timedelta(days=day)
    payments, labels = table(), fraud_labels(delay)
    fitted = fit(ENCODED, payments, labels, until)
    seen, known = payments.filter(pl.col("event_time") < until), labels.filter(pl.col("known_at") < until)
    later = payments.with_columns(payee_id=pl.when(pl.col("event_time") < until).then("payee_id").otherwise(pl.lit("z")))
    other = labels.with_columns(is_fraud=pl.col("is_fraud") & (pl.col("known_at") < until))
    assert fitted == fit(ENCODED, later, other, until) == fit(ENCODED, seen, known, until)
    often, risky, count = fitted.features
    assert dict(often.values) == pytest.approx({k: n / len(seen) for k, n in seen["payee_id"].value_counts().iter_rows()})
    judged = set(seen.join(known, on="payment_id")["payee_id"])
    assert dict(risky.values) == {
        k: float(bool(judged)) for k in seen["payee_id"].unique()
    }  # all are frauds; the unjudged get the overall rate
    assert count == COUNT
    need_fitted(fitted)
    with pytest.raises(ValueError, match="The encoding 'often' has no values yet"):
        need_fitted(ENCODED)


def test_payments_before_the_fit_do_not_get_its_values():
    fitted = fit(FeatureSet(ENCODED.features[:1]), table(), fraud_labels(1), START + timedelta(days=3))
    assert reference(fitted, table(), fraud_labels(1))["often"].is_nan().to_list() == [True] * 3 + [False] * 3
    with pytest.raises(ValueError, match=r"there are none\. Start the training period later"):
        fit(ENCODED, table(), fraud_labels(1), START)
