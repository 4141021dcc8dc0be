"""The scorer where there are no payers, and against the offline inputs."""

from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import numpy as np
import polars as pl
from tiny_bundle import ANSWERS

from fraudlab.features.definitions import FeatureSet
from fraudlab.features.encoding import Column, Encoding
from fraudlab.features.sequences import Dataset, inputs, plan
from fraudlab.models.contract import score_all, to_dict
from fraudlab.models.steps import make_stepper
from fraudlab.models.zoo.gru import Gru
from fraudlab.serving.scorer import Scorer
from fraudlab.serving.state import backfill


def test_payments_of_nobody_have_no_history_online_as_offline():
    start = datetime(2018, 4, 1, tzinfo=UTC)
    payments = pl.DataFrame(
        {
            "payment_id": list("abcd"),
            "event_time": [start + timedelta(hours=h) for h in range(4)],
            "payer_id": [None] * 4,
            "payee_id": [None] * 4,
        },
        {"payment_id": pl.String, "event_time": pl.Datetime("us", "UTC"), "payer_id": pl.String, "payee_id": pl.String},
    ).with_columns(amount=pl.Series([1.0, 2.0, 3.0, 4.0]), currency=pl.lit("EUR"))
    labels = pl.DataFrame(schema={"payment_id": pl.String, "is_fraud": pl.Boolean, "known_at": pl.Datetime("us", "UTC")})
    encoding = Encoding.fit(payments, [Column("amount")])
    data = Dataset(encoding.encode(payments), encoding.columns, payments["payer_id"], payments["event_time"])
    until = int((start + timedelta(hours=2)).timestamp() * 1e6)
    about = {
        "features": FeatureSet().to_dict(),
        "columns": encoding.to_dict(),
        "history": 3,
        "stepper": None,
        **ANSWERS,
    }

    scorer = Scorer(
        SimpleNamespace(**about, score=lambda shown: shown.rows[:, -1, 0] + 100 * (shown.sequence > 0).sum(1)), "sqlite::memory:"
    )
    assert backfill(scorer.state, payments, labels, data.rows, until) == 2
    assert [x.answer.score for x in scorer.score(payments.tail(2).to_dicts())] == [103.0, 104.0]  # each is shown itself

    model = Gru(data.columns, width=8, layers=1)
    weights = model.init(inputs(data, plan(data, np.arange(4), 0, 4), np.arange(1)), 0)
    stepper = make_stepper("gru", to_dict(model)["options"], data.columns, weights)
    scorer = Scorer(SimpleNamespace(**about | {"stepper": stepper, "memory": "a hash"}), "sqlite::memory:")
    assert backfill(scorer.state, payments, labels, data.rows, until) == 2
    scores = [x.answer.score for x in scorer.score(payments.to_dicts())]
    np.testing.assert_allclose(scores, score_all(model, weights, data, np.arange(4)), atol=1e-6)
    assert not any(key.startswith(b"=past=") for page in scorer.state.store.pages() for key, _ in page)
