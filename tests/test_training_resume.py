"""A training killed with SIGKILL at several moments and started again ends with the same weights as one that was left alone."""

import signal
import subprocess
import sys

import numpy as np
import pytest

from fraudlab.core.registry import resolve
from fraudlab.models.contract import example, weights_hash
from fraudlab.training.loop import Recipe, batch_at, fit

# prints each step that was trained, then the hash of the final weights
SCRIPT = """
import sys
import numpy as np
from fraudlab.core.registry import resolve
from fraudlab.models.contract import example, weights_hash
from fraudlab.training.loop import Recipe, fit

data, fraud = example(800)
model = resolve("model", "decoder")(data.columns, width=8, layers=1, heads=1, key_heads=1, window=4, pieces=4)
recipe = Recipe(epochs=20, tokens=256, room=64, checkpoint_every=20, log_every=1)
log = lambda step, figures: print(step, figures["loss"].hex(), flush=True)
objective = resolve("objective", "fraud")()
weights = fit(model, data, np.arange(800), fraud, objective, recipe, seed=3, checkpoints=sys.argv[1], log=log, progress=False)
print("hash", weights_hash(weights), flush=True)
"""
STEPS = 20 * 4  # 800 payments of 40 payers fill 13 rows of 64, four of which are a step


def run(folder, kill_after: int | None) -> list[list[str]]:
    """Lines of one process; it is killed when it has reported step `kill_after`."""
    lines, command = [], [sys.executable, "-c", SCRIPT, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            lines.append(line.split())
            if lines[-1][0] == str(kill_after):
                process.send_signal(signal.SIGKILL)
        error = process.stderr.read()
    assert process.returncode == (-signal.SIGKILL if kill_after else 0), error
    return lines


def test_killed_and_started_again_the_final_weights_are_the_same(tmp_path):
    alone = run(tmp_path / "alone", None)
    assert [line[0] for line in alone] == [*map(str, range(1, STEPS + 1)), "hash"]

    # before anything was kept; when a checkpoint begins to be written in the background
    firsts, seen, expected = [], {}, dict(line[:2] for line in alone)
    for kill_after in (7, 60, None):
        lines = run(tmp_path / "killed", kill_after)
        firsts.append(int(lines[0][0]))
        for step, value in lines:
            assert value == expected[step], f"step {step} differs"
            seen[step] = value

    assert seen == expected
    assert firsts[:2] == [1, 1]
    assert all(first > 1 and (first - 1) % 20 == 0 for first in firsts[2:])  # went on from a checkpoint, not from the beginning
    assert firsts == sorted(firsts)
    print(f"2 kills, began at steps {firsts}; weights {expected['hash'][:16]} both times, losses of {STEPS} steps equal bit by bit")


def tiny(columns, **options):
    return resolve("model", "decoder")(
        columns, **{"width": 8, "layers": 1, "heads": 1, "key_heads": 1, "window": 4, "pieces": 4, **options}
    )


def test_an_equal_seed_trains_alike_and_another_does_not():
    data, fraud = example(400)
    settings = {"objective": resolve("objective", "fraud")(), "recipe": Recipe(epochs=2, tokens=256, room=64), "progress": False}
    hashes = [weights_hash(fit(tiny(data.columns), data, np.arange(400), fraud, seed=seed, **settings)) for seed in (0, 0, 1)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_every_row_once_an_epoch_and_in_another_order_in_the_next():
    for count, batch in ((1, 4), (8, 4), (9, 4), (1000, 256)):
        steps = -(-count // batch)
        epochs = [[batch_at(step, count, batch, seed=5) for step in range(e * steps, (e + 1) * steps)] for e in range(2)]
        orders = [np.concatenate([rows[counts] for rows, counts in epoch]) for epoch in epochs]
        for order in orders:
            assert sorted(order) == list(range(count))
        assert count < 8 or orders[0].tolist() != orders[1].tolist()
        assert all(len(rows) == batch for epoch in epochs for rows, _ in epoch)


@pytest.mark.parametrize("log_every", [1, 20])
def test_a_training_that_leaves_the_numbers_stops_and_keeps_nothing_broken(tmp_path, log_every):
    data, fraud = example(200)
    recipe = Recipe(tokens=256, room=64, learning_rate=1e30, clip=1e30, warmup=0.0, checkpoint_every=1, log_every=log_every)
    run = {"objective": resolve("objective", "fraud")(), "recipe": recipe, "checkpoints": tmp_path, "progress": False}
    with pytest.raises(FloatingPointError, match=r"became (nan|inf) between steps 1 and 1\b.*learning_rate"):
        fit(tiny(data.columns), data, np.arange(200), fraud, **run)
    assert list(tmp_path.iterdir()) == []
