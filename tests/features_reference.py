"""The reference of every feature kind: a few lines of Python over the list of an entity's payments. Slow, and obviously right.

Every number is read as whole ten-thousandths, so all but decays, velocities and logarithms must agree to the last bit.
"""

import math
from collections import defaultdict
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import numpy as np
import polars as pl
from hypothesis import given, settings
from hypothesis import strategies as st

from fraudlab.features.definitions import (
    ALL,
    EARTH,
    EXPONENTS,
    FORGOTTEN,
    MONEY,
    Decay,
    Encoded,
    FeatureSet,
    Risk,
    Row,
    Since,
    Velocity,
    Window,
    check_table,
    column,
    duration,
)  # fmt: skip

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
TIME = pl.Datetime("us", "UTC")


def reference(features: FeatureSet, payments: pl.DataFrame, labels: pl.DataFrame) -> pl.DataFrame:
    """payment_id and one Float32 column a feature, in the order of the payments; missing is NaN."""
    check_table(features, payments)
    rows = plain(payments, labels)
    values = {f.name: [VALUE[type(f)](f, now, seen) for now, seen in histories(f, rows)] for f in features.features}
    missing = {f.name: math.nan if getattr(f, "empty", None) is None else f.empty for f in features.features}
    floats = {name: np.array([missing[name] if x is None else x for x in column], np.float32) for name, column in values.items()}
    return pl.DataFrame({"payment_id": payments["payment_id"]} | floats)


def plain(payments: pl.DataFrame, labels: pl.DataFrame) -> list[dict]:
    """Payments as dictionaries, with `time` and `known` (as a fraud; None: never) in microseconds."""
    frauds = labels.filter(pl.col("is_fraud"))
    known = dict(zip(frauds["payment_id"], frauds["known_at"].to_physical(), strict=True))
    times = payments["event_time"].to_physical()
    return [r | {"time": t, "known": known.get(r["payment_id"])} for r, t in zip(payments.iter_rows(named=True), times, strict=True)]


def histories(f, rows: list[dict]):
    """Each payment, and its entity's payments up to and including it; none where the key has a null."""
    seen = defaultdict(list)
    for now in rows:
        key = tuple(now[column(part)] for part in getattr(f, "entity", "payment_id").split("+"))
        seen[key].append(now)
        yield now, [] if None in key else seen[key]


def before(now: dict, seen: list[dict]) -> list[dict]:
    return [r for r in seen if r["time"] < now["time"]]


def number(row: dict, name: str) -> int | None:
    """A number in whole ten-thousandths."""
    return None if row[name] is None else round(row[name] * MONEY)


def category(row: dict, name: str) -> str | None:
    value = row[column(name)]
    return str(value).lower() if isinstance(value, bool) else None if value is None else str(value)


def row(f: Row, now: dict, seen: list[dict]) -> float:
    local = (EPOCH + timedelta(microseconds=now["time"])).astimezone(ZoneInfo(f.zone))
    match f.take:
        case "hour":
            return local.hour
        case "weekday":
            return local.isoweekday()
        case "weekend":
            return local.isoweekday() >= 6
        case "night":
            return local.hour <= 6
        case "month_day":
            return local.day
        case "month_end":
            return (local.date() + timedelta(days=1)).day == 1
        case "log_amount":
            return math.log1p(now["amount"])
        case "currency_exponent":
            return EXPONENTS.get(now["currency"], 2)


def inside(f: Window | Risk, now: dict, seen: list[dict]) -> list[dict]:
    """The payments of the window. `seen` ends with the current one, so that nothing later in the table is there."""
    end = now["time"] - duration(f.delay)
    start = -math.inf if f.length == ALL else end - duration(f.length)
    return [r for r in seen if (start <= r["time"] < end if f.closed == "left" else start < r["time"] <= end)]


def window(f: Window, now: dict, seen: list[dict]) -> float | None:
    there = inside(f, now, seen)
    if f.take == "count":
        return len(there)
    if f.take in ("distinct", "share"):
        values = [v for r in there if (v := category(r, f.of)) is not None]
        if f.take == "distinct":
            return len(set(values))
        return values.count(f.value) / len(values) if values else None
    own, values = number(now, f.of), [v for r in there if (v := number(r, f.of)) is not None]
    n, total, squares = len(values), sum(values), sum(v * v for v in values)
    spread = n * squares - total * total  # n (n - 1) times the variance, whole
    match f.take:
        case "sum":
            return total / MONEY
        case "mean":
            return total / n / MONEY if n else None
        case "min" | "max":
            return {"min": min, "max": max}[f.take](values) / MONEY if n else None
        case "std":
            return math.sqrt(spread / (n * (n - 1))) / MONEY if n > 1 else None
        case "zscore":
            return (n * own - total) / n / math.sqrt(spread / (n * (n - 1))) if own is not None and n > 1 and spread else None
        case "ratio":
            return n * own / total if own is not None and total else None


def risk(f: Risk, now: dict, seen: list[dict]) -> float | None:
    there = inside(f, now, seen)
    at = now["time"] + (f.closed == "right")
    frauds = sum(r["known"] is not None and r["known"] < at for r in there)
    if f.take == "frauds":
        return frauds
    payments = len(there) + f.prior_weight
    return (frauds + f.prior_rate * f.prior_weight) / payments if payments else None


def decay(f: Decay, now: dict, seen: list[dict]) -> float | None:
    earlier, half, alive = before(now, seen), duration(f.half_life), []
    for r, following in zip(earlier, [*earlier, now][1:], strict=True):
        alive.append(r)
        if following["time"] - r["time"] >= FORGOTTEN * half:
            alive = []
    weights = [2.0 ** ((r["time"] - now["time"]) / half) for r in alive]
    if f.take == "count":
        return math.fsum(weights)
    pairs = [(w, v) for w, r in zip(weights, alive, strict=True) if (v := number(r, f.of)) is not None]
    total, weight = math.fsum(w * v / MONEY for w, v in pairs), math.fsum(w for w, _ in pairs)
    return total if f.take == "sum" else total / weight if weight else None


def since(f: Since, now: dict, seen: list[dict]) -> float | None:
    earlier = before(now, seen)
    if f.take == "same":
        if (own := category(now, f.of)) is None:
            return None
        run = 0
        for value in (v for r in reversed(earlier) if (v := category(r, f.of)) is not None):
            if value != own:
                break
            run += 1
        return run
    return (now["time"] - earlier[-1 if f.take == "last" else 0]["time"]) / 1_000_000 if earlier else None


def velocity(f: Velocity, now: dict, seen: list[dict]) -> float | None:
    def has_place(r):
        return r[f.latitude] is not None and r[f.longitude] is not None

    places = [r for r in before(now, seen) if has_place(r)]
    if not places or not has_place(now):
        return None
    a, b, c, d = (math.radians(r[name]) for name in (f.latitude, f.longitude) for r in (places[-1], now))
    arc = math.sin((b - a) / 2) ** 2 + math.cos(a) * math.cos(b) * math.sin((d - c) / 2) ** 2
    return 2 * EARTH * math.asin(math.sqrt(min(1.0, arc))) / ((now["time"] - places[-1]["time"]) / 3_600_000_000)


def encoded(f: Encoded, now: dict, seen: list[dict]) -> float | None:
    return None if now["time"] < f.fitted_until else dict(f.values).get(category(now, f.of), f.unseen)


VALUE = {Row: row, Window: window, Risk: risk, Decay: decay, Since: since, Velocity: velocity, Encoded: encoded}


def assert_close(a: pl.DataFrame, b: pl.DataFrame, features: FeatureSet | None = None):
    """Equal to the last bit, NaN equal to NaN; decays, velocities and logarithms of `features` to 1e-6 of their value."""
    assert a.columns == b.columns, (set(a.columns) ^ set(b.columns), a.columns[:9], b.columns[:9])
    assert a["payment_id"].equals(b["payment_id"]), "other payments, or another order"
    near = {f.name for f in (features or EVERYTHING).features if isinstance(f, Decay | Velocity) or f.take == "log_amount"}
    for name in a.columns[1:]:
        assert a.schema[name] == b.schema[name] == pl.Float32, (name, a.schema[name], b.schema[name])
        x, y = a[name].to_numpy(), b[name].to_numpy()
        if name in near:
            equal = np.isclose(x.astype(float), y.astype(float), rtol=1e-6, atol=1e-30, equal_nan=True)
        else:
            equal = (x == y) | (np.isnan(x) & np.isnan(y))
        if not equal.all():
            i = int(np.argmin(equal))
            raise AssertionError(f"{name}: {(~equal).sum()} of {len(x)} differ, first at row {i}: {x[i]!r} and {y[i]!r}")


# Tables that hypothesis makes

US = {"us": 1, "s": 1_000_000, "m": 60_000_000, "h": 3_600_000_000, "d": 86_400_000_000}
STARTS = [
    datetime(2024, 2, 28, 22, tzinfo=UTC),  # before a leap day
    datetime(2024, 3, 31, 0, 59, 59, tzinfo=UTC),  # before Paris loses an hour, at a month's end
    datetime(2024, 10, 27, 0, tzinfo=UTC),  # before Paris lives an hour twice
    datetime(2024, 11, 3, 5, 30, tzinfo=UTC),  # the same in New York
    datetime(2025, 12, 31, 18, 15, tzinfo=UTC),  # a year's end, in Kathmandu
]
FITTED = int(datetime(2024, 11, 4, tzinfo=UTC).timestamp() * 1e6)


# microseconds between payments: ties, bursts, and exactly, just under and just over the lengths of windows
def near(*spans: int) -> st.SearchStrategy[int]:
    return st.builds(lambda span, off: span + off, st.sampled_from(spans), st.integers(-1, 1))


gaps = st.one_of(
    st.just(0),
    st.sampled_from([US["us"], US["s"], 90 * US["s"]]),
    st.sampled_from([20 * US["m"], 5 * US["h"], 30 * US["h"]]),
    near(US["h"], 6 * US["h"], US["d"]),
    near(US["h"], US["d"], 7 * US["d"], 64 * US["h"]),
    st.sampled_from([23 * US["d"], 30 * US["d"], 70 * US["d"]]),
)
amounts = st.one_of(st.integers(0, 1_000_000), st.sampled_from([0, 1, 10_000, 10**12, 10**12 + 1])).map(lambda m: m / MONEY)
places = (
    st.none() | st.sampled_from([48.8566, 2.3522, -33.8688, 89.9, 0.0, 48.8567]) | st.integers(-900_000, 900_000).map(lambda m: m / 10_000)
)
payment = st.fixed_dictionaries(
    {
        "gap": gaps,
        "payer_id": st.sampled_from(["a", "a", "a", "b", "a+b"]),  # a and b+x is not a+b and x
        "payee_id": st.sampled_from(["x", "x", "y", "b+x"]),
        "amount": amounts,
        "device": st.sampled_from([None, "phone", "phone", "web"]),
        "distance": st.none() | st.integers(0, 10_000_000).map(lambda m: m / 80_000),  # finer than is added
        "lat": places,
        "lon": places,
        "label": st.none() | st.tuples(st.sampled_from([True, True, False, None]), gaps),
    }
)
SCHEMA = {
    "payment_id": pl.String,
    "event_time": TIME,
    "payer_id": pl.String,
    "payee_id": pl.String,
    "amount": pl.Float64,
    "currency": pl.String,
}
SCHEMA |= {"device": pl.String, "distance": pl.Float64, "lat": pl.Float64, "lon": pl.Float64}
LABELS = {"payment_id": pl.String, "is_fraud": pl.Boolean, "known_at": TIME}


@st.composite
def tables(draw, max_size: int = 20, mixed: bool = False) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Payments in time order and labels (frauds, genuine, unknown, none). In one currency, unless `mixed`."""
    n = draw(st.integers(1, max_size))
    rows = draw(st.lists(payment, min_size=n, max_size=n))
    currencies = st.sampled_from(["EUR", "JPY", "BHD", "CLF"])
    currency = draw(st.lists(currencies, min_size=len(rows), max_size=len(rows))) if mixed else [draw(currencies)] * len(rows)
    time, payments, labels = draw(st.sampled_from(STARTS)), [], []
    for i, r in enumerate(rows):
        time += timedelta(microseconds=r["gap"])
        payments.append(r | {"payment_id": f"{99 - i}", "event_time": time, "currency": currency[i]})  # table order is not id order
        if r["label"]:
            labels.append({"payment_id": f"{99 - i}", "is_fraud": r["label"][0], "known_at": time + timedelta(microseconds=r["label"][1])})
    return pl.DataFrame(payments, SCHEMA), pl.DataFrame(labels[::-1], LABELS)


def examples(n: int, **options) -> list[tuple[pl.DataFrame, pl.DataFrame]]:
    """`n` tables, always the same ones."""
    found = []

    @settings(max_examples=n, derandomize=True, database=None, deadline=None)
    @given(tables(**options))
    def collect(pair):
        found.append(pair)

    collect()
    return found


def together(pairs: list[tuple[pl.DataFrame, pl.DataFrame]]) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Many small tables as one, with payers, payees and payments of their own; in euros."""
    payments, labels = [], []
    for i, (p, k) in enumerate(pairs):
        own = [pl.concat_str(pl.lit(f"{i}:"), name).alias(name) for name in ("payment_id", "payer_id", "payee_id")]
        payments.append(p.with_columns(*own, currency=pl.lit("EUR")))
        labels.append(k.with_columns(own[0]))
    return pl.concat(payments).sort("event_time", maintain_order=True), pl.concat(labels)


# Every kind and take, with several lengths, delays and sides

SPANS = [
    ("1h", "0s", "left"),
    ("7d", "0s", "right"),
    ("6d", "1d", "left"),
    ("30d", "7d", "right"),
    (ALL, "0s", "left"),
    (ALL, "1d", "left"),
]
TAKES = ["count", "sum", "mean", "std", "min", "max", "zscore", "ratio"]
ENTITIES = ["payer", "payee", "payer+payee", "device"]


def _window(entity: str, take: str, span: tuple[str, str, str], of: str = "amount", value: str = "", **options) -> Window:
    length, delay, closed = span
    return Window(f"{entity}_{take}_{of}_{length}_{delay}_{closed}", entity, take, length, of, value, delay, closed, **options)


def _risk(entity: str, take: str, span: tuple[str, str, str], rate: float = 0.0, weight: float = 0.0, **options) -> Risk:
    length, delay, closed = span
    return Risk(f"{entity}_{take}_{length}_{delay}_{closed}_{weight}", entity, take, length, delay, rate, weight, closed, **options)


def _everything():
    for zone in ("UTC", "Europe/Paris", "America/New_York", "Asia/Kathmandu"):
        for take in ("hour", "weekday", "weekend", "night", "month_day", "month_end"):
            yield Row(f"{take}_{zone}", take, zone)
    yield from (Row(take, take) for take in ("log_amount", "currency_exponent"))
    yield from (_window("payer", take, span) for span in SPANS for take in TAKES)
    for i, entity in enumerate(ENTITIES[1:]):
        yield from (_window(entity, take, SPANS[(i + j) % len(SPANS)]) for j, take in enumerate(TAKES))
    yield from (_window("payer", take, SPANS[i % 4], "distance", empty=-1.0) for i, take in enumerate(TAKES))
    yield from (_window("device", take, SPANS[1], "lat") for take in ("sum", "mean", "std", "min", "max", "zscore", "ratio"))
    yield from (_window("payer", "distinct", span, of) for span in SPANS[:4] for of in ("payee", "device"))
    yield from (_window("device", "distinct", span, "payer") for span in SPANS[:2])
    yield from (_window("payer", "share", span, "device", "phone") for span in SPANS)
    yield _window("payer+payee", "share", SPANS[1], "device", "web", empty=0.5)
    yield from (_risk("payee", take, span) for span in SPANS[:4] for take in ("frauds", "rate"))
    yield from (_risk(entity, "rate", span, 0.02, 10.0) for entity in ENTITIES for span in (SPANS[1], SPANS[2]))
    yield _risk("device", "frauds", SPANS[3])
    yield _risk("payer+payee", "rate", SPANS[0], empty=0.25)
    for entity in ENTITIES:
        for half in ("1h", "7d"):
            yield from (Decay(f"{entity}_decayed_{take}_{half}", entity, take, half) for take in ("count", "sum", "mean"))
        yield from (Since(f"{entity}_{take}", entity, take) for take in ("last", "first"))
    yield Decay("distance_decayed_sum", "payer", "sum", "1d", "distance")
    yield Decay("distance_decayed_mean", "payer", "mean", "1d", "distance", empty=-1.0)
    yield Since("payer_last_or_year", "payer", "last", empty=3e7)
    yield from (
        Since(f"{entity}_same_{of}", entity, "same", of) for entity, of in (("payer", "device"), ("payer", "payee"), ("device", "payer"))
    )
    yield Since("payee_same_device", "payee", "same", "device", empty=-1.0)
    yield from (Velocity(f"{entity}_velocity", entity, "lat", "lon") for entity in ("payer", "device"))
    yield Velocity("payer+payee_velocity", "payer+payee", "lat", "lon", empty=0.0)
    yield Encoded("device_frequency", "device", "frequency", values=(("phone", 0.6), ("desk", 0.1)), unseen=0.0, fitted_until=FITTED)
    yield Encoded(
        "payee_fraud_rate", "payee", "fraud_rate", empty=0.01, values=(("x", 0.07), ("0:x", 1 / 3)), unseen=0.02, fitted_until=FITTED
    )


EVERYTHING = FeatureSet(tuple(_everything()))
# of a table in several currencies
MIXED = FeatureSet(
    (
        Row("currency_exponent", "currency_exponent"),
        *(_window(entity, take, SPANS[i % 4]) for entity in ("payer+currency", "currency") for i, take in enumerate(TAKES)),
        Decay("decayed", "payee+currency", "sum", "1d"),
        _window("payer", "count", SPANS[1]),
        _window("payer", "mean", SPANS[1], "distance"),
        _window("payer", "distinct", SPANS[1], "currency"),
        Since("same_currency", "payer", "same", "currency"),
    )
)
