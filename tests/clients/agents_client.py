"""The OpenAI Agents SDK as a client: prints one JSON object with what it made of the answers.

Usage: agents_client.py WORD; the scripted API answers what holds WORD and the name of a case.
"""

import asyncio
import json
import sys
from typing import Any

from agents import Agent, Runner, function_tool, set_tracing_disabled
from pydantic import BaseModel

WORD = sys.argv[1]
MODEL = "claude-sonnet-4-6"
set_tracing_disabled(True)


@function_tool
def double(number: int) -> str:
    """Double a number."""
    return f"doubled-{2 * number}-{WORD}"


class City(BaseModel):
    name: str


async def main() -> None:
    doubling = Agent(name="doubling", instructions="double", tools=[double], model=MODEL)
    other = Agent(name="other", instructions="you are the other", model=MODEL)
    first = Agent(name="first", instructions="hand it on", handoffs=[other], model=MODEL)
    parsing = Agent(name="parsing", output_type=City, model=MODEL)
    seen: dict[str, Any] = {}
    seen["loop"] = (await Runner.run(doubling, f"loop {WORD}")).final_output
    streamed = Runner.run_streamed(doubling, f"loop {WORD}")
    kinds = [event.type async for event in streamed.stream_events()]
    seen["streamed"] = [streamed.final_output, kinds.count("run_item_stream_event")]
    parallel = await Runner.run(doubling, f"parallel {WORD}")
    seen["parallel"] = parallel.final_output
    seen["structured"] = (await Runner.run(parsing, f"structured {WORD}")).final_output.name
    handed = await Runner.run(first, f"handoff {WORD}")
    seen["handoff"] = [handed.last_agent.name, handed.final_output]
    again = [*parallel.to_input_list(), {"role": "user", "content": f"again {WORD}"}]
    seen["again"] = (await Runner.run(doubling, again)).final_output
    print(json.dumps(seen))


asyncio.run(main())
