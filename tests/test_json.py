"""JSON in slices is the same as at once, whatever is cut where. Pure."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

import cc2api

TEXTS = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from('"\\\n\u2028\U0001f600'))
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXTS,
    lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner),
)
SOME = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(params=[25, 40, 100])
def _tiny_slices(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut everywhere: an escape takes six characters, half an emoji too."""
    monkeypatch.setattr(cc2api, "SLICE_CHARS", request.param // 2)
    monkeypatch.setattr(cc2api, "LARGE_CHARS", request.param)


@pytest.mark.usefixtures("_tiny_slices")
@SOME
@given(VALUES, st.booleans())
def test_pieces_are_what_json_writes(value: Any, sort_keys: bool) -> None:
    written = "".join(cc2api.json_pieces(value, sort_keys=sort_keys))
    assert written == json.dumps(value, sort_keys=sort_keys)


@pytest.mark.usefixtures("_tiny_slices")
@SOME
@given(VALUES, st.booleans(), st.sampled_from([None, 1]))
def test_slices_are_read_as_json_reads_them(
    value: Any, ascii_only: bool, indent: int | None
) -> None:
    raw = json.dumps(value, ensure_ascii=ascii_only, indent=indent).encode()
    assert cc2api.load_in_slices(raw) == json.loads(raw)


BROKEN = [
    '{"a": NaN}',
    '{"a": -Infinity}',
    '{"a": 1e999}',
    '{"a": "\\ud83d"}',
    '{"a": "\\ud83d and so on, for more than a slice"}',
    '{"a": "\\ude00\\ud83d"}',
    '{"a": "b',
    '{"a": "b\\',
    '{"a": "b\\u12',
    '{"a": "\\x"}',
    '{"a": "line\nend"}',
    '{"a": 1,}',
    '{"a" 1}',
    "[1 2]",
    "[",
    "",
    '{"a": 1} x',
]


@pytest.mark.usefixtures("_tiny_slices")
@pytest.mark.parametrize("text", BROKEN)
def test_what_is_refused_at_once_is_refused_in_slices(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - whatever its words
        cc2api.load_in_slices(text.encode())


@pytest.mark.usefixtures("_tiny_slices")
@pytest.mark.parametrize("raw", [b'{"a": "\xff"}', b'{"a": "\xed\xa0\xbd"}', b'{"a": "\xf0\x9f'])
def test_what_is_not_utf_8_is_refused_in_slices(raw: bytes) -> None:
    with pytest.raises(ValueError, match="utf-8"):
        cc2api.load_in_slices(raw)


def test_a_body_of_lists_alone_is_refused() -> None:
    body = b"[" + b"[]," * (cc2api.MAX_CONTAINERS + 1) + b"0]"
    with pytest.raises(cc2api.InvalidRequest, match="over 400000 lists and objects"):
        cc2api.parse_json(body)


def test_a_deep_body_is_refused() -> None:
    for depth in (200, 100_000, 2_000_000):
        with pytest.raises(cc2api.InvalidRequest):
            cc2api.parse_json(b'{"a":' * depth)
        with pytest.raises(cc2api.InvalidRequest):
            cc2api.parse_json(b'{"a":' + b"[" * depth + b"]" * depth + b"}")


TEXT_OF_LINES = "some words of a line, as long as lines are in most files of text\n" * 20_000
LARGE: dict[str, Any] = {
    "one text": [{"type": "text", "text": TEXT_OF_LINES}],
    "other letters": [{"type": "text", "text": "\u0436\u0438\u0437\u043d\u044c " * 200_000}],
    "many texts": [{"type": "text", "text": "some words " * 20}] * 8_000,
    "many lists": [{"type": "text", "text": "a", "x": [[]] * 20_000}],
    "an image": [
        {
            "type": "image",
            "source": {"type": "base64", "media_type": "image/gif", "data": "R0lGODlh" * 200_000},
        }
    ],
}


@pytest.mark.parametrize("name", LARGE)
def test_nothing_large_is_dealt_with_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one call in C deals with is bounded, so that other threads have their turn.

    tests/bench/large_bodies.py measures it.
    """
    body = {"model": "m", "max_tokens": 1, "messages": [{"role": "user", "content": LARGE[name]}]}
    raw = json.dumps(body, ensure_ascii=name == "one text").encode()
    dumps = json.dumps

    def loads_little(text: str) -> None:
        raise AssertionError("all at once")

    def dumps_little(value: Any, **more: Any) -> str:
        written = dumps(value, **more)
        assert len(written) < 12 * cc2api.SLICE_CHARS
        return written

    monkeypatch.setattr(json, "loads", loads_little)
    monkeypatch.setattr(json, "dumps", dumps_little)
    turn = cc2api.parse_messages_request(cc2api.parse_json(raw))
    line = cc2api.to_stdin_message(turn, 0, "m")
    assert "".join(cc2api.json_pieces(line)) == dumps(line)
