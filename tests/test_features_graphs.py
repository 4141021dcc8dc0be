"""As-of graphs against their definition, written plainly: nothing at or after a payment's time is ever reached."""

import numpy as np
import polars as pl
import pytest

from fraudlab.features.graphs import Growing, Layout, around, graph, neighbours, seen, shuffled

ACCOUNTS = {"payer_id": "account", "payee_id": "account"}
CARDS = {"payer_id": "card", "payee_id": "shop", "device": "device"}


def payments(n: int = 600, people: int = 25, instants: int = 150, seed: int = 0) -> pl.DataFrame:
    rng = np.random.default_rng(seed)
    some = lambda share: pl.Series([None if rng.random() < share else f"d{i}" for i in rng.integers(0, 9, n)], dtype=pl.String)  # noqa: E731
    return pl.DataFrame(
        {
            "payment_id": [f"p{i}" for i in range(n)],
            "event_time": pl.Series(np.sort(rng.integers(0, instants, n)) * 10**6).cast(pl.Datetime("us", "UTC")),
            "payer_id": rng.integers(0, people, n).astype(str),
            "payee_id": rng.integers(0, people, n).astype(str),
            "device": some(0.3),
        }
    )


def times_of(frame: pl.DataFrame) -> np.ndarray:
    return frame["event_time"].to_physical().to_numpy()


def earlier(frame: pl.DataFrame, kinds: dict, pairs: list, kind: str, name: str, t: int) -> list[tuple]:
    """(row, role here, role there) of all that the entity had been part of before `t`, newest first."""
    found, times = [], times_of(frame)
    for row, payment in enumerate(frame.iter_rows(named=True)):
        if times[row] >= t:
            break
        for a, b in pairs:
            if payment[a] is None or payment[b] is None:
                continue
            for here, there in ((a, b), (b, a)):
                if kinds[here] == kind and payment[here] == name:
                    found.append((row, here, there))
    return found[::-1]


@pytest.mark.parametrize(
    ("kinds", "pairs"),
    [
        (ACCOUNTS, [("payer_id", "payee_id")]),
        (CARDS, [("payer_id", "payee_id"), ("payer_id", "device")]),
        (CARDS, [("payee_id", "device"), ("payer_id", "device")]),
    ],
)
@pytest.mark.parametrize("k", [1, 4, 100])
def test_neighbours_are_the_latest_strictly_earlier_entries(kinds, pairs, k):
    frame = payments()
    made = graph(frame, Layout(kinds, pairs))
    times = np.repeat(times_of(frame)[:, None], made.ends.shape[1], 1)
    hop = neighbours(made, made.ends, times, k, threads=3)
    for row in range(0, len(frame), 29):
        for place, role in enumerate(made.roles):
            name = frame[role][row]
            if name is None:
                assert (hop.payment[row, place] == -1).all()
                continue
            expected = earlier(frame, kinds, pairs, kinds[role], name, times[row, place])[:k]
            there = hop.payment[row, place] >= 0
            assert there.sum() == len(expected)
            assert [int(p) for p in hop.payment[row, place][there]] == [p for p, _, _ in expected]
            assert [made.relations[r] for r in hop.relation[row, place][there]] == [f"{a}>{b}" for _, a, b in expected]
            others = [(kinds[b], frame[b][p]) for p, _, b in expected]
            first = np.cumsum([0, *map(len, made.names)])
            of = [(made.kinds[made.kind[n]], made.names[made.kind[n]][int(n - first[made.kind[n]])]) for n in hop.node[row, place][there]]
            assert of == others


@pytest.mark.parametrize("latest", [True, False])
def test_the_future_moves_nothing(latest):
    frame = payments()
    cut = 400
    t = int(times_of(frame)[cut])
    rng = np.random.default_rng(1)
    late = pl.Series(times_of(frame) >= t)
    other = pl.Series(rng.integers(0, 25, len(frame)).astype(str))
    changed = frame.with_columns(payee_id=pl.when(late).then(other).otherwise("payee_id"))
    before = np.flatnonzero(times_of(frame) <= t)
    hops = [around(graph(of, Layout(ACCOUNTS)), before, times_of(of)[before], (5, 4, 3), latest, 7) for of in (frame, changed)]
    known = times_of(frame)[before] < t
    for one, two in zip(*hops, strict=True):
        for a, b in zip(one, two, strict=True):
            np.testing.assert_array_equal(a[known], b[known])


def test_payments_can_be_nodes():
    frame = payments(50)
    made = graph(frame, Layout(CARDS, payments_as_nodes=True))
    assert made.kinds == ("card", "shop", "device", "payment")
    assert made.relations[:2] == ("payment_id>payer_id", "payer_id>payment_id")
    cards = neighbours(made, made.ends[:, 1], times_of(frame), 50)
    for row in range(50):
        mine = [i for i in range(50) if frame["payer_id"][i] == frame["payer_id"][row] and times_of(frame)[i] < times_of(frame)[row]]
        found = cards.node[row][cards.node[row] >= 0]
        assert found.tolist() == [int(made.ends[i, 0]) for i in reversed(mine)]


def test_a_growing_graph_finds_what_the_whole_one_does_whatever_comes_late():
    frame, rng = payments().with_columns(pl.col("event_time") + pl.duration(microseconds=pl.int_range(pl.len()))), np.random.default_rng(2)
    made, growing = graph(frame, Layout(CARDS)), Growing(Layout(CARDS))
    order = np.argsort(np.arange(len(frame)) + rng.integers(0, 40, len(frame)), kind="stable")
    row_of = np.empty(len(frame), int)
    for row in order.tolist():
        row_of[growing.insert(frame.row(row, named=True), int(times_of(frame)[row]))] = row
    times = np.repeat(times_of(frame)[:, None], 3, 1)
    ends = np.stack([growing.ends(payment) for payment in frame.iter_rows(named=True)])
    found, expected = growing.neighbours(ends, times, 6), neighbours(made, made.ends, times, 6)
    assert len(frame["event_time"].unique()) == len(frame)  # payments of one instant would stay in the order in which they came
    np.testing.assert_array_equal(np.where(found.payment >= 0, row_of[found.payment], -1), expected.payment)
    for name in ("time", "relation", "port"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout({"payer": "card"}), "no column 'payer'. They have: payment_id"),
        (Layout(edges=[("payer_id", "card")]), "are not two of the columns payer_id, payee_id"),
    ],
)
def test_what_is_no_graph_is_refused(layout, message):
    with pytest.raises(ValueError, match=message):
        graph(payments(), layout)


def test_payments_out_of_order_and_no_neighbours_are_refused():
    with pytest.raises(ValueError, match="not in time order"):
        graph(payments()[::-1])
    with pytest.raises(ValueError, match="k = 0"):
        neighbours(graph(payments()), np.zeros(1, np.int32), np.zeros(1, np.int64), 0)


def test_labels_are_seen_by_known_at_alone():
    frame, rng = payments(), np.random.default_rng(3)
    known = times_of(frame) + rng.integers(0, 40, len(frame)) * 10**6
    told = pl.DataFrame(
        {
            "payment_id": frame["payment_id"],
            "is_fraud": rng.random(len(frame)) < 0.5,
            "known_at": pl.Series(known).cast(pl.Datetime("us", "UTC")),
        }
    )
    told = told.filter(pl.Series(rng.random(len(frame)) < 0.8)).sample(fraction=1, shuffle=True, seed=0)
    made, at = graph(frame, Layout(ACCOUNTS), told), np.arange(len(frame))
    number = np.arange(len(frame), dtype=np.float32)[:, None] + 1
    verdict = {row["payment_id"]: row for row in told.iter_rows(named=True)}
    some = 0
    for block in seen(made, number, at, (6, 3), times_of(frame)):
        shape = (-1,) + (1,) * (block.label.ndim - 1)
        looking = np.broadcast_to(times_of(frame).reshape(shape), block.label.shape)
        for p, t, label in zip(block.rows[..., 0].ravel(), looking.ravel(), block.label.ravel(), strict=True):
            row = verdict.get(f"p{int(p) - 1}") if p else None
            early = row is not None and row["known_at"].timestamp() * 1e6 < t
            assert label == (1 + row["is_fraud"] if early else 0)
            some += label > 0
    assert some > 1000


def test_shuffled_edges_keep_each_days_nodes():
    frame = payments().with_columns(pl.col("event_time") + pl.duration(hours=pl.int_range(pl.len()) // 20))
    dealt, day = shuffled(frame, ["payee_id"]), pl.col("event_time").dt.truncate("1d")
    count = lambda f: f.group_by(day, "payee_id").len().sort(pl.all())  # noqa: E731
    assert count(dealt).equals(count(frame))
    assert dealt["payer_id"].equals(frame["payer_id"])
    assert (dealt["payee_id"] == frame["payee_id"]).mean() < 0.3
    assert graph(frame, Layout(ACCOUNTS, shuffle=True)).ends[:, 0].tolist() == graph(frame, Layout(ACCOUNTS)).ends[:, 0].tolist()
