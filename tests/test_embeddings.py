"""Embeddings as tables, the nearest earlier cases, what an embedding knows; and that none of them sees the future."""

from datetime import timedelta

import jax
import numpy as np
import polars as pl
import pytest

from fraudlab.core.registry import resolve
from fraudlab.data import lake
from fraudlab.data.contract import TIME
from fraudlab.evaluation.embeddings import (
    confirmed,
    explained,
    nearest_earlier,
    payer_embeddings,
    payment_embeddings,
    read_embeddings,
    stretches,
    write_embeddings,
)
from fraudlab.features.audit import audit, encoded
from fraudlab.features.definitions import FeatureSet
from fraudlab.features.sequences import inputs, plan
from fraudlab.models.contract import embed_all, weights_hash

WIDTH = 8
MICRO = timedelta(microseconds=1)


@pytest.fixture(scope="module")
def world():
    return resolve("source", "handbook")(
        customers=20, terminals=30, radius=40.0, days=20, compromised_terminals=1, compromised_customers=1, seed=1
    )


def network(columns):
    return resolve("model", "decoder")(columns, width=WIDTH, layers=1, heads=2, key_heads=1, window=6, pieces=4)


@pytest.fixture(scope="module")
def until(world):
    return world.payments["event_time"][len(world.payments) // 2]


@pytest.fixture(scope="module")
def learned(world, until):
    """First weights of a tiny decoder, fitted to the payments before `until`."""
    data = encoded(FeatureSet(), world.fields, world.payments, world.labels, until)
    earlier = np.flatnonzero((world.payments["event_time"] < until).to_numpy())
    some = inputs(data, planned := plan(data, earlier, 6, 64), np.arange(len(planned)))
    return jax.tree.map(np.asarray, network(data.columns).init(some, seed=0))


def embed(world, learned, until, payments, labels) -> pl.DataFrame:
    data = encoded(FeatureSet(), world.fields, payments, labels, until)
    return payment_embeddings(network(data.columns), learned, data, payments, np.arange(len(payments)))


@pytest.fixture(scope="module")
def embedded(world, learned, until):
    return embed(world, learned, until, world.payments, world.labels)


def random(count: int, seed: int, since: int = 0) -> pl.DataFrame:
    """Random embeddings, several at one instant."""
    rng = np.random.default_rng(seed)
    times = pl.Series(np.sort(rng.integers(since, since + count // 2, count)) * 1_000_000).cast(TIME)
    ids, vectors = [f"{seed}-{i}" for i in range(count)], rng.normal(size=(count, WIDTH)).astype(np.float32)
    return pl.DataFrame({"payment_id": ids, "event_time": times, "embedding": vectors})


def test_a_row_says_what_it_is_of(world, embedded, learned, until):
    data = encoded(FeatureSet(), world.fields, world.payments, world.labels, until)
    some = np.array([7, 3])
    rows = payment_embeddings(network(data.columns), learned, data, world.payments, some)
    assert rows["payment_id"].to_list() == world.payments["payment_id"][some].to_list()
    assert rows.schema["embedding"] == pl.Array(pl.Float32, WIDTH)
    assert rows.select("model", "weights").unique().rows() == [("decoder", weights_hash(learned))]
    np.testing.assert_allclose(rows["embedding"].to_numpy(), embed_all(network(data.columns), learned, data, some), atol=1e-5)
    np.testing.assert_allclose(rows["embedding"].to_numpy(), embedded["embedding"].to_numpy()[some], atol=1e-5)


def test_only_networks_have_embeddings(world, learned, until):
    data = encoded(FeatureSet(), world.fields, world.payments, world.labels, until)
    with pytest.raises(ValueError, match="'boosted' is not trained by gradient"):
        payment_embeddings(resolve("model", "boosted")(data.columns), learned, data, world.payments, np.arange(3))
    with pytest.raises(ValueError, match="in one order"):
        payment_embeddings(network(data.columns), learned, data, world.payments[1:], np.arange(3))


def test_a_payer_is_its_latest_payment_strictly_before(embedded):
    rng = np.random.default_rng(0)
    at = [embedded["event_time"][int(i)] + int(rng.integers(-1, 2)) * MICRO for i in rng.integers(0, len(embedded), 200)]
    asked = pl.DataFrame({"payer_id": embedded["payer_id"].sample(200, seed=1), "as_of": at})
    found = payer_embeddings(embedded, asked)
    assert found.select("payer_id", "as_of").equals(asked)
    for row in found.rows(named=True):
        before = embedded.filter(pl.col("payer_id") == row["payer_id"], pl.col("event_time") < row["as_of"])
        assert row["payment_id"] == (before["payment_id"][-1] if len(before) else None)
        assert row["embedding"] == (before["embedding"][-1].to_list() if len(before) else None)
    assert 0 < found["payment_id"].null_count() < 200


def test_nobodys_payments_are_nobodys(embedded):
    unnamed = embedded.with_columns(payer_id=pl.lit(None, pl.String))
    asked = pl.DataFrame({"payer_id": pl.Series([None, "1"], dtype=pl.String), "as_of": [embedded["event_time"].max()] * 2})
    assert payer_embeddings(unnamed, asked)["payment_id"].null_count() == 2


def test_tables_come_back_at_their_version(tmp_path, embedded):
    payers = payer_embeddings(embedded, embedded.select("payer_id", as_of="event_time"))
    assert payers["embedding"].null_count()
    for version, rows in enumerate((embedded, embedded[:5], payers)):
        assert write_embeddings("demo/embeddings", rows, tmp_path) == version
    for version, rows in enumerate((embedded, embedded[:5], payers)):
        assert read_embeddings("demo/embeddings", version, tmp_path).equals(rows)
    lake.write("demo/labels", pl.DataFrame({"payment_id": ["a"]}), tmp_path)
    with pytest.raises(ValueError, match="holds no embeddings: it has payment_id"):
        read_embeddings("demo/labels", root=tmp_path)


def test_stretches_know_what_was_known_strictly_before():
    rng = np.random.default_rng(3)
    for _ in range(20):
        times, known = (np.sort(rng.integers(0, 12, rng.integers(0, 15))) for _ in range(2))
        counts = np.full(len(times), -1)
        for first, last, count in stretches(times, known):
            assert (counts[first:last] == -1).all()
            counts[first:last] = count
        assert counts.tolist() == [(known < t).sum() for t in times]


def test_the_nearest_earlier_cases_are_those_of_an_exact_search():
    asked, cases = random(300, 0, since=20), random(200, 1)
    cases = cases.with_columns(known_at=pl.col("event_time") + pl.duration(seconds=5)).sample(fraction=1, shuffle=True, seed=0)
    asked = asked.sample(fraction=1, shuffle=True, seed=1)
    found = nearest_earlier(asked, cases, k=4)
    assert found["payment_id"].unique(maintain_order=True).is_in(asked["payment_id"].implode()).all()
    unit = {
        row["payment_id"]: np.array(row["embedding"]) / np.linalg.norm(row["embedding"])
        for row in (*asked.rows(named=True), *cases.rows(named=True))
    }
    got, hits, total = found.partition_by("payment_id", as_dict=True, maintain_order=True), 0, 0
    for row in asked.rows(named=True):
        known = cases.filter(pl.col("known_at") < row["event_time"])
        near = got.get((row["payment_id"],), found[:0])
        exact = sorted((1 - unit[case] @ unit[row["payment_id"]], case) for case in known["payment_id"])[:4]
        assert len(near) == len(exact)
        for case, distance in near.select("case", "distance").rows():
            assert distance == pytest.approx(1 - unit[case] @ unit[row["payment_id"]], abs=1e-5)
        assert near["distance"].is_sorted()
        hits, total = hits + len({case for _, case in exact} & set(near["case"])), total + len(exact)
    assert hits >= 0.99 * total > 900
    about = found.join(cases.select("event_time", "known_at", case="payment_id"), "case", maintain_order="left")
    assert (about["event_time"] == about["event_time_right"]).all()
    assert (about["known_at"] == about["known_at_right"]).all()


def test_without_cases_there_are_no_neighbours():
    asked = random(20, 0)
    for cases in (asked[:0], asked):
        found = nearest_earlier(asked, cases.with_columns(known_at=pl.col("event_time") + pl.duration(days=9)))
        assert found.columns == ["payment_id", "case", "distance", "event_time", "known_at"]
        assert found.is_empty()
    with pytest.raises(ValueError, match="k = 0"):
        nearest_earlier(asked, asked.with_columns(known_at="event_time"), k=0)


def test_equal_calls_find_equal_cases():
    asked, cases = random(200, 0, since=50), random(500, 1).with_columns(known_at="event_time")
    assert nearest_earlier(asked, cases).equals(nearest_earlier(asked, cases.reverse()))


def test_cases_are_known_frauds(embedded, world):
    cases = confirmed(embedded, world.labels)
    assert (
        cases.select("payment_id", "known_at")
        .sort("payment_id")
        .equals(world.labels.filter("is_fraud").select("payment_id", "known_at").sort("payment_id"))
    )
    assert len(cases)
    unknown = world.labels.with_columns(known_at=pl.lit(None, TIME))
    assert confirmed(embedded, unknown).is_empty()


def test_no_embedding_sees_the_future(world, learned, until):
    """Of payments from `until` on, since what columns are filled with is fitted on those before."""

    def payment(payments, labels):
        rows = embed(world, learned, until, payments, labels).filter(pl.col("event_time") >= until)
        return rows.select("payment_id", pl.col("embedding") + np.float32(10))  # so that 1e-5 is of a size, and not of a number near 0

    def payer(later):
        def subject(payments, labels):
            rows = embed(world, learned, until, payments, labels)
            found = payer_embeddings(rows, rows.select("payer_id", as_of=pl.col("event_time") + later))
            now = payments.select("payment_id", "event_time").with_columns(found["embedding"]).filter(pl.col("event_time") >= until)
            return now.select("payment_id", pl.col("embedding") + np.float32(10))

        return subject

    for honest in (payment, payer(timedelta())):
        assert audit(honest, world, cuts=2, tolerance=1e-5, effort=4) == []
    assert audit(payer(timedelta(days=3)), world, cuts=1, tolerance=1e-5, effort=4)


def test_no_neighbour_sees_the_future(world):
    def rows(payments):
        """A vector of the payment alone, to the last bit the same in every world."""
        amount = payments["amount"].cast(pl.Float64).to_numpy()
        vectors = np.stack([np.cos(amount * k) for k in range(1, WIDTH + 1)], 1).astype(np.float32)
        return payments.select("payment_id", "event_time").with_columns(embedding=pl.Series(vectors))

    def cases(known):
        def subject(payments, labels):
            every = rows(payments).join(labels, "payment_id", maintain_order="left").with_columns(known_at=known)
            found = nearest_earlier(
                rows(payments), every.filter(pl.col("is_fraud").fill_null(False), pl.col("known_at").is_not_null()), k=3
            )
            return found.select("payment_id", "case", "known_at")

        return subject

    assert audit(cases(pl.col("known_at")), world, cuts=3) == []
    assert audit(cases(pl.col("event_time")), world, cuts=3, effort=10)[0].cause == "label"


def test_what_is_told_of_a_fact_is_what_is_in_the_vector():
    rng = np.random.default_rng(0)
    payers = pl.Series(rng.integers(0, 60, 1500))
    vectors = rng.normal(size=(1500, 4)).astype(np.float32)
    plain, folded = vectors[:, 0].astype(np.float64), np.abs(vectors[:, 1]).astype(np.float64)
    plain[:100] = np.nan
    assert explained(vectors, plain, payers)["linear"] > 0.99
    found = explained(vectors, folded, payers)
    assert found["linear"] < 0.1
    assert found["trees"] > 0.9
    own = rng.normal(size=60)[payers.to_numpy()]  # a fact of the payer, and vectors that tell one payer from another
    named = np.stack([payers.to_numpy(), rng.normal(size=1500)], 1).astype(np.float32)
    assert explained(named, own, payers)["trees"] < 0.3
    with pytest.raises(ValueError, match="2 payers have the fact"):
        explained(vectors[:20], plain[100:120], pl.Series(["a", "b"] * 10))
