"""The service as a stranger meets it who means no good: one real server, and what it must do with everything that should not be sent."""

import base64
import hmac
import http.client
import io
import json
import re
import secrets
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
import psutil
import pytest
from joserfc import jwk
from joserfc.jws import JWSRegistry
from tiny_bundle import Linear, tiny_bundle, tiny_weights

from fraudlab.data.tokens import looks_like_card, luhn
from fraudlab.governance import audit_log
from fraudlab.serving import bundle as bundles
from fraudlab.serving.access import add_key, trust
from fraudlab.serving.arrow import NotArrow, Stream
from fraudlab.serving.bento import started
from fraudlab.serving.connection import HEAD

ROOT = Path(__file__).parents[1]
JSON, ARROW = {"content-type": "application/json"}, {"content-type": "application/vnd.apache.arrow.stream"}
SIGNERS = {"ours": jwk.generate_key("OKP", "Ed25519"), "rsa": jwk.generate_key("RSA", 2048), "theirs": jwk.generate_key("OKP", "Ed25519")}


class Server(NamedTuple):
    port: int
    lab: Path
    bundle: object
    keys: dict[str, str]

    @property
    def log(self) -> str:
        return (self.lab / "log").read_text(errors="replace")

    @property
    def worker(self) -> psutil.Process:
        """The process that answers."""
        found = [p for p in psutil.Process().children(recursive=True) if "--worker-id" in p.cmdline() and self.port in _ports(p)]
        (worker,) = found
        return worker

    @property
    def memory(self) -> float:
        return self.worker.memory_info().rss / 1e6


def _ports(process: psutil.Process) -> list[int]:
    return [c.laddr.port for c in process.net_connections() if c.laddr]


class Answer(NamedTuple):
    status: int
    headers: dict
    body: bytes

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def code(self) -> tuple[int, str]:
        return self.status, self.json["error"]["code"] if self.status >= 400 else ""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    lab = tmp_path_factory.mktemp("lab")
    folder, keys = tiny_bundle(lab)
    tiny_bundle_again(lab, keys)
    access = lab / "keys" / "access.json"
    callers = {name: add_key(access, name, scopes) for name, scopes in
               {"till": ["score"], "reader": ["read"], "chief": ["admin"], "all": ["score", "read", "admin"]}.items()}  # fmt: skip
    callers |= {"expired": add_key(access, "expired", ["score"], days=-1), "early": add_key(access, "early", ["score"])}
    written = json.loads(access.read_text())
    for key in written["keys"]:
        if key["principal"] == "early":
            key["not_before"] = (datetime.now(UTC) + timedelta(days=1)).isoformat()
    access.write_text(json.dumps(written))
    (access.parent / "jwks.json").write_text(
        json.dumps({"keys": [SIGNERS[kid].as_dict(private=False) | {"kid": kid} for kid in ("ours", "rsa")]})
    )
    trust(access, "https://login.example", "fraudlab", "jwks.json")
    place = {"FRAUDLAB_ROOT": str(ROOT)} | {f"FRAUDLAB_{k.upper()}": str(lab / k) for k in ("data", "keys", "bundles")}
    with ExitStack() as running:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in place.items():
                patch.setenv(name, value)
            address = running.enter_context(started(folder, public_key=keys.public, state=f"lmdb:{lab}/state.lmdb", log=lab / "log"))
        yield Server(int(address.rpartition(":")[2]), lab, bundles.load(folder, keys.public), callers)


def tiny_bundle_again(lab: Path, keys):
    """A second bundle that may be a challenger: as the first, with other weights."""
    parts = {"features": tiny_features(), "fields": tiny_fields(), "buckets": (1, 8), "lineage": {"git": "0" * 40}, "evaluation": {}}
    bundles.write(lab / "bundles" / "other", Linear(), tiny_weights(1), private_key=keys.private, **parts)


def tiny_features() -> dict:
    from tiny_bundle import FEATURES

    return FEATURES.to_dict()


def tiny_fields():
    from tiny_bundle import FIELDS

    return FIELDS


def ask(server, method, path, body=None, key="all", **headers) -> Answer:
    """An answer over a connection of its own; `key` is the name of one of the callers, or None."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    headers = {k.replace("_", "-"): v for k, v in headers.items()} | ({"x-api-key": server.keys[key]} if key else {})
    try:
        connection.request(method, path, body, headers)
        found = connection.getresponse()
        return Answer(found.status, {k.lower(): v for k, v in found.getheaders()}, found.read())
    finally:
        connection.close()


def post(server, content, path="/v1/score", **options) -> Answer:
    return ask(server, "POST", path, content if isinstance(content, bytes) else json.dumps(content).encode(), **JSON | options)


def wire(server, *pieces: bytes, pause: float = 0, half: bool = False, patience: float = 15) -> bytes:
    """Whatever comes back on pieces of bytes: all of it, or what came before the connection was cut."""
    found = b""
    with socket.create_connection(("127.0.0.1", server.port), timeout=patience) as s, suppress(ConnectionError, BrokenPipeError):
        for i, piece in enumerate(pieces):
            time.sleep(pause if i else 0)
            s.sendall(piece)
        if half:
            s.shutdown(socket.SHUT_WR)
        while more := s.recv(1 << 16):
            found += more
    return found


def head(server, *lines: str, path="/v1/score", method="POST", key="all") -> bytes:
    """A request's head, after which its connection is closed."""
    first = [f"{method} {path} HTTP/1.1", "Host: localhost", "Connection: close", f"X-API-Key: {server.keys[key]}", *lines]
    return "\r\n".join([*first, "", ""]).encode("latin1")


def payment(name: str = "", **changes) -> dict:
    good = {"payment_id": name or secrets.token_hex(8), "event_time": "2024-03-01T10:00:00Z", "payer_id": "a payer", "payee_id": "a payee"}
    good |= {"amount": 57.16, "currency": "EUR", "channel": "web", "distance": 3.5, "note": "a note", "opened": None, "abroad": False}
    return good | changes


def stream(rows: list[dict], level: pl.CompatLevel | None = None, **options) -> bytes:
    times = {name: datetime(2024, 3, 1, 10, tzinfo=UTC) for name in ("event_time", "opened")}
    to = io.BytesIO()
    pl.DataFrame([row | times for row in rows]).write_ipc_stream(to, compat_level=level, **options)
    return to.getvalue()


# ---------------------------------------------------------------- what its own document allows, and what it does not

CONFIGURATION = """
[generation]
allow-extra-parameters = false
database = "none"
max-examples = 15
[phases.stateful]
generation.max-examples = 4
"""


def test_whatever_the_document_describes_is_answered_as_it_says(server, tmp_path):
    """Schemathesis, all checks but one: that all a schema allows is accepted. The document says in words which rules a schema cannot."""
    (tmp_path / "st.toml").write_text(CONFIGURATION)
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(tmp_path / "st.toml"), "run"]
    checks = ["--checks", "all", "--exclude-checks", "positive_data_acceptance", "--continue-on-failure", "--seed", "1", "--no-color"]
    caller = ["-H", f"X-API-Key: {server.keys['all']}"]
    said = subprocess.run(
        [*command, f"http://127.0.0.1:{server.port}/docs.json", *caller, *checks], capture_output=True, text=True, cwd=tmp_path
    )
    assert said.returncode == 0, said.stdout[-6000:] + said.stderr[-2000:]
    assert "Operations:       11 selected / 11 total" in said.stdout
    assert "✅  Stateful" in said.stdout
    assert post(server, {"champion": str(server.lab / "bundles" / "tiny"), "cold": True}, path="/v1/rollout").status == 200


# ---------------------------------------------------------------- bodies

WHOLE = json.dumps(payment("whole")).encode()
BODIES = {
    "nothing in a hundred thousand lists": b"[" * 100_000 + b"]" * 100_000,
    "ninety thousand objects": b'{"amount":' * 90_000 + b"1" + b"}" * 90_000,
    "lists in a text": WHOLE.replace(b'"a note"', b"[" * 100_000 + b"]" * 100_000),
    "NaN": WHOLE.replace(b"57.16", b"NaN"),
    "Infinity": WHOLE.replace(b"57.16", b"-Infinity"),
    "a NaN in quotes": WHOLE.replace(b"57.16", b'"NaN"'),
    "an amount of a hundred thousand digits": WHOLE.replace(b"57.16", b"1" * 100_000),
    "a distance of a hundred thousand digits": WHOLE.replace(b"3.5", b"1" * 100_000),
    "a very small number, in a hundred thousand digits": WHOLE.replace(b"57.16", b"0." + b"0" * 100_000 + b"x"),
    "an exponent": WHOLE.replace(b"3.5", b"1e99999999999"),
    "minus zero": WHOLE.replace(b"57.16", b"-0.00001"),
    "hexadecimal": WHOLE.replace(b"57.16", b"0x10"),
    "a zero before": WHOLE.replace(b"57.16", b"057.16"),
    "a name twice": WHOLE[:-1] + b',"amount":1}',
    "a name twice, once in escapes": WHOLE[:-1] + b',"\\u0061mount":1}',
    "an unknown name twice": WHOLE[:-1] + b',"x":1,"x":1}',
    "half a character": WHOLE.replace(b"a note", b"\\ud800"),
    "halves in the wrong order": WHOLE.replace(b"a note", b"\\udc00\\ud800"),
    "half a character, in UTF-8": WHOLE.replace(b"a note", b"\xed\xa0\x80"),
    "invalid UTF-8": WHOLE.replace(b"a note", b"\xff\xfe"),
    "overlong UTF-8": WHOLE.replace(b"a note", b"\xc0\xaf"),
    "beyond Unicode": WHOLE.replace(b"a note", b"\xf4\x90\x80\x80"),
    "a byte order mark": b"\xef\xbb\xbf" + WHOLE,
    "UTF-16": WHOLE.decode().encode("utf-16"),
    "a raw line end in a text": WHOLE.replace(b"a note", b"a\nnote"),
    "a comment": WHOLE + b"//",
    "nothing but spaces": b" " * 100_000,
    "zeros": b"\0" * 100_000,
    "pickle": b"\x80\x04cos\nsystem\n(S'true'\ntR.",
}


@pytest.mark.parametrize("path", ["/v1/score", "/v1/labels", "/v1/rollout"])
def test_no_body_is_anything_but_refused(server, path):
    for name, body in BODIES.items():
        answer = post(server, body, path=path)
        assert answer.status in (400, 422), (name, answer)
        assert set(answer.json) == {"error"}
    assert post(server, WHOLE).status == 200


def test_bodies_without_end_are_cut_off_and_cost_no_memory(server):
    before = server.memory
    big = wire(server, head(server, "Content-Type: application/json", "Content-Length: 200000000"), b" " * 200_000_000)
    bytewise = wire(server, head(server, "Content-Type: application/json", "Transfer-Encoding: chunked"), b"1\r\n \r\n" * 3_000_000)
    for answer in (big, bytewise):  # who goes on sending may be cut off before reading the answer
        assert answer == b"" or re.match(rb"HTTP/1.1 4(13|08) ", answer)
    assert b"413" in wire(server, head(server, "Content-Type: application/json", "Content-Length: 1048577"), b" " * 1_048_577)
    assert server.memory - before < 50


def test_slow_half_and_broken_requests_end(server):
    body, worker = json.dumps(payment()).encode(), server.worker.pid
    sized = head(server, "Content-Type: application/json", f"Content-Length: {len(body)}")
    assert b" 408 " in wire(server, sized, *(body[i : i + 1] for i in range(24)), pause=0.05)
    assert b" 408 " in wire(server, head(server, "Content-Type: application/json", "Transfer-Encoding: chunked") + b"1" * 15)
    assert wire(server, sized + body[:-1], half=True) == b""
    assert b" 200 " in wire(server, sized[:-3], sized[-3:] + body[:20], body[20:], pause=0.05)
    for broken in (
        b"\x16\x03\x01\x02\x00" + b"\0" * 512,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
        sized.replace(b"Content-Length", b"Transfer-Encoding: chunked\r\nContent-Length") + b"0\r\n\r\n",
        head(server, "Content-Type: application/json", "Transfer-Encoding: chunked") + b"-1\r\n",
        head(server, "X: \0"),
        head(server, path="/v1/\xff"),
        head(server, path="/" + "a" * HEAD),
    ):
        assert re.match(rb"HTTP/1.1 4\d\d ", wire(server, broken)), broken[:60]
    assert server.worker.pid == worker


def test_heads_without_end_are_cut_off_and_cost_no_memory(server):
    before = server.memory
    for flood in (
        [head(server, f"X: {'a' * HEAD}")],
        [head(server, *(f"X-{i}: {'a' * 40}" for i in range(1000)))],
        [b"GET / HTTP/1.1\r\nX: ", b"a" * 50_000_000],
        [b"GET / HTTP/1.1\r\n", b"X: a\r\n" * 5_000_000],
        [b"GET /", b"a" * 50_000_000],
    ):
        answer = wire(server, *flood)
        assert answer == b"" or re.match(rb"HTTP/1.1 4(31|00) ", answer), answer[:200]
    assert server.memory - before < 50


def test_nobody_keeps_a_connection_without_asking(server):
    silent, slow = (socket.create_connection(("127.0.0.1", server.port), timeout=20) for _ in range(2))
    slow.sendall(b"GET /livez HTTP/1.1\r\nX:")
    with silent, slow, suppress(ConnectionError):
        for _ in range(8):
            time.sleep(0.5)
            slow.sendall(b"a")
        assert slow.recv(1) == silent.recv(1) == b""


# ---------------------------------------------------------------- Arrow


def bombs() -> dict[str, bytes]:
    pa = pytest.importorskip("pyarrow")

    def written(column, name: str = "payer_id") -> bytes:
        table, to = column if isinstance(column, pa.Table) else pa.table({name: column}), io.BytesIO()
        with pa.ipc.new_stream(to, table.schema) as writer:
            writer.write_table(table)
        return to.getvalue()

    long, most, deep = "x" * 900_000, 2**31 - 1, pa.list_(pa.null())
    for _ in range(2000):
        deep = pa.list_(deep)
    views = np.zeros((8192, 4), np.int32)
    views[:, 0], views[:, 1] = 900_000, int.from_bytes(b"xxxx", "little")
    parts = [None, pa.py_buffer(views.tobytes()), pa.py_buffer(long.encode())]
    to = io.BytesIO()
    pl.select(payer_id=pl.repeat("\0" * 1_000_000, 3000)).write_ipc_stream(to, compression="zstd")
    return {
        "3 GB of zeros": to.getvalue(),
        "a dictionary": written(pa.DictionaryArray.from_arrays(pa.array([0] * 8192, pa.int32()), pa.array([long]))),
        "shared": written(pa.Array.from_buffers(pa.string_view(), 8192, parts)),
        "two billion nulls": written(pa.nulls(most)),
        "lists of nulls": written(pa.ListArray.from_arrays(pa.array([0, most], pa.int32()), pa.nulls(most))),
        "runs": written(pa.RunEndEncodedArray.from_arrays(pa.array([most], pa.int32()), pa.array(["x"]))),
        "lists in lists": written(pa.schema([("payer_id", deep)]).empty_table()),
        "a name twice": written(pa.table([pa.array(["a"]), pa.array(["b"])], names=["payer_id", "payer_id"])),
        "many columns": written(pa.table({f"c{i}": pa.nulls(8192) for i in range(4000)})),
        "wrong types": written(pa.table({"amount": pa.array([b"1"]), "payer_id": pa.array([1.5])})),
        "far times": written(pa.array([2**63 - 1], pa.timestamp("s", "UTC")), "event_time"),
        "no such zone": written(pa.array([0], pa.timestamp("s", "No/Where")), "event_time"),
    }


def test_no_arrow_body_costs_more_than_it_brings(server):
    worker, before = server.worker.pid, server.memory
    for name, body in bombs().items():
        assert len(body) < 1 << 20, name
        answer = ask(server, "POST", "/v1/score", body, **ARROW)
        assert answer.status in (400, 422), (name, answer)
    assert (server.worker.pid, server.memory - before < 50) == (worker, True)


def test_arrow_bodies_with_bytes_turned_over_are_refused_or_read(server):
    worker, rng, statuses = server.worker.pid, np.random.default_rng(0), set()
    for level in (pl.CompatLevel.newest(), pl.CompatLevel.oldest()):
        for _ in range(300):
            body = bytearray(stream([payment(), payment()], level))
            for at in rng.integers(len(body) if rng.random() < 0.5 else 1500, size=rng.integers(1, 4)):
                body[at] = rng.integers(256)
            statuses.add(ask(server, "POST", "/v1/score", bytes(body), **ARROW).status)
    assert {200, 400, 422} <= statuses <= {200, 400, 409, 422}
    assert server.worker.pid == worker


def test_arrow_streams_say_what_polars_wrote():
    """The same rows from our reader as from polars, of tables of every type that is read."""
    rng, words = np.random.default_rng(1), ["", "short", "a text of more than twelve bytes", "ünï", None]
    for n in (1, 7, 100):
        frame = pl.DataFrame(
            {
                "text": [words[i] for i in rng.integers(len(words), size=n)],
                "number": [None if i == 3 else float(x) for i, x in enumerate(rng.normal(size=n))],
                "truth": [[True, False, None][i] for i in rng.integers(3, size=n)],
                "time": [datetime(2024, 1, 1, tzinfo=UTC) + timedelta(microseconds=int(i)) for i in rng.integers(10**15, size=n)],
                "nothing": [None] * n,
            },
            schema_overrides={"text": pl.String, "truth": pl.Boolean, "number": pl.Float64},
        )
        small = [pl.Int8, pl.UInt16, pl.Int32, pl.UInt64, pl.Float32]
        frame = frame.with_columns(pl.int_range(n).cast(kind).alias(str(kind)) for kind in small)
        for unit in ("ms", "us", "ns"):
            frame = frame.with_columns(pl.col("time").dt.cast_time_unit(unit).alias(unit))
        for level in (pl.CompatLevel.newest(), pl.CompatLevel.oldest()):
            to = io.BytesIO()
            frame.write_ipc_stream(to, compat_level=level)
            assert Stream(to.getvalue()).rows() == frame.to_dicts()
    with pytest.raises(NotArrow, match="shorter than it says"):
        Stream(to.getvalue()[:-300])


# ---------------------------------------------------------------- who asks


def token(kid: str = "ours", head: dict | None = None, signer=None, **changes) -> str:
    now = int(time.time())
    claims = {"iss": "https://login.example", "aud": "fraudlab", "sub": "checkout", "scope": "score", "exp": now + 300} | changes
    part = lambda content: base64.urlsafe_b64encode(json.dumps(content).encode()).rstrip(b"=")  # noqa: E731
    head = {"alg": "RS256" if kid == "rsa" else "Ed25519", "kid": kid} | (head or {})
    signed = part(head) + b"." + part(claims)
    signature = signer(signed) if signer else JWSRegistry.algorithms[head["alg"]].sign(signed, SIGNERS[kid])
    return (signed + b"." + base64.urlsafe_b64encode(signature).rstrip(b"=")).decode()


def test_tokens_that_are_old_early_foreign_or_forged_are_refused(server):
    now, public = int(time.time()), {kid: SIGNERS[kid].as_pem(private=False) for kid in ("ours", "rsa")}
    with_secret = lambda secret: lambda signed: hmac.digest(secret, signed, "sha256")  # noqa: E731
    tokens = {
        "good": token(),
        "good RSA": token("rsa"),
        "expired": token(exp=now - 120),
        "not yet valid": token(nbf=now + 120),
        "for others": token(aud="others"),
        "of others": token(iss="https://elsewhere.example"),
        "without end": token(exp=None),
        "none": token(head={"alg": "none"}, signer=lambda _: b""),
        "None": token(head={"alg": "None"}, signer=lambda _: b"x"),
        "HS256 with our public key": token(head={"alg": "HS256"}, signer=with_secret(public["ours"])),
        "HS256 with our public RSA key": token("rsa", head={"alg": "HS256"}, signer=with_secret(public["rsa"])),
        "signed by another": token(signer=lambda signed: JWSRegistry.algorithms["Ed25519"].sign(signed, SIGNERS["theirs"])),
        "with a key that it brings": token("theirs", head={"jwk": SIGNERS["theirs"].as_dict(private=False)}),
        "with a key from elsewhere": token("theirs", head={"jku": "http://127.0.0.1/keys", "x5u": "file:///etc/passwd"}),
        "of another kind": token(head={"typ": "logout+jwt"}),
        "cut": token()[:-4],
        "a list": token(head={"kid": ["ours"]}),
        "long": token(note="x" * 20_000),
    }
    for name, secret in tokens.items():
        answer = post(server, payment(), key=None, authorization=f"Bearer {secret}")
        assert answer.status == (200 if name in ("good", "good RSA", "long") else 401), name
        assert secret[-20:] not in server.log
        if answer.status == 401:
            assert answer.headers["www-authenticate"].startswith("Bearer")


def test_each_caller_may_do_what_its_scopes_say(server):
    routes = {"score": ("POST", "/v1/score"), "read": ("GET", "/v1/model"), "admin": ("POST", "/v1/rollout")}
    for who, may in {"till": "score", "reader": "read", "chief": "admin", "expired": "", "early": ""}.items():
        for scope, (method, path) in routes.items():
            answer = ask(server, method, path, b"{" if method == "POST" else None, key=who, **JSON)
            if not may:
                assert answer.code == (401, "expired"), (who, path)
            else:
                assert (answer.status == 403) == (scope != may), (who, path)
    assert post(server, payment(), x_api_key=server.keys["till"], authorization=f"Bearer {token()}", key=None).status == 401, "two secrets"


# ---------------------------------------------------------------- deadlines, the queue, idempotency, parameters


def test_a_deadline_that_passes_leaves_nothing(server):
    late = payment(payer_id="a payer who was late")
    body = json.dumps(late).encode()
    first = head(server, "Content-Type: application/json", f"Content-Length: {len(body)}", "X-Deadline-Ms: 20", "X-Request-ID: too-late")
    answer = wire(server, first, body, pause=0.1)
    assert b"HTTP/1.1 504 " in answer
    assert b'"code":"deadline"' in answer
    assert b"x-request-id: too-late" in answer
    assert post(server, late | {"payer_id": "another"}).status == 200, "its id was never used"
    assert [r["payment"]["payer_id"][:2] for r in audit_log.read(server.lab / "data" / "audit", late["payment_id"])] == ["k1"]
    assert not list(audit_log.read(server.lab / "data" / "audit", "too-late"))
    for wrong in ("0", "-1", "1.5", "1e3", "", " ", "x", "9" * 50, "²"):
        assert post(server, payment(), x_deadline_ms=wrong).code == (400, "invalid_header"), wrong
    assert post(server, payment(), x_deadline_ms="900000").status == 200


def test_too_many_at_once_are_told_to_wait(server):
    first = head(server, "Content-Type: application/json", "Content-Length: 10")
    crowd = [socket.create_connection(("127.0.0.1", server.port), timeout=10) for _ in range(300)]
    try:
        for s in crowd:
            s.sendall(first + b"{")
        answers = list(ThreadPoolExecutor(32).map(lambda s: s.recv(1 << 16), crowd))
    finally:
        for s in crowd:
            s.close()
    statuses = [a.split(b" ", 2)[1] for a in answers]
    assert set(statuses) == {b"408", b"429"}
    assert statuses.count(b"408") <= 256
    busy = next(a for a in answers if b" 429 " in a[:20])
    assert b"retry-after: 1" in busy
    assert b'"code":"busy"' in busy
    assert post(server, payment()).status == 200


def test_one_idempotency_key_is_for_one_body(server):
    one, other = payment("once"), payment("once more")
    key = {"idempotency_key": "0f8fad5b-d9cb-469f-a165-70867728950e"}
    first = post(server, one, **key)
    again = post(server, one, **key)
    assert {**first.json, "request_id": ""} == {**again.json, "request_id": ""}
    assert post(server, other, **key).code == (409, "idempotency_key")
    assert post(server, [one], **key).code == (409, "idempotency_key")
    assert post(server, other, key="till", **key).status == 200, "another caller's keys are its own"
    for wrong in ("", " ", "x" * 129, "a key", "4111-1111-1111-1111"):
        assert post(server, payment(), idempotency_key=wrong).code == (400, "invalid_header"), wrong


def test_explain_is_true_or_false(server):
    assert "reasons" in post(server, payment(amount=900.0), path="/v1/score?explain=true").json
    assert post(server, payment(), path="/v1/score?explain=false").json["reasons"] == []
    for query in (
        "explain",
        "explain=",
        "explain=1",
        "explain=TRUE",
        "explain=true&explain=false",
        "x=1",
        "explain=true#x",
        "%00",
        "explain[]=true",
    ):
        assert post(server, payment(), path=f"/v1/score?{query}").status in (400, 422) or "#" in query, query


# ---------------------------------------------------------------- card numbers

FORMS = (
    "{}",
    "{:.4} {:.4} {:.4} {:.4}",
    "{:.4}-{:.4}-{:.4}-{:.4}",
    "{:.4}.{:.4}.{:.4}.{:.4}",
    "{:.4}\u00a0{:.4}\u2011{:.4}\u2009{:.4}",
    "card={}; until 12/29",
)


class Cards:
    """Numbers that no two places share, so that one that is found says by which way it came."""

    def __init__(self):
        self.of = {}

    def __call__(self, place: str, form: str = "{}") -> str:
        digits = f"4{7_100_000 + len(self.of):014d}"
        number = next(digits + check for check in "0123456789" if luhn(digits + check))
        self.of[number] = place
        return form.format(number) if form.count("{") == 1 else form.format(*(number[i : i + 4] for i in range(0, 16, 4)))

    def leaked(self, content: bytes) -> list[str]:
        """Places whose numbers are in `content`, with whatever between their digits."""
        text = "".join(re.findall(r"\d", re.sub(r"[^\d\n]+", "", content.decode("utf-8", "ignore")) + "\n"))
        plain = re.sub(rb"[ ._-]|\xc2\xa0|\xe2\x80[\x80-\x95\xaf]", b"", content)
        return [place for number, place in self.of.items() if number.encode() in plain or (len(content) < 1000 and number in text)]


def test_cards_are_found_in_what_is_searched():
    cards = Cards()
    for form in FORMS:
        number = cards("here", form)
        assert looks_like_card(number)
        assert cards.leaked(b"x\0" + number.encode() + b"\0x") == ["here"], form
    assert not cards.leaked(b"4111111111111111")


def json_places(cards: Cards, form: str) -> dict[str, tuple[str, dict | list]]:
    """By its name: a path, and a body with a card number in it."""
    places = {}
    for name in payment():
        places[name] = "/v1/score", payment(**{name: cards(name, form)})
        places[f"{name} in a list"] = "/v1/score", [payment(), payment(**{name: cards(f"{name} in a list", form)})]
    places["a field's name"] = "/v1/score", payment(**{cards("a field's name", form): 1})
    places["an object"] = "/v1/score", payment(note={"card": cards("an object", form)})
    places["a number"] = "/v1/score", payment(distance=int(cards("a number")))
    places["an amount"] = "/v1/score", payment(amount=int(cards("an amount")))
    places["the body"] = "/v1/score", cards("the body", form)
    label = {"payment_id": "whole", "is_fraud": True, "known_at": "2024-03-02T10:00:00Z"}
    for name in (*label, "source", "note"):
        places[f"label's {name}"] = "/v1/labels", label | {name: cards(f"label's {name}", form)}
    for name in ("champion", "challenger", "why", "canary", "unknown"):
        places[f"plan's {name}"] = "/v1/rollout", {"champion": "tiny"} | {name: cards(f"plan's {name}", form)}
    places["a conflict"] = "/v1/score", payment("whole", payer_id=cards("a conflict", form))
    return places


def header_places(server, cards: Cards, form: str) -> list[bytes]:
    """Requests with a card number in their target or headers."""
    body = json.dumps(payment()).encode()
    names = "X-Request-ID Idempotency-Key Authorization Cookie Referer User-Agent X-Deadline-Ms Content-Type Content-Encoding traceparent"
    names = [*names.split(), "tracestate", "baggage", "X-Forwarded-For", "Forwarded", "Origin", "Expect", "Upgrade", "Accept"]
    lines = {name: f"{name}: {cards(name, form)}".encode().decode("latin1") for name in names}
    lines["basic"] = f"Authorization: Basic {cards('basic')}"
    lines["bearer"] = f"Authorization: Bearer {cards('bearer')}"
    lines["header's name"] = f"X-{cards('header name')}: 1"
    sized = ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    requests = [head(server, *sized, line) + body for line in lines.values()]
    requests += [head(server, *sized, line).replace(b"X-API-Key", b"X-Other") + body for line in lines.values()]
    target = cards("target", form).replace(" ", "%20").encode("utf-8").decode("latin1")
    for path in (
        f"/{target}",
        f"/v1/score/{target}",
        f"/v1/score?explain={target}",
        f"http://{cards('absolute')}/v1/model",
        f"/static_content/{target}",
    ):
        requests += [head(server, *sized, path=path) + body, head(server, path=path, method="GET")]
    chunked = head(server, "Content-Type: application/json", "Transfer-Encoding: chunked")
    requests += [
        chunked + b"2;x=" + cards("chunk").encode() + b"\r\n{}\r\n0\r\nX: " + cards("trailer").encode() + b"\r\n\r\n",
        chunked + cards("chunk's size").encode() + b"\r\n",
        f"{cards('method')} / HTTP/1.1\r\n\r\n".encode(),
        f"GET / HTTP/{cards('version')}\r\n\r\n".encode(),
        f"CONNECT {cards('connect')}:443 HTTP/1.1\r\nHost: x\r\n\r\n".encode(),
        b"\x16\x03\x01" + cards("no HTTP", form).encode() * 20,
        head(server, f"Host: {cards('host')}", "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13",
             "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==", method="GET", path=f"/{cards('socket')}"),
    ]  # fmt: skip
    return requests


def byte_places(cards: Cards, form: str) -> list[tuple[dict, bytes]]:
    """Headers, and a body that is broken where a card number is, or Arrow."""
    card, whole = (lambda place: cards(place, form).encode()), json.dumps(payment()).encode()
    broken = [
        b'{"' + card("a name cut"),
        b'{"amount": ' + card("a number cut") + b"x}",
        whole[:-1] + b', "amount": "' + card("twice") + b'"}',
        whole + card("after"),
        b"[" + whole + b", " + card("second"),
        whole.replace(b"a note", b"\xff" + card("not UTF-8")),
    ]
    changes = {"payer_id": cards("Arrow payer", form), "note": cards("Arrow note", form), "payment_id": cards("Arrow id", form)}
    changes |= {cards("Arrow name", form): 1, "distance": float(cards("Arrow number"))}
    arrows = [stream([payment(**{name: value})]) for name, value in changes.items()]
    arrows += [arrows[0][:-200], stream([payment()]) + card("Arrow end"), card("Arrow")]
    return [(JSON, body) for body in broken] + [(ARROW, body) for body in arrows]


def test_no_card_number_is_kept_or_comes_back(server):
    cards, answers, accepted = Cards(), [], set()
    plan = {"champion": "tiny", "cold": True}
    ways = {"alone": plan, "with a challenger": plan | {"challenger": "other"}, "without a model": plan | {"killed": True}}
    assert post(server, payment("whole")).status == 200
    for i, (way, serving) in enumerate(ways.items()):
        assert post(server, serving, path="/v1/rollout").status == 200, way
        for form in FORMS[2 * i : 2 * i + 2]:
            for place, (path, body) in json_places(cards, form).items():
                answer = post(server, body, path=path)
                answers.append((place, answer.body + str(answer.headers).encode()))
                accepted |= {place} if answer.status == 200 else set()
            answers += [("wire", wire(server, request)) for request in header_places(server, cards, form)[:: i + 1]]
            for kind, body in byte_places(cards, form):
                answer = ask(server, "POST", "/v1/score", body, **kind)
                answers.append(("bytes", answer.body + str(answer.headers).encode()))
    assert accepted - {"a conflict"} == {"payer_id", "payee_id", "payer_id in a list", "payee_id in a list"}
    answers += [(path, ask(server, "GET", path).body) for path in ("/metrics", "/docs.json", "/v1/model", "/v1/rollout", "/readyz")]
    server.worker.kill()
    assert ask(server, "GET", "/readyz").status == 200, "another worker is there"
    assert len(cards.of) > 300
    assert not [(place, cards.leaked(answer)) for place, answer in answers if cards.leaked(answer)]
    files = [p for p in server.lab.rglob("*") if p.is_file()]
    assert {"log", "state.lmdb"} < {p.name for p in files}
    assert not {str(p.relative_to(server.lab)): found for p in files if (found := cards.leaked(p.read_bytes()))}
    assert sum(r["kind"] == "answer" for r in audit_log.read(server.lab / "data" / "audit")) > 20


def test_nothing_failed_on_the_way(server):
    assert "Traceback" not in server.log
    assert not re.findall(r"Request \S+ failed: .*", server.log)
    assert len(server.log) < 1 << 20
