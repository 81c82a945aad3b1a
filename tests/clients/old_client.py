"""An anthropic 0.x SDK as a client: prints one JSON object with what it understood."""

import json
import sys

import anthropic

url, marker = sys.argv[1:]
client = anthropic.Anthropic(base_url=url, api_key="any", max_retries=0)
hello = [{"role": "user", "content": "hi"}]
asked = [{"role": "user", "content": marker}]
tools = [{"name": "f", "input_schema": {"type": "object"}}]
ask = {"model": "claude-sonnet-4-6", "max_tokens": 50}
message = client.messages.create(messages=hello, temperature=0.5, **ask)
with client.messages.stream(messages=asked, tools=tools, **ask) as stream:
    final = stream.get_final_message()
try:
    client.messages.create(messages=hello, **{**ask, "model": ""})
    error = None
except anthropic.BadRequestError as exc:
    error = [type(exc).__name__, exc.status_code]
seen = {
    "version": anthropic.__version__,
    "text": message.content[0].text,
    "calls": [block.input for block in final.content if block.type == "tool_use"],
    "error": error,
}
print(json.dumps(seen))
