"""Access as a stranger tries it: forged, old and foreign tokens, wrong scopes, unknown paths, too many requests, no certificate."""

import base64
import http.client
import ipaddress
import json
import logging
import math
import multiprocessing
import ssl
import string
import threading
import time
from datetime import UTC, datetime, timedelta
from http import HTTPMethod
from types import SimpleNamespace

import msgspec
import pytest
import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from joserfc import jwk

from fraudlab.serving.access import (
    LEEWAY,
    LOCAL,
    ROUTES,
    SCOPES,
    Access,
    Denied,
    Limit,
    Limiter,
    Principal,
    add_key,
    key_set,
    read_credentials,
    revoke,
    rotate_key,
    set_limit,
    tls_arguments,
    tls_options,
    trust,
)

ISSUER, AUDIENCE = "https://login.example", "fraudlab"
KEY = "a key for the tests, long enough"
KINDS = {"Ed25519": ("OKP", "Ed25519"), "ES256": ("EC", "P-256"), "RS256": ("RSA", 2048)}
SIGNERS = {f"{algorithm}-{i}": jwk.generate_key(*kind, {"kid": f"{algorithm}-{i}"}) for algorithm, kind in KINDS.items() for i in (1, 2)}


def publish(path, *kids):
    """Write the public keys `kids` where the issuer's keys are."""
    keys = [SIGNERS[kid].as_dict(private=False) for kid in kids]
    new = path.with_name("new.json")
    new.write_bytes(msgspec.json.encode({"keys": keys}))
    new.replace(path.with_name("jwks.json"))


@pytest.fixture(scope="module")
def credentials(tmp_path_factory):
    """A file of credentials that believes an issuer with one key for each algorithm."""
    path = tmp_path_factory.mktemp("keys") / "access.json"
    publish(path, *(f"{a}-1" for a in KINDS))
    trust(path, ISSUER, AUDIENCE, "jwks.json")
    return path


@pytest.fixture
def clock():
    return SimpleNamespace(wall=1_800_000_000.0, steady=100.0)


def door(path, clock, **options) -> Access:
    return Access(path, now=lambda: clock.wall, clock=lambda: clock.steady, **options)


def header(secret) -> list:
    return [(b"host", b"x"), (b"x-api-key", secret if isinstance(secret, bytes) else secret.encode())]


def bearer(token) -> list:
    return [(b"host", b"x"), (b"authorization", b"Bearer " + (token if isinstance(token, bytes) else token.encode()))]


def asked(headers, path="/v1/score", method="POST", server="10.0.0.9") -> dict:
    return {"path": path, "method": method, "headers": headers, "server": (server, 3000)}


def claims(clock, **changes) -> dict:
    own = {"iss": ISSUER, "aud": AUDIENCE, "sub": "checkout", "exp": clock.wall + 300, "scope": "score read"}
    return {k: v for k, v in (own | changes).items() if v is not ...}


def token(clock, kid="Ed25519-1", algorithm=None, head=None, **changes) -> str:
    algorithm = algorithm or kid.partition("-")[0]
    return raw(claims(clock, **changes), {"alg": algorithm, "kid": kid} | (head or {}), SIGNERS[kid])


def raw(payload: dict, head: dict, key, signature: bytes | None = None) -> str:
    """A JWT as RFC 7515 tells it, with any header: a library would refuse to sign some of these."""
    part = lambda content: base64.urlsafe_b64encode(content).rstrip(b"=")  # noqa: E731
    signed = part(json.dumps(head).encode()) + b"." + part(json.dumps(payload).encode())
    if signature is None:
        from joserfc.jws import JWSRegistry

        with_name = "Ed25519" if head["alg"] == "EdDSA" else head["alg"]
        signature = JWSRegistry.algorithms[with_name].sign(signed, key)
    return (signed + b"." + part(signature)).decode()


def refused(access, headers, **more) -> Denied:
    with pytest.raises(Denied) as error:
        access.enter(asked(headers, **more))
    return error.value


# JWTs


@pytest.mark.parametrize("algorithm", KINDS)
def test_a_signed_token_opens(credentials, clock, algorithm):
    access = door(credentials, clock)
    found = access.enter(asked(bearer(token(clock, f"{algorithm}-1"))))
    assert found == Principal("jwt:checkout", frozenset({"score", "read"}))


def test_ed25519_may_be_called_eddsa(credentials, clock):
    assert door(credentials, clock).enter(asked(bearer(token(clock, algorithm="EdDSA")))).name == "jwt:checkout"


WRONG_CLAIMS = {
    "expired": {"exp": -1},
    "expired now": {"exp": 0},
    "no exp": {"exp": ...},
    "exp as text": {"exp": "9999999999"},
    "exp not a number": {"exp": math.nan},
    "exp infinite": {"exp": math.inf},
    "exp true": {"exp": True},
    "not yet": {"nbf": LEEWAY + 1},
    "issued in the future": {"iat": LEEWAY + 1},
    "no iss": {"iss": ...},
    "iss of another": {"iss": "https://evil.example"},
    "iss as a list": {"iss": [ISSUER]},
    "no aud": {"aud": ...},
    "aud of another": {"aud": "payments"},
    "aud of others": {"aud": ["payments", "fraud"]},
    "aud empty": {"aud": []},
    "no sub": {"sub": ...},
    "sub a number": {"sub": 7},
    "sub empty": {"sub": ""},
    "sub a card number": {"sub": "4111-1111-1111-1111"},
    "sub of two lines": {"sub": "a\nb"},
    "sub too long": {"sub": "a" * 129},
    "scope a list": {"scope": ["score"]},
    "scope a number": {"scope": 1},
}
RELATIVE = ("exp", "nbf", "iat")


def relative(clock, changes: dict) -> dict:
    plain = lambda v: isinstance(v, int) and not isinstance(v, bool)  # noqa: E731
    return {k: clock.wall + v if k in RELATIVE and plain(v) else v for k, v in changes.items()}


@pytest.mark.parametrize("changes", WRONG_CLAIMS.values(), ids=WRONG_CLAIMS)
def test_wrong_claims_are_refused(credentials, clock, changes):
    access = door(credentials, clock)
    denied = refused(access, bearer(token(clock, **relative(clock, changes))))
    assert (denied.status, denied.code) == (401, "invalid_token")
    assert 'error="invalid_token"' in denied.headers["www-authenticate"]
    assert "4111" not in denied.message


@pytest.mark.parametrize("changes", [{"nbf": LEEWAY}, {"iat": LEEWAY}, {"nbf": -1}, {"aud": ["x", AUDIENCE]}, {"exp": 1}], ids=str)
def test_claims_at_the_edge_are_accepted(credentials, clock, changes):
    assert door(credentials, clock).enter(asked(bearer(token(clock, **relative(clock, changes)))))


def forgeries(clock) -> dict[str, str]:
    import hmac

    payload, public = claims(clock), {kid: SIGNERS[kid] for kid in ("Ed25519-1", "ES256-1", "RS256-1")}
    forged = {}
    for name in ("none", "None", "NONE", ""):
        for signature in (b"", b"x"):
            forged[f"alg {name!r} {signature}"] = raw(payload, {"alg": name, "kid": "RS256-1"}, None, signature)
    for kid, key in public.items():
        for form, secret in {
            "pem": key.as_pem(private=False),
            "der": key.as_der(private=False),
            "jwk": json.dumps(key.as_dict(private=False)).encode(),
        }.items():
            head = {"alg": "HS256", "kid": kid}
            unsigned = raw(payload, head, None, b"").rpartition(".")[0].encode()
            forged[f"HS256 with the {form} of {kid}"] = raw(payload, head, None, hmac.digest(secret, unsigned, "sha256"))
    for kid, key in SIGNERS.items():
        own = kid.partition("-")[0]
        if kid.endswith("-2"):
            forged[f"{kid} as {own}-1"] = raw(payload, {"alg": own, "kid": f"{own}-1"}, key)
            forged[f"{kid} unpublished"] = raw(payload, {"alg": own, "kid": kid}, key)
            forged[f"{kid} brought along"] = raw(payload, {"alg": own, "kid": f"{own}-1", "jwk": key.as_dict(private=False)}, key)
        for other in KINDS.keys() - {own}:
            forged[f"{kid} for {other}"] = raw(payload, {"alg": own, "kid": f"{other}-1"}, key)
            forged[f"{kid} called {other}"] = raw(payload, {"alg": other, "kid": kid.replace("2", "1")}, None, b"x" * 64)
    good = SIGNERS["RS256-1"]
    for name, head in {
        "no kid": {"alg": "RS256"},
        "kid a list": {"alg": "RS256", "kid": ["RS256-1"]},
        "no alg": {"kid": "RS256-1"},
        "alg a number": {"alg": 1, "kid": "RS256-1"},
        "PS256": {"alg": "PS256", "kid": "RS256-1"},
        "RS512": {"alg": "RS512", "kid": "RS256-1"},
        "critical": {"alg": "RS256", "kid": "RS256-1", "crit": ["exp"], "exp": 1},
        "type": {"alg": "RS256", "kid": "RS256-1", "typ": "logout+jwt"},
        "type a number": {"alg": "RS256", "kid": "RS256-1", "typ": 1},
    }.items():
        unsigned = raw(payload, head, None, b"").rpartition(".")[0].encode()
        from joserfc.jws import JWSRegistry

        algorithm = JWSRegistry.algorithms.get(head.get("alg"), JWSRegistry.algorithms["RS256"])
        forged[name] = raw(payload, head, None, algorithm.sign(unsigned, good))
    return forged


def test_forged_tokens_are_refused(credentials, clock):
    access = door(credentials, clock)
    forged = forgeries(clock)
    assert len(forged) > 40
    for name, forgery in forged.items():
        assert refused(access, bearer(forgery)).status == 401, name
    assert access.enter(asked(bearer(token(clock, "RS256-1", head={"typ": "at+JWT"}))))


def test_headers_that_nobody_must_know_are_ignored(credentials, clock):
    head = {"jku": "https://evil.example/keys", "x5t": "abc", "nonce": "unknown"}
    assert door(credentials, clock).enter(asked(bearer(token(clock, head=head)))).name == "jwt:checkout"


WALL = SimpleNamespace(wall=1_800_000_000.0, steady=100.0)
GOOD = [token(WALL, kid) for kid in ("Ed25519-1", "ES256-1", "RS256-1")]


@given(st.sampled_from(range(3)), st.floats(0, 1, exclude_max=True), st.characters(exclude_categories=["Cs"]))
@hypothesis_settings(max_examples=200)
def test_a_changed_token_never_opens(credentials, which, place, letter):
    good = GOOD[which]
    at = int(place * len(good))
    assume(letter != good[at])
    changed = (good[:at] + letter + good[at + 1 :]).encode()
    if at == len(good) - 1:  # this letter of base64 has bits that nobody reads: another can stand for the same bytes
        assume(letter not in string.ascii_letters + string.digits + "-_")
    assert refused(door(credentials, WALL), bearer(changed)).status == 401


@given(st.binary(max_size=200) | st.from_regex(rb"[\w-]{0,40}\.[\w-]{0,40}\.[\w-]{0,40}", fullmatch=True), st.booleans())
@hypothesis_settings(max_examples=200)
def test_any_bytes_are_refused_with_401(credentials, noise, as_jwt):
    denied = refused(door(credentials, WALL), bearer(noise) if as_jwt else header(noise))
    assert denied.status == 401


def test_keys_rotate_while_the_service_runs(tmp_path, clock):
    path = tmp_path / "access.json"
    publish(path, "Ed25519-1", "ES256-1")
    trust(path, ISSUER, AUDIENCE, "jwks.json")
    access, old, new = door(path, clock), token(clock, "Ed25519-1"), token(clock, "Ed25519-2")
    assert access.principal(bearer(old))
    assert refused(access, bearer(new)).code == "invalid_token"

    publish(path, "Ed25519-1", "Ed25519-2")  # both for a while
    clock.steady += 1
    assert access.principal(bearer(old)) == access.principal(bearer(new))

    publish(path, "Ed25519-2")  # the old one is taken away, and with it what it signed and was remembered
    clock.steady += 0.5
    assert access.principal(bearer(old)), "files are looked at once a second"
    clock.steady += 0.5
    assert refused(access, bearer(old)).code == "invalid_token"
    assert access.principal(bearer(new))


def test_a_remembered_token_ends_with_its_exp(credentials, clock):
    access, known = door(credentials, clock), token(clock, exp=clock.wall + 60)
    verified = []
    verify = access.passes.verified.verify
    access.passes.verified.verify = lambda t: verified.append(t) or verify(t)
    for _ in range(5):
        assert access.principal(bearer(known)).name == "jwt:checkout"
    assert len(verified) == 1
    clock.wall += 60
    assert refused(access, bearer(known)).code == "expired"
    assert access.principal(bearer(token(clock, exp=clock.wall + 1)))


def test_remembered_tokens_are_bounded(credentials, clock, monkeypatch):
    monkeypatch.setattr("fraudlab.serving.access._REMEMBERED", 4)
    access = door(credentials, clock)
    tokens = [token(clock, sub=f"caller-{i}") for i in range(6)]
    for t in tokens:
        access.principal(bearer(tokens[0]))  # in use all the time
        access.principal(bearer(t))
        assert len(access.passes.verified.seen) <= 4
    names = {p.principal.name for p in access.passes.verified.seen.values()}
    assert names == {f"jwt:caller-{i}" for i in (0, 3, 4, 5)}, "the one in use is kept"


def test_strangers_cannot_keep_the_service_busy(credentials, clock):
    access, known = door(credentials, clock), token(clock)
    access.principal(bearer(known))
    statuses = [refused(access, bearer(f"a.b.{i}")).status for i in range(1200)]
    assert statuses == [401] * 999 + [429] * 201, "a burst of 1000, one of which is the known token's"
    assert access.principal(bearer(known)).name == "jwt:checkout", "who is known is not held up"
    clock.steady += 1
    assert [refused(access, bearer(f"a.b.{i}")).status for i in range(201)] == [401] * 200 + [429]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"keys": [SIGNERS["ES256-1"].as_dict(private=True)]}, "a secret one"),
        ({"keys": [{"kty": "oct", "k": "c2VjcmV0", "kid": "1"}]}, "a secret one"),
        ({"keys": [SIGNERS["ES256-1"].as_dict(private=False) | {"kid": None}]}, "no `kid` of its own"),
        ({"keys": [SIGNERS["ES256-1"].as_dict(private=False)] * 2}, "no `kid` of its own"),
        ({"keys": [{"kty": "EC", "crv": "P-256", "x": "AA", "y": "AA", "kid": "1"}]}, "cannot be read"),
        ({"keys": [{"kty": "RSA", "n": "AQAB", "e": "AQAB", "kid": "1"}]}, "RSA|cannot be read"),
        ({"keys": [SIGNERS["RS256-1"].as_dict(private=False) | {"use": "enc"}]}, "no key for"),
        ({"keys": [SIGNERS["RS256-1"].as_dict(private=False) | {"alg": "RS512"}]}, "no key for"),
        ({"keys": [SIGNERS["RS256-1"].as_dict(private=False) | {"alg": "HS256"}]}, "no key for"),
        ({"keys": [1]}, "is not an object"),
        ({"keys": {}}, "not a JWK set"),
        ({}, "not a JWK set"),
    ],
)
def test_key_sets_that_are_refused(tmp_path, content, says):
    path = tmp_path / "jwks.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=says):
        key_set(path)


def test_short_rsa_keys_are_refused(tmp_path):
    from cryptography.hazmat.primitives.asymmetric import rsa

    numbers = rsa.generate_private_key(65537, 1024).public_key().public_numbers()
    number = lambda n: base64.urlsafe_b64encode(n.to_bytes((n.bit_length() + 7) // 8)).rstrip(b"=").decode()  # noqa: E731
    path = tmp_path / "jwks.json"
    path.write_text(json.dumps({"keys": [{"kty": "RSA", "n": number(numbers.n), "e": number(numbers.e), "kid": "1"}]}))
    with pytest.raises(ValueError, match=r"1024 bits|cannot be read"):
        key_set(path)


def test_keys_for_other_uses_are_left_out(tmp_path, caplog):
    other = SIGNERS["RS256-2"].as_dict(private=False) | {"use": "enc", "alg": "RSA-OAEP"}
    (tmp_path / "jwks.json").write_text(json.dumps({"keys": [other, SIGNERS["ES256-1"].as_dict(private=False)]}))
    caplog.set_level(logging.INFO)
    assert list(key_set(tmp_path / "jwks.json")) == ["ES256-1"]
    assert "Key 0 of" in caplog.text


# API keys


@pytest.fixture
def path(tmp_path):
    return tmp_path / "access.json"


@pytest.fixture
def present(clock):
    """Keys are made now: a clock that starts there."""
    clock.wall = time.time() + 1
    return clock


def test_keys_of_one_principal_overlap(path, present):
    day = 86400
    first = add_key(path, "gateway", ["score"], days=30)
    second = rotate_key(path, "gateway", overlap=7, days=30)
    access = door(path, present)
    for days, good in ((0, (True, True)), (6.9, (True, True)), (7.1, (False, True)), (29.9, (False, True)), (30.1, (False, False))):
        present.wall = time.time() + 1 + days * day
        for key, opens in zip((first, second), good, strict=True):
            if opens:
                assert access.enter(asked(header(key))).name == "gateway"
            else:
                assert refused(access, header(key)).code == "expired"
    present.wall = time.time() - 60
    assert refused(access, header(second)).code == "expired", "not valid yet"


def test_a_revoked_key_opens_nothing(path, present):
    keys = [add_key(path, "gateway", ["score"]) for _ in range(3)] + [add_key(path, "other", ["score"])]
    access = door(path, present)
    assert revoke(path, "gateway", read_credentials(path).keys[1].id) == 1
    present.steady += 1
    opens = []
    for key in keys:
        try:
            opens.append(access.enter(asked(header(key))).name)
        except Denied as e:
            opens.append(e.code)
    assert opens == ["gateway", "unauthorized", "gateway", "other"]
    assert revoke(path, "gateway") == 2
    assert revoke(path, "other") == 1
    present.steady += 1
    assert access.secured
    assert {refused(access, header(key)).status for key in keys} == {401}, "with no key left, nobody enters"
    assert Access(path).secured


def test_a_key_is_shown_in_three_ways(path, present):
    key = add_key(path, "gateway", ["score"])
    access = door(path, present, api_key=KEY)
    basic = lambda k: [(b"authorization", b"Basic " + base64.b64encode(b"me:" + k.encode()))]  # noqa: E731
    for way in (header, bearer, basic):
        assert access.enter(asked(way(key))).name == "gateway"
        assert access.enter(asked(way(KEY))) == Principal("default", frozenset({"score", "read"}))
        assert refused(access, way(key[:-1])).status == 401
        assert refused(access, way(key + "x")).status == 401
        assert refused(access, way("")).status == 401
    for several in (header(key) + bearer(key), header(key) * 2, header(KEY) + header("wrong"), bearer(key) + bearer(key)):
        assert refused(access, several).status == 401


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666])
def test_a_file_that_others_can_read_is_refused(path, mode):
    add_key(path, "gateway", ["score"])
    path.chmod(mode)
    with pytest.raises(PermissionError, match="chmod 600"):
        Access(path)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        '{"key": []}',
        '{"keys": [{"principal": "x"}]}',
        '{"limit": {"rate": 0}}',
        '{"limits": {"a": {"rate": -1}}}',
        '{"issuer": {}}',
    ],
)
def test_a_file_that_makes_no_sense_is_refused_and_while_running_ignored(path, present, caplog, content):
    key = add_key(path, "gateway", ["score"])
    access, good = door(path, present), path.read_text()
    path.write_text(content)
    with pytest.raises(ValueError, match=r"access\.json"):
        Access(path)
    present.steady += 1
    assert access.enter(asked(header(key))).name == "gateway"
    present.steady += 1
    assert access.enter(asked(header(key))).name == "gateway"
    assert caplog.text.count("the old ones stay") == 1, "told once"
    path.write_text(good.replace("gateway", "checkout"))
    present.steady += 1
    assert access.enter(asked(header(key))).name == "checkout"


def test_a_file_that_disappears_changes_nothing(path, present, caplog):
    key = add_key(path, "gateway", ["score"])
    access = door(path, present)
    path.unlink()
    present.steady += 1
    assert access.enter(asked(header(key))).name == "gateway"
    assert refused(access, []).status == 401
    assert "the old ones stay" in caplog.text


def test_unknown_scopes_in_a_file_are_refused(path):
    add_key(path, "gateway", ["score"])
    path.write_text(path.read_text().replace('"score"', '"scroe"'))
    with pytest.raises(ValueError, match="Did you mean 'score'"):
        Access(path)


def _add(path):
    add_key(path, "gateway", ["score"])


def test_processes_that_add_keys_together_lose_none(path):
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        pool.map(_add, [path] * 12)
    assert len(read_credentials(path).keys) == 12
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_change_that_could_not_be_read_is_not_written(path):
    add_key(path, "gateway", ["score"])
    before = path.read_text()
    for change in (
        lambda: add_key(path, "Gateway", ["score"]),
        lambda: add_key(path, "x" * 65, ["score"]),
        lambda: add_key(path, "gateway", []),
        lambda: add_key(path, "gateway", ["all"]),
        lambda: set_limit(path, "gateway", math.nan, 1),
        lambda: set_limit(path, "gateway", 1, -1),
        lambda: trust(path, "", "x", "none.json"),
    ):
        with pytest.raises((ValueError, OSError)):
            change()
    assert path.read_text() == before


def test_settings_lead_to_the_file(lab, monkeypatch):
    access = Access.from_settings()
    assert not access.secured
    monkeypatch.setenv("FRAUDLAB_API_KEY", KEY)
    assert Access.from_settings().secured
    monkeypatch.delenv("FRAUDLAB_API_KEY")
    monkeypatch.setenv("FRAUDLAB_ACCESS", "elsewhere/access.json")
    with pytest.raises(FileNotFoundError, match="fraudlab access add"):
        Access.from_settings()
    monkeypatch.delenv("FRAUDLAB_ACCESS")
    key = add_key(lab / "keys" / "access.json", "gateway", ["admin"])
    assert Access.from_settings().principal(header(key)) == Principal("gateway", frozenset({"admin"}))


# default deny

PATHS = (
    st.sampled_from(list(ROUTES))
    | st.text(max_size=30)
    | st.sampled_from(["/v1/score/", "//v1/score", "/v1/Score", "/v1/score?x", "/v2", ""])
)
METHODS = st.sampled_from([*(m.value for m in HTTPMethod), "get", "POST ", ""])


def all_callers(path) -> dict[str, list]:
    return {scope: header(add_key(path, scope, [scope])) for scope in SCOPES} | {
        "stranger": header("nobody's key"),
        "silent": [],
        "everybody": header(add_key(path, "everybody", list(SCOPES))),
    }


@pytest.fixture(scope="module")
def callers(tmp_path_factory):
    path = tmp_path_factory.mktemp("callers") / "access.json"
    return path, all_callers(path)


def expected(who: str, path: str, method: str) -> int:
    """What the rules say, told from the caller's side."""
    if path in ("/livez", "/readyz") and method == "GET":
        return 200
    if who in ("stranger", "silent"):
        return 401
    if path not in ROUTES:
        return 404
    if method not in ROUTES[path]:
        return 405
    return 200 if who == "everybody" or ROUTES[path][method] == who else 403


@given(PATHS, METHODS)
@hypothesis_settings(max_examples=400)
def test_what_is_not_allowed_is_refused(callers, path, method):
    file, headers = callers
    access = Access(file)
    for who, shown in headers.items():
        if (status := expected(who, path, method)) == 200:
            assert access.enter(asked(shown, path, method)).name == ("" if path in ("/livez", "/readyz") else who)
            continue
        denied = refused(access, shown, path=path, method=method)
        assert denied.status == status
        assert ("www-authenticate" in denied.headers) == (status in (401, 403))
        assert ("allow" in denied.headers) == (status == 405)


def test_every_route_takes_exactly_one_known_scope_or_is_a_probe():
    for path, methods in ROUTES.items():
        for scope in methods.values():
            assert scope in SCOPES or (scope == "" and path in ("/livez", "/readyz"))


# without credentials


@pytest.mark.parametrize("server", ["127.0.0.1", "::1", "127.8.8.8", "10.0.0.9", "0.0.0.0", "localhost", None, "/run/x.sock"])
@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "127.0.0.1:3000", "localhost:3000", "[::1]:3000", "evil.example", "127.0.0.1.evil.example", "10.0.0.9", "", "[", None],
)
def test_without_credentials_only_this_machine_is_answered(server, host):
    own = server in ("127.0.0.1", "::1", "127.8.8.8", "localhost") and host in (
        "127.0.0.1",
        "127.0.0.1:3000",
        "localhost:3000",
        "[::1]:3000",
    )
    headers = [] if host is None else [(b"host", host.encode())]
    access = Access()
    for path, method in (("/v1/score", "POST"), ("/livez", "GET")):
        if own:
            assert access.enter(asked(headers, path, method, server)) == LOCAL
        else:
            assert refused(access, headers, path=path, method=method, server=server).status == 403
    if own:
        assert refused(access, headers, path="/nothing", server=server).status == 404
        assert refused(Access(routes={"/v1/control": {"POST": "admin"}}), headers, path="/v1/control", server=server).status == 403


def test_two_hosts_are_no_host():
    assert refused(Access(), [(b"host", b"127.0.0.1"), (b"host", b"evil.example")], server="127.0.0.1").status == 403


# how often


STEPS = st.lists(st.tuples(st.floats(0, 3), st.sampled_from("abc"), st.sampled_from([0.5, 1.0, 3.0])), min_size=1, max_size=120)


@given(STEPS, st.floats(0.1, 50), st.floats(1, 20), st.integers(1, 3), st.floats(0, 1e7))
@hypothesis_settings(max_examples=300)
def test_nobody_gets_more_than_rate_times_t_and_a_burst(steps, rate, burst, size, start):
    now, limit = start, Limit(rate, burst)
    limiter = Limiter(lambda: now, size)
    granted = {name: [] for name in "abc"}
    for pause, name, cost in steps:
        now += pause
        if limiter.wait(name, limit, cost) == 0:
            granted[name].append((now, cost))
        assert len(limiter._full) <= size
    for times in granted.values():
        for i, (first, _) in enumerate(times):
            taken = 0.0
            for last, cost in times[i:]:
                taken += cost
                assert taken <= rate * (last - first) + max(burst, cost) + 2e-6 * max(rate, 1)


@given(st.floats(0.1, 1e4), st.floats(1, 1e4), st.floats(0, 1e7))
def test_who_waits_as_told_goes_on(rate, burst, start):
    now = start
    limiter, limit = Limiter(lambda: now), Limit(rate, burst)
    for _ in range(min(int(burst), 50)):
        assert limiter.wait("a", limit) == 0, "a full bucket gives its burst"
    assert limiter.wait("b", limit, cost=3 * burst) == 0, "more than a burst takes a full bucket"
    assert limiter.wait("b", limit) > 0
    while wait := limiter.wait("a", limit):
        assert 0 < wait <= 1 / rate + 1e-6
        now += wait + 1e-6


def test_full_buckets_are_forgotten_and_others_are_not():
    now = 0.0
    limiter, limit = Limiter(lambda: now, size=3), Limit(rate=1, burst=2)
    assert [limiter.wait(name, limit) for name in "abc"] == [0, 0, 0]
    assert limiter.wait("d", limit) == 1, "three buckets are not full again: a fourth caller waits"
    now = 1.0
    assert limiter.wait("d", limit) == 0
    assert list(limiter._full) == ["b", "c", "d"]


def test_the_door_counts_by_principal(path, present):
    keys = {name: add_key(path, name, ["score"]) for name in ("fast", "slow")}
    second = add_key(path, "slow", ["score"])
    set_limit(path, "slow", rate=1, burst=2)
    access = door(path, present)
    access.enter(asked(header(keys["slow"])))
    refused(access, header(keys["slow"]), path="/nothing")  # a mistake counts too
    denied = refused(access, header(second))
    assert (denied.status, denied.code, denied.headers) == (429, "too_often", {"retry-after": "1"})
    assert access.enter(asked(header(keys["fast"]))).name == "fast"
    present.steady += 1
    assert access.enter(asked(header(second))).name == "slow"
    set_limit(path, "*", rate=1, burst=1)
    present.steady += 1
    access.enter(asked(header(keys["fast"])))
    assert refused(access, header(keys["fast"])).status == 429


# secrets


def test_no_secret_is_in_a_text(path, present, caplog):
    caplog.set_level(logging.DEBUG)
    publish(path, "Ed25519-1")
    trust(path, ISSUER, AUDIENCE, "jwks.json")
    key, good = add_key(path, "gateway", ["score"]), token(present)
    wrong, forged = key[:-2] + "xx", token(present, "Ed25519-2")
    access = door(path, present, api_key=KEY)
    texts = [path.read_text(), *(x.read_text() for x in path.parent.iterdir())]
    for headers in (header(key), bearer(good), header(KEY), header(wrong), bearer(forged), bearer(key + ".x.y")):
        try:
            texts.append(repr(access.enter(asked(headers))))
        except Denied as e:
            texts += [str(e), repr(e), e.message, str(e.headers), repr(vars(e))]
    path.write_text("{" + key)
    present.steady += 1
    access.enter(asked(header(KEY)))
    texts += [
        repr(access),
        repr(access.passes),
        repr(vars(access.passes)),
        repr(access.passes.credentials),
        repr(vars(access)),
        caplog.text,
    ]
    assert "the old ones stay" in caplog.text
    for secret in (key, good, KEY, wrong, forged):
        signature = secret.rpartition(".")[2]
        assert not any(secret in t or signature in t or secret.encode().hex() in t for t in texts)


# certificates


class Authority:
    """A certificate authority for the length of a test."""

    def __init__(self, name: str):
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        basic, usage = x509.BasicConstraints(True, 0), x509.KeyUsage(False, False, False, False, False, True, True, False, False)
        own = self._builder(self.name, self.key.public_key(), 9).add_extension(basic, critical=True).add_extension(usage, critical=True)
        self.certificate = own.sign(self.key, hashes.SHA256())

    def _builder(self, subject, public, days):
        now, issuer = datetime.now(UTC), self.key.public_key()
        made = x509.CertificateBuilder().subject_name(subject).issuer_name(self.name).public_key(public)
        made = (
            made.serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=20))
            .not_valid_after(now + timedelta(days=days))
        )
        made = made.add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        return made.add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer), critical=False)

    def write(self, folder, name: str, days: float = 1):
        """A key and a certificate for `name` that this authority has signed: `<name>.key` and `<name>.crt`."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        here = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
        made = self._builder(subject, key.public_key(), days).add_extension(here, critical=False).sign(self.key, hashes.SHA256())
        pem = serialization.Encoding.PEM
        private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        (folder / f"{name}.key").write_bytes(private)
        (folder / f"{name}.key").chmod(0o600)
        (folder / f"{name}.crt").write_bytes(made.public_bytes(pem))

    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    folder, ours, theirs = tmp_path_factory.mktemp("tls"), Authority("ours"), Authority("theirs")
    ours.write(folder, "tls")
    ours.write(folder, "client")
    ours.write(folder, "old", days=-1)
    theirs.write(folder, "stranger")
    (folder / "ca.crt").write_bytes(ours.pem())
    return folder


@pytest.fixture(scope="module")
def served(certificates, tmp_path_factory):
    """A server with the options of `tls_options`, behind the door; its port and a key."""
    file = tmp_path_factory.mktemp("served") / "access.json"
    key, access = add_key(file, "gateway", ["score"]), Access(file)

    async def app(scope, receive, send):
        try:
            status, text = 200, access.enter(scope).name
        except Denied as e:
            status, text = e.status, e.code
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": text.encode()})

    config = uvicorn.Config(app, port=0, lifespan="off", log_level="critical", ws="none", **tls_options(certificates))
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1], key
    server.should_exit = True
    thread.join()


def client(certificates, name: str = "") -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=certificates / "ca.crt")
    if name:
        context.load_cert_chain(certificates / f"{name}.crt", certificates / f"{name}.key")
    return context


def ask(port: int, context: ssl.SSLContext, key: str = "") -> tuple[int, str]:
    connection = http.client.HTTPSConnection("127.0.0.1", port, context=context, timeout=10)
    try:
        connection.request("POST", "/v1/score", headers={"x-api-key": key} if key else {})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def test_with_a_certificate_a_caller_is_answered(certificates, served):
    port, key = served
    assert ask(port, client(certificates, "client"), key) == (200, "gateway")
    assert ask(port, client(certificates, "client")) == (401, "unauthorized"), "a certificate is not a key"


@pytest.mark.parametrize("name", ["", "stranger", "old"])
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_without_one_of_ours_there_is_no_connection(certificates, served, name, version):
    port, key = served
    context = client(certificates, name)
    context.minimum_version = context.maximum_version = version
    with pytest.raises((ssl.SSLError, ConnectionError)):
        ask(port, context, key)


@pytest.mark.parametrize("ciphers", ["AES256-SHA", "ECDHE-ECDSA-AES256-SHA384"])
def test_old_ciphers_are_not_spoken(certificates, served, ciphers):
    port, key = served
    context = client(certificates, "client")
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("ECDHE+AESGCM")
    assert ask(port, context, key)[0] == 200
    context.set_ciphers(ciphers)
    with pytest.raises((ssl.SSLError, ConnectionError)):
        ask(port, context, key)


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")
def test_bentoml_takes_the_arguments(certificates):
    """They are hidden from its help, so that their going would not be seen."""
    from bentoml_cli.serve import build_serve_command

    options = {o for p in build_serve_command().commands["serve"].params for o in p.opts}
    arguments = tls_arguments(certificates)
    assert set(arguments[::2]) <= options
    assert arguments[1::2] == [str(v) for v in tls_options(certificates).values()]


def test_an_expired_server_certificate_is_refused(certificates, tmp_path):
    for theirs, ours in (("old.crt", "tls.crt"), ("old.key", "tls.key"), ("ca.crt", "ca.crt")):
        (tmp_path / ours).write_bytes((certificates / theirs).read_bytes())
    (tmp_path / "tls.key").chmod(0o600)
    with pytest.raises(ValueError, match="was good until"):
        tls_options(tmp_path)
