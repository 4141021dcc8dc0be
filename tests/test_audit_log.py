"""The audit log: whatever is done to its files is found; kills, full disks and broken ones lose nothing that was answered."""

import errno
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from fraudlab.governance import audit_log
from fraudlab.governance.audit_log import CHECKPOINTS, TAIL, AuditError, AuditLog, Mark, read, seal, verify
from fraudlab.governance.signing import create_key

WRITER = """
import os, sys
from fraudlab.governance.audit_log import AuditLog
log = AuditLog(sys.argv[1], sys.argv[2], writer=sys.argv[3], segment=int(sys.argv[4]), window=.002)
for i in range(int(sys.argv[5])):
    log.append({"request_id": f"{sys.argv[3]}-{i}", "at": i, "row": "A" * 600})
    os.write(1, f"{i}\\n".encode())
log.close()
"""


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    return create_key(tmp_path_factory.mktemp("keys"), ed25519=True)


def start(folder: Path, keys, writer: str, segment: int = 1 << 20, records: int = 10**9) -> subprocess.Popen:
    """A process that logs, and answers on its standard output."""
    command = [sys.executable, "-c", WRITER, folder, keys.private, writer, str(segment), str(records)]
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE)


def wait_until(true, seconds: float = 30):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.002)


def ids(folder: Path) -> list[str]:
    return [r["request_id"] for r in read(folder)]


@pytest.fixture
def written(tmp_path, keys, monkeypatch) -> Path:
    """A closed log of two chains, several files each, with a checkpoint every few lines."""
    monkeypatch.setattr(audit_log, "EVERY", 4)
    folder = tmp_path / "log"
    for writer in ("a", "b"):
        log = AuditLog(folder, keys.private, writer, window=0, segment=1200)
        for i in range(9):
            log.append({"request_id": f"{writer}{i}", "at": i, "text": 'é\n"'})
            if i % 3 == 2:
                wait_until(lambda log=log: log._signed.n > log._mark.n - 4)
        log.close()
    assert not verify(folder, keys.public).broken
    return folder


def lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def test_every_flipped_byte_is_found(tmp_path, keys):
    folder = tmp_path / "log"
    with AuditLog(folder, keys.private, "a", segment=400) as log:
        for i in range(3):
            log.append({"request_id": f"{i}", "at": i, "text": "é"})
    files, rng = sorted(folder.glob("*.jsonl")), random.Random(0)
    assert len(files) == 3
    for path in files:
        content = bytearray(path.read_bytes())
        for at in range(len(content)):
            content[at] ^= (bit := 1 << rng.randrange(8))
            path.write_bytes(content)
            assert verify(folder, keys.public).broken, (path.name, at)
            content[at] ^= bit
        path.write_bytes(content)
    assert not verify(folder, keys.public).broken


def test_the_line_that_was_changed_is_named(written, keys):
    for path in sorted(written.glob("[ab]*.jsonl")):
        content = lines(path)
        for i, line in enumerate(content):
            path.write_bytes(b"".join([*content[:i], line.replace(b'"n":', b'"n" :', 1), *content[i + 1 :]]))
            (found,) = verify(written, keys.public).broken
            assert (found.file, found.line) == (path.name, i + 1)
            assert found.why.startswith("changed")
        path.write_bytes(b"".join(content))


def changes(content: list[bytes], random: random.Random):
    """Kinds of tampering with lines: what it is called, and the lines after it."""
    i, j = sorted(random.sample(range(len(content)), 2))
    yield "removed", content[:i] + content[i + 1 :], i
    yield "reordered", [*content[:i], content[j], *content[i + 1 : j], content[i], *content[j + 1 :]], i
    yield "inserted", content[: j + 1] + content[i:], j + 1
    yield "inserted", [*content[:j], content[i], *content[j:]], j


@pytest.mark.parametrize("seed", range(12))
def test_lines_removed_reordered_and_repeated_are_found(written, keys, seed):
    rng = random.Random(seed)
    path = rng.choice(sorted(written.glob("[ab]*.jsonl")))
    content = lines(path)
    for why, changed, at in changes(content, rng):
        path.write_bytes(b"".join(changed))
        (found,) = verify(written, keys.public).broken
        assert found.file.startswith(path.name[0])  # a removed last line is seen in the next file, or by the checkpoint
        if (found.file, found.line) == (path.name, at + 1):
            assert found.why.startswith(why)
        else:
            assert (why, at) == ("removed", len(content) - 1)
    path.write_bytes(b"".join(content))


def test_checkpoints_removed_or_repeated_are_found_but_for_the_last(written, keys):
    path = written / CHECKPOINTS
    content = lines(path)
    last = {}
    for i, line in enumerate(content):
        last[json.loads(line)["chain"]] = i
    for i, line in enumerate(content):
        path.write_bytes(b"".join(content[:i] + content[i + 1 :]))
        assert bool(verify(written, keys.public).broken) == (i not in last.values())
        path.write_bytes(b"".join([*content, line]))
        assert "twice" in verify(written, keys.public).broken[0].why
        before = next((j for j in range(i) if json.loads(content[j])["chain"] == json.loads(line)["chain"]), None)
        if before is not None:
            swapped = [line if j == before else content[before] if j == i else other for j, other in enumerate(content)]
            path.write_bytes(b"".join(swapped))
            assert any(b.why.startswith("reordered") for b in verify(written, keys.public).broken)
    copy = written.parent / "copy"
    copy.write_bytes(b"".join(content))
    path.write_bytes(b"".join(content[:-1]))
    assert not verify(written, keys.public).broken
    (found,) = verify(written, keys.public, checkpoints=copy).broken
    assert "in the copy only" in found.why
    path.unlink()
    assert all("checkpoint" in b.why for b in verify(written, keys.public).broken)


def test_files_removed_renamed_and_added_are_found(written, keys):
    files = sorted(written.glob("[ab]*.jsonl"))
    for path in files:
        moved = path.rename(written.parent / path.name)
        assert verify(written, keys.public).broken[0].why.startswith(("removed", "truncated"))
        moved.rename(path)
    one, two = files[:2]
    contents = one.read_bytes(), two.read_bytes()
    one.write_bytes(contents[1])
    two.write_bytes(contents[0])
    assert verify(written, keys.public).broken[0].file == one.name
    one.write_bytes(contents[0])
    two.write_bytes(contents[1])
    (written / "notes.jsonl").write_text("{}\n")
    assert "no file of an audit log" in verify(written, keys.public).broken[0].why
    (written / "notes.jsonl").unlink()
    for path in files[: len(files) // 2]:
        path.unlink()
    assert verify(written, keys.public).broken[0].why == "removed: this file is missing"


def test_another_key_and_a_forged_chain_are_found(written, keys, tmp_path):
    other = create_key(tmp_path / "other", ed25519=True)
    assert all("wrong signature" in b.why for b in verify(written, other.public).broken[:5])
    with AuditLog(written, other.private, "c") as log:
        log.append({"request_id": "c0"})
    assert "another key" in verify(written, keys.public).broken[0].why
    (path,) = written.glob("c_*")
    (written / CHECKPOINTS).write_bytes(b"".join(x for x in lines(written / CHECKPOINTS) if b'"chain":"c' not in x))
    (found,) = verify(written, keys.public).broken
    assert found.file == path.name
    assert "without any checkpoint" in found.why


def rehashed(path: Path, mark: Mark, change) -> Mark:
    """Change a file's lines, and compute their hashes anew, as one would who knows how the log is made."""
    made = b""
    for line in lines(path):
        sealed, hash = seal(mark.hash, re.sub(rb'(?<="before":")\w+', mark.hash, change(line[: -TAIL - 1])))
        made, mark = made + sealed, Mark(mark.n + 1, hash)
    path.write_bytes(made)
    return mark


def test_hashes_made_anew_are_found_by_the_signatures(written, keys):
    kept, mark = {path: path.read_bytes() for path in sorted(written.glob("b*.jsonl"))}, Mark()
    for path in kept:
        mark = rehashed(path, mark, lambda body: body)
    assert {path: path.read_bytes() for path in kept} == kept  # that is how it is made
    mark = Mark()
    for path in kept:
        mark = rehashed(path, mark, lambda body: body.replace(b'"b8"', b'"b9"'))  # the last record
    (found,) = verify(written, keys.public).broken
    assert "hashes made anew" in found.why
    assert found.file == path.name


def test_the_end_of_a_log_cut_at_any_byte_is_found(written, keys):
    path = sorted(written.glob("b*.jsonl"))[-1]
    content = path.read_bytes()
    for size in range(len(content)):
        path.write_bytes(content[:size])
        (found,) = verify(written, keys.public).broken
        assert found.why.startswith("truncated")
    path.write_bytes(content)


def test_after_the_last_checkpoint_a_cut_line_is_torn_and_a_changed_one_is_told(tmp_path, keys):
    folder = tmp_path / "log"
    log = AuditLog(folder, keys.private, "a", window=60)
    for i in range(3):
        log.append({"request_id": str(i)})
    (path,) = folder.glob("a*.jsonl")
    content = path.read_bytes()
    first, begin = len(lines(path)[0]), len(content) - len(lines(path)[-1])
    for size in range(first, len(content)):
        path.write_bytes(content[:size])
        report = verify(folder, keys.public)
        assert not report.broken
        assert report.torn == size - content[:size].rindex(b"\n") - 1
        assert report.unsigned == report.records == content[:size].count(b"\n") - 1 == len(list(read(folder)))
    for at in range(begin, len(content)):
        changed = bytearray(content)
        changed[at] ^= 1
        path.write_bytes(changed)
        (found,) = verify(folder, keys.public).broken
        assert "after the last checkpoint" in found.why
    path.write_bytes(content)
    log.close()


def test_a_checkpoint_that_was_not_finished_is_torn(written, keys):
    path = written / CHECKPOINTS
    content = lines(path)
    whole = b"".join(content)
    for size in (1, 9, 10, 60, len(content[0]) - 140, len(content[0]) - 20):
        for broken in (
            content[0] + content[1][:size] + b"".join(content[1:]),
            whole + content[1][:size],
        ):  # written again after it; or killed
            path.write_bytes(broken)
            report = verify(written, keys.public)
            assert not report.broken
            assert report.torn == size
    path.write_bytes(whole + b"x")
    assert "no checkpoint" in verify(written, keys.public).broken[0].why


def test_a_killed_process_has_logged_what_it_answered(tmp_path, keys):
    for i in range(4):
        folder = tmp_path / str(i)
        child = start(folder, keys, "killed", segment=20_000)
        answered = [child.stdout.readline() for _ in range(1 + 150 * i)]
        child.send_signal(signal.SIGKILL)
        answered += child.stdout.read().splitlines()
        child.wait()
        child.stdout.close()
        report = verify(folder, keys.public)
        assert not report.broken
        assert len(answered) <= report.records <= len(answered) + 1
        with AuditLog(folder, keys.private, "next") as log:
            log.append({"request_id": "after", "at": 10**9})
        assert not verify(folder, keys.public).broken
        assert ids(folder)[: len(answered)] == [f"killed-{i}" for i in range(len(answered))]
        assert ids(folder)[-1] == "after"


def test_processes_write_beside_one_another(tmp_path, keys):
    children = [start(tmp_path / "log", keys, name, segment=30_000, records=300) for name in ("a", "b")]
    assert [len(child.communicate(timeout=60)[0].splitlines()) for child in children] == [300, 300]
    report = verify(tmp_path / "log", keys.public)
    assert not report.broken
    assert (len(report.chains), report.records, report.unsigned) == (2, 600, 0)
    assert [r["at"] for r in read(tmp_path / "log")] == sorted([*range(300)] * 2)


def test_threads_append_to_one_chain(tmp_path, keys):
    with AuditLog(tmp_path / "log", keys.private, segment=5000, window=0.001) as log:

        def work(name: str):
            for i in range(200):
                log.append({"request_id": f"{name}{i}", "at": i})

        threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    report = verify(tmp_path / "log", keys.public)
    assert not report.broken
    assert report.records == 800
    assert sorted(ids(tmp_path / "log")) == sorted(f"{name}{i}" for name in "abcd" for i in range(200))


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 2 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here; RLIMIT_FSIZE is tried below")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_full_disk(small_disk, keys):
    def logged(i: int, **more) -> bool:
        try:
            log.append({"request_id": str(i), "at": i} | more)
        except AuditError as e:
            told.add(e.errno)
            return False
        return True

    ballast, folder, told = small_disk / "ballast", small_disk / "log", set()
    ballast.write_bytes(bytes(500_000))
    log = AuditLog(folder, keys.private, segment=400_000, window=0.001)
    answered = [i for i in range(3000) if logged(i, row="A" * 1000)]
    assert answered == list(range(len(answered)))
    assert len(answered) < 2000
    assert not verify(folder, keys.public).broken
    ballast.unlink()
    wait_until(lambda: logged(3000))
    log.close()
    assert told == {errno.ENOSPC}
    report = verify(folder, keys.public)
    assert not report.broken
    assert report.unsigned == 0
    assert ids(folder) == [*map(str, answered), "3000"]


def test_a_file_that_may_not_grow(tmp_path, keys):
    log = AuditLog(tmp_path / "log", keys.private)
    log.append({"request_id": "0"})
    (path,) = (tmp_path / "log").glob("*.00000.jsonl")
    whole, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    for more in (0, 1, 50, 300):
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + more, limits[1]))
        try:
            with pytest.raises(AuditError) as told:
                log.append({"request_id": "1", "row": "A" * 600})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert told.value.errno == errno.EFBIG
        assert path.read_bytes() == whole
    log.append({"request_id": "2"})
    log.close()
    assert not verify(tmp_path / "log", keys.public).broken
    assert ids(tmp_path / "log") == ["0", "2"]


def test_what_was_written_in_half_is_cut_off_later_if_not_at_once(tmp_path, keys, monkeypatch):
    log = AuditLog(tmp_path / "log", keys.private)
    write, cut = os.write, os.ftruncate

    def half(file, content):
        if file == log._segment.file and len(content) > 20:
            return write(file, content[:20])
        raise OSError(errno.EIO, "Input/output error")

    def never(file, size):
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as m:
        m.setattr(audit_log.os, "write", half)
        m.setattr(audit_log.os, "ftruncate", never)
        with pytest.raises(AuditError, match="Input/output error"):
            log.append({"request_id": "0"})
        assert verify(tmp_path / "log", keys.public).torn > 0  # as it would be after a kill now
        m.setattr(audit_log.os, "write", write)
        with pytest.raises(AuditError, match="Read-only"):
            log.append({"request_id": "1"})
    assert os.ftruncate is cut
    log.append({"request_id": "2"})
    log.close()
    assert not verify(tmp_path / "log", keys.public).broken
    assert ids(tmp_path / "log") == ["2"]


def test_nothing_is_cut_where_nothing_failed(tmp_path, keys, monkeypatch):
    monkeypatch.setattr(audit_log.os, "ftruncate", None)
    with AuditLog(tmp_path / "log", keys.private, segment=300) as log:
        for i in range(5):
            log.append({"request_id": str(i)})
    assert len(ids(tmp_path / "log")) == 5


def test_an_interrupted_append_leaves_the_chain_whole(tmp_path, keys, monkeypatch):
    log = AuditLog(tmp_path / "log", keys.private)
    write = os.write

    def interrupted(file, content):
        write(file, content)
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(audit_log.os, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            log.append({"request_id": "0"})
    log.append({"request_id": "1"})
    log.close()
    assert not verify(tmp_path / "log", keys.public).broken
    assert ids(tmp_path / "log") == ["1"]


def test_a_failing_fsync_is_told_to_the_next_append(tmp_path, keys, monkeypatch):
    log = AuditLog(tmp_path / "log", keys.private, window=0.001)
    fail = threading.Event()
    fsync = os.fsync

    def maybe(file):
        if fail.is_set():
            raise OSError(errno.EIO, "Input/output error")
        fsync(file)

    monkeypatch.setattr(audit_log.os, "fsync", maybe)
    monkeypatch.setattr(audit_log, "RETRY", 0.01)
    fail.set()
    log.append({"request_id": "0"})
    wait_until(lambda: log._trouble)
    for _ in range(3):
        with pytest.raises(AuditError, match="Input/output error") as told:
            log.append({"request_id": "1"})
        assert told.value.errno == errno.EIO
    time.sleep(0.05)
    monkeypatch.setattr(audit_log, "RETRY", 60)  # tries leave no files behind
    time.sleep(0.05)
    assert len(list((tmp_path / "log").glob("*.0*.jsonl"))) == 1
    monkeypatch.setattr(audit_log, "RETRY", 0.01)
    log._wake.set()
    fail.clear()
    wait_until(lambda: not log._trouble)
    log.append({"request_id": "2"})

    fail.set()
    wait_until(lambda: log._trouble)
    fail.clear()
    wait_until(lambda: log._trouble.cured)  # nobody saw it: the next one does, though it is over
    with pytest.raises(AuditError):
        log.append({"request_id": "3"})
    log.append({"request_id": "4"})

    fail.set()
    with pytest.raises(AuditError):
        log.close()
    fail.clear()
    report = verify(tmp_path / "log", keys.public)
    assert not report.broken
    assert ids(tmp_path / "log") == ["0", "2", "4"]
    notes = [m[1] for p in sorted((tmp_path / "log").glob("*.0*.jsonl")) if (m := re.search(r'"note":"([^"]*)', p.read_text()))]
    assert notes[0] == ""
    assert all("Input/output error" in note for note in notes[1:])


def test_an_fsync_that_the_operating_system_fails(tmp_path, keys):
    """Injected into the system call of a real process."""
    if not shutil.which("strace"):
        pytest.skip("strace is not installed")
    code = """
import sys, time
from fraudlab.governance.audit_log import AuditError, AuditLog
log, told, answered = AuditLog(sys.argv[1], sys.argv[2], window=.002), 0, []
while not told or len(answered) < 100:
    try: log.append({"request_id": str(len(answered)), "at": len(answered)})
    except AuditError as e: told += 1
    else: answered.append(0)
    time.sleep(.001)
log.close()
print(told, len(answered))
"""
    inject = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=fsync", "-e", "inject=fsync:error=EIO:when=8"]
    command = [*inject, sys.executable, "-c", code, str(tmp_path / "log"), str(keys.private)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if "ptrace" in done.stderr.lower():
        pytest.skip("processes cannot be traced here")
    told, answered = map(int, done.stdout.split())
    assert told >= 1
    report = verify(tmp_path / "log", keys.public)
    assert not report.broken
    assert report.records == answered
    assert "Input/output error" in sorted((tmp_path / "log").glob("*.00001.jsonl"))[0].read_text()


def test_an_fsync_that_does_not_come_back_stops_the_log(tmp_path, keys, monkeypatch):
    log = AuditLog(tmp_path / "log", keys.private, window=0.001)
    go, fsync = threading.Event(), os.fsync

    def hangs(file):
        go.wait()
        fsync(file)

    monkeypatch.setattr(audit_log, "LATEST", 0.02)
    monkeypatch.setattr(audit_log.os, "fsync", hangs)
    log.append({"request_id": "0"})
    wait_until(lambda: log._late())
    with pytest.raises(AuditError, match="has not answered"):
        log.append({"request_id": "1"})
    go.set()
    wait_until(lambda: not log._late())
    log.append({"request_id": "2"})
    log.close()
    assert ids(tmp_path / "log") == ["0", "2"]


def test_checkpoints_are_signed_by_time_and_when_idle(tmp_path, keys, monkeypatch):
    monkeypatch.setattr(audit_log, "SECONDS", 0.05)
    log = AuditLog(tmp_path / "log", keys.private, window=0.001)
    for i in range(3):
        log.append({"request_id": str(i)})
        wait_until(lambda: verify(tmp_path / "log", keys.public).unsigned == 0)
    assert verify(tmp_path / "log", keys.public).checkpoints >= 3
    wait_until(lambda: log._signed == log._mark)
    k = log._k
    time.sleep(0.2)
    assert log._k == k  # nothing new, nothing signed
    log.close()
    log.close()
    (chain,) = verify(tmp_path / "log", keys.public).chains
    assert chain.signed.end


def test_what_does_not_become_json_is_not_logged(tmp_path, keys):
    with AuditLog(tmp_path / "log", keys.private) as log:
        with pytest.raises(TypeError):
            log.append({"row": object()})
        with pytest.raises(ValueError, match="line break"):
            log.append({"row": msgspec.Raw(b'{\n"a": 1}')})
        log.append({"text": 'a\n"h":"é'})
    assert not verify(tmp_path / "log", keys.public).broken
    assert list(read(tmp_path / "log")) == [{"text": 'a\n"h":"é'}]


def test_a_clock_set_back_changes_nothing(tmp_path, keys, monkeypatch):
    clock = iter(range(10**18, 0, -(10**15)))
    monkeypatch.setattr(audit_log.time, "time_ns", lambda: next(clock))
    with AuditLog(tmp_path / "log", keys.private, segment=400) as log:
        for at in (5, 3, None, 4):
            log.append({"request_id": str(at)} | ({"at": at} if at else {}))
    assert not verify(tmp_path / "log", keys.public).broken
    assert ids(tmp_path / "log") == ["3", "None", "4", "5"]
    assert list(read(tmp_path / "log", having='"')) == []
    assert list(read(tmp_path / "log", having="5")) == [{"request_id": "5", "at": 5}]


def test_a_forked_process_may_not_go_on(tmp_path, keys):
    code = """
import os, sys, warnings
warnings.simplefilter("ignore")
from fraudlab.governance.audit_log import AuditError, AuditLog
log = AuditLog(sys.argv[1], sys.argv[2])
if not os.fork():
    try: log.append({"request_id": "child"})
    except AuditError as e: os._exit(7 if "another process" in str(e) else 1)
    os._exit(0)
assert os.waitstatus_to_exitcode(os.wait()[1]) == 7
log.append({"request_id": "parent"})
log.close()
"""
    subprocess.run([sys.executable, "-c", code, tmp_path / "log", keys.private], check=True, timeout=60)
    assert ids(tmp_path / "log") == ["parent"]


def test_command(written, keys):
    from fraudlab.cli import app

    def ask(folder: Path):
        return CliRunner().invoke(app, ["audit-log", "verify", str(folder), "--public-key", str(keys.public)])

    whole = ask(written)
    assert whole.exit_code == 0
    assert "records      18" in whole.output
    path = sorted(written.glob("a*.jsonl"))[0]
    path.write_bytes(path.read_bytes().replace(b'"a0"', b'"a9"'))
    broken = ask(written)
    assert broken.exit_code == 1
    assert f"{path.name}, line 2: changed" in broken.output
    missing = ask(written / "no")
    assert missing.exit_code == 1
    assert "No audit log" in missing.output
