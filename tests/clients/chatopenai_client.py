"""LangChain's ChatOpenAI, on chat completions or on responses."""

from common_client import KIND, MODEL, PNG_URL, SYSTEM, Person, double, report, told
from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI

model = ChatOpenAI(
    model=MODEL,
    temperature=0.3,
    top_p=0.9,
    max_tokens=500,
    max_retries=0,
    stream_usage=True,
    use_responses_api=KIND == "responses",
)


def messages(content):
    return [SystemMessage(SYSTEM), HumanMessage(content)]


def streamed(asked, given):
    whole = None
    for chunk in asked.stream(given):
        whole = chunk if whole is None else whole + chunk
    assert whole.usage_metadata["total_tokens"] == 61
    return whole


def text(prompt):
    return streamed(model, messages(prompt)).text


def loop(prompt):
    bound = model.bind_tools([tool(double)], strict=True, parallel_tool_calls=False)
    given = messages(prompt)
    while (answer := streamed(bound, given)).tool_calls:
        given.append(answer)
        for call in answer.tool_calls:
            given.append(ToolMessage(double(**call["args"]), tool_call_id=call["id"]))
    return answer.text


def structured(prompt):
    method = "function_calling" if KIND == "functions" else "json_schema"
    return told(model.with_structured_output(Person, method=method).invoke(messages(prompt)))


def image(prompt):
    image = {"type": "image_url", "image_url": {"url": PNG_URL}}
    return model.invoke(messages([{"type": "text", "text": prompt}, image])).text


report(text=text, loop=loop, structured=structured, image=image)
