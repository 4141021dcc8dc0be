"""The contract: nothing is lost, every good row is good, every bad row says why."""

import json
from datetime import UTC, datetime, timedelta

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fraudlab.core.registry import discover
from fraudlab.data.contract import LARGEST, TIME, Field, Labels, Payments, Tables, check, profile, reasons, sift, sources

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
ROW = {"payment_id": "a", "event_time": NOON, "payer_id": "ann", "payee_id": "shop", "amount": 12.5, "currency": "EUR"}


def payments(*changes: dict) -> pl.DataFrame:
    rows = [ROW | {"payment_id": str(i)} | c for i, c in enumerate(changes)]
    return pl.DataFrame(rows, pl.Schema(Payments))


def labels(*rows: tuple) -> pl.DataFrame:
    return pl.DataFrame(rows, pl.Schema(Labels), orient="row")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"payment_id": None}, "payment_id: missing"),
        ({"payment_id": ""}, "payment_id: empty"),
        ({"payment_id": "0"}, "payment_id: repeats an earlier row"),
        ({"event_time": None}, "event_time: missing"),
        ({"event_time": datetime(1969, 12, 31, tzinfo=UTC)}, "event_time: not between 1970 and 2200"),
        ({"event_time": datetime(2200, 1, 1, tzinfo=UTC)}, "event_time: not between 1970 and 2200"),
        ({"payer_id": None}, "payer_id: missing"),
        ({"payee_id": ""}, "payee_id: empty"),
        ({"amount": None}, "amount: missing"),
        ({"amount": -0.01}, "amount: negative"),
        ({"amount": float("nan")}, "amount: not a number"),
        ({"amount": float("inf")}, "amount: infinite"),
        ({"amount": 0.00001}, "amount: more than 4 decimals"),
        ({"amount": 2 * LARGEST}, "amount: above 10^12"),
        ({"currency": None}, "currency: missing"),
        ({"currency": "EU"}, "currency: not three capital letters"),
        ({"currency": "EUR\n"}, "currency: not three capital letters"),
        ({"currency": "ÉUR"}, "currency: not three capital letters"),
    ],
)
def test_each_rule_has_its_reason(change, reason):
    good, held = sift("payments", payments({}, change), Payments)
    assert good["payment_id"].to_list() == ["0"]
    assert held["reason"].to_list() == [reason]
    assert held["row"].to_list() == [1]
    assert json.loads(held["raw"][0])["currency"] == change.get("currency", "EUR")


@pytest.mark.parametrize("amount", [0.0, 0.0001, 0.3, 57.16, 1234567.8901, 99999999999.99, LARGEST])
def test_amounts_that_are_amounts(amount):
    good, _ = sift("payments", payments({"amount": amount}), Payments)
    assert len(good) == 1


def test_every_amount_of_cents_passes():
    cents = pl.int_range(0, 2_000_000, eager=True)
    frame = pl.DataFrame({"payment_id": cents.cast(pl.String), "amount": pl.Series(cents.to_numpy() / 100)}).with_columns(
        event_time=pl.lit(NOON, TIME), payer_id=pl.lit("a"), payee_id=pl.lit("b"), currency=pl.lit("EUR")
    )
    assert sift("payments", frame, Payments)[1].is_empty()


def test_fields_may_be_missing_but_not_odd():
    fields = (Field("age", "numeric"), Field("seen", "time"), Field("country", "categorical"), Field("first", "boolean"))
    frame = payments({}, {}, {}, {}).with_columns(
        age=pl.Series([None, float("nan"), float("inf"), 3.0]),
        seen=pl.Series([None, NOON, NOON, NOON.replace(year=1900)], dtype=TIME),
        country=pl.lit(None, pl.String),
        first=pl.lit(None, pl.Boolean),
    )
    tables = check(frame, labels(), fields)
    assert tables.payments["payment_id"].to_list() == ["0"]
    assert tables.quarantined["reason"].to_list() == ["age: not a number", "age: infinite", "seen: not between 1970 and 2200"]


def test_labels_are_checked_beside_their_payments():
    paid = payments({}, {"amount": -1}, {}, {})
    early = NOON - timedelta(seconds=1)
    told = labels(("0", True, NOON), ("0", False, NOON), ("1", True, NOON), ("9", True, NOON), ("2", True, early), ("3", None, None))
    tables = check(paid, told)
    assert tables.labels.rows() == [("0", True, NOON)]
    held = tables.quarantined.filter(table="labels")
    assert held["reason"].to_list() == [
        "payment_id: repeats an earlier row",
        "payment_id: its payment is in quarantine",
        "payment_id: no such payment",
        "known_at: before the payment",
        "known_at: missing",
    ]
    assert reasons(tables.quarantined)["rows"].sum() == 6


def test_without_entities_there_are_none():
    nobody = payments({}, {}).with_columns(payer_id=pl.Series([None, "ann"]), payee_id=pl.lit(None, pl.String))
    tables = check(nobody, labels(), entities=False)
    assert tables.quarantined["reason"].to_list() == ["payer_id: given by a source without entities"]
    assert "payers" not in profile(tables)


def test_payments_of_one_instant_keep_the_order_of_the_source():
    later = NOON + timedelta(days=1)
    tables = check(payments({"event_time": later}, {}, {"event_time": later}, {}), labels())
    assert tables.payments["payment_id"].to_list() == ["1", "3", "0", "2"]


messy = st.fixed_dictionaries(
    {
        "payment_id": st.none() | st.text(max_size=2),
        "event_time": st.none() | st.datetimes(datetime(1960, 1, 1), datetime(2210, 1, 1)).map(lambda d: d.replace(tzinfo=UTC)),
        "payer_id": st.none() | st.text(max_size=2),
        "payee_id": st.none() | st.text(max_size=2),
        "amount": st.none() | st.floats(),
        "currency": st.none() | st.sampled_from(["EUR", "eur", "EURO", ""]),
    }
)
told = st.tuples(st.none() | st.text(max_size=2), st.none() | st.booleans(), st.none() | st.just(NOON))


@settings(deadline=None, max_examples=60)
@given(st.lists(messy, max_size=12), st.lists(told, max_size=12))
def test_no_row_is_lost_and_good_rows_are_good(rows, known):
    paid, judged = pl.DataFrame(rows, pl.Schema(Payments)), labels(*known)
    tables = check(paid, judged)
    held = dict(tables.quarantined["table"].value_counts().iter_rows())
    assert len(tables.payments) + held.get("payments", 0) == len(paid)
    assert len(tables.labels) + held.get("labels", 0) == len(judged)
    assert tables.quarantined["reason"].str.len_chars().fill_null(0).min() != 0
    again = check(tables.payments, tables.labels)
    assert again.quarantined.is_empty()
    assert again.payments.equals(tables.payments)


def test_every_source_is_listed_with_its_options():
    listed = sources()
    assert set(listed["source"]) == set(discover("source"))
    assert listed.filter(source="handbook", option="customers").row(0)[2:4] == ("int", "5000")
    assert listed.filter(source="ulb", option="path")["default"].item() is None


@pytest.mark.parametrize("name", sorted(discover("source")))
def test_every_source_refuses_unknown_options(name):
    with pytest.raises(ValueError, match=rf"'customer' is no option of source '{name}'.*There are: "):
        discover("source")[name](customer=3)


def test_a_missing_option_is_named():
    with pytest.raises(ValueError, match="Source 'ulb' needs the option 'path'"):
        discover("source")["ulb"]()


def test_tables_is_the_contract_of_rooms():
    assert Tables._fields == ("payments", "labels", "quarantined", "fields", "entities")
