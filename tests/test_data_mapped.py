"""Bring your own data: every row of any file ends among the payments or in quarantine, and a wrong mapping says which part of it."""

import gzip
from datetime import UTC, date, datetime

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fraudlab.data.sources.mapped import mapped

BASIC = """\
event_time: when
payer_id: from
payee_id: to
amount: {amount}
currency: {{constant: EUR}}
{more}
"""


@pytest.fixture
def bring(lab):
    """Write a file and a mapping into the lab and read them."""

    def read(data, mapping: str, name: str = "data.csv"):
        (lab / "m.yaml").write_text(mapping, "utf8")
        if isinstance(data, pl.DataFrame):
            data.write_parquet(lab / name)
        else:
            (lab / name).write_bytes(data.encode() if isinstance(data, str) else data)
        return mapped(mapping="m.yaml", path=name)

    return read


def basic(amount: str = "amount", more: str = "") -> str:
    return BASIC.format(amount=amount, more=more)


def one(**values) -> str:
    row = {"when": "2026-03-01 12:00:05", "from": "ann", "to": "shop", "amount": "12.5"} | values
    return ",".join(row) + "\n" + ",".join(f'"{v}"' for v in row.values()) + "\n"


@pytest.mark.parametrize(
    ("time", "value", "expected"),
    [
        ("when", "2026-03-01", datetime(2026, 3, 1)),
        ("when", "2026-03-01 08:30", datetime(2026, 3, 1, 8, 30)),
        ("when", "2026-03-01T08:30:15.123456", datetime(2026, 3, 1, 8, 30, 15, 123456)),
        ("when", "2026-03-01 08:30:15Z", datetime(2026, 3, 1, 8, 30, 15)),
        ("when", "2026-03-01T08:30:15.5+02:00", datetime(2026, 3, 1, 6, 30, 15, 500000)),
        ("{column: when, zone: America/New_York}", "2026-07-01 08:00:00", datetime(2026, 7, 1, 12)),
        ("{column: when, format: '%d/%m/%Y'}", "25/12/2026", datetime(2026, 12, 25)),
        ("{column: when, format: '%d/%m/%y %I:%M %p'}", "25/12/26 01:05 PM", datetime(2026, 12, 25, 13, 5)),
        ("{column: when, format: '%Y-%m-%d %H:%M:%S %z'}", "2026-03-01 08:30:15 +0100", datetime(2026, 3, 1, 7, 30, 15)),
        ("{column: when, offset: seconds, start: 1970-01-01}", "1772353815", datetime(2026, 3, 1, 8, 30, 15)),
        ("{column: when, offset: milliseconds, start: 1970-01-01}", "1772353815001", datetime(2026, 3, 1, 8, 30, 15, 1000)),
        ("{column: when, offset: days, start: '2026-03-01T06:00:00+01:00'}", "1.5", datetime(2026, 3, 2, 17)),
    ],
)
def test_times(bring, time, value, expected):
    tables = bring(one(when=value), basic().replace("event_time: when", f"event_time: {time}"))
    assert tables.payments["event_time"].to_list() == [expected.replace(tzinfo=UTC)]


@pytest.mark.parametrize(
    ("column", "time", "expected"),
    [
        (pl.Series([datetime(2026, 3, 1, 8)], dtype=pl.Datetime("ns")), "when", datetime(2026, 3, 1, 8)),
        (pl.Series([datetime(2026, 7, 1, 8)], dtype=pl.Datetime("ms")), "{column: when, zone: Europe/Paris}", datetime(2026, 7, 1, 6)),
        (pl.Series([datetime(2026, 7, 1, 8, tzinfo=UTC)]).dt.convert_time_zone("Asia/Tokyo"), "when", datetime(2026, 7, 1, 8)),
        (pl.Series([date(2026, 7, 1)]), "when", datetime(2026, 7, 1)),
        (pl.Series([86_400]), "{column: when, offset: seconds, start: 2026-03-01}", datetime(2026, 3, 2)),
    ],
)
def test_times_of_a_parquet_file(bring, column, time, expected):
    frame = pl.DataFrame({"when": column, "from": [1], "to": [2.0], "amount": [3]})
    tables = bring(frame, basic().replace("event_time: when", f"event_time: {time}"), "data.parquet")
    assert tables.payments.row(0)[:5] == ("0", expected.replace(tzinfo=UTC), "1", "2", 3.0)


@pytest.mark.parametrize(
    ("value", "more", "expected"),
    [("12.50", "", 12.5), (" 7 ", "", 7.0), ("1e2", "", 100.0), ("12,5", "csv: {decimal: ','}", 12.5), ("0", "", 0.0)],
)
def test_amounts(bring, value, more, expected):
    assert bring(one(amount=value), basic(more=more)).payments["amount"].to_list() == [expected]


@pytest.mark.parametrize("units", [1, 10, 100, 1000, 10000])
def test_minor_units_are_divided_exactly(bring, units):
    minor = pl.int_range(0, 200_000, eager=True)
    frame = pl.DataFrame({"amount": minor}).with_columns(when=datetime(2026, 3, 1), **{"from": pl.lit("a"), "to": pl.lit("b")})
    tables = bring(frame, basic(amount=f"{{column: amount, minor_units: {units}}}"), "data.parquet")
    assert (tables.payments["amount"].to_numpy() == minor.to_numpy() / units).all()


def test_float32_amounts_are_what_was_meant(bring):
    amounts = pl.Series([57.16, 0.1, 1299.99], dtype=pl.Float32)
    frame = pl.DataFrame({"amount": amounts}).with_columns(when=datetime(2026, 3, 1), **{"from": pl.lit("a"), "to": pl.lit("b")})
    assert bring(frame, basic(), "data.parquet").payments["amount"].to_list() == [57.16, 0.1, 1299.99]


@pytest.mark.parametrize(
    ("values", "more", "reason"),
    [
        ({"when": "soon"}, "", "event_time: not a time like 2026-03-01 12:00:05"),
        ({"when": ""}, "", "event_time: missing"),
        ({"when": "1969-01-01"}, "", "event_time: not between 1970 and 2200"),
        ({"amount": "12,5"}, "", "amount: not a number"),
        ({"amount": "nan"}, "", "amount: not a number"),
        ({"amount": "n/a"}, "missing: [n/a]", "amount: missing"),
        ({"amount": "-3"}, "", "amount: negative"),
        ({"from": ""}, "", "payer_id: missing"),
        ({"age": "old"}, "fields: {age: {kind: numeric}}", "age: not a number"),
        ({"ok": "maybe"}, "fields: {ok: {kind: boolean}}", "ok: neither true nor false"),
        ({"seen": "soon"}, "fields: {seen: {kind: time, format: '%Y'}}", "seen: not a time like %Y"),
    ],
)
def test_bad_cells_go_to_quarantine_alone(bring, values, more, reason):
    good = one(**dict.fromkeys(set(values) - {"when", "amount", "from"}, ""))
    _, bad = one(**{k: "" for k in values if k not in ("when", "amount", "from")} | values).splitlines()
    tables = bring(good + bad + "\n", basic(more=more))
    assert tables.payments["payment_id"].to_list() == ["0"]
    assert tables.quarantined.select("table", "row", "reason").rows() == [("payments", 1, reason)]
    assert all(f'"{v}"' in tables.quarantined["raw"][0] for v in values.values() if v)


def test_cells_too_many_and_too_few(bring):
    lines = ["when,from,to,amount,note", *["2026-03-01,a,b,1,x"] * 3, "2026-03-01,a,b,1,x,y", "2026-03-01,a", "2026-03-01,a,b,1"]
    tables = bring("\n".join(lines), basic(more="fields: {note: {kind: text}}"))
    assert tables.payments["note"].to_list() == ["x", "x", "x", None]
    assert tables.quarantined["reason"].to_list() == ["line: more cells than the header has", "payee_id: missing; amount: missing"]


@pytest.mark.parametrize("hour", ["2026-03-29 02:30:00", "2026-10-25 02:30:00"])
def test_an_hour_that_the_clocks_skip_or_repeat_is_not_guessed(bring, hour):
    mapping = basic().replace("event_time: when", "event_time: {column: when, zone: Europe/Paris}")
    tables = bring(one() + one(when=hour).splitlines()[1], mapping)
    assert tables.quarantined["reason"].to_list() == ["event_time: an hour that the clocks of Europe/Paris skip or repeat"]


LABELLED = "label: {column: was, fraud: [yes, 1], genuine: [no, 0], unknown: ['?'], delay_days: 2}"


def _labelled(*rows: str) -> str:
    return "when,from,to,amount,was,told\n" + "".join(f"2026-03-01 00:00:00,a,b,1,{r}\n" for r in rows)


def test_labels_and_their_delay(bring):
    tables = bring(_labelled("yes,", "no,", "?,", ",", "1,", "what,"), basic(more=LABELLED))
    assert tables.labels.rows() == [(i, f, datetime(2026, 3, 3, tzinfo=UTC)) for i, f in (("0", True), ("1", False), ("4", True))]
    held = tables.quarantined.select("table", "row", "reason").rows()
    assert held == [("labels", 5, "is_fraud: a value that the mapping does not mention")]
    assert len(tables.payments) == 6


def test_labels_that_tell_when_they_were_known(bring):
    more = LABELLED.replace("delay_days: 2", "known_at: told")
    rows = ("yes,2026-03-09", "no,", "no,soon", "yes,2026-02-27", "?,")
    tables = bring(_labelled(*rows), basic(more=more))
    assert tables.labels.rows() == [("0", True, datetime(2026, 3, 9, tzinfo=UTC))]
    reasons = ["known_at: missing", "known_at: not a time like 2026-03-01 12:00:05", "known_at: before the payment"]
    assert tables.quarantined["reason"].to_list() == reasons
    both = bring(_labelled(*rows), basic(more=LABELLED.replace("delay_days: 2", "delay_days: 2, known_at: told")))
    assert both.labels["known_at"].dt.day().to_list() == [9, 3]
    assert both.quarantined["row"].to_list() == [2, 3]


@pytest.mark.parametrize("column", [pl.Series([1, 0]), pl.Series([1.0, 0.0]), pl.Series([True, False]), pl.Series(["1", "0"])])
def test_labels_of_any_type(bring, column):
    frame = pl.DataFrame({"was": column}).with_columns(when=datetime(2026, 3, 1), amount=1, **{"from": pl.lit("a"), "to": pl.lit("b")})
    tables = bring(frame, basic(more="label: {column: was, fraud: [1, 'true'], genuine: [0, 'false'], delay_days: 0}"), "data.parquet")
    assert tables.labels["is_fraud"].to_list() == [True, False]


def test_forms_of_a_file(bring):
    text = one(**{"from": "zoë"})
    expected = bring(text, basic()).payments
    assert bring(gzip.compress(text.encode()), basic(), "data.csv.gz").payments.equals(expected)
    assert bring(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode(), basic()).payments.equals(expected)
    assert bring(text.encode("latin1"), basic(more="csv: {encoding: latin1}")).payments.equals(expected)
    assert bring(text.replace(",", ";"), basic(more="csv: {separator: ';'}")).payments.equals(expected)
    assert expected["payer_id"].item() == "zoë"


def test_a_mapping_without_label_or_payers(bring):
    mapping = "event_time: when\namount: amount\ncurrency: {constant: eur}\n"
    tables = bring(one(), mapping)
    assert not tables.entities
    assert tables.labels.is_empty()
    assert tables.payments.row(0)[2:] == (None, None, 12.5, "EUR")


LABEL = "label: {column: to, fraud: [1], genuine: [0], delay_days: 0}"


@pytest.mark.parametrize(
    ("mapping", "text"),
    [
        (basic().replace("from", "form"), r"m.yaml, payer_id: data.csv has no column 'form'. Did you mean 'from'\?"),
        (basic().replace("{constant: EUR}", "EUR"), r"write \{constant: EUR\}"),
        (basic() + "labels: {}", "'labels' is no key of m.yaml. Did you mean 'label'"),
        (basic() + "label: was", "m.yaml, label: object missing required field `fraud`"),
        (basic() + "label: {column: from, fraud: [1], genuine: [1], delay_days: 0}", "a value stands in two"),
        (basic() + "label: {column: from, fraud: [], genuine: [1], delay_days: 0}", "at least one value each"),
        (basic() + "label: {column: from, fraud: [1], genuine: [0]}", "delay_days, known_at or both"),
        (basic() + "label: {column: from, fraud: [1], genuine: [0], delay_days: -1}", "delay_days = -1.0: must be 0 or more"),
        (basic() + LABEL + "\nfields: {x: {column: to, kind: text}}", "column 'to' tells the label"),
        (basic() + LABEL, "none of the 1 labels of data.csv .* a value that the mapping does not mention .1.. The first row"),
        (basic(amount="{column: amount, minor_units: 7}"), "'7' is no minor_units .m.yaml, amount.. There are: 1, 10"),
        (basic(amount="{column: when}"), "none of the 1 payments of data.csv keeps the contract. Reasons: amount: not a number"),
        (basic(amount="[amount]"), "m.yaml, amount: must be a block with keys of column, minor_units, or the name of a column"),
        (basic() + "fields: {amount: {kind: numeric}}", "A field cannot be called 'amount'"),
        (basic() + "fields: {to: {kind: numeric, offset: days, start: 1970-01-01}}", "are for kind: time"),
        (basic() + "fields: {gone: {kind: text}}", "m.yaml, fields.gone: data.csv has no column 'gone'"),
        (basic() + "fields: {to: {kind: txt}}", "'txt' is no kind .m.yaml, fields.to.. Did you mean 'text'"),
        (basic() + "amount: to", "line 7: the key 'amount' is there twice"),
        (basic().replace("payee_id: to\n", ""), "m.yaml, payee_id: the other one is given"),
        (basic().replace("payer_id: from", "payer_id: {}"), "m.yaml, payer_id: give either a column or a constant"),
        (basic().replace("amount: amount\n", ""), "m.yaml: object missing required field `amount`"),
        (basic().replace("event_time: when", "event_time: {column: when, zone: Mars}"), "Mars"),
        ("a: [1", "m.yaml is not valid YAML"),
        ("just text", "m.yaml is no mapping"),
    ],
)
def test_a_wrong_mapping_says_where(bring, mapping, text):
    with pytest.raises(ValueError, match=text):
        bring(one(), mapping)


@pytest.mark.parametrize(
    ("data", "name", "text"),
    [
        ("", "data.csv", "data.csv has no rows"),
        ("when,from,to,amount\n", "data.csv", "data.csv has no rows"),
        ("when,from,to,to,amount\n1,2,3,4,5\n", "data.csv", "has the column 'to' 2 times"),
        (one(**{"from": "zoë"}).encode("latin1"), "data.csv", "data.csv cannot be read.* encoding"),
        (one(), "data.txt", "a file must be one of .parquet, .csv, .csv.gz"),
        (b"no parquet", "data.parquet", "data.parquet cannot be read"),
        (b"no gzip", "data.csv.gz", "data.csv.gz cannot be read"),
    ],
)
def test_a_wrong_file_says_what(bring, data, name, text):
    with pytest.raises(ValueError, match=text):
        bring(data, basic(), name)


anything = st.text(st.characters(codec="utf8", exclude_characters='"\x00'), max_size=8)
cell = anything | st.sampled_from(["2026-03-01", "1", "-1", "0.00001", "yes", "no", "9" * 40, "1e400"])


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(*[cell] * 6), max_size=6))
def test_any_text_is_payment_or_quarantine(bring, rows):
    """Whatever stands in the cells: no other error, and no row lost."""
    rows = [("2026-03-01", "a", "b", "1", "yes", "3"), *rows]
    text = "when,from,to,amount,was,age\n" + "".join(",".join(f'"{c}"' for c in r) + "\n" for r in rows)
    tables = bring(text, basic(more=LABELLED + "\nfields: {age: {kind: numeric}}"))
    assert len(tables.payments) + len(tables.quarantined.filter(table="payments")) == len(rows)
    assert "0" in tables.payments["payment_id"]
