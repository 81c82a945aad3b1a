"""The file reads downwards: a section uses only names from above itself, and the stdlib."""

from __future__ import annotations

import ast
import functools
import re
import sys

from harness import GATEWAY

SOURCE = GATEWAY.read_text()
TREE = ast.parse(SOURCE)
BANNER = re.compile(r"^# =+ (.+)$", re.MULTILINE)


@functools.cache
def sections() -> list[tuple[int, str]]:
    """Return the first line and the name of each section, in order."""
    return [(SOURCE[: m.start()].count("\n") + 1, m.group(1)) for m in BANNER.finditer(SOURCE)]


def section_of(line: int) -> int:
    return sum(start <= line for start, _ in sections())


def test_each_section_uses_only_names_from_above() -> None:
    defined: dict[str, int] = {}
    for node in TREE.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            defined[node.name] = section_of(node.lineno)
        for target in getattr(node, "targets", [getattr(node, "target", None)]):
            if isinstance(target, ast.Name):
                defined.setdefault(target.id, section_of(node.lineno))
    used = [n for n in ast.walk(TREE) if isinstance(n, ast.Name) and n.id in defined]
    early = [f"{n.id} line {n.lineno}" for n in used if section_of(n.lineno) < defined[n.id]]
    assert early == []


def test_the_docstring_names_the_sections_in_order() -> None:
    names = [name for _, name in sections()]
    docstring = ast.get_docstring(TREE) or ""
    listed = " ".join(docstring.partition("stands above it: ")[2].split()).rstrip(".").split(", ")
    assert listed == names


def test_only_the_standard_library_is_imported() -> None:
    imported = set()
    for node in ast.walk(TREE):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").partition(".")[0])
    assert imported <= set(sys.stdlib_module_names)
