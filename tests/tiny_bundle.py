"""A small real model and its signed bundle, for the tests of the service."""

from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from fraudlab.data.contract import Field
from fraudlab.evaluation import calibration
from fraudlab.features.definitions import FeatureSet, Row, Window
from fraudlab.features.encoding import Column
from fraudlab.governance import policy, reason_texts
from fraudlab.governance.signing import Keys, create_key
from fraudlab.models.contract import Model
from fraudlab.models.layers import causal
from fraudlab.serving.bundle import write

ANSWERS = {
    "model": {"name": "tiny"},
    "version": "1",
    "calibration": calibration.to_dict(calibration.Calibration()),
    "policy": policy.to_dict(policy.DEFAULT),
    "reasons": reason_texts.to_dict(reason_texts.DEFAULT),
    "fields": [],
}  # what a bundle's card says of its answers
FEATURES = FeatureSet(
    (Row("night", "night"), Window("payer_count_7d", "payer", "count", "7d"), Window("payer_mean_7d", "payer", "mean", "7d"))
)
FIELDS = (
    Field("channel", "categorical", about="where it was made"),
    Field("distance", "numeric", unit="km", about="from the payer's home"),
    Field("note", "text", personal=True),
    Field("opened", "time"),
    Field("abroad", "boolean"),
)
COLUMNS = (
    Column("amount", fill=50.0),
    *(Column(name) for name in FEATURES.names),
    Column("distance"),
    Column("channel", "categorical", ("web", "shop")),
)


@dataclass(frozen=True)
class Linear(Model):
    """A logistic model of the payment and the sum of its payer's latest ones."""

    columns: tuple[Column, ...] = COLUMNS
    history: int = 3

    def score(self, weights, inputs):
        itself = jnp.eye(inputs.gap.shape[1], dtype=bool)[None]
        seen = (causal(inputs, self.history + 1)[:, 0] & ~itself).astype(jnp.float32)
        earlier = jnp.einsum("bij,bj->bi", seen, inputs.rows @ weights["earlier"])
        return jax.nn.sigmoid(inputs.rows @ weights["now"] + earlier + weights["bias"])


def tiny_weights(seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {name: random.normal(0, 0.01, len(COLUMNS)).astype(np.float32) for name in ("now", "earlier")} | {"bias": np.float32(-2)}


def tiny_bundle(lab: Path, name: str = "tiny", **changes) -> tuple[Path, Keys]:
    """A bundle in `lab/bundles`, signed with a key pair in `lab/keys`."""
    keys = create_key(lab / "keys")
    parts = {
        "features": FEATURES.to_dict(),
        "fields": FIELDS,
        "evaluation": {"linear.auc": 0.9},
        "lineage": {"git": "0" * 40},
        "buckets": (1, 8),
    }
    return write(lab / "bundles" / name, Linear(), tiny_weights(), private_key=keys.private, **parts | changes), keys
