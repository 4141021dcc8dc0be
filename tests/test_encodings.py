"""From a payment's values to the numbers of a row, for a frame and for one payment; from a row to a token and to classes."""

import json
import math
from datetime import UTC, datetime, timedelta, timezone
from functools import cache
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest
import yaml
from conftest import ROOT
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from fraudlab.core.registry import resolve
from fraudlab.core.runs import Run
from fraudlab.data.contract import Field
from fraudlab.data.splits import Backtest, backtest
from fraudlab.features import prepared
from fraudlab.features.definitions import FeatureSet, Window
from fraudlab.features.encoding import Column, Encoding, choose, fit_encoding, grams, ids
from fraudlab.models.embeddings import IDS, NUMBERS, FieldEmbedding, as_classes, classes, fit_fields, of_kinds, places

FIELDS = (
    Field("distance", "numeric"),
    Field("fee", "numeric"),
    Field("chip", "boolean"),
    Field("abroad", "boolean"),
    Field("country", "categorical"),
    Field("shop", "categorical"),
    Field("note", "text"),
    Field("opened", "time"),
    Field("renewed", "time"),
)
ASKED = {"fee": "amount", "abroad": "categorical", "shop": {"kind": "hashed", "size": 7}, "renewed": "calendar", "payer_id": "entity"}
ASKED |= {"note": {"size": 50, "width": 5}, "payee_id": {"size": 1000}}

# one payment, and what a frame and a dictionary hold of it

ZONES = st.sampled_from([UTC, timezone(timedelta(hours=-7, minutes=-30)), timezone(timedelta(hours=14))])
INSTANTS = st.datetimes(datetime(1901, 1, 1), datetime(2199, 12, 30), timezones=ZONES)
NUMBER = st.floats(width=64) | st.sampled_from([1e39, -1e39, 3.4028235677973366e38, 1e-46, -0.0, 16_777_217.0])
WORD = st.text(st.characters(codec="utf-8"), max_size=40) | st.sampled_from(["FR", "DE", "true", "Straße", "STRASSE", "ﬁn", "İ", "ς Σ"])
PAYMENT = st.fixed_dictionaries(
    {"event_time": INSTANTS, "payer_id": st.none() | WORD, "payee_id": st.none() | WORD, "amount": st.none() | NUMBER}
    | {"currency": st.sampled_from(["EUR", "JPY", "KWD", "XXX"]), "distance": st.none() | NUMBER, "fee": st.none() | NUMBER}
    | {name: st.none() | st.booleans() for name in ("chip", "abroad")}
    | {name: st.none() | WORD for name in ("country", "shop", "note")}
    | {name: st.none() | INSTANTS for name in ("opened", "renewed")}
)
TYPES = {name: pl.Datetime("us", "UTC") for name in ("event_time", "opened", "renewed")}
TYPES |= dict.fromkeys(("amount", "distance", "fee"), pl.Float64) | dict.fromkeys(("chip", "abroad"), pl.Boolean)
TYPES |= dict.fromkeys(("payer_id", "payee_id", "currency", "country", "shop", "note"), pl.String)


def table(payments: list[dict]) -> pl.DataFrame:
    in_utc = [{k: v.astimezone(UTC) if isinstance(v, datetime) else v for k, v in p.items()} for p in payments]
    return pl.DataFrame(in_utc, schema=TYPES, orient="row")


def training() -> pl.DataFrame:
    """A few ordinary payments in three currencies, the last without any value that may be missing."""
    rng = np.random.default_rng(0)
    rates = {"EUR": 1.0, "JPY": 163.7, "KWD": 0.31}
    rows = []
    for i in range(60):
        currency = ["EUR", "EUR", "JPY", "KWD"][i % 4]
        known = rng.random() < 0.9
        rows.append(
            {"event_time": datetime(2026, 3, 2, tzinfo=UTC) + timedelta(hours=i), "payer_id": f"p{i % 9}", "payee_id": f"s{i % 5}"}
            | {"amount": rng.gamma(2, 20) * rates[currency], "currency": currency, "distance": rng.normal() if known else None}
            | {"fee": rng.gamma(1, 2) * rates[currency], "chip": bool(i % 3), "abroad": bool(i % 2) if known else None}
            | {
                "country": ["FR", "DE", "FR", "true"][i % 4] if known else None,
                "shop": f"shop {i % 11}",
                "note": f"Café {i}" if known else None,
            }
            | {"opened": datetime(2025, 1, 1, tzinfo=UTC) if known else None, "renewed": datetime(2026, 1, i % 28 + 1, i % 24, tzinfo=UTC)}
        )
    return table(rows)


TRAINING = training()
ENCODING = fit_encoding(TRAINING, FIELDS, [], ASKED)
AT = dict(zip((c.name for c in ENCODING.columns), places(ENCODING.columns, *(c.kind for c in ENCODING.columns)).tolist(), strict=True))


def test_every_kind_that_is_encoded_is_tested_here():
    assert {c.kind for c in ENCODING.columns} == {"numeric", "amount", "calendar", "age", "categorical", "hashed", "entity", "text"}
    assert ENCODING.columns[0].scales
    assert sum(c.width for c in ENCODING.columns) == len(ENCODING.columns) + 4


@settings(max_examples=150, deadline=None)
@given(st.lists(PAYMENT, min_size=1, max_size=4))
def test_a_frame_and_one_payment_give_equal_bits(payments):
    rows = ENCODING.encode(table(payments))
    assert rows.dtype == np.float32
    assert np.isfinite(rows).all()
    for row, payment in zip(rows, payments, strict=True):
        np.testing.assert_array_equal(row.view(np.uint32), ENCODING.encode_one(payment).view(np.uint32))


@settings(max_examples=50, deadline=None)
@given(PAYMENT)
def test_ids_are_below_their_cardinality(payment):
    row = ENCODING.encode_one(payment)
    for c in ENCODING.columns:
        if c.cardinality:
            values = row[AT[c.name] :][: c.width]
            assert ((values >= 0) & (values < c.cardinality) & (values == np.round(values))).all()


def test_times_without_a_zone_are_in_utc_and_microseconds_are_times():
    payment = TRAINING.row(-1, named=True)
    times = ("event_time", "opened", "renewed")
    naive = payment | {name: payment[name].replace(tzinfo=None) for name in times}
    counted = payment | {name: int(payment[name].timestamp() * 1_000_000) for name in times}
    expected = ENCODING.encode_one(payment)
    np.testing.assert_array_equal(ENCODING.encode_one(naive), expected)
    np.testing.assert_array_equal(ENCODING.encode_one(counted), expected)
    bare = TRAINING.with_columns(pl.col(name).dt.replace_time_zone(None).cast(pl.Datetime("ms")) for name in times)
    np.testing.assert_array_equal(ENCODING.encode(bare), ENCODING.encode(TRAINING))
    paris = TRAINING.with_columns(pl.col(name).dt.convert_time_zone("Europe/Paris") for name in times)
    np.testing.assert_array_equal(ENCODING.encode(paris), ENCODING.encode(TRAINING))


def test_what_each_kind_becomes():
    payment = TRAINING.row(2, named=True)
    payment |= {"event_time": datetime(2026, 3, 8, 23, 59, 59, 999_999, UTC), "opened": datetime(2026, 3, 8, 11, 59, 59, 999_999, UTC)}
    row = ENCODING.encode_one(payment | {"currency": "XXX", "amount": 12.5, "chip": True, "abroad": False, "country": "PT", "shop": None})
    assert row[AT["event_time"]] == np.float32(167 + 59 / 60 + 59 / 3600)
    assert row[AT["opened"]] == 12
    assert row[AT["amount"]] == 12.5
    assert row[AT["chip"]] == 1
    assert row[AT["country"]] == 1
    assert row[AT["shop"]] == 0
    abroad = ENCODING.columns[[c.name for c in ENCODING.columns].index("abroad")]
    assert abroad.vocabulary[int(row[AT["abroad"]]) - 2] == "false"


def test_hashes_never_change():
    """A bundle's tables are in the order of these ids: xxh64 (seed 0) of the UTF-8 text, 1 + its remainder."""
    assert ids(Column("x", "hashed", size=1 << 20))("Café") == [101_774]
    assert ids(Column("x", "entity", size=1000))("") == [1 + 0xEF46DB3751D8E999 % 1000]
    assert ids(Column("x", "text", size=1 << 20, width=4))("CAFÉ  x") == [318_359, 589_788, 674_930, 155_455]
    assert ids(Column("x", "text", size=1 << 20, width=9))("a") == [527_511, *[0] * 8]


def test_a_text_is_what_it_says_and_not_how():
    assert grams("Straße ﬁn") == grams("  STRASSE\tFIN ") == [" st", "str", "tra", "ras", "ass", "sse", "se ", "e f", " fi", "fin", "in "]
    assert grams("") == grams(" \n") == []
    assert len(ids(Column("x", "text", size=9, width=3))("a long name")) == 3


# fitted


def test_amounts_of_all_currencies_have_one_median():
    column = ENCODING.columns[0]
    scaled = ENCODING.encode(TRAINING)[:, 0]
    euro = TRAINING.filter(pl.col("currency") == "EUR")["amount"]
    assert {currency for currency, _ in column.scales} == {"JPY", "KWD"}
    for currency in ("EUR", "JPY", "KWD"):
        assert np.median(scaled[(TRAINING["currency"] == currency).to_numpy()]) == pytest.approx(euro.median(), rel=1e-6)
    np.testing.assert_array_equal(scaled[(TRAINING["currency"] == "EUR").to_numpy()], euro.cast(pl.Float32))
    assert column.fill == pytest.approx(np.median(scaled), rel=1e-6)


def test_one_currency_leaves_amounts_and_is_no_column():
    euros = TRAINING.with_columns(currency=pl.lit("EUR"))
    encoding = fit_encoding(euros, (), [])
    assert [c.name for c in encoding.columns] == ["amount", "event_time"]
    assert encoding.columns[0].scales == ()
    np.testing.assert_array_equal(encoding.encode(euros)[:, 0], euros["amount"].cast(pl.Float32))


def test_currencies_without_money_have_no_factor():
    frame = pl.DataFrame({"amount": [5.0, 7.0, 0.0, 0.0, 0.0, math.nan, None], "currency": [*["EUR"] * 2, *["JPY"] * 3, "KWD", "USD"]})
    (column,) = Encoding.fit(frame, [Column("amount", "amount")]).columns
    assert column.scales == ()


def test_vocabularies_hold_the_most_frequent_values_in_one_order():
    frame = pl.DataFrame({"c": ["b", "a", "c", "c", None, None, None, "d"]})
    encoding = Encoding.fit(frame, [Column("c", "categorical")], limit=3)
    assert encoding.columns[0].vocabulary == ("c", "a", "b")
    assert encoding.encode(frame)[:, 0].tolist() == [4, 3, 2, 2, 0, 0, 0, 1]


def test_medians_are_of_finite_numbers():
    frame = pl.DataFrame({"x": [1.0, 2.0, 4.0, math.inf, math.inf, -math.inf, math.nan, None, None], "none": [None] * 9})
    assert [c.fill for c in Encoding.fit(frame, ["x", "none"]).columns] == [2, 0]


def test_it_comes_back_from_a_file():
    again = Encoding.from_dict(json.loads(json.dumps(ENCODING.to_dict())))
    assert again == ENCODING
    np.testing.assert_array_equal(again.encode(TRAINING), ENCODING.encode(TRAINING))


def test_no_rows_and_no_columns():
    width = sum(c.width for c in ENCODING.columns)
    assert ENCODING.encode(TRAINING.clear()).shape == (0, width)
    assert Encoding(()).encode(TRAINING).shape == (len(TRAINING), 0)


# chosen


def test_a_column_follows_from_its_declaration():
    fields = (*FIELDS, Field("name", "text", personal=True))
    kinds = {c.name: c.kind for c in choose(fields, ["payer_count_7d"], currencies=2)}
    assert kinds == {
        "amount": "amount",
        "event_time": "calendar",
        "currency": "categorical",
        **dict.fromkeys(("distance", "fee", "chip", "abroad"), "numeric"),
        **dict.fromkeys(("country", "shop"), "categorical"),
        "note": "text",
        **dict.fromkeys(("opened", "renewed"), "age"),
        "payer_count_7d": "numeric",
    }


def test_what_is_asked_for_is_what_is_made():
    asked = {"payer_id": "entity", "currency": "categorical", "note": "", "amount": "numeric", "shop": {"kind": "text", "width": 4}}
    made = {c.name: c for c in choose(FIELDS, ["n"], asked)}
    assert made["payer_id"].kind == "entity"
    assert made["amount"].kind == "numeric"
    assert "currency" in made
    assert "note" not in made
    assert made["shop"].width == 4
    assert made["shop"].size > 0


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"merchant": "hashed"}, r"'merchant' is no column of these payments\. .*amount, chip, country, currency, .*payee_id, .*shop"),
        ({"payment_id": "hashed"}, "'payment_id' is no column"),
        ({"country": "numeric"}, r"'numeric' is no encoding of 'country'\. .*categorical, entity, hashed, text"),
        ({"payer_id": "categorical"}, "'categorical' is no encoding of 'payer_id'"),
        ({"shop": {"kind": "hashed", "buckets": 4}}, r"'buckets' is no option of the encoding of 'shop'\. There are: kind, size, width"),
        ({"shop": {"kind": "hashed", "size": 0}}, "size = 0: give how many ids"),
        ({"shop": {"kind": "hashed", "size": 1 << 24}}, "size = 16777216: give how many ids"),
        ({"shop": {"width": 3}}, "width = 3: a text takes 1 or more, all others 1"),
        ({"shop": True}, "encoding of 'shop' is True: give a kind"),
    ],
)
def test_what_cannot_be_is_refused(asked, says):
    with pytest.raises(ValueError, match=says):
        choose(FIELDS, ["n"], asked)


def test_the_published_ground_keeps_its_fifteen_columns():
    steps = yaml.safe_load((ROOT / "params/pipelines/handbook.yaml").read_text())["steps"]
    (options,) = (step["with"] for step in steps if step["flow"] == "prepare")
    columns = choose((), resolve("features", options["features"]).names, options["encodings"])
    assert [c.name for c in columns] == ["amount", *resolve("features", "handbook").names]
    assert len(columns) == 15


def test_only_training_rows_are_fitted_on(lab):
    """Whatever the payments after the training period are, the columns are the same."""
    tables = resolve("source", "handbook")(customers=20, terminals=40, days=30, seed=1)
    thirds = pl.int_range(pl.len()) % 3
    currency = pl.when(thirds == 1).then(pl.lit("JPY")).otherwise("currency")
    payments = tables.payments.with_columns(shop="payee_id", currency=currency)
    (fold,) = backtest(payments, tables.labels, Backtest("2018-04-08", 7, 3, 7))
    later = pl.col("event_time") >= fold.train_end
    new = {"amount": pl.lit(1e6), "shop": pl.lit("new"), "currency": pl.lit("USD")}
    changed = payments.with_columns(pl.when(later).then(value).otherwise(name).alias(name) for name, value in new.items())
    features = FeatureSet((Window("n", "payer", "count", "7d"),))
    tables = tables._replace(fields=(Field("shop", "categorical"),))
    made, again = (prepared.prepare("p", tables._replace(payments=p), features, fold, {"payee_id": "entity"}) for p in (payments, changed))
    assert made["columns"] == again["columns"]
    columns = {c.name: c for c in Encoding.from_dict(made["columns"]).columns}
    assert [c.kind for c in columns.values()] == ["amount", "calendar", "categorical", "entity", "categorical", "numeric"]
    assert [currency for currency, _ in columns["amount"].scales] == ["JPY"]
    assert columns["currency"].vocabulary == ("EUR", "JPY")
    rows = prepared.read(Run(lab, {"outputs": made})).dataset.rows
    assert (rows[:, 3] == [ids(columns["payee_id"])(payee)[0] for payee in payments["payee_id"]]).all()


# tokens

ROWS = ENCODING.encode(TRAINING)
COLUMNS = (*ENCODING.columns, Column("elapsed", "elapsed"))
ROWS = np.column_stack([ROWS, np.random.default_rng(1).gamma(1, 3600, len(ROWS))]).astype(np.float32)
PLACES = places(COLUMNS, *{c.kind for c in COLUMNS}).tolist()
C, D, K = len(COLUMNS), 12, 6


@cache
def of_all(numbers: str) -> FieldEmbedding:
    return embedding(COLUMNS, ROWS, numbers)


def embedding(columns, rows, numbers="pieces", pieces=K, width=D) -> FieldEmbedding:
    """Made and fitted; its bias is 0, 1, 2 …"""
    module = nnx.jit(lambda: FieldEmbedding(columns, pieces, width, numbers, rngs=nnx.Rngs(3)))()
    for key, value in fit_fields(columns, rows, pieces).items():
        getattr(module, key)[...] = value
    module.bias[...] = np.arange(width, dtype=np.float32)
    return module


token = nnx.jit(lambda module, rows, hidden=None: module(rows, hidden))


def slowly(module: FieldEmbedding, row: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """The token of one row, column by column, in double precision."""
    weights = {key: np.asarray(value[...], np.float64) for key, value in vars(module).items() if isinstance(value, nnx.Variable)}
    tables = iter([np.asarray(x[...], np.float64) for x in module.tables])
    numbers = zip(*(weights[key] for key in ("edges", "mean", "deviation", "numbers")), strict=True)
    frequencies, weeks = iter(weights.get("frequencies", ())), iter(weights.get("weeks", ()))
    total, at = weights["bias"], 0
    for c, hide, instead in zip(module.columns, hidden, weights["hidden"], strict=True):
        values = row[at : at + c.width].astype(np.float64)
        at += c.width
        if c.kind in NUMBERS:
            edges, mean, deviation, kernel = next(numbers)
            number = values[0]
            whole = np.clip((np.array([number, np.sign(number) * np.log1p(np.abs(number))]) - mean) / deviation, -5, 5)
            read = [*whole]
            if module.way != "periodic":
                read += [np.clip((number - a) / (b - a), 0, 1) if b > a else 0 for a, b in pairwise(edges)]
            if module.way != "pieces":
                angles = 2 * np.pi * whole[0] * next(frequencies)
                read += [*np.sin(angles), *np.cos(angles)]
            add = np.array(read) @ kernel
        elif c.kind == "calendar":
            angles = 2 * np.pi * values[0] / 168 * np.array([1, 2, 3, 7, 14, 21, 28])
            add = np.concatenate([np.sin(angles), np.cos(angles)]) @ next(weeks)
        else:
            looked, here = next(tables)[values.astype(int)], values > (0 if c.kind == "text" else -1)
            add = looked[here].mean(0) if here.any() else 0
        total = total + (instead if hide else add)
    return total


@pytest.mark.parametrize("numbers", ["pieces", "periodic", "both"])
def test_a_token_is_the_sum_of_what_its_columns_add(numbers):
    module = of_all(numbers)
    hidden = np.random.default_rng(0).random((len(ROWS), C)) < 0.3
    rows, shape = ROWS.reshape(5, 12, -1), (5, 12, -1)
    seen, unseen = token(module, rows), token(module, rows, hidden.reshape(shape))
    assert seen.shape == unseen.shape == (5, 12, D)
    assert seen.dtype == unseen.dtype == np.float32
    tolerance = 5e-4 if numbers == "pieces" else 2e-3  # logarithms of ages of a year that differ by hours; angles of many turns
    for i in (0, 7, 31, 59):
        np.testing.assert_allclose(seen.reshape(-1, D)[i], slowly(module, ROWS[i], np.zeros(C, bool)), atol=tolerance)
        np.testing.assert_allclose(unseen.reshape(-1, D)[i], slowly(module, ROWS[i], hidden[i]), atol=tolerance)


def test_a_hidden_column_says_nothing_and_a_shown_one_something():
    module, names = of_all("pieces"), [c.name for c in COLUMNS]
    rows, other = np.repeat(ROWS[:1], C, 0), np.repeat(ROWS[:1], C, 0)
    for i, (c, at) in enumerate(zip(COLUMNS, PLACES, strict=True)):
        other[i, at : at + c.width] = (rows[i, at : at + c.width] + 1) % c.cardinality if c.cardinality else rows[i, at] + 5
    assert (rows != other).any(1).all()
    hidden = np.eye(C, dtype=bool)
    np.testing.assert_array_equal(token(module, rows, hidden), token(module, other, hidden))
    moved = np.abs(token(module, rows, ~hidden) - token(module, other, ~hidden)).max(1)
    assert (moved > 1e-4).all(), dict(zip(names, moved, strict=True))
    np.testing.assert_array_equal(token(module, rows, hidden & False), token(module, rows))


def test_gradients_reach_every_weight_and_nothing_that_is_fixed():
    graph, weights, fixed = nnx.split(of_all("both"), nnx.Param, ...)
    hidden = np.random.default_rng(0).random((len(ROWS), C)) < 0.2
    gradients = jax.jit(jax.grad(lambda w: (nnx.merge(graph, w, fixed)(ROWS, hidden) ** 2).sum()))(weights)
    for path, gradient in nnx.to_flat_state(gradients):
        assert np.isfinite(gradient[...]).all()
        assert np.asarray(gradient[...]).any(), path
    assert {path[-1] for path, _ in nnx.to_flat_state(fixed)} == {"edges", "mean", "deviation"}


@pytest.mark.parametrize("kinds", [("calendar",), ("numeric", "amount"), ("categorical", "text")])
def test_columns_of_some_kinds_are_enough(kinds):
    columns = tuple(c for c in COLUMNS if c.kind in kinds)
    rows = np.concatenate([ROWS[:, at : at + c.width] for c, at in zip(COLUMNS, PLACES, strict=True) if c in columns], 1)
    module = embedding(columns, rows)
    np.testing.assert_allclose(token(module, rows)[5], slowly(module, rows[5], np.zeros(len(columns), bool)), atol=2e-5)


def test_at_the_beginning_each_column_has_its_part():
    """What a column adds has about the variance 1 / C; ids begin with a tenth of that size."""
    columns = (Column("x"), Column("c", "categorical", tuple("abcdefgh")), Column("t", "calendar"))
    rows = np.column_stack([np.linspace(-2, 2, 200), np.arange(200) % 10, np.linspace(0, 167, 200)]).astype(np.float32)
    module = embedding(columns, rows, pieces=8, width=512)
    module.hidden[...], module.bias[...] = np.zeros((3, 512), np.float32), np.zeros(512, np.float32)
    parts = [token(module, rows, np.repeat(np.arange(3)[None] != i, 200, 0)).var() for i in range(3)]
    assert all(0.2 < part < 0.7 for part in (parts[0], 100 * parts[1], parts[2]))


def test_wrong_options_and_rows_are_refused():
    with pytest.raises(ValueError, match=r"'waves' is no way to read numbers\. .*both, periodic, pieces"):
        FieldEmbedding(COLUMNS, K, D, "waves", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"take \d+ numbers of a row, and the rows have 3"):
        fit_fields(COLUMNS, ROWS[:, :3], K)


# classes


def test_each_column_is_one_of_its_classes():
    fitted, count = fit_fields(COLUMNS, ROWS, K), np.array(classes(COLUMNS, K))
    told = np.asarray(jax.jit(lambda rows: as_classes(COLUMNS, jnp.asarray(fitted["edges"]), rows))(ROWS.reshape(5, 12, -1))).reshape(-1, C)
    assert told.dtype == np.int32
    assert (told >= 0).all()
    assert (told < np.where(count, count, 2**16 + 1)).all()  # 0: it is not told, such as ids of more than 5,000
    for i, c, at in zip(range(C), COLUMNS, PLACES, strict=True):
        values = ROWS[:, at]
        if c.kind in NUMBERS:
            edges = fitted["edges"][of_kinds(COLUMNS, *NUMBERS).tolist().index(i)]
            np.testing.assert_array_equal(told[:, i], np.searchsorted(edges[1:-1], values, side="right"))
            assert count[i] == K
        elif c.kind == "calendar":
            np.testing.assert_array_equal(told[:, i], np.floor(values))
            assert count[i] == 168
        elif c.kind == "text":
            assert count[i] == 0
            assert not told[:, i].any()
        else:
            assert c.kind in IDS
            np.testing.assert_array_equal(told[:, i], values)
            assert count[i] == (c.cardinality if 1 < c.cardinality <= 5000 else 0)


def test_numbers_of_training_are_spread_over_their_classes():
    rows = np.random.default_rng(0).gamma(1, 100, (4000, 1)).astype(np.float32)
    columns = (Column("amount", "amount"),)
    told = as_classes(columns, jnp.asarray(fit_fields(columns, rows, 8)["edges"]), jnp.asarray(rows))
    assert np.bincount(told[:, 0], minlength=8).min() > 450
