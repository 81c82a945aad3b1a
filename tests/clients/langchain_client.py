"""LangChain on the Responses API: prints one JSON object with what it made of the answers."""

import json
import sys

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI

word = sys.argv[1]


@tool
def double(number: int) -> int:
    """Double a number."""
    return 2 * number


reasoning = {"effort": "high", "summary": "auto"}
model = ChatOpenAI(
    model="claude-sonnet-4-6",
    use_responses_api=True,
    output_version="responses/v1",
    reasoning=reasoning,
    max_retries=0,
).bind_tools([double])
messages = [HumanMessage(f"parallel {word}")]
whole = None
for chunk in model.stream(messages):
    whole = chunk if whole is None else whole + chunk
messages.append(whole)
messages += [
    ToolMessage(f"doubled-{2 * call['args']['number']}-{word}", tool_call_id=call["id"])
    for call in whole.tool_calls
]
last = model.invoke(messages)
seen = {
    "calls": [call["args"] for call in whole.tool_calls],
    "text": last.text if isinstance(last.text, str) else last.text(),
    "tokens": last.usage_metadata["total_tokens"],
}
print(json.dumps(seen))
