"""Ring features against their definitions, written plainly: nothing at or after a payment's time moves them."""

from datetime import timedelta

import numpy as np
import polars as pl
import pytest

from fraudlab.data.sources.transfers import TYPOLOGIES
from fraudlab.features.rings import FANS, REACH, Rings, names, rings

WINDOWS = ("30s", "100s")


def payments(n: int, accounts: int, instants: int, seed: int = 0) -> pl.DataFrame:
    """Random ones, many at equal instants, some to oneself, a few without a payer or payee."""
    rng = np.random.default_rng(seed)
    some = lambda: [f"a{i}" if rng.random() > 0.01 else None for i in rng.integers(0, accounts, n)]  # noqa: E731
    return pl.DataFrame(
        {
            "payment_id": [f"p{i}" for i in range(n)],
            "event_time": pl.Series(np.sort(rng.integers(0, instants, n)) * 10**6).cast(pl.Datetime("us", "UTC")),
            "payer_id": some(),
            "payee_id": some(),
            "amount": rng.integers(90, 110, n) / 1,
        }
    )


def plainly(rows: list[tuple], payment: tuple, window: float) -> dict[str, int]:
    """The definitions, for one payment and one window; rows and payment are (second, payer, payee, amount)."""
    t, src, dst, amount = payment
    joined = [r for r in rows if None not in r and r[1] != r[2]]
    within = lambda found, most: [r for r in found[-most:] if r[0] >= t - window]  # noqa: E731
    made = lambda who, most=REACH, before=t: within([r for r in joined if r[1] == who and r[0] < before], most)  # noqa: E731
    got = lambda who, most=REACH, before=t: within([r for r in joined if r[2] == who and r[0] < before], most)  # noqa: E731
    payers, payees = lambda found: {r[1] for r in found}, lambda found: {r[2] for r in found}
    out = {
        "fan_in_payee": len(payers(got(dst, FANS))) if dst else 0,
        "fan_in_payer": len(payers(got(src, FANS))) if src else 0,
        "fan_out_payee": len(payees(made(dst, FANS))) if dst else 0,
        "fan_out_payer": len(payees(made(src, FANS))) if src else 0,
        "passed_on": sum(0.9 * r[3] <= amount <= r[3] for r in got(src, FANS)) if src else 0,
    }
    if None in (src, dst) or src == dst:
        return out | dict.fromkeys(("cycle_2", "cycle_3", "cycle_4", "bipartite", "scatter_gather"), 0)
    last, first = got(src), made(dst)
    threes = [(a, b) for a in first for b in last if a[2] == b[1] and a[0] < b[0] and a[2] != src]
    fours = [
        (a, b, c)
        for a in first
        for b in made(a[2])
        for c in last
        if b[2] == c[1] and a[0] < b[0] < c[0] and len({src, dst, a[2], b[2]}) == 4
    ]
    brought = {m: payers(got(m, before=max(r[0] for r in got(dst) if r[1] == m))) for m in payers(got(dst)) - {src}}
    ways = {s: 1 + sum(s in sources for sources in brought.values()) for s in payers(last) - {dst}}
    others = payees(made(src)) - {dst}
    return out | {
        "cycle_2": sum(r[1] == dst for r in last),
        "cycle_3": len(threes),
        "cycle_4": len(fours),
        "bipartite": sum(bool(payees(made(m)) & others) for m in payers(got(dst)) - {src}),
        "scatter_gather": max(ways.values(), default=0),
    }


def rows_of(frame: pl.DataFrame) -> list[tuple]:
    seconds = frame["event_time"].to_physical() / 10**6
    return list(zip(seconds, frame["payer_id"], frame["payee_id"], frame["amount"], strict=True))


@pytest.mark.parametrize(
    ("n", "accounts", "instants"),
    [(500, 20, 300), (400, 10, 60), (900, 5, 120)],  # long and sparse; many at one instant; so many that what is looked at is limited
)
def test_every_feature_is_what_its_definition_says(n, accounts, instants):
    frame = payments(n, accounts, instants, seed=n)
    found, rows = rings(frame, WINDOWS), rows_of(frame)
    assert found.columns == ["payment_id", *names(WINDOWS)]
    assert set(found.dtypes[1:]) == {pl.Float32}
    met = dict.fromkeys(names(WINDOWS), 0.0)
    for i in range(n - 1, 0, -3):
        for text, window in zip(WINDOWS, (30, 100), strict=True):
            for name, value in plainly(rows, rows[i], window).items():
                column = f"rings_{name}_{text}"
                assert found[column][i] == value, (i, column)
                met[column] = max(met[column], value)
    assert min(met.values()) > 0, met


def test_what_is_at_or_after_a_payment_moves_nothing_it_sees():
    frame = payments(300, 8, 60)
    found, rng, time = rings(frame, WINDOWS), np.random.default_rng(1), frame["event_time"].to_physical().to_numpy()
    for i in range(20, 300, 40):
        others = (time >= time[i]) & (np.arange(300) != i)
        changed = frame.with_columns(
            pl.when(pl.Series(others)).then(pl.Series(rng.permutation(frame[c]))).otherwise(c).alias(c)
            for c in ("payer_id", "payee_id", "amount")
        )
        fewer = frame.filter(~others)
        kept = (time < time[i]) | (np.arange(300) == i)
        assert rings(changed, WINDOWS).filter(kept).equals(found.filter(kept))
        assert rings(fewer, WINDOWS).equals(found.filter(kept))
    earlier = frame.with_columns(pl.when(pl.int_range(300) == 100).then(pl.lit("a1")).otherwise("payer_id").alias("payer_id"))
    assert not rings(earlier, WINDOWS).equals(found), "a change in the past must be seen"


def test_one_by_one_as_all_at_once():
    frame = payments(900, 20, 500)
    grown = Rings(WINDOWS)
    single = np.stack([grown.add(payment) for payment in frame.iter_rows(named=True)])
    np.testing.assert_array_equal(single, rings(frame, WINDOWS).select(grown.names).to_numpy())


def test_a_late_payment_sees_what_was_before_it_and_is_seen_by_what_comes_after():
    frame = payments(400, 20, 300)
    together, rng = rings(frame, WINDOWS).drop("payment_id").to_numpy(), np.random.default_rng(0)
    came = np.argsort(np.arange(400) + np.where(rng.random(400) < 0.1, 60, 0), kind="stable")
    grown, late = Rings(WINDOWS), 0
    for place, i in enumerate(came):
        found = grown.add(frame.row(int(i), named=True))
        if set(came[:place]) >= set(range(i)):  # all that was earlier is there, and perhaps more
            late += place > i
            np.testing.assert_array_equal(found, together[i])
    assert late > 20
    after = {
        "payment_id": "x",
        "event_time": frame["event_time"][-1] + timedelta(seconds=5),
        "payer_id": "a1",
        "payee_id": "a2",
        "amount": 95.0,
    }
    whole = pl.concat([frame, pl.DataFrame([after], schema=frame.schema)])
    np.testing.assert_array_equal(grown.add(after), rings(whole, WINDOWS).drop("payment_id").to_numpy()[-1])


@pytest.mark.parametrize(
    ("typology", "size", "expected"),
    [
        ("fan_in", 6, {"fan_in_payee": 5}),
        ("fan_out", 6, {"fan_out_payer": 5}),
        ("cycle", 3, {"cycle_3": 1, "passed_on": 1}),
        ("cycle", 4, {"cycle_4": 1}),
        ("scatter_gather", 6, {"scatter_gather": 6}),
        ("bipartite", 6, {"bipartite": 2, "fan_in_payee": 2, "fan_out_payer": 3}),
        ("stack", 6, {"scatter_gather": 2, "bipartite": 1}),
    ],
)
def test_a_planted_pattern_is_seen_by_its_last_payment(typology, size, expected):
    edges = TYPOLOGIES[typology](size)
    frame = pl.DataFrame(
        {
            "payment_id": [str(i) for i in range(len(edges))],
            "event_time": pl.Series(np.arange(len(edges)) * 10**6).cast(pl.Datetime("us", "UTC")),
            "payer_id": [f"a{a}" for a, _, _ in edges],
            "payee_id": [f"a{b}" for _, b, _ in edges],
            "amount": 100.0,
        }
    )
    last = rings(frame, ["1d"]).row(-1, named=True)
    assert {name: last[f"rings_{name}_1d"] for name in expected} == expected


def test_payments_out_of_order_and_wrong_windows_are_refused():
    frame = payments(10, 3, 10)
    with pytest.raises(ValueError, match="not in time order"):
        rings(frame.reverse(), WINDOWS)
    for wrong in ([], ["1d", "24h"], ["0s"]):
        with pytest.raises(ValueError, match="windows"):
            rings(frame, wrong)
    assert rings(frame.clear(), WINDOWS).is_empty()
