"""What the service tells of itself: a real server with two workers, its /metrics, its log, and what is made of them."""

import asyncio
import http.client
import json
import re
import subprocess
import sys
import time
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import prometheus_client
import pytest
import yaml
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider, sampling
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client.parser import text_string_to_metric_families
from tiny_bundle import tiny_bundle

from fraudlab.governance.audit_log import AuditError, AuditLog
from fraudlab.governance.signing import create_key
from fraudlab.serving import observability
from fraudlab.serving.access import ROUTES, Access, add_key
from fraudlab.serving.bento import started
from fraudlab.serving.bundle import example, load
from fraudlab.serving.rollout import Plan, Rollout, write_plan
from fraudlab.serving.scorer import NO_STATE, Scorer
from fraudlab.serving.service import Door, Service

ROOT = Path(__file__).parents[1]
CANARY = "4111111111111111"
TRACE = "0af7651916cd43dd8448eb211c80319c"
WORKERS = 2


class Metrics:
    """Samples of the Prometheus text format."""

    def __init__(self, text: str):
        self.families = list(text_string_to_metric_families(text))
        self.samples = [s for family in self.families for s in family.samples]
        self.names = {s.name for s in self.samples}

    def __call__(self, name: str, **labels: str) -> float:
        """Sum of the samples of `name` that have these labels."""
        assert name in self.names, f"/metrics has no {name}"
        return sum(s.value for s in self.samples if s.name == name and labels.items() <= s.labels.items())

    def values(self, name: str, label: str) -> set[str]:
        return {s.labels[label] for s in self.samples if s.name == name and label in s.labels}


class Server(NamedTuple):
    port: int
    log: Path
    bundle: object
    keys: dict[str, str]

    def ask(self, method: str, path: str, body=None, key: str = "all", **headers: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        given = {"content-type": "application/json"} | ({"x-api-key": self.keys.get(key, key)} if key else {})
        given |= {k.replace("_", "-"): v for k, v in headers.items()}
        try:
            connection.request(method, path, body if body is None or isinstance(body, bytes) else json.dumps(body).encode(), given)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def metrics(self, until=lambda metrics: True) -> Metrics:
        """What /metrics says; the worker that is not asked hands its numbers over within half a second."""
        end = time.monotonic() + 10
        while True:
            status, body = self.ask("GET", "/metrics")
            assert status == 200
            if until(found := Metrics(body.decode())) or time.monotonic() > end:
                return found
            time.sleep(0.05)

    def lines(self) -> list[dict]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    lab = tmp_path_factory.mktemp("lab")
    folder, keys = tiny_bundle(lab)
    access = lab / "keys" / "access.json"
    known = {"all": add_key(access, "tester", ["score", "read", "admin"]), "score": add_key(access, "shop", ["score"])}
    with ExitStack() as running:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {"ROOT": ROOT, "DATA": lab / "data", "KEYS": lab / "keys", "BUNDLES": lab, "WORKERS": WORKERS}.items():
                patch.setenv(f"FRAUDLAB_{name}", str(value))
            patch.setenv("BENTOML_CONFIG_OPTIONS", "tracing.exporter_type=in_memory tracing.sample_rate=1.0")
            address = running.enter_context(started(folder, public_key=keys.public, log=lab / "log"))
        server = Server(int(address.rpartition(":")[2]), lab / "log", load(folder, keys.public), known)
        ready = server.metrics(lambda m: m("fraudlab_ready") == 1 and len(m.values("fraudlab_memory_bytes", "pid")) == WORKERS)
        assert ready("fraudlab_ready") == 1
        yield server


def paid(server, name: str, **changes) -> dict:
    return example(server.bundle) | {"payment_id": name} | changes


# ---------------------------------------------------------------- /metrics of a real server


def test_every_request_of_every_worker_is_in_the_metrics(server):
    before, n = server.metrics(), 40
    for i in range(n):
        assert server.ask("POST", "/v1/score?explain=false", paid(server, f"one-{i}", payer_id=f"payer-{i % 10}"))[0] == 200
    assert server.ask("POST", "/v1/score", [paid(server, f"many-{i}", payer_id="payer-0") for i in range(20)])[0] == 200
    assert server.ask("POST", "/v1/score", paid(server, "one-0", payer_id="payer-0"))[0] == 200
    label = {"payment_id": "one-1", "is_fraud": True, "known_at": "2030-01-01T00:00:00Z"}
    assert server.ask("POST", "/v1/labels", label)[0] == 422
    assert server.ask("POST", "/v1/labels", {**label, "known_at": paid(server, "")["event_time"]})[0] == 200
    done = n + 2

    def added(after, name, **labels):
        return after(name, **labels) - (before(name, **labels) if name in before.names else 0)

    after = server.metrics(lambda m: added(m, "fraudlab_requests_total", route="/v1/score", status="200") == done)
    assert added(after, "fraudlab_requests_total", route="/v1/score", status="200") == done
    assert added(after, "fraudlab_requests_total", route="/v1/labels", status="422") == 1
    assert added(after, "fraudlab_refusals_total", code="invalid_value") == 1
    assert added(after, "fraudlab_labels_total", result="noted") == 1
    for stage in ("read", "decode", "queue", "score", "audit", "encode", "send", "total"):
        assert added(after, "fraudlab_stage_seconds_count", stage=stage) == done, stage
    assert added(after, "fraudlab_stage_seconds_count", stage="explain") == 1, "of the list: the repeated payment has its reasons already"
    parts = sum(added(after, "fraudlab_stage_seconds_sum", stage=s) for s in observability.STAGES[:-1])
    assert parts == pytest.approx(added(after, "fraudlab_stage_seconds_sum", stage="total")), "all of the time has a stage"
    version, new = server.bundle.version, n + 20
    assert added(after, "fraudlab_decisions_total", bundle=version, to="caller") == new
    assert added(after, "fraudlab_score_count", bundle=version, to="caller") == new
    assert added(after, "fraudlab_probability_bucket", bundle=version, to="caller", le="+Inf") == new
    assert added(after, "fraudlab_call_payments_sum") == new + 1
    assert added(after, "fraudlab_call_payments_bucket", le="1.0") == n + 1, "a list of 20 is 16 and 4"
    assert added(after, "fraudlab_repeats_total") == 1
    assert (added(after, "fraudlab_payers_total", payer="new"), added(after, "fraudlab_payers_total", payer="known")) == (10, new - 10)
    assert added(after, "fraudlab_audit_appends_total", result="written") == new + 2, "and the repeated payment, and the label"


def test_gauges_tell_what_serves(server):
    found = server.metrics()
    (serving,) = (s.labels for s in found.samples if s.name == "fraudlab_serving" and s.value)
    assert serving == {"bundle": server.bundle.version, "role": "champion", "model": server.bundle.model["name"]}
    assert found("fraudlab_plans_total", result="begun") == WORKERS
    assert all(s.value > 1e7 for s in found.samples if s.name == "fraudlab_memory_bytes")
    for name in ("killed", "canary_share", "breaker_open", "missed_payments", "shadow_waiting", "audit_waiting"):
        assert found(f"fraudlab_{name}") == 0


def test_a_log_line_is_json_and_names_its_request_bundle_and_trace(server):
    given = {"x_request_id": "req-77", "traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}
    status, _ = server.ask("POST", "/v1/rollout", {"champion": "no such bundle"}, **given)
    assert status == 409
    (line,) = (x for x in server.lines() if x.get("request_id") == "req-77")
    assert (line["level"], line["logger"], line["trace_id"]) == ("ERROR", "fraudlab.serving", TRACE)
    assert line["bundle"] == server.bundle.version
    assert line["time"].endswith("+00:00")
    assert {"bentoml.serve", "fraudlab.serving"} <= {x["logger"] for x in server.lines()}
    assert server.metrics(lambda m: m("fraudlab_plans_total", result="refused") == 1)("fraudlab_plans_total", result="refused") == 1


def test_refused_requests_are_counted_and_not_logged(server):
    before, lines = server.metrics(), len(server.lines())
    for _ in range(50):
        assert server.ask("POST", "/v1/score", {}, key="")[0] == 401
        assert server.ask("POST", "/v1/score", b"{")[0] == 400
        assert server.ask("GET", f"/{_}/nowhere")[0] == 404
    after = server.metrics(lambda m: m("fraudlab_requests_total", status="401") - before("fraudlab_requests_total", status="401") == 50)
    for labels in ({"route": "/v1/score", "status": "401"}, {"route": "/v1/score", "status": "400"}, {"route": "other", "status": "404"}):
        assert after("fraudlab_requests_total", **labels) - before("fraudlab_requests_total", **labels) == 50, labels
    assert len(server.lines()) == lines


def test_a_card_number_sent_anywhere_is_in_no_metric_and_no_line(server):
    url, payment = "/v1/score", paid(server, "canary")
    for name in payment:
        server.ask("POST", url, payment | {name: CANARY})
    assert server.ask("POST", url, payment | {"payment_id": "canary-id", "payer_id": CANARY})[0] == 200, "it becomes a token"
    for body in ([payment] * 2, {CANARY: 1}, [CANARY], CANARY, int(CANARY), CANARY.encode() + b"{", payment | {CANARY: CANARY}):
        for path in (url, "/v1/labels", "/v1/rollout"):
            server.ask("POST", path, body)
    for field in ("champion", "challenger", "why"):
        server.ask("POST", "/v1/rollout", {"champion": "no such bundle", field: CANARY})
    for path in (f"/{CANARY}", f"{url}/{CANARY}", f"{url}?{CANARY}=1", f"{url}?explain={CANARY}", f"/metrics?{CANARY}"):
        server.ask("POST", path, payment)
        server.ask("GET", path)
    server.ask(CANARY, url, payment)
    names = (
        "x_request_id",
        "idempotency_key",
        "x_deadline_ms",
        "traceparent",
        "tracestate",
        "content_type",
        "user_agent",
        "cookie",
        "x_api_key",
    )
    for name in names:
        assert server.ask("POST", url, paid(server, "canary-header"), **{name: CANARY})[0] in (200, 400, 401, 415, 504)
    server.ask("POST", url, payment, traceparent=f"00-{TRACE}-{CANARY}-01", tracestate=f"shop={CANARY}")
    server.ask("POST", "/v1/rollout", {"champion": "x"}, traceparent=f"00-{TRACE}-{CANARY}-01")
    server.ask("POST", url, payment, key=CANARY)
    time.sleep(0.6)  # until the other worker has handed over, too
    seen = server.ask("GET", "/metrics")[1].decode() + server.log.read_text()
    assert "card_number" in seen, "the refusals are counted"
    assert CANARY not in seen


def test_labels_are_bounded(server):
    found = server.metrics()
    assert found.values("fraudlab_requests_total", "route") <= {*ROUTES, "other"}
    assert all(re.fullmatch(r"[1-5]\d\d", status) for status in found.values("fraudlab_requests_total", "status"))
    assert found.values("fraudlab_decisions_total", "decision") <= {"approve", "challenge", "decline"}
    assert found.values("fraudlab_decisions_total", "bundle") == {server.bundle.version}
    assert all(re.fullmatch(r"[a-z_]{3,30}", code) for code in found.values("fraudlab_refusals_total", "code"))
    labels = {name for s in found.samples if s.name.startswith("fraudlab_") for name in s.labels}
    told = {"route", "status", "decision", "bundle", "to", "code", "stage", "kind", "payer", "result", "role", "model", "le", "pid"}
    assert labels <= told


# ---------------------------------------------------------------- dashboard and alerts

WORDS = {"by", "ignoring", "group_left", "on"}


def check(promql: str, found: Metrics):
    """Whether `/metrics` has what an expression asks for: metrics, labels, and the values that are named."""
    text = promql.replace("$__rate_interval", "5m").replace("$instance", ".*")
    for name, matchers in re.findall(r"(\w+)\{([^}]*)\}", text):
        assert name in found.names, f"/metrics has no {name}: {promql}"
        for label, how, value in re.findall(r'(\w+)(=~|!=|=)"([^"]*)"', matchers):
            if label != "instance" and how == "=":
                assert value in found.values(name, label), f"{name} has no {label}={value}"
            elif label != "instance":
                assert found.values(name, label), f"{name} has no label {label}"
    text = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\b(by|ignoring) \([^)]*\)", "", text)
    used = [m[0] for m in re.finditer(r"[a-zA-Z_]\w*\b(?!\s*\()", text) if m[0] not in WORDS]
    assert used, f"no metric in {promql}"
    assert set(used) <= found.names, f"/metrics has no {set(used) - found.names}"
    labels = {label for name in used for s in found.samples if s.name == name for label in s.labels} | {"instance"}
    grouped = {label.strip() for names in re.findall(r"\bby \(([^)]*)\)", promql) for label in names.split(",")}
    assert grouped <= labels, f"no label {grouped - labels}: {promql}"


def test_the_dashboard_asks_for_what_there_is(server):
    dashboard, found = json.loads((ROOT / "docs/grafana/scorer.json").read_text()), server.metrics()
    assert dashboard["schemaVersion"] >= 39
    variables = {v["name"]: v for v in dashboard["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    check(variables["instance"]["definition"].removeprefix("label_values(").partition(",")[0], found)
    rows = [p["title"] for p in dashboard["panels"] if p["type"] == "row"]
    panels = [p for p in dashboard["panels"] if p["type"] != "row"]
    assert len(rows) == len(set(rows)) == 8
    assert len({p["id"] for p in dashboard["panels"]}) == len(dashboard["panels"])
    expressions = [t["expr"] for p in panels for t in p["targets"]] + [a["expr"] for a in dashboard["annotations"]["list"]]
    for expression in expressions:
        check(expression, found)
    for p in panels:
        assert p["title"]
        assert all(t["datasource"]["uid"] == "${datasource}" for t in (p, *p["targets"]))
        assert 0 <= p["gridPos"]["x"] <= 24 - p["gridPos"]["w"]
    shown = set(re.findall(r"fraudlab_\w+", " ".join(expressions)))
    shown = {name for name in found.names if name.startswith("fraudlab_")} - shown
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in shown}
    assert not {f for f in families if f not in " ".join(expressions)}, "a metric that nobody sees"


def test_alerts_ask_for_what_there_is(server):
    found = server.metrics()
    (group,) = yaml.safe_load((ROOT / "docs/grafana/alerts.yaml").read_text())["groups"]
    assert len({rule["alert"] for rule in group["rules"]}) == len(group["rules"]) >= 8
    for rule in group["rules"]:
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert set(rule["annotations"]) == {"summary", "description"}
        check(" ".join(rule["expr"].split()), found)


@pytest.mark.parametrize(
    "promql", ["rate(fraudlab_gone_total[5m])", 'fraudlab_ready{role="x"}', "sum by (colour) (fraudlab_ready)", "1 + 1"]
)
def test_the_check_finds_what_is_not_there(server, promql):
    with pytest.raises(AssertionError):
        check(promql, server.metrics())


# ---------------------------------------------------------------- in this process


@pytest.fixture
def service(tmp_path):
    """A service whose challenger scores in the shadow; its two bundles share one state."""
    folder, keys = tiny_bundle(tmp_path)
    bundle = load(folder, keys.public)
    signing = create_key(tmp_path / "audit", ed25519=True)

    def opened(name: str, rollout: Rollout) -> Scorer:
        return Scorer(bundle, rollout.state(bundle, f"lmdb:{tmp_path}/state.lmdb"))

    rollout = Rollout(opened, tmp_path / "plan.json", AuditLog(tmp_path / "log", signing.private))
    rollout.begin(rollout.prepare(Plan("tiny", challenger="tiny")))
    write_plan(rollout.path, rollout.now.plan)
    found = Service(lambda: rollout, Access())
    found.rollout = rollout
    found._read_as(bundle)
    yield found
    rollout.close()


def post(service: Service, payment, **headers: str) -> int:
    """Send a payment through the door."""
    sent = []

    async def receive():
        return {"type": "http.request", "body": json.dumps(payment).encode()}

    async def send(message):
        sent.append(message)

    given = [(b"content-type", b"application/json"), (b"host", b"127.0.0.1"), *((k.encode(), v.encode()) for k, v in headers.items())]
    scope = {"type": "http", "method": "POST", "path": "/v1/score", "query_string": b"explain=false", "headers": given}
    asyncio.run(Door(None, service)(scope | {"server": ("127.0.0.1", 80)}, receive, send))
    return sent[0]["status"]


def counted() -> Metrics:
    observability.flush()
    return Metrics(prometheus_client.generate_latest().decode())


@pytest.fixture
def spans():
    """Spans that end while a test runs."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    observability.trace_with(provider)
    yield exporter
    observability.trace_with(None)


def test_a_request_is_a_span_with_its_stages_as_children(service, spans):
    payment = example(service.rollout.now.champion.bundle) | {"payer_id": CANARY, "payee_id": "shop-17"}
    assert (
        post(service, payment, **{"x-request-id": "r-1", "traceparent": f"00-{TRACE}-b7ad6b7169203331-01", "tracestate": f"a={CANARY}"})
        == 200
    )
    *children, whole = spans.get_finished_spans()
    assert list(dict.fromkeys(s.name for s in children)) == ["read", "decode", "queue", "score", "audit", "encode", "send"]
    assert {s.parent.span_id for s in children} == {whole.context.span_id}
    assert all(a.end_time == b.start_time for a, b in pairwise(children)), "one ends where the next begins"
    assert (whole.name, whole.kind) == ("POST /v1/score", trace.SpanKind.SERVER)
    assert f"{whole.context.trace_id:032x}" == TRACE
    assert f"{whole.parent.span_id:016x}" == "b7ad6b7169203331"
    about = dict(whole.attributes)
    assert about["fraudlab.request_id"] == "r-1"
    assert about["fraudlab.bundle"] == (service.rollout.now.champion.bundle.version,)
    assert about["fraudlab.decision"][0] in ("approve", "challenge", "decline")
    assert about["http.response.status_code"] == 200
    told = " ".join(s.to_json() for s in (*children, whole))
    assert CANARY not in told
    assert "shop-17" not in told


def test_a_refusal_has_a_span_and_a_failure_is_an_error(service, spans, monkeypatch):
    assert post(service, {}) == 422
    monkeypatch.setattr(service.rollout.log, "append", lambda record: (_ for _ in ()).throw(AuditError("no room")))
    assert post(service, example(service.rollout.now.champion.bundle)) == 503
    refused, failed = (s for s in spans.get_finished_spans() if s.kind == trace.SpanKind.SERVER)
    assert (refused.attributes["http.response.status_code"], refused.status.is_ok) == (422, True)
    assert (failed.attributes["http.response.status_code"], failed.status.is_ok) == (503, False)


def test_a_trace_that_is_not_sampled_has_no_spans(service, spans):
    provider = TracerProvider(sampler=sampling.ParentBased(sampling.ALWAYS_ON))
    provider.add_span_processor(SimpleSpanProcessor(spans))
    observability.trace_with(provider)
    assert post(service, example(service.rollout.now.champion.bundle), traceparent=f"00-{TRACE}-b7ad6b7169203331-00") == 200
    assert not spans.get_finished_spans()


@pytest.mark.parametrize("given", ["nonsense", f"00-{'0' * 32}-b7ad6b7169203331-01", f"00-{TRACE}-{CANARY}-01", "é"])
def test_what_is_no_traceparent_begins_a_trace(service, spans, given):
    assert post(service, example(service.rollout.now.champion.bundle), traceparent=given) == 200
    whole = spans.get_finished_spans()[-1]
    assert whole.parent is None
    assert f"{whole.context.trace_id:032x}" not in (TRACE, "0" * 32)


def test_without_a_provider_there_are_no_spans(service, monkeypatch):
    observability.trace_with(None)
    monkeypatch.setattr(observability, "_begin_span", None)  # would fail if it were called
    assert post(service, example(service.rollout.now.champion.bundle)) == 200


def test_shadows_fallbacks_and_failures_are_counted(service, monkeypatch):
    rollout, before = service.rollout, counted()
    paid = [example(rollout.now.champion.bundle) | {"payment_id": f"p{i}", "payer_id": f"payer-{i % 4}"} for i in range(6)]
    for payment in paid[:4]:
        assert post(service, payment) == 200
    assert rollout.shadow_one()
    monkeypatch.setattr(Scorer, "again", lambda scorer, look: 1 / 0)
    assert rollout.shadow_one()
    rollout.shadows.clear()
    monkeypatch.setattr("fraudlab.serving.rollout.SHADOWS", 0)
    assert post(service, paid[4]) == 200
    rollout.now.champion.breaker.until = float("inf")
    assert post(service, paid[5]) == 200
    service.tell()
    after = counted()
    assert (after("fraudlab_breaker_open"), after("fraudlab_missed_payments")) == (1, 1)
    assert after("fraudlab_audit_waiting") == 0
    version = rollout.now.champion.bundle.version

    def added(name: str, **labels: str) -> float:
        return after(name, **labels) - (before(name, **labels) if name in before.names else 0)

    assert [added("fraudlab_shadows_total", result=r) for r in ("scored", "failed", "dropped")] == [1, 1, 2]
    assert [added("fraudlab_payers_total", payer=p) for p in ("new", "known", "none")] == [4, 1, 0]
    assert added("fraudlab_fallbacks_total", kind=NO_STATE) == 1
    assert added("fraudlab_decisions_total", bundle=version, to="shadow") == 1
    assert added("fraudlab_decisions_total", bundle=version, to="caller") == 6
    rollout.now = rollout.now._replace(plan=Plan("tiny", challenger="tiny", canary=0.5))
    rollout._roll_back("it is a test")
    rollout.now = rollout.now._replace(plan=Plan("tiny", killed=True))
    assert post(service, paid[0]) == 200
    monkeypatch.setattr(rollout.log, "append", lambda record: (_ for _ in ()).throw(AuditError("no room")))
    assert post(service, paid[0]) == 503
    service.tell()
    after = counted()
    assert added("fraudlab_plans_total", result="rolled_back") == 1
    assert added("fraudlab_fallbacks_total", kind="kill_switch") == 1
    assert added("fraudlab_audit_appends_total", result="failed") == 1
    assert added("fraudlab_refusals_total", code="no_audit") == 1
    assert (after("fraudlab_killed"), after("fraudlab_audit_waiting")) == (1, 1)
    rollout.unlogged.clear()


def test_a_new_plan_changes_what_serves():
    def bundle(version: str) -> SimpleNamespace:
        return SimpleNamespace(version=version, model={"name": "m"})

    observability.tell_serving(bundle("v1"), bundle("v2"))
    observability.tell_serving(bundle("v2"))
    now = {(s.labels["bundle"], s.labels["role"]) for s in counted().samples if s.name == "fraudlab_serving" and s.value}
    assert now == {("v2", "champion")}


def test_bundles_beyond_those_that_are_told_apart_are_others(monkeypatch):
    monkeypatch.setattr(observability, "_BUNDLES", set())
    assert [observability.bundle_label(f"v{i}") for i in range(32)] == [f"v{i}" for i in range(32)]
    assert observability.bundle_label("v32") == "other"
    assert observability.bundle_label("v0") == "v0"


def test_gauges_of_workers_that_are_no_more_are_forgotten(tmp_path):
    """Each process of prometheus_client's has its files; a killed one leaves them."""
    tell = "from prometheus_client import Gauge; Gauge('g', 'a gauge', multiprocess_mode='livesum').set(1); import os; os._exit(9)"
    environment = {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", tell], env=environment)
    (left,) = tmp_path.glob("gauge_livesum_*.db")
    forget = "from fraudlab.serving.observability import forget_the_dead as f, IN_FLIGHT; f(); f(); print(IN_FLIGHT)"
    subprocess.run([sys.executable, "-c", forget], env=environment | {"PYTHONPATH": str(ROOT)}, check=True, stdout=subprocess.DEVNULL)
    assert not left.exists()
