"""The child's lines to events, events to a message, failures to errors. Pure."""

from __future__ import annotations

import json
from typing import Any

import pytest
from scripted_api import Reply

import cc2api

JsonObject = dict[str, Any]


@pytest.mark.parametrize("details", [{}, {"details": None}, {"details": ["x"], "param": "y"}])
def test_an_error_keeps_all_that_upstream_says_of_it(details: JsonObject) -> None:
    inner = {"type": "invalid_request_error", "message": "no", **details}
    body = json.dumps({"type": "error", "error": inner})
    error = cc2api.to_upstream_error(f"API error (attempt 1/1): 400 400 {body}")
    assert error is not None
    assert cc2api.to_anthropic_error(error, "req_1")[1]["error"] == inner


def line(event: JsonObject, **more: Any) -> JsonObject:
    return {"type": "stream_event", "event": event, "parent_tool_use_id": None, **more}


def lines(reply: Reply) -> list[JsonObject]:
    """Return the lines of a whole answer: before each block's end the CLI repeats it whole."""
    found = []
    for event in reply.events("m"):
        if event["type"] == "content_block_stop":
            found.append(
                {"type": "assistant", "message": {"content": [reply.blocks[event["index"]]]}}
            )
        found.append(line(event))
    return found


def assemble(events: list[JsonObject]) -> JsonObject:
    writer = cc2api.MessagesEncoder()
    for event in events:
        writer.feed(event)
    return writer.message


def test_the_answer_is_over_with_the_stop_reason_and_message_stop_is_added() -> None:
    reader = cc2api.StreamParser()
    reply = Reply(blocks=[{"type": "text", "text": "a b"}])
    events = [each["event"] for each in lines(reply) if "event" in each]
    got = [out for each in lines(reply) for out in reader.feed(each)]
    assert got[1:] == events[1:]
    assert reader.is_done
    assert reader.can_go_on
    assert reader.feed(line(events[0])) == []


def test_a_whole_answer_keeps_what_its_deltas_and_its_end_bring() -> None:
    block = {"type": "compaction", "content": None}
    deltas = [
        {"type": "compaction_delta", "content": "all in short", "encrypted_content": "c2Vj"},
        {"type": "delta_of_next_year", "mood": {"good": True}},
    ]
    start: JsonObject = {
        "id": "msg_1",
        "content": [],
        "usage": {"input_tokens": 1},
        "stop_reason": None,
    }
    end = {
        "type": "message_delta",
        "delta": {"stop_reason": "end_turn", "container": None, "of_next_year": [1]},
        "usage": {"output_tokens": 2},
        "context_management": None,
        "input_transformations": [{"type": "downsized"}],
    }
    message = assemble(
        [
            {"type": "message_start", "message": start},
            {"type": "content_block_start", "index": 0, "content_block": block},
            *({"type": "content_block_delta", "index": 0, "delta": delta} for delta in deltas),
            {"type": "content_block_stop", "index": 0},
            end,
        ]
    )
    whole = {
        **block,
        "content": "all in short",
        "encrypted_content": "c2Vj",
        "mood": {"good": True},
    }
    assert message == {
        **start,
        "content": [whole],
        "usage": {"input_tokens": 1, "output_tokens": 2},
        "stop_reason": "end_turn",
        "container": None,
        "of_next_year": [1],
        "context_management": None,
        "input_transformations": [{"type": "downsized"}],
    }


def test_how_far_a_model_has_thought_is_no_part_of_its_block() -> None:
    block = {"type": "thinking", "thinking": "", "signature": ""}
    delta = {"type": "thinking_delta", "thinking": "hm", "estimated_tokens": 50}
    message = assemble(
        [
            {"type": "message_start", "message": {"content": [], "usage": {}}},
            {"type": "content_block_start", "index": 0, "content_block": block},
            {"type": "content_block_delta", "index": 0, "delta": delta},
            {"type": "content_block_stop", "index": 0},
        ]
    )
    assert message["content"] == [{**block, "thinking": "hm"}]


def test_blocks_are_numbered_anew_where_the_cli_leaves_one_out() -> None:
    """It leaves out `fallback`, without which SDKs would find no block of the index 1."""
    reader = cc2api.StreamParser()
    reply = Reply(blocks=[{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])
    events = [each["event"] for each in lines(reply) if "event" in each]
    shifted = [{**e, "index": e["index"] + 1} if "index" in e else e for e in events]
    got = [out for event in shifted for out in reader.feed(line(event))]
    assert [e["index"] for e in got if "index" in e] == [e["index"] for e in events if "index" in e]


@pytest.mark.parametrize(
    ("blocks", "stop_reason", "asks_again"),
    [
        ([{"type": "text", "text": "a"}], "end_turn", False),
        ([{"type": "text", "text": " "}], "end_turn", True),
        ([], "end_turn", True),
        ([{"type": "tool_use", "id": "t", "name": "f", "input": {}}], "tool_use", False),
        ([{"type": "text", "text": "a"}], "tool_use", True),
        ([{"type": "text", "text": "a"}], "max_tokens", True),
        ([{"type": "text", "text": "a"}], "refusal", True),
        ([{"type": "text", "text": "a"}], "brand_new", True),
    ],
)
def test_it_is_known_when_the_cli_would_ask_again(
    blocks: list[JsonObject], stop_reason: str, asks_again: bool
) -> None:
    reader = cc2api.StreamParser()
    for each in lines(Reply(blocks=blocks, stop_reason=stop_reason)):
        reader.feed(each)
    assert reader.can_go_on is not asks_again


def test_lines_of_other_kinds_and_of_subagents_bring_nothing() -> None:
    reader = cc2api.StreamParser()
    event = {"type": "message_start", "message": {"id": "msg_1", "content": [], "usage": {}}}
    assert reader.feed({"type": "brand_new"}) == []
    assert reader.feed({"type": "keep_alive"}) == []
    assert reader.feed(line(event, parent_tool_use_id="toolu_1")) == []
    assert reader.feed(line({"type": "content_block_delta"})) == [], "nothing before the start"
    assert reader.feed(line(event)) == [event]


FAILURES: list[tuple[JsonObject, str | None, int, str, str]] = [
    (
        {"api_error_status": 400, "api_error_type": "invalid_request_error"},
        None,
        400,
        "invalid_request_error",
        "API Error: 400 tools.0: no | tools.0: no",
    ),
    ({"api_error_status": 429}, None, 429, "rate_limit_error", "API Error: 429 slow | slow"),
    (
        {"api_error_status": 529},
        None,
        529,
        "overloaded_error",
        "API Error: 529 Overloaded. This is a server-side issue, usually temporary — try"
        " | Overloaded",
    ),
    ({"api_error_type": "timeout_error"}, None, 504, "timeout_error", "API Error: late | late"),
    ({}, "rate_limit", 429, "rate_limit_error", "words | words"),
    ({}, "server_error", 502, "api_error", "API Error: Connection lost | Connection lost"),
    ({}, "overloaded", 529, "overloaded_error", "words | words"),
    ({}, "account_on_hold", 403, "permission_error", "words | words"),
    ({}, "verification_required", 403, "permission_error", "words | words"),
    ({}, "cloud_credential_error", 401, "authentication_error", "words | words"),
    ({}, "unknown", 502, "api_error", "words | words"),
    ({"api_error_status": 418}, None, 418, "invalid_request_error", "API Error: 418 tea | tea"),
    ({"api_error_status": 200}, None, 502, "api_error", "strange | strange"),
]


@pytest.mark.parametrize(("fields", "cli_error", "status", "kind", "texts"), FAILURES)
def test_failures_keep_status_type_and_message(
    fields: JsonObject, cli_error: str | None, status: int, kind: str, texts: str
) -> None:
    said, expected = texts.split(" | ")
    result = {"type": "result", "is_error": True, "result": said, **fields}
    error = cc2api.to_api_error(result, cli_error)
    assert (error.status, error.type, str(error)) == (status, kind, expected)


def test_tool_input_is_parsed_and_a_cut_one_is_empty() -> None:
    def with_json(*pieces: str) -> list[JsonObject]:
        block = {"type": "tool_use", "id": "t", "name": "f", "input": {}}
        deltas = [{"type": "input_json_delta", "partial_json": piece} for piece in pieces]
        return [
            {"type": "message_start", "message": {"usage": {}}},
            {"type": "content_block_start", "index": 0, "content_block": block},
            *({"type": "content_block_delta", "index": 0, "delta": delta} for delta in deltas),
            {"type": "content_block_stop", "index": 0},
        ]

    assert assemble(with_json("", '{"a"', ": [1]}"))["content"][0]["input"] == {"a": [1]}
    assert assemble(with_json('{"a": "cut'))["content"][0]["input"] == {}
    assert assemble(with_json(""))["content"][0]["input"] == {}
    assert assemble(with_json())["content"][0]["input"] == {}


def test_usage_of_message_delta_overwrites_and_null_does_not() -> None:
    message = assemble(
        [
            {
                "type": "message_start",
                "message": {"usage": {"input_tokens": 5, "output_tokens": 1}},
            },
            {
                "type": "message_delta",
                "delta": {"stop_reason": "end_turn"},
                "usage": {"output_tokens": 9, "input_tokens": None},
                "context_management": {"applied_edits": []},
            },
        ]
    )
    assert message["usage"] == {"input_tokens": 5, "output_tokens": 9}
    assert message["context_management"] == {"applied_edits": []}


def test_a_frame_is_ascii_and_on_one_line() -> None:
    event = {"type": "content_block_delta", "delta": {"text": "a\u2028b\n\U0001f600"}}
    frame = cc2api.to_sse_frames([event])
    assert frame.isascii()
    assert frame.count(b"\n") == 3


@pytest.mark.parametrize("depth", [100, 890, 5000])
def test_deep_tool_input_can_be_answered(depth: int) -> None:
    text = '{"a":' * depth + "1" + "}" * depth
    block = {"type": "tool_use", "id": "t", "name": "f", "input": {}}
    delta = {"type": "input_json_delta", "partial_json": text}
    events: list[JsonObject] = [
        {"type": "message_start", "message": {"usage": {}}},
        {"type": "content_block_start", "index": 0, "content_block": block},
        {"type": "content_block_delta", "index": 0, "delta": delta},
        {"type": "content_block_stop", "index": 0},
    ]
    message = assemble(events)
    given = json.dumps(message["content"][0]["input"])
    assert given.count("a") in {depth, depth if depth < 900 else 0}, "too deep for json is none"
    assert cc2api.digest_message(cc2api.Message("assistant", message["content"]))


def test_an_event_that_lacks_what_it_should_hold_is_upstreams_failure() -> None:
    with pytest.raises(cc2api.CliFailed, match="broke the protocol"), cc2api.malformed_as_502():
        assemble([{"type": "message_start"}])


def test_a_call_has_left_when_the_log_says_so_though_it_was_not_announced_yet() -> None:
    """The two come by two pipes; the hold would be too late if it waited for the other one."""
    leaves = {"type": cc2api.LOG_LINE, "text": "[API:timing] dispatching to firstParty"}
    reader = cc2api.StreamParser()
    assert reader.feed(leaves) == []
    assert (reader.is_calling, reader.has_left) == (True, True)
