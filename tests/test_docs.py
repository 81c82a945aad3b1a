"""What the README says is so: its commands are run, its options are the program's.

What needs an account is run as far as it goes without one: towards the scripted API. The clients
of its table are run by tests/clients, which installs them, and so is an installation from nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import API_KEY, GATEWAY, ROOT, RunningGateway, clean_environment, real_claude
from scripted_api import DEFAULT_TEXT, ScriptedApi

import cc2api

README = (ROOT / "README.md").read_text()
GUARANTEES = (ROOT / "tests" / "GUARANTEES.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
SHELL_BLOCKS = [text for kind, text in BLOCKS if kind == "sh"]
CURLS = [block for block in SHELL_BLOCKS if block.startswith("curl")]
SHOWN = [text for kind, text in BLOCKS if kind == ""]  # what commands print
TEST_COMMAND = "pip install -e '.[test]' && pytest"


def block(kind: str) -> str:
    """Return the README's only block of a kind."""
    (text,) = (text for other, text in BLOCKS if other == kind)
    return str(text)


def commands() -> list[list[str]]:
    """Return the words of every command of the README, in blocks and in the text, less curl's."""
    code = re.sub(r"^```.*?^```$", "", README, flags=re.DOTALL | re.MULTILINE)
    inline = re.findall(r"`([^`]+)`", code)
    fenced = [b.replace("\\\n", " ") for b in SHELL_BLOCKS if b not in CURLS]
    lines = [line for text in (*inline, *fenced) for line in text.splitlines()]
    return [shlex.split(part) for line in lines for part in line.split(" && ")]


# ---- how it reads


def test_what_the_readme_links_to_is_there() -> None:
    headings = re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    anchors = {"#" + re.sub(r"[^\w-]", "", h.lower().replace(" ", "-")) for h in headings}
    for target in re.findall(r"(?<!!)\[[^\]]*\]\(([^)]+)\)", README):
        assert target in anchors or (ROOT / target.partition("#")[0]).is_file(), target


# ---- its commands


@pytest.mark.parametrize("command", CURLS)
def test_every_curl_of_the_readme_gets_an_answer(gateway: RunningGateway, command: str) -> None:
    here = command.replace("http://127.0.0.1:8080", gateway.url)
    assert here != command
    done = subprocess.run(["bash", "-c", f"{here.strip()} -sS"], capture_output=True, check=True)
    if '"stream":true' in command:
        text = "".join(
            json.loads(t) for t in re.findall(r'"text": (".*?[^\\]")', done.stdout.decode())
        )
        assert b"event: message_stop" in done.stdout
    elif "chat" in command:
        text = json.loads(done.stdout)["choices"][0]["message"]["content"]
    else:
        text = json.loads(done.stdout)["content"][0]["text"]
    assert text == DEFAULT_TEXT


def test_the_readmes_python_gets_an_answer(gateway: RunningGateway, tmp_path: Path) -> None:
    script = block("python").replace("http://127.0.0.1:8080", gateway.url)
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=clean_environment(tmp_path),
        capture_output=True,
        text=True,
    )
    assert done.stdout == f"{DEFAULT_TEXT}\n", done.stderr


def test_ci_runs_the_readmes_test_command() -> None:
    assert f"\n{TEST_COMMAND}\n" in (ROOT / ".ci" / "run").read_text()


def is_ours(words: list[str]) -> bool:
    """Say whether a command starts the gateway, by either of its names."""
    return words[:1] == ["cc2api"] or any(word.endswith("cc2api.py") for word in words[:2])


def starts() -> list[list[str]]:
    """Return the arguments of every start of the gateway that the README shows."""
    found = [words for words in commands() if is_ours(words)]
    found.append(json.loads(block("dockerfile").rpartition("CMD ")[2]))
    found.append(shlex.split(block("ini").partition("ExecStart=")[2].splitlines()[0]))
    return [words[1 + (not words[0].endswith("cc2api")) :] for words in found]


def test_every_start_that_the_readme_shows_takes_its_options() -> None:
    shown = starts()
    assert len(shown) >= 6
    for arguments in shown:
        cc2api.parse_args(arguments, {})  # ends the process where it does not know one


def test_every_option_that_the_readme_names_is_one() -> None:
    known = {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(cc2api.Settings)}
    theirs = {  # of other programs, in the same words as theirs
        *("--system", "--create-home", "--now", "--init", "--env-file", "--add-host"),
        *("--config", "--model", "--auth-type"),
    }
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", README))
    assert named - theirs - known == set()
    variables = set(re.findall(r"\bCC2API_[A-Z_]+", README))
    assert {"--" + v[7:].lower().replace("_", "-") for v in variables} <= known


def test_every_package_extra_that_the_readme_installs_is_there() -> None:
    extras = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
    for name in re.findall(r"'\.\[(\w+)\]'", README):
        assert re.search(rf"^{name} = \[", extras, re.MULTILINE)
    assert 'cc2api = "cc2api:main"' in (ROOT / "pyproject.toml").read_text()


@contextlib.contextmanager
def started(arguments: list[str], tmp_path: Path, **env: str) -> Iterator[str]:
    """Start the gateway as `python3 cc2api.py` does; yield what it prints first."""
    # Not where it stands in the repository: a developer may have keys there.
    shutil.copy(ROOT / "cc2api.py", tmp_path)
    process = subprocess.Popen(
        [sys.executable, *arguments],
        env={
            **clean_environment(tmp_path),
            **{"CC2API_PORT": "0", "CC2API_CLAUDE": real_claude()},
            **env,
        },
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert process.stdout is not None
        banner = []
        for line in process.stdout:
            banner += [line] * (not line.startswith("time="))  # the log, which is on stderr
            if line.startswith("  try"):
                break
        yield "".join(banner)
    finally:
        process.terminate()
        process.communicate(timeout=60)


def test_it_starts_as_one_file_and_prints_what_the_readme_shows(
    api: ScriptedApi, tmp_path: Path
) -> None:
    (command,) = re.findall(r"Without pip: `python3 ([^`]+)`", README)
    env = {**API_KEY, "ANTHROPIC_BASE_URL": api.url}
    with started(shlex.split(command), tmp_path, **env) as banner:
        printed, shown = banner.splitlines(), SHOWN[0].splitlines()
        version = re.compile(r"cc2api \S+ listens on http://127\.0\.0\.1:\d+")
        assert version.fullmatch(printed[0])
        assert version.fullmatch(shown[0])
        names = [line.split()[0] for line in printed[1:]]
        # an upstream is told of where one is configured, as here
        assert [line.split()[0] for line in shown[1:]] == [n for n in names if n != "upstream"]
        assert printed[-1].startswith(re.sub(r":8080/.*", "", shown[-1]))


def test_the_answer_is_as_the_readme_shows_it(gateway: RunningGateway) -> None:
    answer = gateway.ask("Hello!", model="sonnet")
    shown = re.findall(r'"(\w+)":', SHOWN[1])
    assert len(shown) > 6
    seen = re.findall(r'"(\w+)":', answer.body.decode())
    assert seen[: len(shown)] == shown
    assert answer.json["model"].startswith("claude-sonnet-")


# ---- its options


def help_text() -> str:
    command = [sys.executable, str(GATEWAY), "--help"]
    done = subprocess.run(
        command, env={"COLUMNS": "200"}, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_readme_help_and_settings_list_the_same_options() -> None:
    table = README.partition("\n## Options\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^  --([\w-]+) +(.*)$", table, re.MULTILINE)
    options = {}
    for field in dataclasses.fields(cc2api.Settings):
        has_default = field.default not in (None, "", (), False)
        default = f" ({field.default:g})" if isinstance(field.default, float) else ""
        default = default or (f" ({field.default})" if has_default else "")
        options[field.name.replace("_", "-")] = field.metadata["help"] + default
    assert len(rows) == len(options)
    assert dict(rows) == options
    shown = re.sub(r"\s+", " ", help_text())
    for field in dataclasses.fields(cc2api.Settings):
        assert f"--{field.name.replace('_', '-')}" in shown
        assert field.metadata["help"] in shown


# ---- its deployment


def test_the_systemd_unit_is_valid(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("no systemd here")
    unit = block("ini").replace("/usr/bin/python3 cc2api.py", "/bin/true")
    file = tmp_path / "cc2api.service"
    file.write_text(unit.replace("User=cc2api", "User=root"))
    done = subprocess.run(
        [analyze, "verify", "--man=no", str(file)], capture_output=True, text=True, check=False
    )
    mine = [line for line in done.stderr.splitlines() if "cc2api.service" in line]
    assert mine == []
    assert done.returncode == 0, done.stderr


def test_the_service_its_user_and_its_files_have_the_same_names() -> None:
    unit = dict(re.findall(r"^(\w+)=(.*)$", block("ini"), re.MULTILINE))
    words = [word for command in commands() for word in command]
    assert unit["User"] in words
    assert unit["WorkingDirectory"] in words
    assert unit["EnvironmentFile"] in words
    assert unit["ReadWritePaths"] == f"/home/{unit['User']}"  # made by --create-home
    assert int(unit["TimeoutStopSec"]) > cc2api.Settings().drain


def test_the_container_recipe_has_an_ordinary_user_and_copies_what_is_there() -> None:
    lines = [line.split(" ", 1) for line in block("dockerfile").splitlines()]
    assert len(lines) <= 10
    steps = dict(lines)
    source, target = steps["COPY"].split()
    assert (ROOT / source).is_file()
    assert json.loads(steps["CMD"])[1] == target + source
    assert steps["RUN"].endswith(f"useradd --create-home {steps['USER']}")
    run = next(words for words in commands() if words[:2] == ["docker", "run"] and "-v" in words)
    port = cc2api.Settings().port
    assert run[run.index("-p") + 1] == f"127.0.0.1:{port}:{port}"
    mount = run[run.index("-v") + 1]
    # the key file is where it is looked for: an open port of another address needs a key
    assert mount.split(":")[1] == f"{steps['WORKDIR']}/{cc2api.DEFAULT_KEY_FILE}"
    arguments = json.loads(steps["CMD"])[2:]
    assert cc2api.KeyFile(cc2api.parse_args(arguments, {})).is_needed


# ---- its guarantees


@pytest.mark.parametrize("heading", ["What is supported", "What happens when"])
def test_each_row_of_the_guarantees_is_a_test(heading: str) -> None:
    table = GUARANTEES.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    named = re.findall(r"\| `(test_\w+)` \|$", table, re.MULTILINE)
    assert len(named) == len(rows) - 2 > 20
    assert set(named) - defined_tests() == set()


def defined_tests() -> set[str]:
    """Return the names of all tests, those of the clients too."""
    sources = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    return set(re.findall(r"def (test_\w+)\(", sources))


def test_each_fact_about_the_cli_names_a_test_that_pins_it() -> None:
    facts = (ROOT / "tests" / "CLI.md").read_text()
    rows = [line for line in facts.splitlines() if line.startswith("| ") and "---" not in line]
    rows = [line for line in rows if not line.startswith("| fact |")]
    assert len(rows) > 40
    for row in rows:
        assert re.search(r"`test(s/bench/)?\w+(\.py)?`", row.rpartition(" | ")[2]), row
    named = set(re.findall(r"`(test_\w+)`", facts))
    assert named - defined_tests() == set()


def test_every_document_that_the_program_names_is_there() -> None:
    named = set(re.findall(r"\b[\w/]+\.md\b", GATEWAY.read_text()))
    assert named
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_the_version_is_told() -> None:
    command = [sys.executable, str(GATEWAY), "--version"]
    done = subprocess.run(command, env={}, capture_output=True, text=True, check=True)
    assert done.stdout == f"cc2api {cc2api.__version__}\n"


def test_the_banner_says_where_how_and_what_to_try(gateway: RunningGateway) -> None:
    banner = gateway.banner
    assert f"listens on {gateway.url}\n" in banner
    assert re.search(r"claude   2\.1\.\d+ at /", banner)
    assert "sign-in  API key from ANTHROPIC_API_KEY: billed to the API\n" in banner
    assert "keys     open" in banner
    command = banner.partition("try      ")[2]
    done = subprocess.run(["bash", "-c", f"{command.strip()} -sS"], capture_output=True, check=True)
    assert json.loads(done.stdout)["type"] == "message"
