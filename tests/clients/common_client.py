"""What the clients of test_python_clients.py have in common: data, and how they report outcomes.

Usage of each: NAME_client.py KIND MODEL; it prints one JSON object with each case's outcome.
"""

import asyncio
import enum
import inspect
import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, Field

KIND, MODEL = sys.argv[1:3]
BASE_URL = os.environ["OPENAI_BASE_URL"]
# Only the outcomes go to stdout: what the clients print there goes to stderr.
STDOUT = os.dup(1)
os.dup2(2, 1)
PNG = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk"
    "+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
PNG_URL = f"data:image/png;base64,{PNG}"
SYSTEM = "You are brief."
SCHEMA = {
    "type": "object",
    "properties": {"number": {"type": "integer", "minimum": 0, "description": "to be doubled"}},
    "required": ["number"],
}


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Town(BaseModel):
    name: str = Field(min_length=1, max_length=40)
    founded: int | None = Field(None, ge=-3000, le=2100)


class Person(BaseModel):
    """A person."""

    name: str = Field(description="the full name", pattern="^[A-Z]")
    age: int = Field(gt=0, lt=150)
    height_m: float | None = None
    colour: Colour = Colour.RED
    home: Town
    towns: list[Town] = Field(min_length=0, max_length=5)


def double(number: int) -> str:
    """Double a number.

    Args:
        number: to be doubled
    """
    return f"doubled-{2 * number}"


def told(person: Any) -> list[Any]:
    return [person.name, person.age, person.colour.value, person.home.name, len(person.towns)]


def said(text: Any) -> str:
    assert isinstance(text, str), text
    return text


def fault(exc: BaseException | None) -> list[Any]:
    """Return the class and the status of an error, or of the error behind it that has a status."""
    first = exc
    while exc is not None and not hasattr(exc, "status_code"):
        exc = exc.__cause__ or exc.__context__
    return [type(exc or first).__name__, getattr(exc, "status_code", None)]


def report(**cases: Callable[[str], Any]) -> None:
    """Run the cases, each with its prompt; print their outcomes."""
    outcomes: dict[str, Any] = {}
    for name in ("text", "loop", "structured", "image", "limited", "overloaded"):
        ask = cases.get(name, cases["text"])
        try:
            outcome = ask(f"case-{name}")
            if inspect.iscoroutine(outcome):
                outcome = asyncio.run(outcome)
        except Exception as exc:  # noqa: BLE001
            outcome = fault(exc)
            if name not in ("limited", "overloaded"):
                traceback.print_exc()
        outcomes[name] = outcome
    os.write(STDOUT, json.dumps(outcomes).encode())
