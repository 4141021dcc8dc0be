"""Back-tests: the published counts, and no row that a fold may not have."""

from datetime import UTC, datetime, timedelta

import numpy as np
import polars as pl
import pytest
from conftest import shared
from hypothesis import given, settings
from hypothesis import strategies as st

from fraudlab.core.registry import resolve
from fraudlab.data.splits import Backtest, backtest, summary, time_split

START = datetime(2026, 3, 1, tzinfo=UTC)


def test_published_handbook_split():
    tables = resolve("source", "handbook_file")(path=str(shared("handbook_raw.parquet").resolve()))
    folds = backtest(tables.payments, tables.labels, Backtest("2018-07-25", folds=4))
    rows = summary(folds, tables.payments, tables.labels).rows(named=True)
    first = rows[0]
    assert (first["train_rows"], first["train_frauds"]) == (67_240, 598)
    assert (first["test_rows"], first["test_frauds"]) == (58_264, 385)
    assert (first["period_rows"], first["test_compromised"], first["train_not_known"]) == (67_080, 8_816, 0)
    assert [f.train_start.date().isoformat() for f in folds] == ["2018-07-25", "2018-07-18", "2018-07-11", "2018-07-04"]
    assert rows[2]["period_rows"] == 67_240  # the test period of the third fold is the train period of the first
    assert (rows[3]["test_rows"], rows[3]["test_frauds"]) == (57_931, 351)
    kept = backtest(tables.payments, tables.labels, Backtest("2018-07-25", remove_compromised=False))[0]
    assert np.array_equal(kept.test, kept.period)


def test_published_ulb_split():
    tables = resolve("source", "ulb")(path=str(shared("ulb_creditcard.parquet").resolve()))
    fold = time_split(tables.payments, tables.labels)
    row = summary([fold], tables.payments, tables.labels).row(0, named=True)
    assert (row["train_rows"], row["test_rows"], row["test_frauds"]) == (227_845, 56_962, 75)
    assert row["train_not_known"] == 0


TYPES = {"payment_id": pl.String, "event_time": pl.Datetime("us", "UTC"), "payer_id": pl.String}
LABEL_TYPES = {"payment_id": pl.String, "is_fraud": pl.Boolean, "known_at": pl.Datetime("us", "UTC")}
# second, payer, label, seconds until it is known
made = st.tuples(st.integers(0, 12 * 86_400), st.sampled_from("abc"), st.sampled_from([True, False, None]), st.integers(0, 4 * 86_400))


def midnight(t: datetime) -> datetime:
    return t.replace(hour=0, minute=0, second=0, microsecond=0)


@settings(deadline=None, max_examples=40)
@given(st.lists(made, min_size=30, max_size=80), st.integers(0, 2))
def test_a_fold_equals_its_definition(rows, delay_days):
    """Row by row, in plain Python: periods, labels known in time, payers compromised before the day."""
    rows = sorted(rows, key=lambda r: r[0])
    at = [START + timedelta(seconds=s) for s, *_ in rows]
    known = [t + timedelta(seconds=r[3]) for t, r in zip(at, rows, strict=True)]
    payments = pl.DataFrame({"payment_id": [str(i) for i in range(len(rows))], "event_time": at, "payer_id": [r[1] for r in rows]}, TYPES)
    labels = pl.DataFrame({"payment_id": payments["payment_id"], "is_fraud": [r[2] for r in rows], "known_at": known}, LABEL_TYPES)
    start, end, test_start = (START + timedelta(days=d) for d in (1, 5, 5 + delay_days))
    test_end = test_start + timedelta(days=3)

    def compromised(i):
        return any(r[2] and r[1] == rows[i][1] and t >= start and k < midnight(at[i]) for t, k, r in zip(at, known, rows, strict=True))

    everyone = range(len(rows))
    train = [i for i in everyone if start <= at[i] < end and rows[i][2] is not None and known[i] < test_start]
    period = [i for i in everyone if test_start <= at[i] < test_end]
    test = [i for i in period if rows[i][2] is not None and not compromised(i)]
    protocol = Backtest("2026-03-02", train_days=4, delay_days=delay_days, test_days=3)
    shuffled = labels.sample(fraction=1, shuffle=True, seed=1)
    if midnight(at[0]) > start or midnight(at[-1]) + timedelta(days=1) < test_end or not train or not test:
        with pytest.raises(ValueError, match=r"needs payments from|has no payments to"):
            backtest(payments, shuffled, protocol)
        return
    (fold,) = backtest(payments, shuffled, protocol)
    assert (fold.train.tolist(), fold.test.tolist(), fold.period.tolist()) == (train, test, period)
    counts = summary([fold], payments, labels).row(0, named=True)
    assert counts["test_rows"] + counts["test_compromised"] + counts["test_not_labelled"] == counts["period_rows"]


def _hourly(days: int) -> tuple[pl.DataFrame, pl.DataFrame]:
    times = pl.datetime_range(START, START + timedelta(days=days), "1h", closed="left", time_unit="us", time_zone="UTC", eager=True)
    payments = pl.DataFrame({"payment_id": [str(i) for i in range(len(times))], "event_time": times, "payer_id": ["a"] * len(times)})
    return payments, payments.select("payment_id", is_fraud=pl.lit(False), known_at="event_time")


def test_ties_at_the_cut_go_to_the_test():
    payments, labels = _hourly(1)
    tied = payments.with_columns(event_time=pl.Series([*payments["event_time"][:18], *[payments["event_time"][18]] * 6]))
    fold = time_split(tied, labels.with_columns(known_at=tied["event_time"]), test_share=0.1)
    assert (len(fold.train), len(fold.test)) == (18, 6)


@pytest.mark.parametrize(
    ("protocol", "text"),
    [
        (Backtest("2026-02-27"), "Fold 1 needs payments from 2026-02-27"),
        (Backtest("2026-03-01", folds=2), "Fold 2 needs payments from 2026-02-22"),
    ],
)
def test_a_fold_beyond_the_payments_is_refused(protocol, text):
    with pytest.raises(ValueError, match=text):
        backtest(*_hourly(21), protocol)


def test_payments_out_of_order_are_refused():
    payments, labels = _hourly(2)
    with pytest.raises(ValueError, match="not in time order"):
        time_split(payments.reverse(), labels)


def test_labels_that_come_too_late_are_not_learned_from():
    payments, labels = _hourly(3)
    late = labels.with_columns(known_at=pl.col("known_at") + timedelta(hours=5))
    fold = time_split(payments, late, test_share=1 / 3)
    assert fold.train.max() == fold.test.min() - 6  # five hours late, and strictly before the cut
    with pytest.raises(ValueError, match=r"The train period .* has no payments to learn from"):
        time_split(payments, labels.with_columns(known_at=pl.col("known_at") + timedelta(days=9)))


def test_compromised_is_strict_at_both_ends():
    """A fraud of the train period's first instant counts; one known at midnight sharp is not known before that day."""
    payments, labels = _hourly(10)
    fraud = pl.col("payment_id") == "24"  # midnight of the second day, when training starts
    protocol = Backtest("2026-03-02", train_days=2, delay_days=1, test_days=3)
    for late, kept in [(timedelta(days=4), 48), (timedelta(days=4, microseconds=-1), 24)]:
        told = labels.with_columns(is_fraud=fraud, known_at=pl.when(fraud).then(pl.col("known_at") + late).otherwise("known_at"))
        assert len(backtest(payments, told, protocol)[0].test) == kept
