"""The simulated world of transfers: patterns are what they are called, labels keep the contract, and nothing shows at a glance."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from fraudlab.data.contract import check
from fraudlab.data.sources.transfers import DAY, TYPOLOGIES, World, account_labels, simulate, transfers

ROOT = Path(__file__).parents[1]
SMALL = {"accounts": 600, "days": 45}


@pytest.fixture(scope="module")
def rows() -> pl.DataFrame:
    return simulate(World(accounts=3000, days=60), seed=3)


def whole(rows: pl.DataFrame, typology: str) -> list[pl.DataFrame]:
    """Patterns of a typology that began early enough to be all there."""
    early = pl.col("event_time").min().over("pattern") < rows["event_time"].min() + pl.duration(days=30)
    return rows.filter(typology=typology).filter(early).partition_by("pattern", maintain_order=True)


def test_same_seed_same_rows_for_ever():
    """The golden rows: a change here changes every simulated result, and must be meant."""
    tables = transfers(**SMALL, seed=7)
    text = (
        tables.payments.join(tables.labels, "payment_id", "left", maintain_order="left")
        .with_columns(pl.col("event_time", "known_at").cast(pl.Int64))
        .write_csv()
    )
    assert hashlib.sha256(text.encode()).hexdigest() == "6edd27fc077aa27738b8646bca5fda24361c5d5ab9dcc5b91b150df0f2c7e8b7"
    assert not transfers(**SMALL, seed=8).payments.equals(tables.payments)


def test_the_contract_keeps_every_row():
    tables = transfers(**SMALL)
    assert tables.quarantined.is_empty()
    assert check(tables.payments, tables.labels, tables.fields).quarantined.is_empty()
    assert [f.name for f in tables.fields] == ["channel"]
    assert 0.003 < tables.labels["is_fraud"].mean() < 0.01
    assert len(tables.labels) / len(tables.payments) == pytest.approx(0.9, abs=0.02)


def test_laundering_leaves_the_honest_economy_as_it_is():
    calm, rough = (
        simulate(World(**SMALL, cover=1.0, lookalikes=0.0, patterns=dict.fromkeys(TYPOLOGIES, rate)), seed=5).drop("known_at")
        for rate in (0, 3)
    )
    assert calm["pattern"].null_count() == len(calm)
    assert rough.filter(pl.col("pattern").is_null()).equals(calm)
    alike = simulate(World(**SMALL, cover=1.0, lookalikes=4.0), seed=5).drop("known_at")
    assert len(alike.filter(pl.col("pattern").is_null())) > len(calm) + 100
    pool_only = simulate(World(**SMALL, cover=0.0, lookalikes=0.0, launderers=0.2), seed=5)
    guilty = pool_only.filter(pl.col("pattern").is_not_null())["payer_id"].unique()
    assert pool_only.filter(pl.col("pattern").is_null(), pl.col("payer_id").is_in(guilty.implode())).is_empty()


@pytest.mark.parametrize("typology", TYPOLOGIES)
def test_a_pattern_is_of_its_typology(rows, typology):
    patterns = whole(rows, typology)
    assert len(patterns) > 2
    for pattern in patterns:
        payers, payees = set(pattern["payer_id"]), set(pattern["payee_id"])
        first, last, middle = payers - payees, payees - payers, payers & payees
        shape = len(first), len(middle), len(last)
        edges = len(pattern)
        assert not pattern.select("payer_id", "payee_id").is_duplicated().any()
        expected = {
            "fan_in": shape == (edges, 0, 1),
            "fan_out": shape == (1, 0, edges),
            "cycle": shape == (0, edges, 0),
            "scatter_gather": shape == (1, edges // 2, 1),
            "bipartite": middle == set() and len(first) > 1 and len(last) > 1 and edges == len(first) * len(last),
            "stack": min(shape) > 1 and edges == len(middle) * (len(first) + len(last)),
        }
        assert expected[typology]
        for account in middle if typology != "cycle" else ():
            got, made = pattern.filter(payee_id=account), pattern.filter(payer_id=account)
            assert got["event_time"].max() <= made["event_time"].min()
            assert 0.9 * got["amount"].sum() < made["amount"].sum() <= got["amount"].sum() + 0.1
        if typology == "cycle":
            assert pattern["payer_id"][1:].equals(pattern["payee_id"][:-1].rename("payer_id"))
            assert pattern["payee_id"][-1] == pattern["payer_id"][0]
            assert pattern["amount"].is_sorted(descending=True)


def test_how_many_patterns_and_how_large():
    world = World(accounts=2000, days=60, patterns={"cycle": 3.0, "fan_in": 1.0}, sizes=(4, 6))
    found = simulate(world).filter(pl.col("pattern").is_not_null())
    assert dict(found.group_by("typology").agg(pl.col("pattern").n_unique()).iter_rows()) == {"cycle": 12, "fan_in": 4}
    cycles = [len(p) for p in whole(simulate(world), "cycle")]
    assert {4, 5, 6} >= set(cycles)


def test_labels_of_a_pattern_become_known_together_after_its_end(rows):
    guilty = rows.filter(pl.col("pattern").is_not_null())
    by_pattern = guilty.group_by("pattern").agg(
        pl.col("known_at").n_unique(), end=pl.col("event_time").max(), known=pl.col("known_at").first()
    )
    assert by_pattern["known_at"].unique().to_list() == [1]
    assert by_pattern["known"].is_null().mean() == pytest.approx(0.1, abs=0.06)
    late = (by_pattern["known"] - by_pattern["end"]).drop_nulls().dt.total_seconds() / DAY
    assert late.min() > 0
    assert late.median() == pytest.approx(14, abs=4)
    honest = rows.filter(pl.col("pattern").is_null())
    late = (honest["known_at"] - honest["event_time"]).drop_nulls().dt.total_seconds() / DAY
    assert late.min() > 0
    assert late.median() == pytest.approx(14, abs=1)
    pairs = honest.group_by("payer_id", "payee_id").agg(pl.col("known_at").is_null().n_unique())
    assert pairs["known_at"].unique().to_list() == [1], "of a pair of accounts all is looked into, or nothing"


def test_an_account_launders_if_it_is_in_a_pattern(rows):
    labels = account_labels(rows)
    guilty = rows.filter(pl.col("pattern").is_not_null())
    ends = pl.concat([guilty["payer_id"], guilty["payee_id"].rename("payer_id")]).unique()
    assert set(labels.filter("is_launderer")["account_id"]) == set(ends)
    assert len(labels) == pl.concat([rows["payer_id"], rows["payee_id"].rename("payer_id")]).n_unique()
    for account, known in labels.filter("is_launderer").select("account_id", "known_at").head(40).iter_rows():
        own = guilty.filter((pl.col("payer_id") == account) | (pl.col("payee_id") == account))
        assert own["known_at"].min() == known
    account, known = labels.filter(~pl.col("is_launderer")).select("account_id", "known_at").row(0)
    assert rows.filter((pl.col("payer_id") == account) | (pl.col("payee_id") == account))["known_at"].max() == known


def recall(rows: pl.DataFrame, score: pl.Series) -> float:
    """Share of launderings above the score that 1 % of the honest transfers exceed; the better of both directions."""
    guilty = rows["pattern"].is_not_null()
    shares = []
    for sign in (1, -1):
        values = score.cast(pl.Float64) * sign
        shares.append((values.filter(guilty) > values.filter(~guilty).quantile(0.99)).mean())
    return max(shares)


def test_no_single_number_gives_laundering_away(rows):
    degrees = {
        f"{other} of {end}": rows.join(rows.group_by(end).agg(many=pl.col(other).n_unique()), end, maintain_order="left")["many"]
        for end in ("payer_id", "payee_id")
        for other in ("payer_id", "payee_id")
        if end != other
    }
    new = rows.select(pl.struct("payer_id", "payee_id").is_first_distinct()).to_series()
    for name, score in {"amount": rows["amount"], "new": new, **degrees}.items():
        assert recall(rows, score) < 0.15, name


def test_an_economy_of_habits(rows):
    honest = rows.filter(pl.col("pattern").is_null())
    known = honest.select(~pl.struct("payer_id", "payee_id").is_first_distinct()).to_series()
    assert known[len(known) // 2 :].mean() > 0.6
    hours = honest["event_time"].dt.hour()
    assert (hours < 6).mean() < 0.08
    made = honest["payer_id"].value_counts()["count"].sort(descending=True)
    got = honest["payee_id"].value_counts()["count"].sort(descending=True)
    assert got.head(len(got) // 100).sum() > 0.2 * len(honest), "few shops get much"
    assert made.head(len(made) // 10).sum() > 0.3 * len(honest)
    assert set(rows["channel"]) == {"card", "transfer", "instant", "standing order", "direct debit"}
    assert set(rows.filter(pl.col("pattern").is_not_null())["channel"]) == {"transfer", "instant"}
    assert (rows["amount"] >= 0.01).all()
    assert (rows["payer_id"] != rows["payee_id"]).all()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"patterns": {"ring": 1.0}}, "'ring' is no typology"),
        ({"patterns": {"cycle": -1.0}}, "patterns of cycle"),
        ({"sizes": [2, 5]}, "sizes"),
        ({"launderers": 0.001}, "launderers"),
        ({"cover": 1.5}, "cover"),
        ({"delay_days": -1.0}, "delay_days"),
    ],
)
def test_wrong_options_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        transfers(**options)


def test_recall_of_each_typology(tmp_path):
    """Prepared, trained and judged; recall by hand from the scores and the world."""
    options = {"accounts": 1500, "days": 60, "seed": 4}
    protocol = {"train_start": "2024-01-08", "train_days": 25, "delay_days": 8, "test_days": 18}
    steps = [
        {"flow": "prepare", "with": {"source": "transfers", "options": options, "features": "", "protocol": protocol}},
        {"flow": "train", "with": {"prepared": "{prepare.folder}", "model": "logistic"}},
        {"flow": "typologies", "with": {"runs": ["{train.folder}"]}},
    ]
    file = tmp_path / "transfers.yaml"
    file.write_text(json.dumps({"purpose": "a test", "expected": "as by hand", "steps": steps}))
    folders = {f"FRAUDLAB_{name.upper()}": str(tmp_path / name) for name in ("runs", "data", "registry", "bundles", "keys")}
    command = [Path(sys.executable).parent / "fraudlab", "run", file]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | folders, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = json.loads((tmp_path / "runs/typologies/latest/result.json").read_text())["metrics"]

    scores = pl.read_parquet(tmp_path / "runs/train/latest/scores.parquet").filter(pl.col("is_fraud").is_not_null(), part="test")
    world = simulate(World(accounts=1500, days=60), 4)
    typology = world["typology"].gather(scores["payment_id"].cast(pl.Int64))
    fraud, score = scores["is_fraud"].to_numpy(), scores["score"].to_numpy()
    assert (typology.is_not_null().to_numpy() == fraud).all()
    thresholds = [t for t in np.unique(score) if (score[~fraud] >= t).mean() <= 0.01]
    alerted = score >= min(thresholds, default=np.inf)
    assert metrics["logistic.recall.all"] == pytest.approx(alerted[fraud].mean())
    for name in set(typology.drop_nulls()):
        assert metrics[f"logistic.recall.{name}"] == pytest.approx(alerted[(typology == name).fill_null(False).to_numpy()].mean())
