"""The service as its callers meet it: a real server process on loopback, with an API key."""

import asyncio
import http.client
import json
import os
import secrets
import shutil
import socket
import time
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import NamedTuple

import jsonschema
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.testclient import TestClient
from tiny_bundle import FIELDS, tiny_bundle

from fraudlab.governance.audit_log import AuditLog
from fraudlab.governance.signing import create_key, find_keys
from fraudlab.serving.access import ROUTES, Access
from fraudlab.serving.bento import free_port, running, serve_command, started
from fraudlab.serving.bundle import example, load
from fraudlab.serving.http import Limits, Problem, payment_reader
from fraudlab.serving.openapi import OPEN, document
from fraudlab.serving.rollout import Plan, Rollout
from fraudlab.serving.scorer import Scorer
from fraudlab.serving.service import Door, Service

ROOT = Path(__file__).parents[1]
KEY = "a key for the tests, long enough"
METHODS = [(method, path) for path, methods in ROUTES.items() for method in methods]
CANARY = "4111111111111111"
JSON = {"content-type": "application/json"}


class Server(NamedTuple):
    port: int
    log: Path
    bundle: object
    folder: Path
    key: Path


class Answer(NamedTuple):
    status: int
    body: bytes
    headers: dict

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def fault(self) -> tuple[int, str, str]:
        return self.status, self.json["error"]["code"], self.json["error"]["field"]


def in_folder(lab: Path) -> dict[str, str]:
    """Settings of a lab whose service is the repository's and whose data are in a folder of their own."""
    return {"FRAUDLAB_ROOT": str(ROOT), "FRAUDLAB_DATA": f"{lab}/data", "FRAUDLAB_KEYS": f"{lab}/keys", "FRAUDLAB_BUNDLES": f"{lab}"}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    lab = tmp_path_factory.mktemp("lab")
    folder, keys = tiny_bundle(lab)
    with ExitStack() as running:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in in_folder(lab).items():
                patch.setenv(name, value)
            patch.setenv("FRAUDLAB_API_KEY", KEY)
            address = running.enter_context(started(folder, public_key=keys.public, state=f"lmdb:{lab}/state.lmdb", log=lab / "log"))
        yield Server(int(address.rpartition(":")[2]), lab / "log", load(folder, keys.public), folder, keys.public)


def ask(server, method, path, body=None, headers=JSON, key=KEY) -> Answer:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    try:
        connection.request(method, path, body, {**headers, **({"x-api-key": key} if key else {})})
        answer = connection.getresponse()
        return Answer(answer.status, answer.read(), {k.lower(): v for k, v in answer.getheaders()})
    finally:
        connection.close()


def post(server, content, path="/v1/score", **options) -> Answer:
    return ask(server, "POST", path, content if isinstance(content, bytes) else json.dumps(content).encode(), **options)


def payment(server, name: str, **changes) -> dict:
    return (
        example(server.bundle)
        | {"payment_id": name, "event_time": "2024-03-01T10:00:00Z", "opened": "2020-01-01T00:00:00Z", "abroad": False}
        | changes
    )


# ---------------------------------------------------------------- scores


def test_one_payment_and_lists_get_the_scores_of_a_scorer_of_their_own(server, tmp_path):
    payments = [
        payment(
            server,
            f"good-{i}",
            payer_id=f"payer-{i % 3}",
            amount=10 + i,
            distance=None if i % 4 == 0 else i / 2,
            event_time=f"2024-03-01T10:{i:02}:00+01:00",
        )
        for i in range(20)
    ]
    one = post(server, payments[0])
    assert one.status == 200
    named = ["payment_id", "score", "probability", "decision", "model", "bundle", "policy", "fallback", "reasons", "request_id"]
    assert list(one.json) == named
    assert one.json["payment_id"] == "good-0"
    assert (one.json["model"], one.json["bundle"]) == ("linear", server.bundle.version)
    many = post(server, payments[1:])
    assert [a["payment_id"] for a in many.json] == [p["payment_id"] for p in payments[1:]]
    read, _ = payment_reader(server.bundle)(json.dumps(payments).encode())
    expected = Scorer(server.bundle, f"lmdb:{tmp_path}/state.lmdb").score(read)
    expected = [s.answer.score for s in expected]
    np.testing.assert_allclose([one.json["score"], *(a["score"] for a in many.json)], expected, atol=1e-6)
    assert len(set(np.round(expected, 6))) > 15, "the scores must differ, or this shows nothing"


def test_a_reported_fraud_is_noted_and_a_label_that_cannot_be_is_refused(server):
    paid = payment(server, "reported")
    assert post(server, paid).status == 200
    label = {"payment_id": "reported", "is_fraud": True, "known_at": "2024-03-09T00:00:00Z"}
    assert post(server, [label, label | {"payment_id": "never seen"}], path="/v1/labels").json == {"noted": 1, "unknown": 1}
    assert post(server, label | {"known_at": "2024-02-01T00:00:00Z"}, path="/v1/labels").fault == (409, "conflict", "known_at")
    assert post(server, label | {"known_at": "2024-03-09"}, path="/v1/labels").fault == (422, "invalid_value", "known_at")
    assert post(server, label | {"score": 1}, path="/v1/labels").fault == (422, "unknown_field", "")


def test_a_list_of_one_is_answered_by_a_list(server):
    assert len(post(server, [payment(server, "list-of-one")]).json) == 1


def test_a_payment_sent_again_gets_its_score_again_and_another_with_its_id_is_a_conflict(server):
    first = post(server, payment(server, "twice"))
    again = post(server, payment(server, "twice"))
    assert again.json | {"request_id": ""} == first.json | {"request_id": ""}
    assert again.json["request_id"] == again.headers["x-request-id"] != first.json["request_id"]
    assert post(server, payment(server, "twice", payer_id="somebody else")).fault == (409, "conflict", "payment_id")


def test_an_amount_in_another_currency_than_its_payers_is_a_conflict(server):
    assert post(server, payment(server, "in euros", payer_id="traveller")).status == 200
    yen = payment(server, "in yen", payer_id="traveller", currency="JPY")
    assert post(server, yen).fault == (409, "conflict", "currency")
    assert post(server, [payment(server, "fine before yen"), yen]).fault == (409, "conflict", "currency")
    assert post(server, yen | {"payer_id": "somebody in Japan"}).status == 200


def test_the_largest_list_is_scored_and_one_more_is_refused(server):
    payments = [payment(server, f"large-{i}") for i in range(257)]
    assert len(post(server, payments[:256]).json) == 256
    assert post(server, payments).fault == (422, "list_length", "")


# ---------------------------------------------------------------- refusals

FAULTS = {
    "negative amount": ({"amount": -0.01}, "invalid_value", "amount"),
    "too many decimals": ({"amount": 1.00001}, "invalid_value", "amount"),
    "amount too large": ({"amount": 1e13}, "invalid_value", "amount"),
    "amount as text": ({"amount": "57.16"}, "wrong_type", "amount"),
    "amount as truth": ({"amount": True}, "wrong_type", "amount"),
    "amount missing in value": ({"amount": None}, "wrong_type", "amount"),
    "time without a zone": ({"event_time": "2024-03-01T10:00:00"}, "invalid_value", "event_time"),
    "time of day only": ({"event_time": "10:00"}, "invalid_value", "event_time"),
    "time as a number": ({"event_time": 1709287200}, "wrong_type", "event_time"),
    "time before 1970": ({"event_time": "1969-12-31T23:59:59Z"}, "invalid_value", "event_time"),
    "time at the edge of the calendar": ({"event_time": "0001-01-01T00:00:00+14:00"}, "invalid_value", "event_time"),
    "declared time without a zone": ({"opened": "2020-01-01T00:00:00"}, "invalid_value", "opened"),
    "currency in small letters": ({"currency": "eur"}, "invalid_value", "currency"),
    "currency and a line end": ({"currency": "EUR\n"}, "invalid_value", "currency"),
    "empty name": ({"payer_id": ""}, "invalid_value", "payer_id"),
    "name too long": ({"payee_id": "x" * 257}, "invalid_value", "payee_id"),
    "category as a number": ({"channel": 3}, "wrong_type", "channel"),
    "number as text": ({"distance": "12"}, "wrong_type", "distance"),
    "truth as text": ({"abroad": "yes"}, "wrong_type", "abroad"),
    "object as value": ({"note": {"a": 1}}, "wrong_type", "note"),
    "unknown field": ({"surprise": 1}, "unknown_field", ""),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_field_that_breaks_its_rule_is_named(server, name):
    changes, code, field = FAULTS[name]
    bad = payment(server, "bad", **changes)
    assert post(server, bad).fault == (422, code, field)
    at = f"[1].{field}" if field else "[1]"
    assert post(server, [payment(server, "fine"), bad]).fault == (422, code, at)


@pytest.mark.parametrize("name", ["payment_id", "event_time", "payer_id", "payee_id", "amount", "currency", *(f.name for f in FIELDS)])
def test_a_missing_field_is_named(server, name):
    bad = {k: v for k, v in payment(server, "bad").items() if k != name}
    assert post(server, bad).fault == (422, "missing_field", name)
    assert name in post(server, bad).json["error"]["message"]


BODIES = {
    "nothing": (b"", 400, "malformed_json"),
    "NaN": (b'{"amount": NaN}', 400, "malformed_json"),
    "Infinity": (b'{"amount": -Infinity}', 400, "malformed_json"),
    "a number that is too large": (b'{"amount": 1e999}', 422, "invalid_value"),
    "half an object": (b'{"amount": 1', 400, "malformed_json"),
    "two objects": (b"{}{}", 422, "missing_field"),
    "not UTF-8": (b'{"payment_id": "\xff"}', 400, "malformed_json"),
    "UTF-16": ('{"amount": 1}'.encode("utf-16"), 400, "malformed_json"),
    "half a character": (b'{"payment_id": "\\ud800"}', 400, "malformed_json"),
    "lists in lists": (b"[" * 500_000, 422, "wrong_type"),
    "objects in objects": (b'{"amount":' * 100_000, 422, "wrong_type"),
    "deep unknown field": (b'{"x":' + b"[" * 500_000, 422, "unknown_field"),
    "null": (b"null", 422, "wrong_type"),
    "text": (b'"payment"', 422, "wrong_type"),
    "an empty list": (b"[]", 422, "list_length"),
    "a list of numbers": (b"[1]", 422, "wrong_type"),
}


@pytest.mark.parametrize("name", BODIES)
def test_a_body_that_is_no_payment_is_refused(server, name):
    body, status, code = BODIES[name]
    assert post(server, body).fault[:2] == (status, code)


def test_a_name_twice_is_refused(server):
    whole = json.dumps(payment(server, "doubled")).encode()
    assert post(server, whole[:-1] + b', "amount": 0.01}').fault == (422, "repeated_field", "")
    assert post(server, [payment(server, "same")] * 2).fault == (422, "repeated_payment", "payment_id")


def test_nothing_of_a_refused_list_is_remembered(server):
    good = payment(server, "half-a-list", payer_id="fresh payer")
    assert post(server, [good, payment(server, "bad", amount=-1)]).status == 422
    assert post(server, good | {"payer_id": "another payer"}).status == 200  # the id was never used


@pytest.mark.parametrize("declared", [True, False], ids=["with a length", "in chunks"])
@pytest.mark.parametrize("size", [(1 << 20) + 1, 20 << 20])
def test_a_body_that_is_too_large_is_refused(server, declared, size):
    def parts():
        for _ in range(size >> 16):
            yield b" " * (1 << 16)
        yield b" " * (size & 0xFFFF or 1)

    try:
        answer = ask(server, "POST", "/v1/score", b" " * size if declared else parts())
    except (BrokenPipeError, ConnectionResetError):  # who sends far too much may be cut off
        assert size > 8 << 20
    else:
        assert answer.fault == (413, "too_large", "")
    assert ask(server, "GET", "/livez").status == 200


def test_a_body_of_the_largest_size_is_read(server):
    assert post(server, json.dumps(payment(server, "padded")).encode().ljust(1 << 20)).status == 200


def test_a_body_that_comes_too_slowly_is_refused(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as slow:
        headers = (
            "POST /v1/score HTTP/1.1",
            "Host: localhost",
            f"X-API-Key: {KEY}",
            "Content-Type: application/json",
            "Content-Length: 100",
        )
        slow.sendall(("\r\n".join(headers) + "\r\n\r\n{").encode())
        answer = slow.makefile("rb").read().decode()
    assert answer.startswith("HTTP/1.1 408")
    assert '"code":"too_slow"' in answer


@pytest.mark.parametrize(
    "kind",
    [
        None,
        "text/plain",
        "application/x-www-form-urlencoded",
        "application/json; charset=utf-16",
        "application/vnd.bentoml+pickle",
        "application/jsonp",
    ],
)
def test_another_content_type_is_refused(server, kind):
    assert post(server, payment(server, "typed"), headers={"content-type": kind} if kind else {}).fault == (
        415,
        "unsupported_media_type",
        "",
    )


def test_a_compressed_body_is_refused(server):
    assert post(server, payment(server, "packed"), headers=JSON | {"content-encoding": "gzip"}).status == 415
    assert post(server, payment(server, "utf"), headers={"content-type": "Application/JSON; Charset=UTF-8"}).status == 200


# ---------------------------------------------------------------- routes, methods, keys


@pytest.mark.parametrize("path", ROUTES)
def test_each_route_has_its_methods(server, path):
    for other in {"GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "HEAD"} - set(ROUTES[path]):
        answer = ask(server, other, path)
        assert (answer.status, answer.headers["allow"]) == (405, ", ".join(ROUTES[path])), other


@pytest.mark.parametrize(
    "path",
    [
        "/v1/score/",
        "/v1",
        "/v1/scores",
        "/healthz",
        "/schema.json",
        "/openapi.json",
        "/static_content/marked.min.js",
        "/static_content/../docs.json",
        "//",
        "/%00",
    ],
)
def test_what_is_not_documented_does_not_exist(server, path):
    for method in ("GET", "POST"):
        assert ask(server, method, path).fault[:2] == (404, "not_found"), method


@pytest.mark.parametrize(("method", "path"), METHODS)
def test_a_key_is_needed_but_for_health(server, method, path):
    free = path in OPEN
    for key in (None, "wrong", KEY[:-1], KEY + "x", KEY.upper()):
        answer = ask(server, method, path, key=key)
        assert answer.status == (200 if free else 401), key
        if not free:
            assert answer.fault[1] == "unauthorized"
            assert 'Basic realm="fraudlab"' in answer.headers["www-authenticate"]


def test_a_key_may_come_as_a_token_or_a_password(server):
    for name, status in (
        (f"Bearer {KEY}", 200),
        (f"bearer {KEY}", 200),
        ("Bearer", 401),
        ("Basic ====", 401),
        ("Basic /w==", 401),
        (f"Digest {KEY}", 401),
    ):
        assert ask(server, "GET", "/v1/model", headers={"authorization": name}, key=None).status == status, name


def test_unknown_routes_say_nothing_without_a_key(server):
    assert ask(server, "GET", "/v1/nothing", key=None).status == 401


def test_the_card(server):
    card = ask(server, "GET", "/v1/model").json
    assert (card["name"], card["version"], card["evaluation"]) == ("tiny", server.bundle.version, {"linear.auc": 0.9})
    assert [f["name"] for f in card["fields"]] == [f.name for f in FIELDS]
    assert "vocabulary" not in json.dumps(card), "values seen in training are nobody's business"


# ---------------------------------------------------------------- documentation


def test_the_document_lists_exactly_what_answers(server):
    described = ask(server, "GET", "/docs.json").json
    operations = {(method.upper(), path) for path, methods in described["paths"].items() for method in methods}
    assert operations == set(METHODS)
    for method, path in operations - {("POST", "/v1/rollout")}:
        posted = described["paths"][path].get("post", {}).get("requestBody")
        answer = ask(server, method, path, json.dumps(posted["content"]["application/json"]["example"]) if posted else None)
        assert str(answer.status) == "200", path
        kinds = described["paths"][path][method.lower()]["responses"]["200"]["content"]
        assert answer.headers["content-type"].split(";")[0] in kinds, path


def test_the_document_is_valid(server):
    from fastapi.openapi.models import OpenAPI  # comes with mlflow

    described = ask(server, "GET", "/docs.json").json
    OpenAPI.model_validate(described)
    assert described["openapi"] == "3.1.0"
    for schema in described["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
    for reference in {x for x in json.dumps(described).split('"') if x.startswith("#/components/schemas/")}:
        assert reference.rpartition("/")[2] in described["components"]["schemas"]
    assert described["paths"]["/livez"]["get"]["security"] == []
    assert set(described["components"]["securitySchemes"]) == {"header", "bearer", "basic"}


def test_answers_are_as_documented(server):
    described = ask(server, "GET", "/docs.json").json
    good = example(server.bundle)
    for content in (good, [good], good | {"amount": -1}, [], b"{", b" " * (2 << 20)):
        answer = post(server, content)
        schema = described["paths"]["/v1/score"]["post"]["responses"][str(answer.status)]["content"]["application/json"]["schema"]
        jsonschema.validate(answer.json, schema | {"components": described["components"]})
    model = described["components"]["schemas"]["Model"]
    jsonschema.validate(ask(server, "GET", "/v1/model").json, model)


def test_the_page_loads_nothing_from_elsewhere(server):
    page = ask(server, "GET", "/")
    assert b"swagger-ui-bundle.js" in page.body
    assert b"://" not in page.body
    assert "default-src 'none'" in page.headers["content-security-policy"]


# ---------------------------------------------------------------- silence


def test_what_is_sent_never_comes_back(server):
    good = payment(server, "quiet")
    bodies = [good | {name: CANARY} for name in ("amount", "event_time", "currency", "distance", "opened", "abroad")]
    bodies += [
        good | {"note": int(CANARY)},
        good | {CANARY: 1},
        [good, good | {CANARY: CANARY}],
        {CANARY: good},
        [CANARY],
        CANARY,
        int(CANARY),
        good | {"payer_id": CANARY * 20},
    ]
    bodies += [
        f'{{"{CANARY}'.encode(),
        f'{{"amount": {CANARY}x}}'.encode(),
        f"{CANARY}".encode(),
        json.dumps(good).encode()[:-1] + f', "amount": {CANARY}}}'.encode(),
    ]
    bodies += [[good | {"payer_id": CANARY}] * 2, good | {"amount": int(CANARY)}, good | {"amount": 0.4111111111111111}]
    answers = [post(server, body) for body in bodies]
    assert all(400 <= a.status < 500 for a in answers), [a.status for a in answers]
    answers += [
        ask(server, method, path)
        for method in ("GET", "POST")
        for path in (f"/{CANARY}", f"/v1/score/{CANARY}", f"/v1/score?card={CANARY}", f"/v1/model;{CANARY}")
    ]
    answers += [
        post(server, good, headers={"content-type": CANARY}),
        post(server, good, headers=JSON | {"cookie": CANARY, "referer": CANARY}),
        ask(server, CANARY, "/v1/score"),
    ]
    answers += [post(server, good, key=CANARY), ask(server, "GET", "/v1/model", headers={"authorization": f"Basic {CANARY}"}, key=None)]
    post(server, good | {"payment_id": f"{CANARY}-1"})
    answers.append(post(server, good | {"payment_id": f"{CANARY}-1", "payer_id": f"{CANARY}-2"}))  # a conflict
    socket = {
        "connection": "upgrade",
        "upgrade": "websocket",
        "sec-websocket-version": "13",
        "sec-websocket-key": "AAAAAAAAAAAAAAAAAAAAAA==",
    }
    answers.append(ask(server, "GET", f"/{CANARY}", headers=socket))
    assert answers[-1].status in (403, 404)
    answers += [ask(server, "GET", path) for path in ("/metrics", "/docs.json", "/v1/model")]
    for answer in answers:
        assert CANARY not in answer.body.decode() + str(answer.headers)
    log = server.log.read_text()
    assert "Ready: bundle tiny" in log
    assert CANARY not in log
    assert KEY not in log


def test_an_error_of_ours_is_logged_without_the_payment(server, caplog):
    def score(payments, *_):
        raise KeyError(payments[0]["payer_id"])

    with Ready(server) as client:
        client.service.rollout.score = score
        answer = client.post("/v1/score", json=payment(server, "x", payer_id=CANARY))
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal")
    assert "failed: KeyError in" in caplog.text
    assert CANARY not in answer.text + caplog.text


# ---------------------------------------------------------------- without a server process


def opened(bundle, folder: Path) -> Rollout:
    """A rollout with `bundle` alone, its state in memory."""
    keys = find_keys(folder / "audit-keys") or create_key(folder / "audit-keys", ed25519=True)
    scorer = lambda name, rollout: Scorer(bundle, rollout.state(bundle, "sqlite::memory:"))  # noqa: E731
    rollout = Rollout(scorer, folder / "rollout.json", AuditLog(folder / "audit", keys.private))
    rollout.begin(rollout.prepare(Plan("tiny")))
    rollout.write()
    return rollout


class Ready(TestClient):
    """A client of a service of its own behind the door, once it is ready."""

    def __init__(self, server, key="", opener=None, **limits):
        folder = server.folder.parent / secrets.token_hex(4)
        self.service = Service(opener or (lambda: opened(server.bundle, folder)), Access(None, key), Limits(**limits))
        super().__init__(Door(Starlette(), self.service), base_url="http://127.0.0.1")

    def __enter__(self):
        client = super().__enter__()
        while self.service.why == "the service is starting" and self.service.rollout is None:
            time.sleep(0.01)
        return client


def test_without_a_key_only_this_machine_is_answered(server):
    with Ready(server) as client:
        for host in ("127.0.0.1:3000", "localhost", "[::1]:80"):
            assert client.get("/v1/model", headers={"host": host}).status_code == 200, host
        for host in ("evil.example", "127.0.0.1.evil.example", "10.0.0.1", "[", ""):
            assert client.get("/v1/model", headers={"host": host}).json()["error"]["code"] == "no_key", host
    for address in (("10.0.0.1", 3000), None):  # the connection came in over another interface, or over one that is not known
        sent = []

        async def send(message, sent=sent):
            sent.append(message)

        scope = {"type": "http", "method": "GET", "path": "/v1/model", "headers": [(b"host", b"localhost")], "server": address}
        asyncio.run(Door(None, Service(None, Access()))(scope, None, send))
        assert sent[0]["status"] == 403


def test_a_refused_bundle_leaves_the_service_not_ready(server, caplog):
    def refuse():
        raise ValueError("weights.safetensors has changed")

    with Ready(server, opener=refuse) as client:
        for path in ("/v1/model", "/docs.json", "/readyz"):
            assert client.get(path).status_code == 503
        assert client.post("/v1/score", json=payment(server, "x")).headers["retry-after"] == "1"
    assert "weights.safetensors has changed" in caplog.text


JSONS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3),
    max_leaves=6,
)


@given(st.data())
@hypothesis_settings(max_examples=150, deadline=None, database=None)
def test_what_is_accepted_is_what_the_schema_allows(server, data):
    """Any value in any field: read if, and only if, the document's schema holds and the rules that it cannot say."""
    name = data.draw(st.sampled_from(["payment_id", "payer_id", "amount", "currency", "channel", "distance", "note", "abroad"]))
    value = data.draw(JSONS | st.floats(0, 1e6).map(lambda x: round(x, data.draw(st.integers(0, 6)))) | st.from_regex("[A-Z]{2,4}"))
    sent = payment(server, "p") | {name: value}
    described = document(server.bundle)["components"]["schemas"]["Payment"]
    try:
        json.dumps(sent, allow_nan=False).encode()
        allowed = jsonschema.Draft202012Validator(described).is_valid(sent) and not (
            name == "currency" and isinstance(value, str) and "\n" in value
        )
    except ValueError:
        allowed = False
    if allowed and name == "amount":
        allowed = round(value, 4) == value or value > 1e11
    with nullcontext() if allowed else pytest.raises(Problem):
        payment_reader(server.bundle)(json.dumps(sent).encode())


@given(st.binary(max_size=60) | JSONS.map(lambda x: json.dumps(x).encode()))
@hypothesis_settings(max_examples=150, deadline=None, database=None)
def test_any_body_is_read_or_refused(server, body):
    with pytest.raises(Problem) as refused:
        payment_reader(server.bundle)(body)
    assert refused.value.status in (400, 422)


# ---------------------------------------------------------------- starting


@pytest.mark.parametrize(
    ("changes", "arguments", "says"),
    [
        ({}, ["--host", "0.0.0.0"], "Refusing to listen on 0.0.0.0 with no credentials"),
        ({"BENTOML_HOST": "::"}, [], "Refusing to listen on :: with no credentials"),
    ],
)
def test_the_service_refuses_to_start_where_others_could_reach_it(server, tmp_path, monkeypatch, changes, arguments, says):
    [monkeypatch.setenv(*item) for item in in_folder(server.folder.parent).items()]
    command, environment = serve_command(server.folder, public_key=server.key, state=f"lmdb:{tmp_path}/state", home=tmp_path / "bentoml")
    command = command[: command.index("--host")] + arguments  # as somebody would call bentoml, past our own check
    with pytest.raises(RuntimeError) as ended, running(command, environment | changes, f"http://127.0.0.1:{free_port()}", tmp_path / "log"):
        pass
    printed = str(ended.value)
    assert "ended with code 1" in printed
    assert says in printed
    assert "Traceback" not in printed


def test_the_command_refuses_too(server, monkeypatch):
    [monkeypatch.setenv(*item) for item in in_folder(server.folder.parent).items()]
    with pytest.raises(ValueError, match="no credentials"):
        serve_command(server.folder, host="0.0.0.0")
    monkeypatch.setenv("FRAUDLAB_API_KEY", "short")
    with pytest.raises(ValueError, match="at least 16 are needed"):
        serve_command(server.folder)
    monkeypatch.setenv("FRAUDLAB_API_KEY", KEY)
    command, environment = serve_command(server.folder, host="0.0.0.0")
    assert KEY not in " ".join(command), "others can read a command line"
    assert environment["FRAUDLAB_API_KEY"] == os.environ["FRAUDLAB_API_KEY"]


def test_a_service_with_a_spoilt_bundle_does_not_start(server, tmp_path, monkeypatch):
    [monkeypatch.setenv(*item) for item in in_folder(server.folder.parent).items()]
    folder = shutil.copytree(server.folder, tmp_path / "spoilt")
    (folder / "weights.safetensors").write_bytes(b"\0" + (folder / "weights.safetensors").read_bytes()[1:])
    with (
        pytest.raises(RuntimeError, match=r"ended with code 1(.|\n)*weights\.safetensors in .* has changed"),
        started(folder, public_key=server.key, state=f"lmdb:{tmp_path}/state", log=tmp_path / "log"),
    ):
        pass
