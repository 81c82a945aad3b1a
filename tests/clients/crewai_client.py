"""CrewAI, over its OpenAI or its Anthropic provider."""

from common_client import KIND, MODEL, PNG_URL, SYSTEM, Person, double, report, told
from crewai import LLM, Agent, Crew, Task
from crewai.tools import tool

SAMPLING = {"temperature": 0.5, "top_p": 0.9} if KIND == "openai" else {}
LLM_FIELDS = {"model": MODEL, "provider": KIND, "max_tokens": 500, "max_retries": 0, **SAMPLING}


def crew(prompt, *tools, is_streamed=False, **more):
    agent = Agent(
        role="helper",
        goal="help",
        backstory=SYSTEM,
        llm=LLM(stream=is_streamed, **LLM_FIELDS),
        tools=list(tools),
        max_retry_limit=0,
        max_iter=4,
    )
    task = Task(description=prompt, expected_output="an answer", agent=agent, **more)
    return Crew(agents=[agent], tasks=[task]).kickoff()


def text(prompt):
    return crew(prompt, is_streamed=True).raw


def loop(prompt):
    return crew(prompt, tool("double")(double), is_streamed=True).raw


def structured(prompt):
    llm = LLM(**LLM_FIELDS)
    assert crew(prompt, output_pydantic=Person).pydantic is not None
    return told(llm.call(prompt, response_model=Person))


def image(prompt):
    content = [
        {"type": "text", "text": prompt},
        {"type": "image_url", "image_url": {"url": PNG_URL}},
    ]
    return LLM(**LLM_FIELDS).call([{"role": "user", "content": content}])


report(text=text, loop=loop, structured=structured, image=image)
