"""Random conversations, with and without `--live`: upstream is sent the same. On the real CLI.

CC2API_TEST_EXAMPLES=50 runs it longer than the suite does.
"""

from __future__ import annotations

import copy
import os
import signal
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

import hypothesis
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from running import InProcessGateway, wait_until
from scripted_api import Reply, ScriptedApi
from test_live import TOOLS, JsonObject, calls_for, marker, said, tool_result, tool_use

LIVE = 3
DELAY_S = 0.1  # two gateways, an API and the test share one interpreter here
EXAMPLES = int(os.environ.get("CC2API_TEST_EXAMPLES", "3"))
TEXT = st.sampled_from(
    [
        "plain",
        "  spaces \n",
        "/compact now",
        "@/etc/hosts ok",
        "\U0001f469\u200d\U0001f680 \u2028 é",
    ]
)
PARAMETERS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0, 0.5]),
        "max_tokens": st.sampled_from([50, 4096]),
        "stop_sequences": st.just(["STOP"]),
        "thinking": st.just({"type": "enabled", "budget_tokens": 1024}),
        "output_config": st.just({"effort": "low"}),
        "tool_choice": st.just({"type": "auto"}),
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
}


class Conversations(RuleBasedStateMachine):
    """Each step is taken on a gateway with live conversations and on one without."""

    api: ClassVar[ScriptedApi]
    live: ClassVar[InProcessGateway]
    plain: ClassVar[InProcessGateway]

    @initialize()
    def begin(self) -> None:
        self.talks: list[JsonObject] = []

    @rule(system=st.sampled_from([None, "Be brief."]), tools=st.booleans(), text=TEXT)
    def start(self, system: str | None, tools: bool, text: str) -> None:
        fields = {"model": "claude-sonnet-4-6", "max_tokens": 100, "messages": []}
        fields |= {"system": system} if system else {}
        self.talks.append({**fields, **({"tools": TOOLS} if tools else {})})
        self.ask(self.talks[-1], text, "text", {})

    @precondition(lambda self: self.talks)
    @rule(
        data=st.data(),
        parameters=PARAMETERS,
        answer=st.sampled_from(["text", "text", "tools", "thinking", "cut", "empty"]),
        marked=st.booleans(),
        edit=st.sampled_from([None, None, None, "question", "answer"]),
    )
    def go_on(
        self, data: st.DataObject, parameters: JsonObject, answer: str, marked: bool, edit: Any
    ) -> None:
        talk = data.draw(st.sampled_from(self.talks))
        content: Any = data.draw(TEXT)
        last = talk["messages"][-1]["content"]
        calls = [block for block in last if block["type"] == "tool_use"]
        if edit == "question":
            talk["messages"][0]["content"] = "something else"
        if edit == "answer" and not calls:
            talk["messages"][-1]["content"] = "never said"
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
    @rule(data=st.data())
    def branch(self, data: st.DataObject) -> None:
        self.talks.append(copy.deepcopy(data.draw(st.sampled_from(self.talks))))

    @rule()
    def kill_one(self) -> None:
        for child in list(self.live.gateway.pool._parked)[-1:]:
            os.kill(child.pid, signal.SIGKILL)

    @rule()
    def time_passes(self) -> None:
        pool = self.live.gateway.pool
        with pool._changed:
            for child in list(pool._parked)[-1:]:
                pool._end_parked(child)

    @invariant()
    def nothing_is_left(self) -> None:
        wait_until(lambda: self.live.gateway.pool.counts()["busy"] == 0)
        assert self.live.gateway.pool.counts()["parked"] <= LIVE

    def ask(self, talk: JsonObject, content: Any, answer: str, parameters: JsonObject) -> None:
        """Take one turn on both gateways, compare what went upstream, and take the answer over."""
        word = marker()
        if isinstance(content, str):
            content = f"{content} {word}"
        elif content[-1]["type"] == "text":
            content[-1]["text"] += word
        else:  # the marker must not change what kind of result it is
            key = "tool_use_id"
            word = content[-1][key]
        if "thinking" in parameters:
            parameters = {k: v for k, v in parameters.items() if k != "temperature"}
            parameters["max_tokens"] = 4096
        self.api.on(word, REPLIES[answer]())
        talk["messages"].append({"role": "user", "content": content})
        request = {**talk, **{k: v for k, v in parameters.items() if k != "beta"}}
        headers = {"anthropic-beta": parameters["beta"]} if "beta" in parameters else {}
        before = len(calls_for(self.api, word))
        answers = [each.post(copy.deepcopy(request), headers) for each in (self.live, self.plain)]
        assert [each.status for each in answers] == [200, 200], [each.json for each in answers]
        calls = calls_for(self.api, word)[before:]
        assert len(calls) == 2, [c.body["messages"][-3:] for c in calls]
        with_live, without = map(said, calls)
        assert with_live == without
        assert answers[0].json["content"] == answers[1].json["content"]
        said_nothing = [{"type": "text", "text": "(nothing)"}]
        reply = answers[0].json["content"] or said_nothing
        talk["messages"].append({"role": "assistant", "content": reply})


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
}


def test_upstream_is_sent_the_same_with_live_conversations_and_without(
    api: ScriptedApi, claude: str, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        for name, live in (("live", LIVE), ("plain", 0)):
            home = tmp_path / name
            home.mkdir()
            gateway = InProcessGateway(home, claude=claude, base_url=api.url, live=live, spares=1)
            setattr(Conversations, name, stack.enter_context(gateway))
        Conversations.api = api
        run_state_machine_as_test(
            Conversations,
            settings=hypothesis.settings(
                max_examples=EXAMPLES,
                stateful_step_count=15,
                deadline=None,
                phases=[hypothesis.Phase.generate],  # a step is too slow to try again and again
                suppress_health_check=list(hypothesis.HealthCheck),
            ),
        )
