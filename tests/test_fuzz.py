"""Any JSON to the parser, any order of events to the assembler: never a crash, never nonsense."""

from __future__ import annotations

import itertools
import json
from typing import Any

from hypothesis import HealthCheck, example, find, given, settings, strategies as st

import cc2api

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=5)
)
words = st.sampled_from(
    [
        *("user", "assistant", "system", "text", "image", "document", "tool_use", "tool_result"),
        *("thinking", "base64", "url", "ephemeral", "1h", "enabled", "adaptive", "t1", "custom"),
        *("json_schema", "auto", "tool", "low", "image/png", "aGk=", "", " ", "function", "{}"),
        *("image_url", "file", "data:image/png;base64,aGk=", "http://x/", "required", "developer"),
    ]
)
names = st.sampled_from(
    [
        *("type", "text", "role", "content", "source", "data", "media_type", "id", "name", "input"),
        *("tool_use_id", "is_error", "cache_control", "ttl", "model", "max_tokens", "messages"),
        *("system", "tools", "tool_choice", "thinking", "budget_tokens", "effort", "stream"),
        *("output_config", "format", "schema", "stop_sequences", "thread", "input_schema"),
        *("signature", "top_p", "metadata", "tool_calls", "tool_call_id", "function", "functions"),
        *("arguments", "response_format", "parallel_tool_calls", "stop", "n", "function_call"),
        *("image_url", "file", "file_data", "json_schema", "reasoning_effort", "stream_options"),
    ]
)
values = st.recursive(
    st.one_of(scalars, words),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.one_of(names, st.text(max_size=3)), inner)
    ),
    max_leaves=25,
)
blocks = st.one_of(
    values,
    st.fixed_dictionaries({"type": words}, optional={"text": st.text(), "content": values}),
    st.fixed_dictionaries(
        {"type": st.just("tool_use"), "id": words, "name": words, "input": st.just({})}
    ),
    st.fixed_dictionaries({"type": st.just("tool_result"), "tool_use_id": words}),
)
messages = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["user", "assistant", "system"]),
            "content": st.one_of(st.text(), st.lists(blocks, max_size=3)),
        }
    ),
    max_size=5,
)
requests = st.one_of(
    st.dictionaries(names, values),
    st.fixed_dictionaries(
        {
            "model": st.just("m"),
            "max_tokens": st.just(5),
            "messages": messages.map(lambda m: [*m, {"role": "user", "content": "hi"}]),
        },
        optional={"system": values, "tools": st.lists(blocks), "thinking": values},
    ),
)
fuzz = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@fuzz
@given(requests, st.text(max_size=20), st.booleans())
def test_any_json_is_a_valid_turn_or_a_400(body: Any, betas: str, login: bool) -> None:
    try:
        turn = cc2api.parse_messages_request(body, betas)
    except cc2api.InvalidRequest:
        return
    turn = cc2api.with_login_caching(turn) if login else turn
    roles = [m.role for m in turn.messages]
    assert roles[-1] == "user"
    assert all(a != b for a, b in itertools.pairwise(roles)), "roles alternate"
    lines = [cc2api.to_stdin_message(turn, index, "m") for index in range(len(turn.messages))]
    sent = json.dumps([lines, cc2api.to_flag_settings(turn, "m")])
    assert sent.count('"cache_control": {"type": "ephemeral"') <= 1, (
        "the CLI sets three of the four"
    )


def test_many_of_the_requests_made_up_here_are_valid() -> None:
    def is_valid(body: Any) -> bool:
        try:
            cc2api.parse_messages_request(body)
        except cc2api.InvalidRequest:
            return False
        return True

    find(requests, is_valid, settings=settings(max_examples=5000, database=None))


@fuzz
@given(requests)
def test_any_chat_request_is_a_valid_turn_or_a_400(body: Any) -> None:
    try:
        cc2api.parse_chat_request(body)
    except cc2api.InvalidRequest:
        return


@fuzz
@given(st.binary(max_size=60))
@example(b'{"a":' * 5000)
@example(b"[" * 200_000)
@example(b'{"a": 1' + b"0" * 5000 + b"}")
@example(b"\xef\xbb\xbf{}")
def test_any_bytes_are_an_object_or_a_400(raw: bytes) -> None:
    try:
        assert isinstance(cc2api.parse_json(raw), dict)
    except cc2api.InvalidRequest:
        return


def event(kind: str, **fields: Any) -> dict[str, Any]:
    return {"type": kind, **fields}


message = {"id": "msg_1", "type": "message", "role": "assistant", "model": "m", "content": []}
usage = {"input_tokens": 1, "output_tokens": 1}
TEXT, TOOL = {"type": "text", "text": ""}, {"type": "tool_use", "id": "t", "name": "f", "input": {}}
events = st.one_of(
    st.sampled_from(
        [
            event("message_start", message={**message, "usage": usage}),
            event("content_block_start", index=0, content_block=TEXT),
            event("content_block_start", index=1, content_block=TOOL),
            event("content_block_delta", index=0, delta={"type": "text_delta", "text": "x"}),
            event("content_block_delta", index=1, delta={"type": "input_json_delta"}),
            event("content_block_delta", index=0, delta={"type": "thinking_delta"}),
            event("content_block_stop", index=0),
            event("message_delta", delta={"stop_reason": None}, usage=usage),
            event("message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": 3}),
            event("message_stop"),
            event("ping"),
        ]
    ),
    st.dictionaries(st.sampled_from(["type", "message", "delta", "index"]), values),
    values,
)
lines = st.one_of(
    st.builds(
        lambda e, p: {"type": "stream_event", "event": e, "parent_tool_use_id": p},
        events,
        st.sampled_from([None, None, None, "toolu_1"]),
    ),
    st.fixed_dictionaries(
        {"type": st.sampled_from(["assistant", "result", "system", "user", "keep_alive"])},
        optional={
            "error": values,
            "result": values,
            "is_error": st.booleans(),
            "api_error_status": values,
            "api_error_type": values,
            "subtype": st.just("model_refusal_no_fallback"),
            "modelUsage": st.just({"m": {"outputTokens": 2}}),
            "errors": values,
        },
    ),
)


@settings(max_examples=50, deadline=None)
@given(st.lists(lines, max_size=25))
def test_any_lines_give_a_valid_answer_or_an_error(script: list[Any]) -> None:
    reader, writer = cc2api.StreamParser(), cc2api.MessagesEncoder()
    given_out: list[Any] = []
    failure: Any = None
    try:
        for line in script:
            with cc2api.malformed_as_502():
                for out in reader.feed(line):
                    given_out.append(out)
                    writer.feed(out)
    except cc2api.ApiError as error:
        failure = cc2api.to_anthropic_error(error, "req_1")[1]
    if failure:
        assert 400 <= cc2api.STATUS_BY_TYPE[failure["error"]["type"]] <= 599
        json.dumps(failure)
    kinds = [out["type"] for out in given_out]
    assert kinds.count("message_start") <= 1
    assert kinds == [] or kinds[0] == "message_start"
    if reader.is_done:
        assert kinds[-2:] == ["message_delta", "message_stop"]
        assert isinstance(writer.message["stop_reason"], str)
    json.dumps(writer.message)
