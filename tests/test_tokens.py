"""Tokens: the same for one value as in a table, apart for different ones; every card number is found, in every form."""

import json
import logging
import multiprocessing
import string
import unicodedata

import polars as pl
import pytest
from hypothesis import assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from fraudlab.core.private import alone, read_private, write_private
from fraudlab.data.tokens import NoCards, Ring, looks_like_card, luhn, open_keys, personal, retire, rotate, scrub, tokenised

# issuers' ranges, by first digits and lengths, written down anew
RANGES = [
    (range(4, 5), (13, 16, 19)),
    (range(51, 56), (16,)),
    (range(2221, 2721), (16,)),
    (range(34, 35), (15,)),
    (range(37, 38), (15,)),
    (range(6011, 6012), (16, 17, 18, 19)),
    (range(644, 660), (16, 17, 18, 19)),
    (range(3528, 3590), (16, 17, 18, 19)),
    (range(300, 306), (14,)),
    (range(36, 37), (14,)),
    (range(38, 39), (14,)),
    (range(62, 63), (16, 17, 18, 19)),
    (range(50, 51), tuple(range(12, 20))),
    (range(56, 70), tuple(range(12, 20))),
]
SEPARATORS = " -._\u00a0\u2009\u2013\uff0d\u00b7\u200b"
ZEROS = [chr(c) for c in range(0x110000) if unicodedata.decimal(chr(c), None) == 0]  # of every script


def check_digit(digits: str) -> str:
    """Luhn's formula as ISO/IEC 7812-1 tells it, digit by digit from the right."""
    total = 0
    for place, digit in enumerate(map(int, reversed(digits))):
        doubled = digit * 2 if place % 2 == 0 else digit
        total += doubled - 9 if doubled > 9 else doubled
    return str(-total % 10)


@st.composite
def card_numbers(draw) -> str:
    prefixes, lengths = draw(st.sampled_from(RANGES))
    prefix, length = str(draw(st.sampled_from(prefixes))), draw(st.sampled_from(lengths))
    rest = draw(st.text(string.digits, min_size=length - len(prefix) - 1, max_size=length - len(prefix) - 1))
    return prefix + rest + check_digit(prefix + rest)


@st.composite
def written(draw) -> str:
    """A card number in some form: groups, separators, scripts."""
    number = draw(card_numbers())
    form = draw(st.sampled_from(["plain", "fours", "anywhere"]))
    separator = st.sampled_from(SEPARATORS)
    if form == "fours":
        between = draw(separator)
        number = between.join(number[i : i + 4] for i in range(0, len(number), 4))
    if form == "anywhere":
        number = number[0] + "".join(draw(st.just("") | separator) + digit for digit in number[1:])
    zero = ord(draw(st.sampled_from(["0", "0", *ZEROS])))
    return "".join(chr(zero + int(c)) if c in string.digits else c for c in number)


# what may stand around it: anything that is neither a digit nor a separator beside it, and no word in hexadecimal
outside = st.text(st.characters(exclude_categories=["Nd", "No", "Nl", "Cs", "Cf"], exclude_characters="abcdefABCDEF"), max_size=8)


@given(outside, written(), outside)
@hypothesis_settings(max_examples=600)
def test_every_card_number_is_found(before, number, after):
    text = before + number + after
    assert looks_like_card(text)
    clean = scrub(text)
    assert clean == f"{before}[card number]{after}"
    assert not looks_like_card(clean)


@given(card_numbers())
def test_numbers_are_found_as_numbers(number):
    assert looks_like_card(int(number))
    assert looks_like_card(json.loads(number))
    if len(number) < 16:
        assert looks_like_card(float(number))


@given(card_numbers(), card_numbers(), st.sampled_from([" ", " and ", "\n", ", ", "/", '","']))
def test_two_card_numbers_are_both_taken_out(one, two, between):
    clean = scrub(one + between + two)
    assert one not in clean
    assert two not in clean
    assert not looks_like_card(clean)


@given(card_numbers(), st.from_regex(r"[0-9]{1,4}", fullmatch=True, alphabet=string.digits), st.sampled_from(SEPARATORS), st.booleans())
def test_a_card_number_beside_other_numbers_is_found(number, other, separator, first):
    assert looks_like_card(other + separator + number if first else number + separator + other)


@given(st.text() | st.text(string.digits + SEPARATORS + "af", max_size=80))
@hypothesis_settings(max_examples=400)
def test_scrubbing_any_text_leaves_none(text):
    clean = scrub(text)
    assert not looks_like_card(clean)
    assert scrub(clean) == clean
    if not looks_like_card(text):
        assert clean == text


@given(card_numbers(), st.integers(1, 9))
def test_a_wrong_check_digit_is_no_card_number(number, more):
    assert luhn(number)
    assert not looks_like_card(number[:-1] + str((int(number[-1]) + more) % 10))


@given(st.text("0123456789abcdef", min_size=1, max_size=70))
def test_a_word_in_hexadecimal_is_no_card_number(word):
    assume(not word.isdecimal())
    assert not looks_like_card(word)
    assert not looks_like_card(word.upper())


@given(st.uuids())
def test_a_uuid_is_no_card_number(identifier):
    assert not looks_like_card(f"payment {identifier}: ok")


@given(st.text(string.digits, min_size=20, max_size=60))
def test_twenty_digits_are_no_card_number(digits):
    assert not looks_like_card(digits)


def test_digits_and_separators_alone_are_searched_in_linear_time():
    """Twenty thousand characters of the kinds that are looked at most closely: a search that went back would not end."""
    for text in ("4 " * 10_000, "4" * 20_000, ("4" + " " * 9) * 2_000, "4" + " " * 20_000, ("4" * 19 + " ") * 1_000):
        looks_like_card(text)
        scrub(text)


# tokens


@pytest.fixture
def keys(tmp_path):
    return open_keys(tmp_path / "tokens.json", create=True)


def test_a_table_has_the_tokens_of_its_values(keys):
    values = ["a", "ä", "", "k1.abc", "4111", None, "a"]
    frame = pl.DataFrame({"payer_id": values, "payee_id": values[::-1], "email": values, "amount": range(7)})
    found = tokenised(frame, keys, {"payer_id": "entity", "payee_id": "entity", "email": "email"})

    def token(kind):
        return [None if v is None else keys.token(v, kind) for v in values]

    expected = frame.with_columns(
        payer_id=pl.Series(token("entity")), payee_id=pl.Series(token("entity")[::-1]), email=pl.Series(token("email"))
    )
    assert_frame_equal(found, expected)
    empty = frame.clear()
    assert_frame_equal(tokenised(empty, keys), empty)
    assert list(personal()) == ["payer_id", "payee_id"]


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), unique=True, min_size=2, max_size=20))
@hypothesis_settings(max_examples=50)
def test_tokens_of_different_values_kinds_and_keys_differ(tmp_path_factory, values):
    folder = tmp_path_factory.mktemp("keys")
    rings = [open_keys(folder / name, create=True) for name in ("a.json", "b.json")]
    tokens = [keys.token(v, kind) for keys in rings for v in values for kind in ("entity", "email")]
    assert len(set(tokens)) == 4 * len(values)
    assert all(len(t) == 27 and t.startswith("k1.") and t.isascii() and not looks_like_card(t) for t in tokens)


def test_a_token_is_keyed_blake2s(keys):
    """Written down anew with the standard's parameters: a change of the formula would lose all that is stored."""
    import base64
    import hashlib

    ring = read_private(keys.path, Ring)
    of_kind = hashlib.blake2s(b"entity", digest_size=32, key=ring.keys["k1"]).digest()
    digest = hashlib.blake2s("Zoë".encode(), digest_size=18, key=of_kind).digest()
    assert keys.token("Zoë", "entity") == "k1." + base64.urlsafe_b64encode(digest).decode()


def test_rotation_keeps_old_tokens_findable(keys):
    old = keys.token("a", "entity")
    for i in range(2, 12):
        assert rotate(keys) == f"k{i}"
    again = open_keys(keys.path)
    tokens = again.tokens("a", "entity")
    assert tokens[0] == again.token("a", "entity") == keys.token("a", "entity")
    assert [t.partition(".")[0] for t in tokens] == [f"k{i}" for i in range(11, 0, -1)]
    assert tokens[-1] == old
    retire(keys, "k1")
    assert old not in keys.tokens("a", "entity")
    assert again.refresh()
    assert old not in again.tokens("a", "entity")


def _rotate(path):
    rotate(open_keys(path, create=True))


def test_processes_that_start_and_rotate_together_lose_no_key(tmp_path):
    path = tmp_path / "tokens.json"
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        pool.map(_rotate, [path] * 12)
    ring = read_private(path, Ring)
    assert list(ring.keys) == [f"k{i}" for i in range(1, 14)]
    assert ring.current == "k13"
    assert path.stat().st_mode & 0o777 == 0o600


def test_secrets_are_in_no_text(keys, tmp_path):
    ring = read_private(keys.path, Ring)
    secret = keys.path.read_text().split('"k1": "')[1].split('"')[0]
    shown = [repr(keys), str(keys), repr(ring)]
    for key in (secret[:-4], secret + "!", secret * 2):
        path = tmp_path / "broken.json"
        path.write_text(f'{{"current": "k1", "keys": {{"k1": "{key}"}}}}')
        path.chmod(0o600)
        with pytest.raises(ValueError, match=r"broken\.json") as error:
            open_keys(path)
        shown.append(str(error.value))
    assert not any(secret[:8] in text or repr(ring.keys["k1"])[2:-1] in text for text in shown)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666])
def test_a_file_that_others_can_read_or_write_is_refused(keys, mode):
    keys.path.chmod(mode)
    with pytest.raises(PermissionError, match="chmod 600"):
        open_keys(keys.path)


def test_writing_keeps_the_mode_and_the_last_content(tmp_path):
    path = tmp_path / "deep" / "ring.json"
    with alone(path):
        write_private(path, Ring("k1", {"k1": bytes(32)}))
    with pytest.raises(TypeError):
        write_private(path, object())
    assert read_private(path, Ring).current == "k1"
    assert path.stat().st_mode & 0o777 == 0o600


# logs


@pytest.fixture
def log(caplog):
    caplog.handler.addFilter(guard := NoCards())
    yield logging.getLogger("payments")
    caplog.handler.removeFilter(guard)


def test_log_records_hold_no_card_number(log, caplog):
    card = "4111-1111-1111-1111"
    log.error("of %(who)s", {"who": card})
    log.error("of %s", card, stack_info=True, extra={"payer": card, "number": 4111111111111111, "ok": True})
    log.error(card, "too", "many")
    log.error("%s %s", card)
    try:
        try:
            raise ValueError(card)
        except ValueError as e:
            raise RuntimeError("while scoring") from e
    except RuntimeError:
        log.exception("failed")
    shown = caplog.handler.format(caplog.records[-1])
    assert "ValueError: [card number]" in shown
    assert "RuntimeError: while scoring" in shown
    numbers = ("thread", "process", "created", "msecs", "relativeCreated")
    for record in caplog.records:
        assert "1111" not in str({k: v for k, v in vars(record).items() if k not in numbers})


def test_other_log_records_pass_as_they_are(log, caplog):
    log.warning("%s - %d", "id", 200)
    try:
        raise KeyError("x")
    except KeyError:
        log.exception("failed", extra={"n": 7})
    first, second = caplog.records
    assert first.args == ("id", 200)
    assert second.exc_info is not None
    assert second.n == 7
