"""Random conversations on few processes, and with a process each: upstream is sent the same.

On the real CLI. CC2API_TEST_STEPS=300 takes more turns than the suite does.
"""

from __future__ import annotations

import copy
import json
import os
import signal
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

import hypothesis
import pytest
from additions import split_additions
from harness import API_KEY, LOGIN, InProcessGateway, wait_until
from helpers import marker
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from scripted_api import Call, Reply, ScriptedApi, text_reply
from test_reuse import TOOLS, JsonObject, calls_for, said, tool_result, tool_use

PROCESSES, AT_ONCE = 3, 2  # fewer than conversations
DELAY_S = 0.1  # no model is quicker; two gateways, an API and the test share one interpreter here
STEPS = int(os.environ.get("CC2API_TEST_STEPS", "6"))  # turns of conversations, at least
STEPS_AT_ONCE = 8  # of one example; few and short ones vary more than one long one
TEXT = st.sampled_from(
    [
        "plain",
        "  spaces \n",
        "/compact now",
        "@/etc/hosts ok",
        "\U0001f469\u200d\U0001f680 \u2028 é",
    ]
)
START = st.fixed_dictionaries(
    {"model": st.sampled_from(["claude-sonnet-4-6", "claude-opus-4-6", "claude-sonnet-5-5"])},
    optional={
        "system": st.sampled_from(["Be brief.", "Be long.", "\u00dc " * 300]),
        "tools": st.sampled_from([TOOLS, TOOLS[:1], [*TOOLS, {"name": "z", "input_schema": {}}]]),
        "caller": st.sampled_from(["first", "second"]),
    },
)
PARAMETERS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0, 0.5]),
        "top_p": st.sampled_from([0.5, 0.9]),
        "max_tokens": st.sampled_from([50, 4096]),
        "stop_sequences": st.just(["STOP"]),
        "thinking": st.sampled_from(
            [
                {"type": "enabled", "budget_tokens": 1024},
                {"type": "adaptive"},
                {"type": "adaptive", "display": "omitted"},
                {"type": "disabled"},
            ]
        ),
        "output_config": st.sampled_from(
            [{"effort": "low"}, {"format": {"type": "json_schema", "schema": {"type": "object"}}}]
        ),
        "tool_choice": st.sampled_from([{"type": "auto"}, {"type": "none"}]),
        "service_tier": st.just("standard_only"),
        "beta": st.sampled_from(["foo-2025-01-01", "bar-2025-01-01"]),
    },
)
PIXEL = {
    "type": "base64",
    "media_type": "image/png",
    "data": "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAA"
    "AABJRU5ErkJggg==",
}
RESULTS: dict[str, JsonObject] = {
    "text": {"content": "result"},
    "blocks": {"content": [{"type": "text", "text": "a\n"}, {"type": "text", "text": " b"}]},
    "error": {"content": "it failed", "is_error": True},
    "blank ends": {"content": " it failed\n", "is_error": True},
    "nothing": {},
    "image": {"content": [{"type": "image", "source": PIXEL}]},
    "large": {"content": "x" * 150_000},
    "a key of next year": {"content": "result", "next_year": 1},
}


class Conversations(RuleBasedStateMachine):
    """Each step is taken on a gateway that uses its processes again and on one that does not."""

    api: ClassVar[ScriptedApi]
    is_login: ClassVar[bool]
    turns: ClassVar[int]  # that were taken, in all conversations
    kept: ClassVar[InProcessGateway]
    plain: ClassVar[InProcessGateway]

    @initialize()
    def begin(self) -> None:
        self.talks: list[JsonObject] = []

    @rule(fields=START, text=TEXT)
    def start(self, fields: JsonObject, text: str) -> None:
        talk = {"max_tokens": 100, "messages": [], "caller": "first", **fields}
        self.talks.append({**talk, "marker": marker()})
        self.ask(self.talks[-1], text, "text", {})

    @precondition(lambda self: self.talks)
    @rule(
        data=st.data(),
        parameters=PARAMETERS,
        answer=st.sampled_from(
            ["text", "text", "tools", "tools", "thinking", "cut", "empty", "refusal", "error"]
        ),
        marked=st.booleans(),
    )
    def go_on(self, data: st.DataObject, parameters: JsonObject, answer: str, marked: bool) -> None:
        talk = data.draw(st.sampled_from(self.talks))
        content: Any = data.draw(TEXT)
        calls = calls_of(talk)
        if calls:
            kinds = [data.draw(st.sampled_from(list(RESULTS))) for _ in calls]
            results = [{"content": None, **RESULTS[kind]} for kind in kinds]
            content = [
                {**tool_result(pair[0], None), **pair[1]}
                for pair in zip(calls, results, strict=True)
            ]
            content = data.draw(st.permutations(content)) if marked else content
            content += data.draw(st.sampled_from([[], [], [{"type": "text", "text": "and"}]]))
        elif marked:
            mark = {"cache_control": {"type": "ephemeral"}}
            content = [{"type": "text", "text": "first", **mark}, {"type": "text", "text": content}]
        self.ask(
            talk, content, answer if "tools" in talk or answer != "tools" else "text", parameters
        )

    @precondition(lambda self: self.talks)
    @rule(data=st.data(), text=TEXT, how=st.sampled_from(["edit", "regenerate", "model", "tools"]))
    def change(self, data: st.DataObject, text: str, how: str) -> None:
        talk = data.draw(st.sampled_from(self.talks))
        if how == "model":
            talk["model"] = data.draw(st.sampled_from(["claude-sonnet-4-6", "claude-opus-4-6"]))
        elif how == "tools":
            talk["tools"] = data.draw(st.sampled_from([[], TOOLS, TOOLS[:1]]))
        places = [at for at in range(0, len(talk["messages"]), 2) if not is_results(talk, at)]
        place = places[-1] if how == "regenerate" else data.draw(st.sampled_from(places))
        again = talk["messages"][place]["content"]
        del talk["messages"][place:]
        self.ask(talk, again if how == "regenerate" else text, "text", {})

    @precondition(lambda self: self.talks)
    @rule(data=st.data())
    def branch(self, data: st.DataObject) -> None:
        self.talks.append(copy.deepcopy(data.draw(st.sampled_from(self.talks))))

    @precondition(lambda self: self.talks)
    @rule(data=st.data())
    def count(self, data: st.DataObject) -> None:
        talk = data.draw(st.sampled_from(self.talks))
        body = {name: talk[name] for name in talk if name not in ("caller", "marker", "max_tokens")}
        headers = {"x-api-key": talk["caller"]}
        answers = [
            gateway.request("POST", "/v1/messages/count_tokens", copy.deepcopy(body), headers)
            for gateway in (self.kept, self.plain)
        ]
        assert [answer.status for answer in answers] == [200, 200]
        assert answers[0].json == answers[1].json

    @precondition(lambda self: self.talks)
    @rule(data=st.data(), after=st.sampled_from([0, 3]))
    def leave(self, data: st.DataObject, after: int) -> None:
        talk, word = data.draw(st.sampled_from(self.talks)), marker()
        messages = copy.deepcopy(talk["messages"])
        if calls_of(talk):
            del messages[-1]
        else:
            messages.append({"role": "user", "content": ""})
        messages[-1]["content"] = [{"type": "text", "text": f"{talk['marker']} {word}"}]
        reply = text_reply("a b", gate=threading.Event(), gate_after=after)
        self.api.on(word, reply)
        connection = self.kept.connect()
        body = {**request_of(talk), "messages": messages, "stream": True}
        data_sent = json.dumps(body)
        connection.request("POST", "/v1/messages", data_sent, {"x-api-key": talk["caller"]})
        assert self.api.wait_for(lambda: bool(calls_for(self.api, word)))
        connection.close()
        assert reply.left.wait(10)

    @precondition(lambda self: self.talks)
    @rule()
    def kill_one(self) -> None:
        for pid in self.kept.now.idle[-1:]:
            os.kill(pid, signal.SIGKILL)

    @invariant()
    def nothing_is_left(self) -> None:
        wait_until(lambda: not self.kept.now.busy)
        wait_until(lambda: len(self.kept.now.idle) <= AT_ONCE)

    def ask(self, talk: JsonObject, content: Any, answer: str, parameters: JsonObject) -> None:
        """Take one turn on both gateways, compare what went upstream, and take the answer over."""
        Conversations.turns += 1
        word = marker()
        if isinstance(content, str):
            content = f"{content} {talk['marker']} {word}"
        elif content[-1]["type"] == "text":
            content = [*content[:-1], {**content[-1], "text": content[-1]["text"] + word}]
        else:  # the marker must not change what kind of result it is
            word = content[-1]["tool_use_id"]
        if parameters.get("thinking", {}).get("type", "disabled") != "disabled":
            parameters = {k: v for k, v in parameters.items() if k not in ("temperature", "top_p")}
            parameters["max_tokens"] = 4096
        self.api.on(word, REPLIES[answer]())
        before = copy.deepcopy(talk["messages"])
        talk["messages"].append({"role": "user", "content": content})
        request = {**request_of(talk), **{k: v for k, v in parameters.items() if k != "beta"}}
        headers = {"anthropic-beta": parameters["beta"]} if "beta" in parameters else {}
        headers["x-api-key"] = talk["caller"]
        calls_before = len(calls_for(self.api, word))
        answers = [each.post(copy.deepcopy(request), headers) for each in (self.kept, self.plain)]
        status = 400 if answer == "error" else 200
        assert [each.status for each in answers] == [status] * 2, [each.json for each in answers]
        calls = calls_for(self.api, word)[calls_before:]
        assert len(calls) == 2, [c.body["messages"][-3:] for c in calls]
        kept, plain = map(said, calls)
        assert kept == plain
        sent = Call("", {}, copy.deepcopy({"messages": request["messages"]}))
        messages, added = split_additions(kept["messages"])
        assert messages == said(sent)["messages"]
        assert bool(added) == self.is_login
        for other in self.talks:
            assert other["marker"] == talk["marker"] or other["marker"] not in json.dumps(kept)
        if answer == "error":
            talk["messages"] = before
            return
        assert answers[0].json["content"] == answers[1].json["content"]
        said_nothing = [{"type": "text", "text": "(nothing)"}]
        reply = answers[0].json["content"] or said_nothing
        talk["messages"].append({"role": "assistant", "content": reply})


def request_of(talk: JsonObject) -> JsonObject:
    """Return what a client sends of a conversation."""
    return {name: value for name, value in talk.items() if name not in ("caller", "marker")}


def calls_of(talk: JsonObject) -> list[JsonObject]:
    """Return the tool calls that the last answer of a conversation makes."""
    return [block for block in talk["messages"][-1]["content"] if block["type"] == "tool_use"]


def is_results(talk: JsonObject, place: int) -> bool:
    """Say whether a message holds tool results."""
    content = talk["messages"][place]["content"]
    return isinstance(content, list) and any(block["type"] == "tool_result" for block in content)


def _text(text: str = "an answer") -> JsonObject:
    return {"type": "text", "text": text}


REPLIES: Any = {
    "text": lambda: Reply(blocks=[_text(), _text("in two parts\n")]),
    "tools": lambda: Reply(
        blocks=[_text(), tool_use(a=1), tool_use("bash", command="ls")], stop_reason="tool_use"
    ),
    "thinking": lambda: Reply(
        blocks=[{"type": "thinking", "thinking": "hm", "signature": "c2lnbmF0dXJl"}, _text()]
    ),
    "cut": lambda: Reply(blocks=[_text("half an ans")], stop_reason="max_tokens", delay_s=DELAY_S),
    "empty": lambda: Reply(blocks=[], delay_s=DELAY_S),
    "refusal": lambda: Reply(blocks=[_text("No")], stop_reason="refusal", delay_s=DELAY_S),
    "error": lambda: Reply(status=400, message="no good"),
}


@pytest.mark.parametrize("sign_in", [API_KEY, LOGIN], ids=["key", "login"])
def test_upstream_is_sent_the_same_whatever_the_processes_have_served_before(
    api: ScriptedApi, claude: str, tmp_path: Path, sign_in: dict[str, str]
) -> None:
    with ExitStack() as stack:
        for name, processes in (("kept", PROCESSES), ("plain", 0)):
            home = tmp_path / name
            home.mkdir()
            gateway = InProcessGateway(
                home,
                claude=claude,
                base_url=api.url,
                env=sign_in,
                processes=processes,
                max_concurrency=AT_ONCE,
            )
            setattr(Conversations, name, stack.enter_context(gateway))
        Conversations.api = api
        Conversations.is_login = sign_in is LOGIN
        Conversations.turns = 0
        # The first example that hypothesis draws is the simplest, and holds hardly a turn.
        while Conversations.turns < STEPS:
            run_state_machine_as_test(
                Conversations,
                settings=hypothesis.settings(
                    max_examples=2 if STEPS < STEPS_AT_ONCE else 5,
                    stateful_step_count=STEPS_AT_ONCE,
                    deadline=None,
                    phases=[hypothesis.Phase.generate],  # a step is too slow to try again and again
                    suppress_health_check=list(hypothesis.HealthCheck),
                ),
            )
