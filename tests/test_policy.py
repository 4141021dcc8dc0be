"""A policy decides as a literal reading of its file does, and what is wrong with one is said before it decides anything."""

import hashlib
import json
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_bundle import FIELDS, tiny_bundle

from fraudlab.data.contract import Field
from fraudlab.evaluation.metrics import simulate_scores
from fraudlab.governance import policy as policies
from fraudlab.governance import reason_texts
from fraudlab.governance.policy import DECISIONS, DEFAULT, check, compiled, from_dict, outcomes, read, to_dict
from fraudlab.governance.signing import Refused, sign
from fraudlab.serving.bundle import CARD, load

ROOT = Path(__file__).parents[1]
OF = [Field("channel", "categorical"), Field("distance", "numeric"), Field("abroad", "boolean"), Field("note", "text", personal=True)]
KINDS = {"amount": (0.0, 50.0, 200.0), "currency": ("EUR", "USD"), "channel": ("web", "shop", None), "distance": (0.0, 3.5, None)}
KINDS |= {"abroad": (True, False, None)}


@st.composite
def conditions(draw) -> dict:
    found = {}
    for name in draw(st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=3, unique=True)):
        values = [v for v in KINDS[name] if v is not None]
        ways = ["equals", "one_of", *["between"] * (name in ("amount", "distance"))]
        way = draw(st.sampled_from(ways))
        if way == "equals":
            found[name] = {"equals": draw(st.sampled_from(values))}
        elif way == "one_of":
            found[name] = {"one_of": draw(st.lists(st.sampled_from(values), min_size=1, unique=True))}
        else:
            low, high = sorted(draw(st.lists(st.sampled_from([0.0, 3.5, 50.0, 199.99, 200.0]), min_size=2, max_size=2)))
            found[name] = draw(st.sampled_from([{"min": low}, {"max": high}, {"min": low, "max": high}]))
    return found


@st.composite
def thresholds(draw) -> dict:
    challenge, decline = sorted(draw(st.lists(st.integers(0, 10**6), min_size=2, max_size=2)))
    return {"challenge": challenge / 10**6, "decline": draw(st.sampled_from([decline / 10**6, None]))}


@st.composite
def plain_policies(draw) -> dict:
    wheres = [*draw(st.lists(conditions(), max_size=3)), {}]
    segments = [{"name": f"s{i}", "where": w, **draw(thresholds())} for i, w in enumerate(wheres)]
    rules = [{"where": w, "decision": draw(st.sampled_from(DECISIONS))} for w in (*draw(st.lists(conditions(), max_size=2)), {})]
    return {"name": "p", "purpose": "to try", "segments": segments, "fallback": {**draw(thresholds()), "rules": rules}}


payments = st.fixed_dictionaries({name: st.sampled_from(values) for name, values in KINDS.items()})


def meets(payment: dict, where: dict) -> bool:
    """A file's words, read literally."""
    for name, c in where.items():
        value = payment[name]
        if value is None:
            return False
        if "equals" in c and value != c["equals"]:
            return False
        if "one_of" in c and value not in c["one_of"]:
            return False
        if value < c.get("min", value) or value > c.get("max", value):
            return False
    return True


def by(thresholds: dict, p: float) -> str:
    if thresholds["decline"] is not None and round(p, 6) >= thresholds["decline"]:
        return "decline"
    return "challenge" if round(p, 6) >= thresholds["challenge"] else "approve"


@given(plain_policies(), payments, st.data())
def test_it_decides_as_its_file_says(plain, payment, data):
    policy = from_dict(json.loads(json.dumps(plain)))
    check(policy, OF)
    decide = compiled(policy)
    segment = next(s for s in plain["segments"] if meets(payment, s["where"]))
    for of, fallback in ((segment, ""), (plain["fallback"], "no_state")):
        edges = [t for t in (of["challenge"], of["decline"]) if t is not None]
        near = [t + d for t in edges for d in (-7e-7, -3e-7, 0, 3e-7, 7e-7) if 0 <= t + d <= 1]
        at = [*near, data.draw(st.integers(0, 10**5)) / 10**5]
        found = [decide(payment, p, fallback) for p in sorted(at)]
        assert found == [by(of, p) for p in sorted(at)]
        assert found == sorted(found, key=DECISIONS.index), "a more probable fraud is never treated more mildly"
    rule = next(r for r in plain["fallback"]["rules"] if meets(payment, r["where"]))
    assert decide(payment, None, "kill_switch") == decide(payment, 1.0, "kill_switch") == rule["decision"]


def test_a_field_that_is_not_there_meets_nothing():
    plain = to_dict(DEFAULT)
    plain["segments"][0]["where"] = {"abroad": {"equals": False}}
    decide = compiled(from_dict(plain))
    assert decide({}, 0.05) == decide({"abroad": None}, 0.05) == "approve"
    assert decide({"abroad": False}, 0.05) == "challenge"


@pytest.mark.parametrize("fallback", ["", "no_state"])
def test_no_probability_is_no_approval(fallback):
    decide = compiled(DEFAULT)
    for wrong, error in ((float("nan"), ArithmeticError), (-0.5, ArithmeticError), (None, TypeError)):
        with pytest.raises(error):
            decide({"amount": 5.0}, wrong, fallback)
    with pytest.raises(ValueError, match="'no_state' or 'kill_switch'"):
        decide({"amount": 5.0}, 0.1, "off")


def test_the_version_is_a_hash_of_all_of_it():
    content = json.dumps(to_dict(DEFAULT), sort_keys=True).encode()
    assert DEFAULT.version == hashlib.sha256(content).hexdigest()[:12]
    plain = to_dict(DEFAULT)
    assert from_dict(dict(reversed(plain.items()))).version == DEFAULT.version
    seen = {DEFAULT.version}
    for change in (
        {"name": "other"},
        {"purpose": "other"},
        {"segments": plain["segments"][1:]},
        {"segments": [plain["segments"][0] | {"decline": 0.31}, plain["segments"][1]]},
        {"segments": [plain["segments"][0] | {"where": {"amount": {"min": 201}}}, plain["segments"][1]]},
        {"fallback": plain["fallback"] | {"rules": plain["fallback"]["rules"][1:]}},
    ):
        seen.add(from_dict(plain | change).version)
    assert len(seen) == 7
    as_whole = from_dict(plain | {"segments": [plain["segments"][0] | {"where": {"amount": {"min": 200}}}, plain["segments"][1]]})
    assert as_whole.version == DEFAULT.version, "200 and 200.0 are the same threshold"


def test_the_files_are_the_librarys_defaults():
    assert read(ROOT / "params/policies/default.yaml") == DEFAULT
    assert reason_texts.read(ROOT / "params/policies/reasons.yaml") == reason_texts.DEFAULT


@pytest.mark.parametrize("path", sorted((ROOT / "params/policies").glob("*.yaml")), ids=lambda p: p.name)
def test_every_file_is_read(path):
    found = reason_texts.read(path) if "codes:" in path.read_text() else read(path)
    assert found.purpose


def changed(**changes) -> dict:
    plain = to_dict(DEFAULT)
    first = plain["segments"][0] | changes.pop("first", {})
    rest = changes.pop("rest", plain["segments"][1])
    fallback = plain["fallback"] | changes.pop("fallback", {})
    return plain | {"segments": [first, rest], "fallback": fallback} | changes


WRONG = {
    "not a policy": (["a"], "Expected `object`"),
    "unknown key": (changed(author="me"), "unknown field `author`"),
    "no purpose": ({k: v for k, v in to_dict(DEFAULT).items() if k != "purpose"}, "required field `purpose`"),
    "nothing": (changed(segments=[]), "The last segment must take every payment"),
    "not all": (changed(rest=to_dict(DEFAULT)["segments"][0] | {"name": "b"}), "The last segment must take every payment"),
    "out of reach": (changed(first={"where": {}}), "segment number 1 has no 'where'"),
    "names": (changed(first={"name": "all"}), "Two segments are called 'all'"),
    "order": (changed(first={"challenge": 0.5}), "declined before it is challenged"),
    "order without state": (changed(fallback={"decline": 0.01}), "thresholds of fallback"),
    "above 1": (changed(first={"decline": 1.5}), "from 0 to 1"),
    "nan": (changed(first={"decline": float("nan")}), "from 0 to 1"),
    "too fine": (changed(first={"challenge": 0.0000001}), "at most 6 decimals"),
    "text": (changed(first={"challenge": "0.1"}), "Expected `float`"),
    "no rule": (changed(fallback={"rules": []}), "last rule of the fallback"),
    "rule for some": (changed(fallback={"rules": to_dict(DEFAULT)["fallback"]["rules"][:1]}), "last rule of the fallback"),
    "decision": (changed(fallback={"rules": [{"decision": "maybe"}]}), "'maybe'"),
    "no condition": (changed(first={"where": {"amount": {}}}), "give one of these three"),
    "two ways": (changed(first={"where": {"amount": {"min": 3, "equals": 3}}}), "give one of these three"),
    "empty range": (changed(first={"where": {"amount": {"min": 3, "max": 2}}}), "Swap them"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_said(what):
    plain, message = WRONG[what]
    with pytest.raises(ValueError, match=message):
        from_dict(plain)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"amuont": {"min": 3}}, "Did you mean 'amount'"),
        ({"payer_id": {"equals": "anna"}}, "no field that a policy may ask"),
        ({"event_time": {"min": 3}}, "no field that a policy may ask"),
        ({"note": {"equals": "x"}}, "no field that a policy may ask"),
        ({"channel": {"max": 3}}, "give equals or one_of"),
        ({"channel": {"equals": False}}, "in quotes"),
        ({"channel": {"one_of": ["web", 3]}}, "compares 'channel' with 3"),
        ({"distance": {"equals": "3"}}, "it is a number"),
        ({"abroad": {"one_of": [1]}}, "it is true or false"),
    ],
)
@pytest.mark.parametrize("place", ["segment", "rule"])
def test_conditions_fit_the_payments(where, message, place):
    rules = [{"decision": "decline", "where": where}, {"decision": "approve"}]
    plain = changed(first={"where": where}) if place == "segment" else changed(fallback={"rules": rules})
    with pytest.raises(ValueError, match=message):
        check(from_dict(plain), OF)


def test_a_file_that_is_no_yaml_is_refused(tmp_path):
    (tmp_path / "p.yaml").write_text("name: [")
    with pytest.raises(ValueError, match="not valid YAML"):
        read(tmp_path / "p.yaml")
    (tmp_path / "p.yaml").write_text("name: x")
    with pytest.raises(ValueError, match=r"p\.yaml: Object missing required field"):
        read(tmp_path / "p.yaml")


def test_outcomes_are_counted_payment_by_payment():
    scored = simulate_scores().rename({"score": "probability"})
    found, decide = outcomes(DEFAULT, scored), compiled(DEFAULT)
    literal: dict[tuple, list] = {}
    for p in scored.iter_rows(named=True):
        of = literal.setdefault(("large" if p["amount"] >= 200 else "all", decide(p, p["probability"])), [0, 0, 0.0])
        of[0], of[1], of[2] = of[0] + 1, of[1] + p["is_fraud"], of[2] + p["amount"] * p["is_fraud"]
    assert {(r["segment"], r["decision"]): (r["payments"], r["frauds"]) for r in found.iter_rows(named=True)} == {
        k: (n, frauds) for k, (n, frauds, _) in literal.items()
    }
    assert found["fraud_amount"].sum() == pytest.approx(scored.filter("is_fraud")["amount"].sum())
    assert found.group_by("segment").agg(pl.col("share").sum())["share"].to_list() == pytest.approx([1, 1])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tiny_bundle(tmp_path_factory.mktemp("lab"))


def test_a_bundle_without_a_policy_has_the_default(made):
    bundle = load(made[0], made[1].public)
    assert from_dict(bundle.policy) == DEFAULT
    assert reason_texts.from_dict(bundle.reasons) == reason_texts.DEFAULT
    assert bundle.calibration["knots"] == [[-14, -14], [14, 14]]


def test_a_bundles_version_covers_what_it_says(made, tmp_path):
    plain = to_dict(DEFAULT) | {"name": "mine"}
    plain["segments"] = [{"name": "abroad", "where": {"abroad": {"equals": True}}, "challenge": 0, "decline": None}, *plain["segments"]]
    mine = from_dict(plain)
    folder, keys = tiny_bundle(tmp_path / "other", policy=mine)
    other = load(folder, keys.public)
    assert from_dict(other.policy) == mine
    assert other.version != load(made[0], made[1].public).version


def test_a_policy_for_other_payments_is_not_packed(tmp_path):
    assert "colour" not in {f.name for f in FIELDS}
    plain = changed(first={"where": {"colour": {"equals": "red"}}})
    with pytest.raises(ValueError, match="'colour' is no field"):
        tiny_bundle(tmp_path, policy=from_dict(plain))


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("policy", {"name": "none"}, "required field"),
        ("policy", changed(first={"where": {"colour": {"equals": "red"}}}), "'colour' is no field"),
        ("calibration", {"knots": [[-14, 14], [14, -14]]}, "knots of a calibration"),
        ("reasons", {"purpose": "", "codes": {}}, "There is no reason 'amount'"),
    ],
)
def test_a_bundle_that_was_signed_with_what_does_not_fit_is_refused(tmp_path, entry, value, message):
    folder, keys = tiny_bundle(tmp_path)
    card = json.loads((folder / CARD).read_text())
    (folder / CARD).write_text(json.dumps(card | {entry: value}))
    sign(folder, keys.private)
    with pytest.raises(Refused, match=message):
        load(folder, keys.public)


def test_margin_is_half_of_the_last_decimal():
    assert policies.MARGIN == 0.5 * 10**-policies.DIGITS
