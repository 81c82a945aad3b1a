"""Answers of every form that upstream may give, for the Responses API's assemblers of events."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from scripted_api import Reply

import cc2api

JsonObject = dict[str, Any]
FUNCTION: JsonObject = {"type": "function", "name": "f", "strict": False, "parameters": {}}
TOOLS: list[JsonObject] = [
    FUNCTION,
    {"type": "custom", "name": "c"},
    {
        "type": "namespace",
        "name": "ns",
        "description": "d",
        "tools": [FUNCTION, {"type": "custom", "name": "c"}],
    },
    {"type": "tool_search", "execution": "client", "description": "d", "parameters": {}},
]
_TEXT = st.one_of(st.sampled_from(["", " ", "\n\n", "a b", "\u2028é 😀"]), st.text(max_size=12))
_INPUT: st.SearchStrategy[JsonObject] = st.one_of(
    st.just({}),
    st.dictionaries(st.sampled_from(["input", "x"]), st.one_of(_TEXT, st.integers(), st.none())),
)
_BLOCKS = st.one_of(
    _TEXT.map(lambda text: {"type": "text", "text": text}),
    _TEXT.map(lambda text: {"type": "thinking", "thinking": text, "signature": "c2ln"}),
    st.just({"type": "redacted_thinking", "data": "xyz"}),
    st.builds(
        lambda name, given: {"type": "tool_use", "name": name, "input": given},
        st.sampled_from(["f", "c", "ns__f", "ns__c", "tool_search", "unasked"]),
        _INPUT,
    ),
    st.just({"type": "server_tool_use", "id": "srvtoolu_1", "name": "web_search", "input": {}}),
)
_REASONS = st.sampled_from(
    ["end_turn", "tool_use", "max_tokens", "refusal", "pause_turn", "model_context_window_exceeded"]
)


@st.composite
def replies(draw: st.DrawFn) -> Reply:
    """Draw an answer of upstream's."""
    blocks = draw(st.lists(_BLOCKS, max_size=6))
    for number, block in enumerate(blocks):
        if block["type"] == "tool_use":
            block["id"] = f"toolu_{number}"
    details = draw(st.sampled_from([None, {"type": "refusal", "explanation": "not that"}]))
    return Reply(blocks=blocks, stop_reason=draw(_REASONS), stop_details=details)


def asked() -> cc2api.ResponsesEncoder:
    body = {"model": "m", "input": "hi", "tools": TOOLS}
    return cc2api.parse_responses_request(body)[1]


@st.composite
def streams(draw: st.DrawFn) -> list[JsonObject]:
    """Draw a stream of the Responses API, with silences, and failures in the midst of it."""
    events = list(draw(replies()).events("m"))
    writer = asked()
    fails_at = draw(st.one_of(st.none(), st.integers(0, len(events) - 1)))
    silences = draw(st.sets(st.integers(0, len(events)), max_size=3))
    written: list[JsonObject] = []
    for place, event in enumerate(events):
        if place in silences:
            written += writer.keepalive()
        if place == fails_at:
            return written + writer.error_events(cc2api.ApiError("broken"), {})
        written += writer.feed(event)
    return written
