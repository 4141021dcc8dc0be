"""Payers who arrive late: what they paid before is left out, nobody else's payments are, and labels follow."""

import polars as pl
import pytest

from fraudlab.core.registry import resolve
from fraudlab.data.contract import instant
from fraudlab.data.newcomers import Newcomers, arrive

TABLES = resolve("source", "handbook")(customers=80, terminals=100, radius=40.0, days=40)
LATE = Newcomers("2018-04-15", "2018-04-25", share=0.25)


def test_a_share_of_the_payers_starts_within_the_days_and_the_others_are_as_they_were():
    there = arrive(TABLES, LATE).payments
    first = lambda frame: frame.group_by("payer_id").agg(first=pl.col("event_time").min(), count=pl.len())  # noqa: E731
    both = first(TABLES.payments).join(first(there), "payer_id", "left", suffix="_after")
    late = both.filter(pl.col("first_after").is_null() | (pl.col("first_after") > pl.col("first")))
    assert 0.15 * len(both) < len(late) <= round(0.25 * len(both))
    assert (late["first_after"].drop_nulls() >= instant(LATE.since)).all()
    same = both.join(late, "payer_id", "anti")
    assert (same["count"] == same["count_after"]).all()


def test_what_is_left_out_is_earlier_than_what_is_left_and_labels_follow():
    left = arrive(TABLES, LATE)
    out = TABLES.payments.join(left.payments, "payment_id", "anti")
    assert (out["event_time"] < instant(LATE.until)).all()
    last = out.group_by("payer_id").agg(last=pl.col("event_time").max())
    kept = left.payments.join(last, "payer_id")
    assert (kept["event_time"] > kept["last"]).all()
    assert set(left.labels["payment_id"]) == set(TABLES.labels["payment_id"]) & set(left.payments["payment_id"])
    assert len(out) + len(left.payments) == len(TABLES.payments)


def test_an_equal_seed_lets_the_same_arrive():
    ids = lambda **options: arrive(TABLES, Newcomers("2018-04-15", "2018-04-25", **options)).payments["payment_id"]  # noqa: E731
    assert ids().equals(ids())
    assert not ids().equals(ids(seed=1))


def test_days_in_the_wrong_order_and_payments_of_nobody_are_refused():
    with pytest.raises(ValueError, match="since must be the earlier one"):
        Newcomers("2018-04-25", "2018-04-15")
    with pytest.raises(ValueError, match=r"share = 1.5"):
        Newcomers("2018-04-15", "2018-04-25", share=1.5)
    nobody = TABLES._replace(payments=TABLES.payments.with_columns(payer_id=pl.lit(None, pl.String)))
    with pytest.raises(ValueError, match="have no payer_id"):
        arrive(nobody, LATE)
