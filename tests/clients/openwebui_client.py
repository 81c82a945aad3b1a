"""What Open WebUI asks an OpenAI-compatible server: its requests, and what it reads of the answers.

By its source: routers/openai.py, routers/tasks.py, utils/middleware.py, utils/misc.py.
"""

import json

import aiohttp
from common_client import BASE_URL, MODEL, PNG_URL, SYSTEM, Person, double, report, said, told

HEADERS = {
    "Authorization": "Bearer any",
    "X-OpenWebUI-User-Name": "A%20B",
    "X-OpenWebUI-User-Id": "6c3f",
    "X-OpenWebUI-User-Email": "a@b.c",
    "X-OpenWebUI-User-Role": "admin",
    "X-OpenWebUI-Chat-Id": "9b1d",
}
# What a user can set for a model; the first ones stand in most configurations.
PARAMS = {
    "temperature": 0.8,
    "top_p": 0.9,
    "max_tokens": 500,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "seed": 42,
    "stop": ["<stop>"],
    "logit_bias": {"1": 0},
    "reasoning_effort": "low",
}
SPEC = {
    "name": "double",
    "description": "Double a number.",
    "parameters": {
        "properties": {"number": {"description": "to be doubled", "type": "integer"}},
        "required": ["number"],
        "type": "object",
    },
}


def post(session, **body):
    """Ask, with the body as text, as it does."""
    url = f"{BASE_URL}/chat/completions"
    return session.post(url, data=json.dumps({"model": MODEL, **body}))


def opened():
    headers = {"Content-Type": "application/json", **HEADERS}
    return aiohttp.ClientSession(trust_env=True, headers=headers)


class AnswerError(Exception):
    def __init__(self, kind, status_code):
        super().__init__(kind)
        self.status_code = status_code


async def chat(messages, **more):
    """Return the text and the tool calls of a streamed answer, put together as it does."""
    body = {"messages": messages, "stream_options": {"include_usage": True}, **PARAMS, **more}
    text, calls, usage = "", [], None
    async with opened() as session, post(session, stream=True, **body) as response:
        if response.status >= 400:
            error = (await response.json())["error"]
            assert error["message"]
            raise AnswerError(error["type"], response.status)
        assert "text/event-stream" in response.headers["Content-Type"]
        async for line in response.content:
            data = line.decode().removeprefix("data:").strip()
            if not data or data == "[DONE]":
                continue
            chunk = json.loads(data)
            assert "error" not in chunk
            usage = chunk.get("usage") or usage
            for choice in chunk["choices"]:
                text += choice["delta"].get("content") or ""
                for call in choice["delta"].get("tool_calls") or []:
                    add_call(calls, call)
    assert usage["total_tokens"] == 61
    return text, calls


def add_call(calls, delta):
    for call in calls:
        if call["index"] == delta["index"]:
            call["function"]["name"] = call["function"]["name"] or delta["function"].get("name")
            call["function"]["arguments"] += delta["function"].get("arguments") or ""
            return
    calls.append({**delta, "function": {"arguments": "", **delta["function"]}})


def messages(content):
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]


async def text(prompt):
    async with opened() as session, session.get(f"{BASE_URL}/models") as response:
        listed = [model["id"] for model in (await response.json())["data"]]
    assert any("sonnet" in name for name in listed), listed
    # a message that was sent empty, and an answer that was stopped at once
    before = [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]
    system, asked = messages(prompt)
    return (await chat([system, *before, asked]))[0]


async def loop(prompt):
    given, tools = messages(prompt), [{"type": "function", "function": SPEC}]
    while True:
        answer, calls = await chat(given, tools=tools)
        if not calls:
            return answer
        # with the `index` of each call, as it came in the stream
        given.append({"role": "assistant", "content": answer, "tool_calls": calls})
        for call in calls:
            content = double(**json.loads(call["function"]["arguments"]))
            given.append({"role": "tool", "tool_call_id": call["id"], "content": content})


async def structured(prompt):
    """Its titles, tags and follow-ups: JSON by the prompt alone, and not streamed."""
    content = f"### Task:\nGenerate a title as JSON.\n<chat_history>{prompt}</chat_history>"
    body = {"messages": [{"role": "user", "content": content}], "max_completion_tokens": 1000}
    async with opened() as session, post(session, stream=False, **body) as response:
        title = (await response.json())["choices"][0]["message"]["content"]
    return told(Person.model_validate_json(title[title.index("{") : title.rindex("}") + 1]))


async def image(prompt):
    picture = {"type": "image_url", "image_url": {"url": PNG_URL}}
    # an image without words, then one with
    before = messages([{"type": "text", "text": ""}, picture])
    answer = {"role": "assistant", "content": "I see."}
    asked = {"role": "user", "content": [{"type": "text", "text": prompt}, picture]}
    return said((await chat([*before, answer, asked]))[0])


report(text=text, loop=loop, structured=structured, image=image)
