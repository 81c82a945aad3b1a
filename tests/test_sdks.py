"""The real SDKs as clients of the gateway on the real CLI."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import anthropic
import openai
import pytest
from harness import RunningGateway
from helpers import marker
from pydantic import BaseModel
from scripted_api import DEFAULT_TEXT, Reply, ScriptedApi, text_reply


@pytest.fixture
def client(gateway: RunningGateway) -> Iterator[anthropic.Anthropic]:
    key = "none-needed"
    with anthropic.Anthropic(base_url=gateway.url, api_key=key, max_retries=0) as made:
        yield made


def test_anthropic_create(client: anthropic.Anthropic) -> None:
    message = client.messages.create(
        model="claude-sonnet-4-6", max_tokens=50, messages=[{"role": "user", "content": "hi"}]
    )
    assert message.content[0].type == "text"
    assert message.content[0].text == DEFAULT_TEXT
    assert message.usage.output_tokens == 42
    assert (message._request_id or "").startswith("req_")


def test_anthropic_stream_helper_with_tools(client: anthropic.Anthropic, api: ScriptedApi) -> None:
    word = f"mark-{uuid4().hex}"
    reply = Reply(
        blocks=[
            {"type": "text", "text": "calling two"},
            {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {"a": [1, "x"]}},
            {"type": "tool_use", "id": "toolu_2", "name": "f", "input": {}},
        ],
        stop_reason="tool_use",
    )
    api.on(word, reply)
    with client.messages.stream(
        model="claude-sonnet-4-6",
        max_tokens=50,
        messages=[{"role": "user", "content": word}],
        tools=[{"name": "f", "input_schema": {"type": "object"}}],
    ) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == "calling two"
    assert [block.to_dict() for block in final.content] == reply.blocks
    assert final.stop_reason == "tool_use"


def test_anthropic_errors_are_of_their_classes(
    client: anthropic.Anthropic, api: ScriptedApi
) -> None:
    word = f"mark-{uuid4().hex}"
    api.on(word, Reply(status=429, message="slow down"))
    with pytest.raises(anthropic.RateLimitError, match="slow down") as caught:
        client.messages.create(
            model="claude-sonnet-4-6", max_tokens=5, messages=[{"role": "user", "content": word}]
        )
    assert (caught.value.request_id or "").startswith("req_")


def test_openai_create(gateway: RunningGateway) -> None:
    with openai.OpenAI(base_url=gateway.url + "/v1", api_key="none-needed") as client:
        completion = client.chat.completions.create(
            model="claude-code", messages=[{"role": "user", "content": "hi"}]
        )
    assert completion.choices[0].message.content == DEFAULT_TEXT
    assert completion.usage is not None
    assert completion.usage.total_tokens == 61


def test_anthropic_tool_runner_falls_back_from_threads(
    client: anthropic.Anthropic, api: ScriptedApi
) -> None:
    word = marker()

    @anthropic.beta_tool
    def add(a: int, b: int) -> str:
        """Add two numbers."""
        return f"sum-{a + b}-{word}"

    calls = [
        {"type": "tool_use", "id": f"toolu_{n}", "name": "add", "input": {"a": n, "b": n}}
        for n in (1, 2)
    ]
    api.on(word, Reply(blocks=calls, stop_reason="tool_use"))
    api.on(f"sum-4-{word}", text_reply("two and four"))
    runner = client.beta.messages.tool_runner(
        model="claude-sonnet-4-6",
        max_tokens=100,
        tools=[add],
        messages=[{"role": "user", "content": word}],
    )
    final = runner.until_done()
    assert final.content[0].type == "text"
    assert final.content[0].text == "two and four"
    last = api.calls_with(f"sum-4-{word}")[-1].body["messages"]
    results = [block["tool_use_id"] for block in last[2]["content"]]
    assert results == ["toolu_1", "toolu_2"], "both parallel calls are answered"


class City(BaseModel):
    name: str


def test_anthropic_structured_output(client: anthropic.Anthropic, api: ScriptedApi) -> None:
    word = marker()
    api.on(word, text_reply('{"name": "Rome"}'))
    parsed = client.messages.parse(
        model="claude-sonnet-4-6",
        max_tokens=100,
        messages=[{"role": "user", "content": word}],
        output_format=City,
    )
    assert parsed.parsed_output == City(name="Rome")
    sent = api.calls_with(word)[0].body["output_config"]["format"]
    assert sent["schema"]["properties"]["name"]["type"] == "string"


def test_anthropic_thinking_is_echoed_back(client: anthropic.Anthropic, api: ScriptedApi) -> None:
    word = marker()
    thinking = {"type": "thinking", "thinking": "hm", "signature": "c2ln"}
    api.on(word, Reply(blocks=[thinking, {"type": "text", "text": "so"}]))
    messages: list[Any] = [{"role": "user", "content": word}]
    ask: dict[str, Any] = {"model": "claude-sonnet-4-6", "max_tokens": 3000}
    ask["thinking"] = {"type": "adaptive", "display": "summarized"}
    with client.messages.stream(messages=messages, **ask) as stream:
        final = stream.get_final_message()
    assert [block.type for block in final.content] == ["thinking", "text"]
    again = f"again-{word[-12:]}"
    messages += [
        {"role": "assistant", "content": final.content},
        {"role": "user", "content": again},
    ]
    client.messages.create(messages=messages, **ask)
    sent = api.calls_with(again)[0].body
    assert sent["messages"][1]["content"][0] == thinking
    assert sent["thinking"] == ask["thinking"]


def test_anthropic_async_with_5_parallel_streams(gateway: RunningGateway) -> None:
    async def one(client: anthropic.AsyncAnthropic, number: int) -> str:
        async with client.messages.stream(
            model="claude-sonnet-4-6",
            max_tokens=50,
            messages=[{"role": "user", "content": f"hi {number}"}],
        ) as stream:
            return "".join([text async for text in stream.text_stream])

    async def all_of_them() -> list[str]:
        async with anthropic.AsyncAnthropic(base_url=gateway.url, api_key="any") as client:
            return await asyncio.gather(*(one(client, number) for number in range(5)))

    assert asyncio.run(all_of_them()) == [DEFAULT_TEXT] * 5


def test_anthropic_raw_headers(client: anthropic.Anthropic) -> None:
    raw = client.messages.with_raw_response.create(
        model="claude-sonnet-4-6", max_tokens=5, messages=[{"role": "user", "content": "hi"}]
    )
    assert raw.headers["request-id"] == raw.headers["x-request-id"]
    assert raw.parse()._request_id == raw.headers["request-id"]


CLASSES = [
    (400, anthropic.BadRequestError),
    (401, anthropic.AuthenticationError),
    (403, anthropic.PermissionDeniedError),
    (404, anthropic.NotFoundError),
    (429, anthropic.RateLimitError),
    (500, anthropic.InternalServerError),
    (529, anthropic.InternalServerError),
]


@pytest.mark.parametrize(("status", "error"), CLASSES)
def test_anthropic_error_classes(
    client: anthropic.Anthropic,
    api: ScriptedApi,
    status: int,
    error: type[anthropic.APIStatusError],
) -> None:
    word = marker()
    api.on(word, Reply(status=status, message="words of upstream"))
    with pytest.raises(error) as caught:
        client.messages.create(
            model="claude-sonnet-4-6", max_tokens=5, messages=[{"role": "user", "content": word}]
        )
    assert caught.value.status_code == status
    assert (caught.value.request_id or "").startswith("req_")
