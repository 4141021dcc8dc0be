"""The three kinds of store under one contract: threads, processes, crashes, full disks, and a server that goes away."""

import os
import random
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from fraudlab.features import stores
from fraudlab.features.definitions import FeatureSet, Risk, Window
from fraudlab.features.online import STATUS, Memory, Online
from fraudlab.features.stores import LmdbStore, Stored, StoreError, copy, open_store, short, sweep, sweeps

A, B = b"payer=a", b"payee=b"


class Redis:
    """A server of our own, on a free port."""

    def __init__(self, folder: Path):
        with socket.create_server(("127.0.0.1", 0)) as s:
            self.port = s.getsockname()[1]
        self.folder = folder
        self.start()

    @property
    def address(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self):
        command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        self.process = subprocess.Popen([*command, "--dir", str(self.folder), "--logfile", str(self.folder / "log")])
        end = time.monotonic() + 10
        while time.monotonic() < end:
            try:
                return open_store(self.address).close()
            except StoreError:
                time.sleep(0.02)
        raise RuntimeError((self.folder / "log").read_text())

    def stop(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    if not shutil.which("redis-server"):
        pytest.skip("there is no redis-server here: apt-get install redis-server")
    server = Redis(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()


@pytest.fixture
def redis(server):
    with open_store(server.address) as store:
        store._ask(b"*1\r\n$8\r\nFLUSHALL\r\n")
    return server


def addresses(folder: Path, request, kind: str) -> str:
    return request.getfixturevalue("redis").address if kind == "redis" else f"{kind}:{folder}/store.{kind}"


@pytest.fixture(params=["lmdb", "sqlite", "redis"])
def address(request, tmp_path):
    return addresses(tmp_path, request, request.param)


@pytest.fixture
def store(address):
    with open_store(address) as store:
        yield store


def count(blobs):
    """One more in each."""
    return [b"%d" % (int(b or b"0") + 1) for b in blobs], int(blobs[0] or b"0")


def python(code: str, *arguments, **options) -> subprocess.Popen:
    """A process that runs `code` with `store` open; arguments from sys.argv[2] on."""
    start = "import os, sys, time\nfrom fraudlab.features.stores import *\nstore = open_store(sys.argv[1])\n"
    command = [sys.executable, "-c", start + code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def finished(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out


# ---------------------------------------------------------------- what is read and written


def test_a_store_is_a_dict(store):
    """Random updates, deletions and sweeps, against a dict."""
    rng, expected = random.Random(0), {}
    keys = [b"%s=%d" % (e, i) for e in (b"payer", b"payer*[^x]?-\\", b"h") for i in range(8)]
    for _ in range(300):
        some = rng.sample(keys, rng.randint(1, 6))
        new = {k: rng.choice([None, rng.randbytes(rng.choice([1, 250, 5000]))]) for k in some}
        assert store.update(some, lambda blobs, new=new: (list(new.values()), blobs)) == [expected.get(k) for k in some]
        expected = {k: b for k, b in (expected | new).items() if b is not None}
        assert store.get_many(some) == [expected.get(k) for k in some]
    for prefix in (b"", b"h=", b"payer", b"payer*", b"nothing"):
        found = [item for page in store.pages(prefix, count=3) for item in page]
        assert len({k for k, _ in found}) == len(found) or "redis" in store.address
        assert dict(found) == {k: b for k, b in expected.items() if k.startswith(prefix)}
    assert store.delete([*keys[:8], b"unknown"]) == sum(k in expected for k in keys[:8])
    assert store.get_many(keys[:8]) == [None] * 8


def test_what_does_not_change_is_not_written_and_no_keys_are_no_work(store):
    store.put_many([(A, b"1")])
    assert store.update([A, B], lambda blobs: (blobs, blobs)) == [b"1", None]
    assert store.update([], lambda blobs: (blobs, "done")) == "done"
    assert store.get_many([]) == []
    assert store.get_many([A, B]) == [b"1", None]


def test_an_error_writes_nothing_and_the_store_goes_on(store):
    store.put_many([(A, b"1")])
    for error in (KeyError, KeyboardInterrupt):
        with pytest.raises(error):
            store.update([A], lambda blobs, error=error: (_ for _ in ()).throw(error()))
    assert store.update([A, B], count) == 1


def test_many_keys_in_one_update(store):
    keys = [b"k%d" % i for i in range(3000)]
    store.update(keys, count)
    store.update(keys, count)
    assert set(store.get_many(keys)) == {b"2"}


@pytest.mark.parametrize("address", ["lmdb", "sqlite"], indirect=True)
def test_it_is_there_when_opened_again(address):
    with open_store(address) as store:
        store.put_many((b"%05d" % i, b"x" * 300) for i in range(12_000))
    with open_store(address) as store:
        assert sum(len(page) for page in store.pages()) == 12_000
    path = Path(address.partition(":")[2])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not path.with_name(f"{path.name}-open").exists()


def test_keys_of_any_length_fit(store):
    long = [short(b"payer=" + b"x" * n) for n in (505, 506, 4000, 4001)]
    assert len(set(long)) == 4
    store.put_many((k, k) for k in long)
    assert store.get_many(long) == long


# ---------------------------------------------------------------- others at the same time


def test_threads_lose_nothing(store):
    def work(i):
        for _ in range(100):
            store.update([A, B] if i % 2 else [B, A], count)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert store.get_many([A, B]) == [b"400", b"400"]


COUNT = """
def count(blobs): return [b"%d" % (int(b or b"0") + 1) for b in blobs], None
a, b = b"payer=a", b"payee=b"
"""


def test_processes_lose_nothing(address, store):
    code = COUNT + "for i in range(300): store.update([a, b] if i % 2 else [b, a], count)"
    workers = [python(code, address) for _ in range(2)]
    for _ in range(100):
        store.update([A, B], count)
    for worker in workers:
        finished(worker)
    assert store.get_many([A, B]) == [b"700", b"700"]


def test_a_process_that_forks_goes_on_in_both_halves(address):
    code = COUNT + (
        "store.update([a, b], count)\n"
        "child = os.fork()\n"
        "for _ in range(100): store.update([a, b], count)\n"
        "if not child: os._exit(0)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
        "print(*store.get_many([a, b]), sep=' ')"
    )
    assert finished(python(code, address)) == "b'201' b'201'\n"


def test_a_process_that_is_killed_leaves_old_or_new_never_half(address, store):
    """Both keys always hold the same number, in big blobs; what was acknowledged is there."""
    code = """
a, b = b"payer=a", b"payee=b"
def change(blobs):
    n = int(blobs[0][:12] if blobs[0] else 0) + 1
    return [b"%012d" % n * 3000] * 2, n
while True: print(store.update([a, b], change), flush=True)
"""
    killed = 0
    for delay in (0.0, 0.01, 0.02, 0.03):
        with python(code, address) as worker:
            first = worker.stdout.readline()
            time.sleep(delay)
            worker.send_signal(signal.SIGKILL)
            acknowledged = int([first, *(line for line in worker.stdout if line.endswith("\n"))][-1])
        first, second = store.get_many([A, B])
        assert first == second == first[:12] * 3000
        assert acknowledged <= int(first[:12]) <= acknowledged + 1
        killed += 1
        store.update([b"other"], count)
    assert killed == 4


def test_one_that_is_killed_between_reading_and_writing_holds_up_nobody(address, store):
    code = """
def change(blobs):
    print("read", flush=True)
    time.sleep(60)
store.update([b"payer=a", b"payee=b"], change)
"""
    with python(code, address) as worker:
        assert worker.stdout.readline() == "read\n"
        worker.send_signal(signal.SIGKILL)
    began = time.monotonic()
    store.update([A, B], count)
    assert store.get_many([A, B]) == [b"1", b"1"]
    assert time.monotonic() - began < 1


# ---------------------------------------------------------------- looking after it


@pytest.mark.parametrize("target", ["lmdb", "sqlite", "redis"])
@pytest.mark.parametrize("source", ["lmdb", "sqlite"])
def test_a_copy_holds_all_whatever_its_kind(source, target, tmp_path, request):
    items = {b"%d" % i: os.urandom(200) for i in range(7000)}
    to = addresses(tmp_path / "to", request, target)
    with open_store(addresses(tmp_path, request, source)) as old, open_store(to) as new:
        old.put_many(items.items())
        assert copy(old, new) == 7000
        assert {k: b for page in new.pages() for k, b in page} == items
        with pytest.raises(StoreError, match="is not empty"):
            copy(old, new)


@pytest.mark.parametrize("address", ["lmdb", "sqlite"], indirect=True)
def test_a_copy_of_a_file_is_of_one_moment(address, tmp_path):
    items = [b"%05d" % i for i in range(20_000)]
    with open_store(address) as store, open_store(f"sqlite:{tmp_path}/copy") as new:
        store.put_many((k, b"1") for k in items)
        worker = python("while True: store.update([b'00000', b'19999'], lambda b: ([b'%d' % (int(x) + 1) for x in b], None))", address)
        while store.get_many([items[0]]) == [b"1"]:
            time.sleep(0.01)
        assert copy(store, new) == 20_000
        worker.kill()
        worker.communicate()
        first, last = new.get_many([items[0], items[-1]])
    assert first == last > b"1"


def test_what_is_expired_is_swept_and_nothing_else(store):
    store.put_many((b"%s=%03d" % (e, i), b"%d" % (i % 4)) for e in (b"payer", b"payee") for i in range(100))
    assert sweep(store, b"payer=", lambda blob: blob == b"0") == 25
    steps = list(sweeps(store, b"payer=", lambda blob: blob == b"1", count=10))
    assert sum(steps) == 25
    assert len(steps) >= 5
    assert sum(len(page) for page in store.pages()) == 150


def test_a_sweep_leaves_what_was_renewed_meanwhile(store):
    """Between looking and removing, somebody else writes: the blob that is there then decides."""
    store.put_many([(A, b"old"), (B, b"old")])
    looked = []

    def expired(blob):
        looked.append(blob)
        if len(looked) == 2:  # both were seen, none is removed yet
            thread = threading.Thread(target=store.put_many, args=([(B, b"new")],))
            thread.start()
            thread.join(0.2)
        return blob == b"old"

    assert sweep(store, b"pay", expired) == 1
    assert store.get_many([A, B]) == [None, b"new"]


# ---------------------------------------------------------------- LMDB


def test_the_map_grows_in_this_process_and_in_others(tmp_path):
    path = tmp_path / "small.lmdb"
    with LmdbStore(str(path), size=1 << 16) as store:
        code = "store.get_many([b'x'])\nprint('open', flush=True)\nsys.stdin.readline()\n"
        code += "print(store.update([b'k0'], lambda b: ([b'seen'], b[0])))"
        other = python(code, f"lmdb:{path}", stdin=subprocess.PIPE)
        assert other.stdout.readline() == "open\n"
        for i in range(60):
            store.update([b"k%d" % i], lambda blobs: ([b"x" * 1_000_000], None))
        store.put_many((b"many%d" % i, b"y" * 1000) for i in range(20_000))
        assert path.stat().st_size > 80_000_000
        assert other.communicate("go\n", timeout=30)[0] == f"{b'x' * 1_000_000}\n"
        assert store.get_many([b"k0", b"k59", b"many19999"]) == [b"seen", b"x" * 1_000_000, b"y" * 1000]


def test_a_full_disk_is_an_error_and_what_is_there_stays(tmp_path):
    code = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (40 << 20, 40 << 20))
for i in range(1000):
    try: store.update([b"k%d" % i], lambda blobs: ([b"x" * 100_000], None))
    except StoreError as e: says = e; break
print(i, says, store.get_many([b"k%d" % i, b"k%d" % (i - 1)])[0] is None)
"""
    done, _, says = finished(python(code, f"lmdb:{tmp_path}/full.lmdb")).partition(" ")
    assert "No room for" in says
    assert "make room" in says
    assert says.endswith("True\n")
    with open_store(f"lmdb:{tmp_path}/full.lmdb") as store:
        assert sum(len(page) for page in store.pages()) == int(done) > 100


def test_after_a_power_cut_it_is_not_used_again(tmp_path, monkeypatch):
    path = tmp_path / "state.lmdb"
    worker = python("store.put_many([(b'a', b'1')])\nos._exit(0)", f"lmdb:{path}")  # ends without closing
    finished(worker)
    open_store(f"lmdb:{path}").close()  # the machine is still up: nothing is lost
    finished(python("os._exit(0)", f"lmdb:{path}"))
    monkeypatch.setattr(stores, "_boot", lambda: b"another one")
    with pytest.raises(StoreError, match=r"The machine went down while .* was in use"):
        open_store(f"lmdb:{path}")


def test_one_of_several_users_ends_and_the_mark_stays(tmp_path):
    path = tmp_path / "state.lmdb"
    with open_store(f"lmdb:{path}"):
        finished(python("store.close()", f"lmdb:{path}"))
        assert path.with_name("state.lmdb-open").exists()
    assert not path.with_name("state.lmdb-open").exists()
    finished(python("store.update([b'a'], lambda b: ([b'1'], None))", f"lmdb:{path}"))  # closed by the end of the program
    assert not path.with_name("state.lmdb-open").exists()


# ---------------------------------------------------------------- Redis


def test_a_server_that_is_down_is_named_and_one_that_is_back_is_used(tmp_path_factory, redis):
    own = Redis(tmp_path_factory.mktemp("own"))
    try:
        store = open_store(own.address)
        store.put_many([(A, b"1")])
        own.stop()
        for use in (lambda: store.update([A], count), lambda: store.get_many([A]), lambda: store.put_many([(A, b"2")])):
            with pytest.raises(StoreError, match=rf"{own.address} does not answer: .*Start the server"):
                use()
        own.start()
        assert store.update([A], count) == 0, "it came back empty, and the script had to be loaded again"
        assert store.get_many([A]) == [b"1"]
    finally:
        own.stop()


def test_a_password_is_never_shown(redis):
    address = redis.address.replace("redis://", "redis://someone:secret@") + "?socket_timeout=1"
    with pytest.raises(StoreError) as e:
        open_store(address)
    assert "secret" not in str(e.value)
    assert redis.address in str(e.value)


def test_a_server_that_hangs_is_not_waited_for(redis):
    with open_store(f"{redis.address}?socket_timeout=0.2") as store:
        store.put_many([(A, b"1")])
        os.kill(redis.process.pid, signal.SIGSTOP)
        try:
            began = time.monotonic()
            with pytest.raises(StoreError, match="Timeout"):
                store.update([A], count)
            assert time.monotonic() - began < 1
        finally:
            os.kill(redis.process.pid, signal.SIGCONT)
        assert store.get_many([A, B]) == [b"1", None], "the late answer is not taken for this one"


def test_a_connection_that_breaks_while_writing_says_that_nobody_knows(redis):
    with open_store(redis.address) as store:

        def change(blobs):
            store.local.connection._sock.shutdown(socket.SHUT_RDWR)
            return count(blobs)

        with pytest.raises(StoreError, match="may be there or not"):
            store.update([A], change)
        assert store.update([A], count) == 0


def test_a_full_server_refuses_and_nothing_is_written(redis):
    with open_store(redis.address) as store:
        store.put_many([(A, b"1")])
        settings = [b"CONFIG", b"SET", b"maxmemory"]
        store._ask(stores.pack(*settings, b"1"))
        try:
            with pytest.raises(StoreError, match=r"refuses: .*Nothing was written"):
                store.update([A, B], count)
        finally:
            store._ask(stores.pack(*settings, b"0"))
        assert store.get_many([A, B]) == [b"1", None]


def test_keys_that_others_keep_changing_are_given_up(redis, monkeypatch):
    monkeypatch.setattr(stores, "TRIES", 5)
    with open_store(redis.address) as store, open_store(redis.address) as other:

        def change(blobs):
            other.update([A], count)
            return count(blobs)

        with pytest.raises(StoreError, match="others changed the same 2 keys 5 times in a row"):
            store.update([A, B], change)
        assert store.get_many([A, B]) == [b"5", None]


# ---------------------------------------------------------------- addresses


@pytest.mark.parametrize("address", ["", "state.sqlite", "mysql://host", "/tmp/x"])
def test_an_unknown_kind_is_named(address):
    with pytest.raises(ValueError, match=r"no kind of store.*lmdb:PATH.*lmdb, redis, rediss, sqlite, unix"):
        open_store(address)


@pytest.mark.parametrize("kind", ["lmdb", "sqlite"])
def test_a_file_of_another_kind_is_left_alone(kind, tmp_path):
    path = tmp_path / "text"
    path.write_text("no store " * 1000)
    with pytest.raises(StoreError, match="text"):
        open_store(f"{kind}:{path}")
    assert path.read_text() == "no store " * 1000


# ---------------------------------------------------------------- an engine on a store


def test_an_engine_on_a_store_gives_what_one_in_memory_gives(store):
    """In order, late, twice, without a key, by several threads that share a payee."""
    features = FeatureSet(
        (
            Window("spent", "payer", "sum", "2d"),
            Window("payers", "payee", "distinct", "1d", of="payer"),
            Window("seen", "payer+device", "count", "5d"),
            Risk("frauds", "payee", "frauds", "9d"),
        )
    )
    rng, start = random.Random(0), datetime(2026, 1, 1, tzinfo=UTC)
    payments = [
        {
            "payment_id": f"{i}",
            "event_time": start + timedelta(hours=i - rng.choice([0, 0, 0, 5, 50])),
            "payer_id": rng.choice("abc" * 300),
            "payee_id": rng.choice(["x", "y" * 1000]),
            "amount": rng.randint(1, 10_000) / 100,
            "currency": "EUR",
            "device": rng.choice([None, "phone"]),
        }
        for i in range(300)
    ]
    payments = [again for p in payments for again in rng.choice([(p,), (p, p)])]
    memory, stored = Memory(Online(features)), Stored(Online(features), store)
    found = set()
    for i, p in enumerate(payments):
        expected, given = memory.update(p), stored.update(p)
        np.testing.assert_array_equal(expected[0], given[0])
        assert expected[1] == given[1]
        found.add(given[1])
        if i % 7 == 0:
            memory.report(p, p["event_time"] + timedelta(hours=9))
            stored.report(p, p["event_time"] + timedelta(hours=9))
    assert found == set(STATUS)
    latest = payments[-1] | {"event_time": start + timedelta(hours=400)}
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: stored.update(latest | {"payment_id": f"t{i}", "payer_id": f"t{i % 4}"}), range(200)))
    values, _ = stored.update(latest | {"payment_id": "last", "event_time": start + timedelta(hours=401), "payer_id": "t0"})
    assert values[0] == pytest.approx(50 * latest["amount"])
