"""Sums and attention on whole graphs: kernels against plain loops, whole passes against the zoo's dense layers, training."""

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest
from flax import nnx
from sklearn.metrics import roc_auc_score

from fraudlab.features.graphs import NEVER, Layout, Neighbours, graph, neighbours, subgraph
from fraudlab.models import whole_graphs
from fraudlab.models.whole_graphs import (
    LOOPS,
    WholeNetwork,
    edges,
    neighbour_attention,
    neighbour_mean,
    neighbour_sum,
    whole_gat,
    whole_sage,
)
from fraudlab.models.zoo.gat import GatLayer
from fraudlab.models.zoo.sage import SageLayer
from fraudlab.training.whole import WholeRecipe, fit_whole

NODES = 40


def drawn(count: int = 260, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Edges with repeats; the last nodes receive nothing, the first send nothing, and one receives most."""
    rng = np.random.default_rng(seed)
    receivers = np.where(rng.random(count) < 0.4, 7, rng.integers(0, NODES - 4, count))
    return rng.integers(3, NODES, count), receivers


def test_edges_stand_by_receiver_and_by_sender():
    senders, receivers = drawn()
    made = edges(senders, receivers, NODES)
    listed = sorted(zip(senders.tolist(), receivers.tolist(), strict=True))
    to = np.repeat(np.arange(NODES), np.diff(made.start))
    assert sorted(zip(made.sender.tolist(), to.tolist(), strict=True)) == listed
    by = np.repeat(np.arange(NODES), np.diff(made.sends))
    assert sorted(zip(by.tolist(), made.receiver.tolist(), strict=True)) == listed
    np.testing.assert_array_equal(made.sender[made.edge], by)
    np.testing.assert_array_equal(to[made.edge], made.receiver)


def test_loops_stand_once():
    senders, receivers = np.array([0, 1, 1, 2]), np.array([0, 1, 2, 1])
    made = edges(senders, receivers, 3, loops=True)
    found = list(zip(made.sender.tolist(), np.repeat(np.arange(3), np.diff(made.start)).tolist(), strict=True))
    assert sorted(found) == [(0, 0), (1, 1), (1, 2), (2, 1), (2, 2)]


@pytest.mark.parametrize("bad", [-1, NODES])
def test_an_edge_to_nowhere_is_refused(bad):
    with pytest.raises(ValueError, match=f"ends at node {bad}: of 40 nodes there are 0 to 39"):
        edges(np.array([0, bad]), np.array([1, 2]), NODES)


@pytest.mark.parametrize("width", [5, 48])
@pytest.mark.parametrize("mean", [False, True])
def test_sums_and_their_gradients_are_those_of_a_loop(width, mean):
    (senders, receivers), rng = drawn(), np.random.default_rng(1)
    made, x, g = edges(senders, receivers, NODES), *rng.normal(size=(2, NODES, width)).astype(np.float32)
    matrix = np.zeros((NODES, NODES))
    np.add.at(matrix, (receivers, senders), 1)
    if mean:
        matrix /= np.maximum(matrix.sum(1, keepdims=True), 1)
    op = neighbour_mean if mean else neighbour_sum
    for compiled in (True, False):
        found, back = jax.vjp(lambda x, compiled=compiled: op(x, made, compiled), x)
        np.testing.assert_allclose(found, matrix @ x, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(back(jnp.asarray(g))[0], matrix.T @ g, rtol=1e-4, atol=1e-4)


def attention_by_loop(x, y, a, senders, receivers, slope):
    out = np.zeros(x.shape)
    for r in range(NODES):
        mine = senders[receivers == r]
        if len(mine) == 0:
            continue
        for h in range(x.shape[1]):
            z = x[mine, h] + y[r, h]
            fit = np.where(z > 0, z, slope * z) @ a[h]
            share = np.exp(fit - fit.max())
            out[r, h] = share / share.sum() @ x[mine, h]
    return out


@pytest.mark.parametrize(("heads", "channels"), [(1, 2), (3, 20)])
def test_attention_is_that_of_a_loop(heads, channels):
    (senders, receivers), rng = drawn(), np.random.default_rng(2)
    x, y = rng.normal(size=(2, NODES, heads, channels)).astype(np.float32)
    a = 3 * rng.normal(size=(heads, channels)).astype(np.float32)
    expected = attention_by_loop(*(v.astype(np.float64) for v in (x, y, a)), senders, receivers, 0.1)
    made = edges(senders, receivers, NODES)
    for compiled in (True, False):
        np.testing.assert_allclose(neighbour_attention(x, y, a, made, 0.1, compiled), expected, rtol=1e-3, atol=1e-4)


def test_gradients_of_attention_are_those_of_the_plain_formula():
    rng = np.random.default_rng(3)
    made = edges(*drawn(), NODES)
    x, y, g = rng.normal(size=(3, NODES, 2, 7)).astype(np.float32)
    a = rng.normal(size=(2, 7)).astype(np.float32)
    each = [
        jax.vjp(lambda *of, c=compiled: neighbour_attention(*of, made, compiled=c), x, y, a)[1](jnp.asarray(g))
        for compiled in (True, False)
    ]
    for fast, plain in zip(*each, strict=True):
        assert np.abs(plain).max() > 0.1
        np.testing.assert_allclose(fast, plain, rtol=1e-3, atol=1e-4)


def test_any_number_of_cores_gives_the_same_to_the_last_bit(monkeypatch):
    rng = np.random.default_rng(4)
    made, x = edges(*rng.integers(0, 900, (2, 30_000)), 900), rng.normal(size=(900, 33)).astype(np.float32)
    found = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(whole_graphs, "THREADS", threads)
        kernel = lambda *sizes: whole_graphs.sum_kernel(*sizes)  # noqa: E731
        kernel.__name__ = f"sums_by_{threads}_threads"
        found.append(np.asarray(whole_graphs.call(kernel, (33, 0), (x.shape,), made.start, made.sender, x)[0]))
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


def test_a_kernel_that_is_defined_again_is_another_one():
    """As in a notebook whose cell is run twice, or beside the module that it makes: XLA takes no name a second time."""
    x, made = np.arange(12, dtype=np.float32).reshape(3, 4), edges(np.array([0, 1]), np.array([1, 2]), 3)
    sums, first = lambda: neighbour_sum(x, made, compiled=True), whole_graphs.target(whole_graphs.sum_kernel, 4, 0)
    np.testing.assert_array_equal(sums(), [x[0] * 0, x[0], x[1]])
    whole_graphs.target.cache_clear()
    assert whole_graphs.target(whole_graphs.sum_kernel, 4, 0) != first
    jax.clear_caches()
    np.testing.assert_array_equal(sums(), [x[0] * 0, x[0], x[1]])


def test_what_is_no_number_is_not_hidden():
    made, x = edges(np.array([0, 1]), np.array([1, 2]), 3), np.ones((3, 16), np.float32)
    x[0, 3] = np.nan
    found = np.asarray(neighbour_sum(x, made, True))
    assert np.isnan(found[1, 3])
    assert np.isfinite(found[2]).all()
    shares = neighbour_attention(x[:, None], x[:, None], np.ones((1, 16), np.float32), made, compiled=True)
    assert np.isnan(np.asarray(shares)[1, 0, 3])


def dense(x, made) -> tuple[np.ndarray, Neighbours]:
    """Each node's senders as one block."""
    many = np.diff(made.start)
    there = np.arange(many.max()) < many[:, None]
    messages = np.zeros((len(many), many.max(), x.shape[1]), np.float32)
    messages[there] = x[made.sender]
    none = np.zeros(there.shape, np.int32)
    blank = dict.fromkeys(Neighbours._fields, none)
    return jnp.asarray(messages), Neighbours(**blank | {"relation": there.astype(np.int32)})


@pytest.mark.parametrize("out", [3, 12])
def test_a_whole_pass_is_the_dense_one_with_all_neighbours(out):
    senders, receivers = drawn()
    apart = senders != receivers
    senders, receivers = senders[apart], receivers[apart]
    made, looped = (edges(senders, receivers, NODES, loops) for loops in (False, True))
    x = np.random.default_rng(5).normal(size=(NODES, 8)).astype(np.float32)
    messages, block = dense(x, made)
    sage = SageLayer(8, out, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(whole_sage(sage, x, made), sage(jnp.asarray(x), messages, block), rtol=1e-4, atol=1e-5)
    gat = GatLayer(8, out, 3, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(whole_gat(gat, x, looped), gat(jnp.asarray(x), messages, block), rtol=1e-4, atol=1e-5)


def test_a_network_learns_what_only_neighbours_tell_and_does_so_again():
    rng = np.random.default_rng(6)
    nodes, ends = 300, rng.integers(0, 300, (2, 3000))
    x, made = rng.normal(size=(nodes, 3)).astype(np.float32), edges(*ends, 300)
    labels, part = np.asarray(neighbour_mean(x, made, False))[:, 0] > 0, rng.permutation(nodes) % 3
    model, recipe = WholeNetwork(3, "sage", width=16, layers=1), WholeRecipe(epochs=40)
    looks = []
    weights, best = fit_whole(model, x, made, labels, part == 0, part == 1, recipe, log=lambda *look: looks.append(look))
    again, _ = fit_whole(model, x, made, labels, part == 0, part == 1, recipe)
    test = part == 2
    assert roc_auc_score(labels[test], np.asarray(model.score(weights, x, made))[test]) > 0.85
    assert best == max(area for _, _, area in looks)
    for name in weights:
        np.testing.assert_array_equal(weights[name], again[name])


def test_training_stops_when_looks_get_no_better():
    rng = np.random.default_rng(7)
    x, made, labels = rng.normal(size=(90, 3)).astype(np.float32), edges(*rng.integers(0, 90, (2, 300)), 90), rng.random(90) < 0.5
    looks, part = [], np.arange(90) % 2 == 0
    recipe = WholeRecipe(epochs=400, look_every=2, patience=10)
    fit_whole(WholeNetwork(3, "sage", width=8, layers=1), x, made, labels, part, ~part, recipe, log=lambda *look: looks.append(look))
    areas = [area for _, _, area in looks]
    assert looks[-1][0] < 400
    assert looks[-1][0] - looks[int(np.argmax(areas))][0] >= 10


@pytest.mark.parametrize("kind", ["sage", "gat", "gcn"])
def test_who_is_not_joined_moves_nothing(kind):
    x = np.random.default_rng(8).normal(size=(6, 3)).astype(np.float32)
    made = edges(np.array([0, 1, 3, 4]), np.array([1, 2, 4, 5]), 6, loops=kind in LOOPS)
    model = WholeNetwork(3, kind, width=8, layers=2, heads=2)
    weights, other = model.init(), x.copy()
    other[3:] += 1
    one, two = (np.asarray(model.score(weights, of, made)) for of in (x, other))
    np.testing.assert_array_equal(one[:3], two[:3])
    assert (one[3:] != two[3:]).all()


def test_numbers_are_dropped_only_with_a_key():
    model, x, made = WholeNetwork(3, width=8, dropout=0.5), np.ones((4, 3), np.float32), edges(np.array([0]), np.array([1]), 4)
    weights = model.init()
    plain = np.asarray(model.score(weights, x, made))
    np.testing.assert_array_equal(plain, model.score(weights, x, made))
    assert (plain != np.asarray(model.score(weights, x, made, jax.random.key(0)))).any()


def test_nodes_that_are_learned_from_are_not_looked_at():
    x, made, every = np.ones((4, 3), np.float32), edges(np.array([0]), np.array([1]), 4), np.ones(4, bool)
    with pytest.raises(ValueError, match="4 nodes are both learned from and looked at"):
        fit_whole(WholeNetwork(3), x, made, np.arange(4) % 2 == 0, every, every)


def test_a_subgraph_holds_each_node_once_and_the_edges_that_were_drawn():
    rng = np.random.default_rng(9)
    frame = pl.DataFrame(
        {
            "payment_id": [f"p{i}" for i in range(500)],
            "event_time": pl.Series(np.arange(500) * 10**6).cast(pl.Datetime("us", "UTC")),
            "payer_id": rng.integers(0, 60, 500).astype(str),
            "payee_id": rng.integers(0, 60, 500).astype(str),
        }
    )
    made = graph(frame, Layout({"payer_id": "account", "payee_id": "account"}))
    asked = np.array([5, 3, 40], np.int32)
    for time in (NEVER, 250 * 10**6):
        small = subgraph(made, asked, time, (4, 3), latest=False, seed=1)
        assert small.nodes[:3].tolist() == asked.tolist()
        assert len(set(small.nodes.tolist())) == len(small.nodes) == small.met[-1]
        assert (small.payment < (500 if time == NEVER else 250)).all()
        expected, first = [], 0
        for depth, (k, last) in enumerate(zip((4, 3), small.met, strict=False)):
            new = small.nodes[first:last]
            hop = neighbours(made, new, np.full(len(new), time), k, False, 1 + depth)
            expected += [
                (n, int(hop.node[i, j]), int(hop.payment[i, j])) for i, n in enumerate(new) for j in range(k) if hop.node[i, j] >= 0
            ]
            first = last
        found = zip(small.nodes[small.node], small.nodes[small.neighbour], small.payment, strict=True)
        assert [tuple(map(int, each)) for each in found] == [tuple(map(int, each)) for each in expected]
