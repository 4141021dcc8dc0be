"""Spark against the reference: hundreds of small tables in one job, the published data, and the tables that Spark reads."""

import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import polars as pl
import pytest
from conftest import shared
from deltalake import write_deltalake
from features_reference import ENTITIES, EVERYTHING, FITTED, MIXED, assert_close, examples, reference, together

from fraudlab.data.sources.handbook_file import handbook_file
from fraudlab.features import spark as engine
from fraudlab.features.definitions import Decay, Encoded, FeatureSet, Risk, Row, Since, Window


@pytest.fixture(scope="session")
def spark(tmp_path_factory):
    pytest.importorskip("pyspark", reason='pyspark is not installed: pip install "fraudlab[spark]"')
    if not shutil.which("java"):
        pytest.skip("Spark needs Java 17, and there is none")
    folder = tmp_path_factory.mktemp("hive")
    options = {"spark__driver__extraJavaOptions": f"-Dderby.system.home={folder} -XX:TieredStopAtLevel=1"}  # short jobs: compile fast
    options["spark__hadoop__javax__jdo__option__ConnectionURL"] = "jdbc:derby:memory:metastore;create=true"
    session = engine.session("local[2]", partitions=2, warehouse=folder, **options)
    yield session
    session.stop()


def computed(spark, features, payments, labels):
    """What Spark computes, in the order of the payments."""
    values = engine.compute(features, engine.from_polars(spark, payments), engine.from_polars(spark, labels))
    return payments.select("payment_id").join(engine.to_polars(values), on="payment_id", how="left", maintain_order="left")


def test_every_kind_equals_the_reference_on_many_tables_with_one_shuffle_an_entity(spark):
    payments, labels = together(examples(200))
    values = engine.compute(EVERYTHING, engine.from_polars(spark, payments), engine.from_polars(spark, labels))
    in_order = payments.select("payment_id").join(engine.to_polars(values), on="payment_id", how="left", maintain_order="left")
    assert_close(in_order, reference(EVERYTHING, payments, labels))
    # those of one payer are in one place already when those of a payer and payee are asked for; labels are broadcast
    assert EVERYTHING.entities == sorted(ENTITIES)
    assert engine.shuffles(values) == ["category:payer_id", "category:payee_id", "category:device, salt:device"]


def test_currencies_keep_apart(spark):
    payments = pl.concat([p for p, _ in examples(60, mixed=True)]).sort("event_time", maintain_order=True)
    payments = payments.with_columns(payment_id=pl.int_range(len(payments)).cast(pl.String))
    labels = examples(1)[0][1].clear()
    assert payments["currency"].n_unique() > 1
    assert_close(computed(spark, MIXED, payments, labels), reference(MIXED, payments, labels), MIXED)


def test_ties_go_by_payment_id_where_there_is_no_position(spark):
    payments, labels = together(examples(60))
    by_id = payments.with_columns(payment_id=pl.int_range(10_000, 10_000 + len(payments)).cast(pl.String))
    labels = labels.with_columns(pl.col("payment_id").replace_strict(payments["payment_id"], by_id["payment_id"]))
    features = [f for f in EVERYTHING.features if f.take in ("same", "velocity") or getattr(f, "closed", "") == "right"]
    features = FeatureSet(tuple(f for f in features if f.entity == "payer"))
    shuffled = engine.from_polars(spark, by_id.sample(fraction=1.0, shuffle=True, seed=1)).drop("position")
    values = engine.to_polars(engine.compute(features, shuffled, engine.from_polars(spark, labels))).sort("payment_id")
    assert_close(values, reference(features, by_id, labels), features)


@pytest.fixture(scope="module")
def handbook():
    tables = handbook_file(path=str(shared("handbook_raw.parquet")), delay_days=0.5)
    payments = tables.payments.head(20_000)
    return payments, tables.labels.join(payments.select("payment_id"), on="payment_id", how="semi")


def test_the_published_payments(spark, handbook):
    features = FeatureSet(
        (
            Row("hour", "hour", "Europe/Paris"),
            *(
                Window(f"{entity}_{take}_{length}_{closed}", entity, take, length, closed=closed)
                for entity in ("payer", "payee")
                for length in ("1h", "1d")
                for closed in ("left", "right")
                for take in ("count", "sum", "mean")
            ),
            *(Window(f"payer_{take}_7d", "payer", take, "7d") for take in ("std", "min", "max", "zscore", "ratio")),
            Window("payees", "payer", "distinct", "7d", of="payee"),
            Window("payers", "payee", "distinct", "12h", of="payer", closed="right"),
            Window("pair", "payer+payee", "count", "7d"),
            *(
                Risk(f"risk_{length}_{closed}", "payee", "rate", length, "12h", closed=closed)
                for length in ("6h", "1d")
                for closed in ("left", "right")
            ),
            Risk("frauds", "payee", "frauds", "7d"),
            Since("last", "payer", "last"),
            Since("same", "payer", "same", "payee"),
            Decay("faded", "payer", "mean", "1h"),
        )
    )
    expected = reference(features, *handbook)
    assert expected["frauds"].sum() > 0
    assert_close(computed(spark, features, *handbook), expected, features)


def test_parquet_delta_and_hive_tables_are_read(spark, handbook, tmp_path):
    payments, labels = (frame.head(2_000) for frame in handbook)
    payments = payments.with_row_index("position").with_columns(
        pl.col("position").cast(pl.Int64), day=pl.col("event_time").dt.strftime("%Y%m%d")
    )
    payments.write_parquet(tmp_path / "payments.parquet")
    write_deltalake(tmp_path / "delta", payments, partition_by=["day"])
    write_deltalake(tmp_path / "delta", payments.with_columns(amount=pl.lit(0.0)), partition_by=["day"], mode="overwrite")
    engine.from_polars(spark, payments).write.saveAsTable("payments_of_the_lab")
    known = engine.from_polars(spark, labels)
    features = FeatureSet((Window("sum", "payer", "sum", "1d"), Window("last_day", "payee+day", "count", "1d")))
    expected = reference(features, payments, labels).sort("payment_id")
    for table in (
        engine.read(spark, tmp_path / "payments.parquet"),
        engine.read(spark, tmp_path / "delta", version=0),
        engine.read(spark, "payments_of_the_lab"),
    ):
        assert dict(table.dtypes)["day"] == "string"
        assert_close(engine.to_polars(engine.compute(features, table, known)).sort("payment_id"), expected, features)
    assert engine.read(spark, tmp_path / "delta").agg({"amount": "max"}).first()[0] == 0
    with pytest.raises(ValueError, match=r"no table 'payment_of_the_lab'\. Did you mean 'payments_of_the_lab'"):
        engine.read(spark, "payment_of_the_lab")
    with pytest.raises(ValueError, match=r"no version 2 .* newest is 1"):
        engine.read(spark, tmp_path / "delta", version=2)
    with pytest.raises(ValueError, match="no Delta table"):
        engine.read(spark, tmp_path / "payments.parquet", version=0)


START = datetime(2026, 1, 1, tzinfo=UTC)


def odd_table(n=12):
    """Columns of other types, and names and values that SQL would trip over."""
    rows = [
        {
            "payment_id": f"{i:02}",
            "event_time": START + timedelta(hours=i // 2),
            "payer_id": "it's" if i % 3 else "`\\",
            "payee_id": i % 2,
            "amount": Decimal(i) / 4,
            "a.b`c": 'it\'s \\ "x"' if i % 4 else "y",
            "chip": i % 5 == 0 if i % 7 else None,
            "mcc": i % 3,
            "points": i,
        }
        for i in range(n)
    ]
    types = {"payee_id": pl.Int32, "amount": pl.Decimal(12, 2), "event_time": pl.Datetime("us", "UTC"), "mcc": pl.Int16, "points": pl.Int64}
    return pl.DataFrame(rows, schema_overrides=types), pl.DataFrame(
        [], {"payment_id": pl.String, "is_fraud": pl.Boolean, "known_at": types["event_time"]}
    )


def test_types_and_names(spark):
    payments, labels = odd_table()
    features = FeatureSet(
        (
            Window("sum of `amounts`, 1.5d", "payer+mcc", "sum", "1.5d"),
            Window("Sum", "payer", "sum", "1d"),
            Window("sum", "chip", "mean", "1d", of="points"),
            Window("it's", "payee", "share", "1d", of="a.b`c", value='it\'s \\ "x"'),
            Window("chip", "payee", "share", "1d", of="chip", value="true", empty=float("inf")),
            Window("a.b", "a.b`c", "distinct", "3h", of="mcc", closed="right"),
            Since("same", "payee", "same", "chip"),
            Encoded("mcc", "mcc", "frequency", values=(("1", 0.25),), unseen=0.0, fitted_until=int(START.timestamp() * 1e6) + 1),
        )
    )
    assert_close(computed(spark, features, payments, labels), reference(features, payments, labels), features)


def test_large_amounts_do_not_overflow(spark):
    payments, labels = odd_table(9)
    payments = payments.with_columns(amount=pl.Series([1e12, 0.0001, 1e12, 1e12, 3.0, 1e11, 1e12, 0.0, 1e12]))
    features = FeatureSet(tuple(Window(take, "payee", take, "7d") for take in ("sum", "mean", "std", "zscore", "ratio")))
    assert_close(computed(spark, features, payments, labels), reference(features, payments, labels), features)


def test_what_is_refused(spark):
    payments, labels = (engine.from_polars(spark, frame) for frame in together(examples(3)))
    risk = FeatureSet((Risk("r", "payee", "rate", "7d"),))
    for features, table, known, message in (
        (FeatureSet((Window("w", "country", "count", "1d"),)), payments, labels, "read 'country'"),
        (FeatureSet((Window("w", "payer", "sum", "1d", of="device"),)), payments, labels, "'device' is String"),
        (EVERYTHING, payments.withColumn("event_time", payments.event_time.cast("timestamp_ntz")), labels, "must be in UTC"),
        (
            EVERYTHING,
            payments.withColumn("payer_id", payments.payer_id.substr(9, 1).try_cast("int").cast("string")),
            labels,
            "payer_id is null in",
        ),
        (EVERYTHING, payments.withColumn("currency", payments.payer_id), labels, "'payer_sum_amount_1h_0s_left' adds amounts"),
        (FeatureSet((Encoded("e", "payee", "frequency"),)), payments, labels, "'e' has no values yet"),
        (EVERYTHING, payments.drop("payment_id"), labels, "no column 'payment_id'"),
        (risk, payments, labels.drop("known_at"), "labels have no column 'known_at'"),
        (risk, payments, labels.withColumn("known_at", labels.known_at.cast("string")), "'known_at' of the labels is string"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.compute(features, table, known)


def test_the_sessions_time_zone_does_not_matter(spark):
    payments, labels = together(examples(10))
    features = FeatureSet(tuple(f for f in EVERYTHING.features if isinstance(f, Row | Encoded)))
    frames = engine.from_polars(spark, payments), engine.from_polars(spark, labels)
    spark.conf.set("spark.sql.session.timeZone", "Europe/Paris")
    try:
        values = engine.to_polars(engine.compute(features, *frames))
    finally:
        spark.conf.set("spark.sql.session.timeZone", "UTC")
    expected = reference(features, payments, labels)
    assert_close(payments.select("payment_id").join(values, on="payment_id", how="left", maintain_order="left"), expected)
    assert {t < FITTED for t in payments["event_time"].to_physical()} == {True, False}


def test_what_is_missing_is_named(monkeypatch):
    subprocess.run([sys.executable, "-c", "import sys, fraudlab.features.spark; assert 'pyspark' not in sys.modules"], check=True)
    with monkeypatch.context() as missing:
        missing.setitem(sys.modules, "pyspark", None)
        missing.setitem(sys.modules, "pyspark.sql", None)
        missing.setenv("JAVA_HOME", "/somewhere")
        with pytest.raises(ImportError, match=r"pip install \"fraudlab\[spark\]\""):
            engine.session()
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ImportError, match="needs Java 17"):
        engine.session()
