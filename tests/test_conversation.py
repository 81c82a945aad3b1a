"""What of a conversation can be reused, who may use it, and when a turn is over."""

from __future__ import annotations

import collections
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from harness import GATEWAY, InProcessGateway

import cc2api

JsonObject = dict[str, Any]
CALL: JsonObject = {"type": "tool_use", "id": "toolu_1", "name": "look", "input": {}}
RESULT: JsonObject = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "seen"}
PNG = {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgoA"}
RESULT_WITH_IMAGE: JsonObject = {**RESULT, "content": [{"type": "image", "source": PNG}]}
# Messages by the names that the table uses for them; an answer's name starts with `a`.
CONTENTS: dict[str, Any] = {"call": [CALL], "result": [RESULT], "image result": [RESULT_WITH_IMAGE]}


def to_turn(names: str, **fields: Any) -> cc2api.Turn:
    """Return the turn of messages, by their names: `u1, a1, u2`.

    It is parsed as one to be counted, which may end with an answer.
    """
    messages = []
    for name in names.split(", "):
        is_answer = name == "call" or name.startswith("a")
        role = "assistant" if is_answer else "user"
        messages.append({"role": role, "content": CONTENTS.get(name, f"text of {name}")})
    body = {"model": "m", "messages": messages, **fields}
    return cc2api.parse_messages_request(body, is_count=True)


def to_conversation(names: str) -> cc2api.Conversation:
    """Return a conversation that holds messages; after a `call` it waits for the result.

    `?` at the end: the last message is a query without an answer.
    """
    conversation = cc2api.Conversation()
    if not names:
        return conversation
    is_unanswered = names.endswith("?")
    turn = to_turn(names.removesuffix("?"))
    for index, message in enumerate(turn.messages):
        is_last = index == len(turn.messages) - 1
        if is_last and message.role == "assistant":
            parser = cc2api.StreamParser()
            parser.content = message.content
            conversation.add_answer(parser)
        else:
            is_query = is_last and is_unanswered
            line = cc2api.to_stdin_message(turn, index, "m", is_query=is_query)
            conversation.add(turn, index, line)
    return conversation


REUSED = [
    ("", "u1", 0, "nothing is held"),
    ("u1, a1", "u1, a1, u2", 2, "the conversation goes on"),
    ("u1, a1, u2, a2", "u1, a1, u2, a2, u3", 4, "it goes on and on"),
    ("u1, a1", "u1", 0, "the same question is asked again: it is the query"),
    ("u1, a1", "other", 0, "another conversation begins"),
    ("u1, a1, u2, a2", "u1, a1, other", 2, "the second question was edited"),
    ("u1, a1, u2, a2", "u1, a1, u2", 2, "the second question is asked again"),
    ("u1, a1, u2, a2", "u1, a1", 0, "fewer messages than are held, the last of them an answer"),
    ("u1, a1, u2, a2", "u1, a other, u2", 0, "an answer was edited: rewound to the user's before"),
    ("u1, a1, u2, a2", "u1, a1, u2, a other, u3", 2, "the second answer was edited"),
    ("u1, a1, u2?", "u1, a1, u2, a2, u3", 2, "a query without an answer is rewound"),
    ("u1?", "u1", 0, "also the very first"),
    ("u1, call", "u1, call, result", 2, "a tool's result goes to the call that waits"),
    ("u1, call", "u1, call, image result", 0, "a result that MCP does not carry as it is"),
    ("u1, call", "u1, call, result, a2, u2", 0, "more than the results comes after a call"),
    ("u1, call", "u1, a1, u2", 0, "nothing comes of a call that was never answered"),
    ("u1, call, result, a2", "u1, call, result, a2, u3", 4, "after an answered call"),
    (
        "u1, call, result, a2, u3, a3",
        "u1, call, image result, a2, u4",
        0,
        "a tool's result is no rewind point: rewound to the user's message before the call",
    ),
]


@pytest.mark.parametrize(("held", "asked", "reused", "why"), REUSED, ids=[r[3] for r in REUSED])
def test_the_reusable_prefix(held: str, asked: str, reused: int, why: str) -> None:
    turn = to_turn(asked)
    conversation = to_conversation(held)
    assert conversation.reusable_prefix(turn, cc2api.PrefixKey.of(turn)) == reused, why


@pytest.mark.parametrize("other", [{"model": "other"}, {"system": "other"}, {"tools": []}])
def test_with_another_model_or_system_prompt_nothing_is_reused(other: JsonObject) -> None:
    before = to_turn("u1, a1")
    after = to_turn("u1, a1, u2", **other)
    is_same = "tools" in other
    reused = to_conversation("u1, a1").reusable_prefix(after, cc2api.PrefixKey.of(before))
    assert reused == (2 if is_same else 0)
    assert to_conversation("u1, a1").reusable_prefix(after, None) == 0


def test_a_rewind_names_its_message_and_the_last_of_the_users() -> None:
    conversation = to_conversation("u1, a1, u2, a2, u3?")
    first, _, second, _, third = (message.uuid for message in conversation.messages)
    assert conversation.rewind(2) == {
        "target_message_uuid": second,
        "last_seen_user_message_uuid": third,
        "interrupt_if_running": True,
    }
    assert [message.uuid for message in conversation.messages] == [first, None]
    assert not conversation.has_unanswered_query


def test_the_order_of_fields_makes_no_other_message() -> None:
    block = {"type": "tool_use", "id": "1", "name": "n", "input": {"a": {"b": 1, "c": 2}, "d": 3}}
    turned = {"input": {"d": 3, "a": {"c": 2, "b": 1}}, "name": "n", "id": "1", "type": "tool_use"}
    digests = [cc2api.digest_message(cc2api.Message("assistant", [b])) for b in (block, turned)]
    assert digests[0] == digests[1]


BIND = """
import cc2api

def request(name):
    key = cc2api.PoolKey(cc2api.Caller(name, name.encode()), ())
    deadline = cc2api.Deadline(1, cc2api.no_hook, TimeoutError())
    return cc2api.SessionRequest(cc2api.WARMUP_TURNS[0], key, deadline)

class Broken:
    def send(self, line): raise BrokenPipeError

session = cc2api.Session(Broken())
for name in ("alice", "alice", "bob"):
    try:
        session.prepare(request(name))
    except (BrokenPipeError, RuntimeError) as exc:
        print(name, type(exc).__name__)
"""


@pytest.mark.parametrize("flags", [[], ["-O"]], ids=["plain", "optimised"])
def test_a_session_never_changes_its_caller(flags: list[str]) -> None:
    """The pool never tries to; the session refuses it all the same, also without assertions."""
    command = [sys.executable, *flags, "-c", BIND]
    done = subprocess.run(command, cwd=GATEWAY.parent, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == [
        *("alice", "BrokenPipeError", "alice", "BrokenPipeError"),
        *("bob", "RuntimeError"),
    ], done.stderr


class SilentProcess:
    """A process that has printed some lines, and prints no more."""

    def __init__(self, *lines: JsonObject) -> None:
        self.lines = collections.deque(lines)

    def has_lines(self) -> bool:
        return bool(self.lines)

    def wait(self, deadline: cc2api.Deadline) -> None:
        if not self.lines:
            raise cc2api.ProcessDied("nothing more comes")


def to_call_line(tool_use_id: str) -> JsonObject:
    params = {"_meta": {"claudecode/toolUseId": tool_use_id}}
    message = {"method": "tools/call", "id": 1, "params": params}
    return {"type": "control_request", "request_id": "r", "request": {"message": message}}


GOES_ON = {
    "it answers its call itself": {"type": "user", "message": {"content": [RESULT]}},
    "its turn ends": {"type": "result", "is_error": False},
    "its turn fails": {"type": "result", "is_error": True},
}


@pytest.mark.parametrize("line", list(GOES_ON.values()), ids=list(GOES_ON))
def test_a_process_that_goes_on_while_its_tool_call_waits_is_given_up(line: JsonObject) -> None:
    """Its conversation would hold what the client's does not."""
    process: Any = SilentProcess(to_call_line("toolu_1"), line)
    deadline = cc2api.Deadline(60, cc2api.no_hook, TimeoutError())
    with pytest.raises(cc2api.ProcessDied, match="did not keep its conversation"):
        cc2api.ControlChannel(process).wait_for_turn_end({"toolu_1"}, deadline)


def test_a_process_whose_tool_call_waits_is_at_the_end_of_its_turn() -> None:
    process: Any = SilentProcess({"type": "system"}, to_call_line("toolu_1"))
    deadline = cc2api.Deadline(60, cc2api.no_hook, TimeoutError())
    cc2api.ControlChannel(process).wait_for_turn_end({"toolu_1"}, deadline)
    assert not process.lines


def test_a_conversation_that_begins_with_an_answer_is_not_kept(tmp_path: Path) -> None:
    """A rewind takes back a message of the user's: no other conversation could begin there."""
    messages = [{"role": "assistant", "content": "Welcome."}, {"role": "user", "content": "hello"}]
    with InProcessGateway(tmp_path, processes=2) as gateway:
        assert gateway.post({"messages": messages}).status == 200
        assert gateway.now.idle == []
        assert gateway.ask("hello").status == 200
        assert len(gateway.now.idle) == 1


def test_a_process_that_is_given_up_is_killed_before_anything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be about to call upstream again; booking its cost can wait."""
    steps: list[str] = []
    kill = cc2api.Process.kill
    take_cost = cc2api.Session.take_cost

    def note_kill(process: cc2api.Process) -> None:
        steps.append("kill")
        kill(process)

    def note_cost(session: cc2api.Session) -> float:
        steps.append("cost")
        return take_cost(session)

    monkeypatch.setattr(cc2api.Process, "kill", note_kill)
    monkeypatch.setattr(cc2api.Session, "take_cost", note_cost)
    messages = [{"role": "assistant", "content": "Welcome."}, {"role": "user", "content": "hello"}]
    with InProcessGateway(tmp_path) as gateway:
        assert gateway.post({"messages": messages}).status == 200
        assert steps[:2] == ["kill", "cost"]


def test_an_answer_with_an_empty_text_is_known_when_it_comes_back() -> None:
    answer = [{"type": "text", "text": ""}, {"type": "text", "text": "so"}]
    parser = cc2api.StreamParser()
    parser.content = answer
    conversation = to_conversation("u1")
    conversation.add_answer(parser)
    messages = [
        {"role": "user", "content": "text of u1"},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "text of u2"},
    ]
    turn = cc2api.parse_messages_request({"model": "m", "max_tokens": 9, "messages": messages})
    assert conversation.reusable_prefix(turn, cc2api.PrefixKey.of(turn)) == 2
