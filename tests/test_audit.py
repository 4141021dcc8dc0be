"""The auditor: it finds what is planted, with a really small example, lets pass what is right, and everything registered passes."""

import inspect
import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from conftest import ROOT, SHARED

from fraudlab.core.registry import discover, resolve
from fraudlab.core.runs import Run
from fraudlab.data.sources.handbook import handbook
from fraudlab.data.splits import Backtest, backtest
from fraudlab.evaluation.audit import fitting, model_subject, source_audit, thinned
from fraudlab.features import prepared
from fraudlab.features.audit import (
    audit,
    audit_extracts,
    audit_split,
    declared_ties,
    example,
    feature_subject,
    input_subject,
    neighbour_subject,
    numbers,
    report,
    smallest,
)
from fraudlab.features.definitions import Decay, Encoded, FeatureSet, Risk, Row, Since, Velocity, Window, need_fitted, needs
from fraudlab.features.encoding import Column, Encoding
from fraudlab.features.graphs import graph, seen
from fraudlab.models.contract import score_all
from fraudlab.training.loop import fit

SMALL = handbook(customers=40, terminals=60, radius=40.0, days=25, seed=1)
UNTIL = SMALL.payments["event_time"][int(0.6 * len(SMALL.payments))]
TIME, PAYMENT = pl.col("event_time"), pl.col("payment_id")


def with_columns(features: FeatureSet):
    """The small world with the fields that the features read, made by chance; some are missing."""
    rng, payments = np.random.default_rng(0), SMALL.payments
    categories, figures = ([c for c in names if c not in payments.columns] for names in needs(features))
    some = pl.Series(rng.random(len(payments)) < 0.9)
    made = [
        pl.when(some).then(pl.col("payer_id").str.slice(0, 1) + pl.Series(rng.integers(0, 3, len(payments))).cast(pl.String)).alias(c)
        for c in categories
    ]
    made += [pl.when(some).then(pl.Series(rng.uniform(-60, 60, len(payments)).round(3))).alias(c) for c in figures]
    return SMALL._replace(payments=payments.with_columns(made))


# everything registered


@pytest.mark.parametrize("name", sorted(discover("features")))
def test_no_registered_feature_set_sees_the_future(name):
    features = resolve("features", name)
    tables, ties = with_columns(features), declared_ties(features)
    assert audit(feature_subject(features, UNTIL), tables, name, ties=ties) == []
    assert audit(input_subject(features, tables.fields, UNTIL, history=6), tables, name, cuts=4, ties=["rows"] if ties else []) == []
    if ties:  # the declaration is needed
        assert {f.column for f in audit(feature_subject(features, UNTIL), tables, name, effort=0)} <= set(ties) != set()


CHEAP = {
    "boosted": {"trees": 10, "smallest_leaf": 5},
    "forest": {"trees": 5},
    "decoder": {"width": 8, "layers": 1, "heads": 2, "key_heads": 1, "window": 8, "pieces": 4},
    "encoder": {"width": 8, "layers": 1, "heads": 2, "pieces": 4},
    "gru": {"width": 8, "pieces": 4},
    "late_fusion": {"base_options": {"width": 8, "layers": 1, "heads": 2, "key_heads": 1, "pieces": 4}, "trees": 10, "smallest_leaf": 5},
    "recurrent": {"width": 8, "layers": 1, "pieces": 4},
    "seq2seq": {"width": 8, "layers": 1, "heads": 2, "pieces": 4},
    **{name: {"width": 8, "fanout": [3, 2], "pieces": 4} for name in ("sage", "gat", "mpnn", "hetero", "temporal", "sequence_graph")},
    "boosted_neighbours": {"trees": 10, "smallest_leaf": 5, "fanout": [3, 2]},
}


@pytest.mark.parametrize("model", sorted(discover("model")))
def test_no_registered_model_sees_the_future(model):
    features = FeatureSet((Window("ratio", "payer", "ratio", "30d"), Risk("risk", "payee", "rate", "7d", delay="1d", empty=0.0)))
    subject = model_subject(model, features, SMALL, UNTIL, CHEAP.get(model, {}), {"epochs": 1})
    assert audit(subject, SMALL, model, cuts=1, tolerance=1e-5) == []  # everything differs from the first scored payment on


FILES = {
    "handbook": {"customers": 40, "terminals": 60, "radius": 40.0, "days": 25},
    "handbook_file": {"path": str(SHARED / "handbook_raw.parquet")},
    "ulb": {"path": str(SHARED / "ulb_creditcard.parquet")},
    "mapped": {"mapping": "params/mappings/s_ffsd.yaml", "path": str(SHARED / "s_ffsd.csv")},
}


@pytest.mark.parametrize("source", sorted(discover("source")))
def test_no_registered_source_rewrites_its_past_or_leaks_into_features(source, monkeypatch):
    monkeypatch.chdir(ROOT)
    options = FILES.get(source, {})
    needed = [
        p.name for p in inspect.signature(resolve("source", source)).parameters.values() if p.default is p.empty and p.name not in options
    ]
    if needed or not Path(options.get("path", ".")).exists():
        pytest.skip(f"source '{source}' needs {', '.join(needed) or options['path']}")
    assert source_audit(source, options) == []
    tables = thinned(resolve("source", source)(**options), 2000)
    names, _ = fitting(tables)
    features = resolve("features", "handbook_strict") if "handbook_strict" in names else FeatureSet()
    until = tables.payments["event_time"][int(0.6 * len(tables.payments))]
    assert audit(input_subject(features, tables.fields, until, history=4), tables, source, cuts=3) == []


def test_the_prepared_data_that_models_are_trained_on(lab):
    """The way of the flows prepare and train: through the lake, to the scores of the test period."""
    fold = backtest(SMALL.payments, SMALL.labels, Backtest("2018-04-03", 7, 5, 7))[0]

    def scores(payments, labels):
        rows = SMALL._replace(payments=payments, labels=labels)
        times = payments["event_time"]
        periods = (fold.train_start, fold.train_end), (fold.test_start, fold.test_end)
        within = [times.is_between(*edges, closed="left") for edges in periods]
        train, test = (rows.arg_true().cast(pl.Int64).to_numpy() for rows in within)
        made = prepared.prepare("audited", rows, resolve("features", "handbook_strict"), fold._replace(train=train, test=test, period=test))
        data = prepared.read(Run(lab, {"outputs": made}))
        net = resolve("model", "logistic")(data.dataset.columns)
        weights = fit(net, data.dataset, data.positions("train"), data.training_labels)
        return pl.DataFrame({"payment_id": payments["payment_id"].gather(test), "score": score_all(net, weights, data.dataset, test)})

    assert audit(scores, SMALL, cuts=2, tolerance=1e-5) == []


# every kind of feature

STRICT = (
    Row("night", "night"),
    *(Window(take, "payer", take, "7d") for take in ("count", "sum", "mean", "std", "min", "max", "zscore", "ratio")),
    Window("devices", "payer", "distinct", "7d", of="device"),
    Window("share", "payee", "share", "all", of="device", value="10"),
    Window("pair", "payer+device", "count", "30d", delay="1h"),
    Risk("frauds", "payee", "frauds", "30d"),
    Risk("rate", "device", "rate", "30d", delay="7d", prior_rate=0.01, prior_weight=5),
    *(Decay(f"fading_{take}", "payer", take, "2d") for take in ("count", "sum", "mean")),
    *(Since(take, "payer", take) for take in ("last", "first")),
    Since("same", "payer", "same", of="device"),
    Velocity("speed", "payer", "latitude", "longitude"),
    Encoded("often", "device", "frequency"),
    Encoded("guilt", "payee", "fraud_rate", prior_weight=10),
)


def test_no_kind_of_feature_raises_a_false_alarm():
    features = FeatureSet(STRICT)
    with pytest.raises(ValueError, match="'often' has no values yet"):
        need_fitted(features)
    tables = with_columns(features)
    for seed in range(2):
        assert audit(feature_subject(features, UNTIL), tables, seed=seed) == []


def test_every_kind_of_window_that_includes_the_payment_is_found():
    loose = [Window(take, "payer", take, "7d", closed="right") for take in ("count", "sum", "mean", "std", "zscore", "ratio")]
    loose += [
        Window("devices", "payer", "distinct", "7d", of="payee", closed="right"),
        Risk("rate", "payee", "rate", "7d", closed="right", prior_rate=0.5, prior_weight=1),
    ]
    features = FeatureSet((*loose, Window("strict", "payer", "sum", "7d")))
    found = audit(feature_subject(features), SMALL)
    assert {f.column for f in found} == {f.name for f in loose} == set(declared_ties(features))
    assert {f.cause for f in found} == {"same instant"}
    assert audit(feature_subject(features), SMALL, ties=declared_ties(features)) == []


# findings

LEAKS = {
    "the next amount": (lambda p, labels: p.select(PAYMENT, x=pl.col("amount").shift(-1).over("payer_id")), "later payment"),
    "mean of the whole table": (lambda p, labels: p.select(PAYMENT, x=pl.col("amount").mean()), "later payment"),
    "number of rows": (lambda p, labels: p.select(PAYMENT, x=pl.len()), "later payment"),
    "the row before": (lambda p, labels: p.select(PAYMENT, x=pl.col("amount").shift().over("payer_id")), "same instant"),
    "its own label": (lambda p, labels: p.join(labels, "payment_id", "left", maintain_order="left").select(PAYMENT, x="is_fraud"), "label"),
    "how many labels there are": (lambda p, labels: p.select(PAYMENT, x=labels.filter(pl.col("is_fraud")).height), "label"),
}


@pytest.mark.parametrize("name", LEAKS)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_example_is_really_small_and_can_be_computed_again(name, seed):
    subject, cause = LEAKS[name]
    [leak] = audit(subject, SMALL, name, seed=seed)
    assert (leak.column, leak.subject, leak.changes) == ("x", name, 1)
    assert leak.payments <= 3
    assert cause in (leak.cause, "label" if leak.cause == "later payment" else "")  # a row that is gone takes its label with it
    was, became = (
        numbers(subject, *world.tables()).filter(payment_id=leak.payment_id)["x"].to_list() for world in (leak.before, leak.after)
    )
    assert was != became
    assert len(example(leak)) <= 4
    assert name in str(leak)
    assert leak.payment_id in str(leak)


def test_a_declared_tie_is_no_licence_to_see_what_comes_later():
    so_far, following = pl.int_range(pl.len()).over("payer_id"), pl.col("amount").shift(-1).over("payer_id")

    def subject(payments, labels):
        return payments.select(PAYMENT, so_far=so_far, next=following)

    assert [f.column for f in audit(subject, SMALL, ties=["so_far", "next"])] == ["next"]


def test_a_table_without_payers_and_with_missing_values_is_audited():
    rng = np.random.default_rng(0)
    values = pl.Series(rng.normal(size=len(SMALL.payments))).set(pl.Series(rng.random(len(SMALL.payments)) < 0.2), None)
    nobody = SMALL._replace(
        payments=SMALL.payments.with_columns(payer_id=pl.lit(None, pl.String), payee_id=pl.lit(None, pl.String), v=values), entities=False
    )

    def filled(strategy):
        return lambda p, labels: p.select(PAYMENT, x=pl.col("v").fill_null(strategy=strategy))

    assert [f.cause for f in audit(filled("backward"), nobody)] == ["later payment"]
    assert [f.cause for f in audit(filled("forward"), nobody, cuts=60)] == ["same instant"]
    assert audit(lambda p, labels: p.select(PAYMENT, x=pl.col("v").fill_null(0)), nobody) == []


def test_rows_that_appear_or_vanish_are_numbers_that_moved():
    def latest(payments, labels):
        return payments.filter(TIME.max() - TIME < timedelta(days=3)).select(PAYMENT, x="amount")

    assert [f.cause for f in audit(latest, SMALL)] == ["later payment"]


def test_arrays_name_the_place_that_moved():
    def fitted_on_all(payments, labels):
        return {"rows": Encoding.fit(payments, [Column("payee_id", "categorical")]).encode(payments)}

    [leak] = audit(fitted_on_all, SMALL)
    assert leak.column == "rows[0]"


def test_no_findings_are_an_empty_table():
    table = report([])
    assert table.is_empty()
    assert {"subject", "column", "payment_id", "was", "became", "change"} <= set(table.columns)


def test_a_split_in_time_has_no_fault_and_a_random_one_has():
    fold = backtest(SMALL.payments, SMALL.labels, Backtest("2018-04-03", 7, 5, 7))[0]
    assert audit_split(fold, SMALL) == []
    mixed = np.random.default_rng(0).permutation(np.concatenate([fold.train, fold.test]))
    assert {f.cause for f in audit_split(fold._replace(train=mixed[:300], test=mixed[300:]), SMALL)} == {"random split", "label"}
    nobody = SMALL.payments.with_columns(payer_id=pl.lit(None, pl.String))
    again = pl.concat([nobody, nobody[fold.test[:3]].with_columns(payment_id=pl.concat_str(pl.lit("again "), PAYMENT))])
    doubled = fold._replace(train=np.append(fold.train, np.arange(len(nobody), len(again))))
    [duplicate] = [f for f in audit_split(doubled, (again, SMALL.labels)) if f.cause == "duplicate"]
    assert duplicate.moved == 3


def test_an_extract_that_changes_afterwards_is_found():
    earlier = (SMALL.payments[:900], SMALL.labels[:900])
    assert audit_extracts(earlier, SMALL) == []
    later = SMALL.payments.with_columns(amount=pl.when(PAYMENT == "7").then(1.0).otherwise("amount")).filter(PAYMENT != "8")
    assert [(f.column, f.payment_id) for f in audit_extracts(earlier, (later, SMALL.labels))] == [("row", "8"), ("amount", "7")]
    flipped = SMALL.labels.with_columns(is_fraud=pl.col("is_fraud") ^ (PAYMENT == "9"))
    assert [(f.column, f.cause) for f in audit_extracts(earlier, (SMALL.payments, flipped))] == [("is_fraud", "label")]


def test_delta_debugging_finds_a_part_that_cannot_be_made_smaller():
    for wanted in ({3}, {0, 99}, {10, 11, 12}, {5, 50, 95, 96}):
        assert set(smallest(list(range(100)), lambda part, wanted=wanted: wanted <= set(part))) == wanted
    assert smallest([1, 2], lambda part: True) == []


@pytest.mark.parametrize(
    ("subject", "message"),
    [
        (lambda p, labels: {"noise": np.random.default_rng().random(len(p))}, "other numbers for 'noise' each time"),
        (lambda p, labels: {"x": [1.0]}, "gave 1 rows for"),
        (lambda p, labels: p.select(PAYMENT, "amount").clear(), "nothing to audit"),
    ],
)
def test_a_subject_that_cannot_be_audited_is_refused(subject, message):
    with pytest.raises(ValueError, match=message):
        audit(subject, SMALL)
    with pytest.raises(ValueError, match="'often' has no values yet"):
        feature_subject(FeatureSet((Encoded("often", "payer", "frequency"),)))


# the command


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    lines = [
        "import polars as pl",
        "def following(payments, labels):",
        "    return payments.select('payment_id', next=pl.col('amount').shift(-1))",
    ]
    (folder / "mine.py").write_text("\n".join(lines))
    environment = os.environ | {f"FRAUDLAB_{name.upper()}": str(folder / name) for name in ("runs", "data")} | {"PYTHONPATH": str(folder)}

    def call(*arguments):
        done = subprocess.run(
            [Path(sys.executable).parent / "fraudlab", "audit", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        found = sorted((folder / "runs" / "audit").glob("[0-9]*/result.json"))
        return done.returncode, done.stdout + done.stderr, json.loads(found[-1].read_text()) if found else {}

    return call


def test_the_command_finds_all_that_is_planted_and_ends_well(command):
    code, said, result = command("params/audit/planted.yaml", "-p", "models={}", "-p", "features=[handbook_strict]", "-p", "cuts=2")
    assert code == 0, said
    assert {"planted_missed": 0, "false_alarms": 0, "leaks": 0}.items() <= result["metrics"].items()
    assert result["metrics"]["planted"] >= 30
    assert "planted leaks found, 0 false alarms" in said


def test_the_command_ends_with_1_where_something_leaks(command):
    options = ("features=[handbook]", "declared=false", "subjects=['mine:following']", "models={}", "planted=false", "cuts=2")
    code, said, result = command("params/audit/planted.yaml", *(x for o in options for x in ("-p", o)))
    assert code == 1, said
    assert "mine:following: next of payment" in said
    assert "features handbook: payer_count_1d of payment" in said
    assert result["metrics"]["leaks"] == len(result["outputs"]["findings"]) >= 7


def test_the_command_refuses_what_is_no_audit(command):
    for target, message in (
        ("params/pipelines/ulb.yaml", "that runs audit"),
        ("params/audit/none.yaml", "No file"),
        ("train", "runs train"),
    ):
        code, said, _ = command(target)
        assert code == 1
        assert message in said


def test_draws_that_depend_on_how_nodes_are_numbered_are_found():
    """Whoever joins later gets a number between the others, and moves theirs: that is why draws go by a hash of the name."""

    def numbered(payments, labels):
        made = graph(payments)
        made = made._replace(key=np.arange(len(made.kind), dtype=np.uint64))
        times, amounts = payments["event_time"].to_physical().to_numpy(), payments["amount"].cast(pl.Float32).to_numpy()[:, None]
        return {"amounts": seen(made, amounts, np.arange(len(payments)), (3,), times, latest=False)[0].rows.reshape(len(payments), -1)}

    assert audit(numbered, SMALL, "numbered")
    assert audit(neighbour_subject(fanout=(3,), latest=False), SMALL) == []
