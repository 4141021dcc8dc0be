"""A training killed with SIGKILL at several moments and started again ends with the same weights as one that was left alone."""

import signal
import subprocess
import sys

import numpy as np
import pytest

from fraudlab.core.registry import resolve
from fraudlab.evaluation.faults import Training, attempt
from fraudlab.models.contract import example, weights_hash
from fraudlab.training.checkpoints import Checkpoints
from fraudlab.training.loop import batch_at, fit
from fraudlab.training.recipe import Recipe

# prints each step that was trained, then the hash of the final weights
SCRIPT = """
import sys
import numpy as np
from fraudlab.core.registry import resolve
from fraudlab.models.contract import example, weights_hash
from fraudlab.training.loop import fit
from fraudlab.training.recipe import Recipe

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


def test_a_training_that_is_asked_to_stop_keeps_its_last_step_and_says_so(tmp_path):
    training = Training()
    alone = attempt(training, tmp_path / "alone")
    asked = attempt(training, tmp_path / "asked", signal.SIGTERM, after=0.05)
    assert asked.code == 1
    last = max(asked.losses)
    assert f"Asked to stop after step {last} of {STEPS}" in asked.said
    again = attempt(training, tmp_path / "asked")
    assert min(again.losses) == last + 1
    assert again.weights == alone.weights != ""


def kept_states(folder) -> dict:
    """Two checkpoints of a state that counts."""
    state = {"count": np.arange(1000, dtype=np.float32)}
    with Checkpoints(folder, {"training": 1}) as kept:
        for step in (1, 2):
            kept.save(step, {"count": state["count"] + step})
    return state


@pytest.mark.parametrize("spoil", ["bit", "cut", "missing"])
def test_a_damaged_checkpoint_is_put_aside_and_the_one_before_it_taken(tmp_path, spoil, capsys):
    folder = tmp_path / "checkpoints"
    state = kept_states(folder)
    largest = max((p for p in (folder / "2").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = largest.read_bytes()
    if spoil == "missing":
        largest.unlink()
    else:
        middle = len(content) // 2
        largest.write_bytes(content[:middle] + (bytes([content[middle] ^ 4]) + content[middle + 1 :] if spoil == "bit" else b""))
    with Checkpoints(folder, {"training": 1}) as kept:
        step, found = kept.restore(state)
        assert step == 1
        np.testing.assert_array_equal(found["count"], state["count"] + 1)
        assert "The checkpoint of step 2 is damaged" in capsys.readouterr().err
        kept.save(2, {"count": state["count"] + 2})
    with Checkpoints(folder, {"training": 1}) as kept:
        assert kept.restore(state)[0] == 2
    assert len(list((tmp_path / "checkpoints.damaged").iterdir())) == 1


def test_where_all_checkpoints_are_damaged_nothing_is_trained(tmp_path):
    folder = tmp_path / "checkpoints"
    state = kept_states(folder)
    for file in (p for p in folder.rglob("*") if p.is_file()):
        file.write_bytes(b"")
    with Checkpoints(folder, {"training": 1}) as kept, pytest.raises(ValueError, match=r"All checkpoints in .* are damaged"):
        kept.restore(state)


FULL = """
import resource, sys
import numpy as np
from fraudlab.training.checkpoints import Checkpoints
state = {"count": np.arange(500_000, dtype=np.float32)}
with Checkpoints(sys.argv[1], {"training": 1}) as kept:
    kept.save(1, state)
    kept._manager.wait_until_finished()
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))      # as if the disk were full: EFBIG
    state["count"] = np.random.default_rng(0).random(500_000, np.float32)
    kept.save(2, state)
"""


def test_a_full_disk_is_told_and_what_was_kept_before_is_whole(tmp_path):
    folder = tmp_path / "checkpoints"
    done = subprocess.run([sys.executable, "-c", FULL, str(folder)], capture_output=True, text=True)
    assert done.returncode == 1
    assert f"OSError: No checkpoint could be written into {folder}" in done.stderr
    assert "See that there is room" in done.stderr
    with Checkpoints(folder, {"training": 1}) as kept:
        step, state = kept.restore({"count": np.zeros(500_000, np.float32)})
    assert step == 1
    np.testing.assert_array_equal(state["count"], np.arange(500_000))
