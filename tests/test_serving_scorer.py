"""The scorer where there are no payers, and against the offline inputs."""

from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import numpy as np
import polars as pl

from fraudlab.features.definitions import FeatureSet
from fraudlab.features.encoding import Encoding
from fraudlab.features.sequences import Dataset
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
    ).with_columns(amount=pl.Series([1.0, 2.0, 3.0, 4.0]))
    labels = pl.DataFrame(schema={"payment_id": pl.String, "is_fraud": pl.Boolean, "known_at": pl.Datetime("us", "UTC")})
    encoding = Encoding.fit(payments, ["amount"])
    data = Dataset(encoding.encode(payments), encoding.columns, payments["payer_id"], payments["event_time"])
    score = lambda inputs: inputs.rows[:, 0] + 100 * inputs.mask.sum(1)  # noqa: E731
    scorer = Scorer(SimpleNamespace(features=FeatureSet().to_dict(), columns=encoding.to_dict(), history=3, score=score), "sqlite::memory:")
    assert backfill(scorer.state, payments, labels, data.rows, until=int((start + timedelta(hours=2)).timestamp() * 1e6)) == 2
    assert scorer.score(payments.tail(2).to_dicts()) == score(data.inputs(np.arange(2, 4), 3)).tolist() == [3.0, 4.0]
