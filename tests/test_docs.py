"""The documents say what the code does: keys, error codes, links and commands."""

from __future__ import annotations

import re
import runpy
import shlex
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from click import Command, Group

from samaritan.cli.main import app
from samaritan.config import config_keys
from samaritan.errors import SamaritanError

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
CONFIGS = sorted(ROOT.glob("configs/*.yaml"))
SOURCES = sorted(
    path
    for folder in ("samaritan", "strategies", "server", "client", "simulation")
    for path in (ROOT / folder).rglob("*.py")
)

CODE = re.compile(r"SAM-[A-Z]\d{3}")
RAISED = re.compile(r"""["'](SAM-[A-Z]\d{3})(?=["' ])""")
"""A code at the start of a string; codes in prose and docstrings stand elsewhere."""

SHARED_CODES = {
    "SAM-D102": {"samaritan/data/volume.py", "samaritan/data/checks.py"},
    "SAM-D114": {"samaritan/data/checks.py", "samaritan/data/slices.py"},
    "SAM-D116": {
        "samaritan/data/slices.py",
        "samaritan/training/evaluate.py",
        "simulation/study.py",
    },
    "SAM-D304": {"samaritan/data/checks.py", "simulation/study.py"},
    "SAM-S101": {"samaritan/files.py", "simulation/run.py"},
}
"""Codes that several modules give the one meaning that docs/errors.md states."""


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def code_places() -> dict[str, set[str]]:
    """The modules that use each code."""
    places: dict[str, set[str]] = defaultdict(set)
    for path in SOURCES:
        for code in RAISED.findall(path.read_text("utf-8")):
            places[code].add(relative(path))
    return places


def documented_codes() -> list[str]:
    """The codes at the start of table rows of docs/errors.md, in order."""
    text = (ROOT / "docs/errors.md").read_text("utf-8")
    return re.findall(r"^\| (SAM-[A-Z]\d{3}) \|", text, re.MULTILINE)


def test_configuration_page_is_the_generated_one() -> None:
    page = runpy.run_path(str(ROOT / "docs/make_configuration.py"))["page"]()
    written = (ROOT / "docs/configuration.md").read_text("utf-8")
    assert written == page, "run .venv/bin/python docs/make_configuration.py"


def test_methods_page_is_the_generated_one() -> None:
    page = runpy.run_path(str(ROOT / "docs/make_methods.py"))["page"]()
    written = (ROOT / "docs/methods.md").read_text("utf-8")
    assert written == page, "run .venv/bin/python docs/make_methods.py"


def test_every_error_code_is_documented_once() -> None:
    documented = documented_codes()
    assert documented == sorted(set(documented), key=documented.index), "a code has two rows"
    assert set(documented) == set(code_places())


def test_every_error_code_has_one_meaning() -> None:
    several = {code: places for code, places in code_places().items() if len(places) > 1}
    assert several == SHARED_CODES, "two modules use one code; give each fault its own"


def test_the_codes_of_an_error_class_carry_its_letter() -> None:
    letters = {cls.__name__: cls.__name__[0] for cls in SamaritanError.__subclasses__()}
    letters |= {"TrustError": "K", "DeploymentError": "N"}  # T and D were taken
    raised = re.compile(r"\b(" + "|".join(letters) + r")\(\s*\"(SAM-[A-Z]\d{3})")
    found = [match for path in SOURCES for match in raised.findall(path.read_text("utf-8"))]
    assert len(found) > 50
    assert not [pair for pair in found if pair[1][4] != letters[pair[0]]]


def test_codes_named_in_other_pages_exist() -> None:
    known = set(documented_codes())
    named = {
        (relative(page), code) for page in PAGES for code in CODE.findall(page.read_text("utf-8"))
    }
    assert not {pair for pair in named if pair[1] not in known}


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_relative_links_lead_somewhere(page: Path) -> None:
    text = without_code(page.read_text("utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.exists(), f"{target} does not exist"
        assert linked.is_relative_to(ROOT), f"{target} leaves the repository"
        if anchor:
            assert anchor in anchors(linked.read_text("utf-8")), f"{target}: no such heading"


@pytest.mark.parametrize("page", [*PAGES, *CONFIGS], ids=relative)
def test_commands_exist(page: Path) -> None:
    for line in commands(page):
        check_command(line)


NOT_YET: set[str] = set()
"""Commands that a hint names and that do not exist; make them or mend the hint, then empty this."""


def test_commands_named_in_hints_exist() -> None:
    missing = set()
    for path in SOURCES:
        text = re.sub(r"\"\s*f?\"", "", path.read_text("utf-8"))  # strings over several lines
        for line in re.findall(r"`(samaritan [^`{}]+)`", text):
            try:
                check_command(" ".join(line.split()))
            except AssertionError:
                missing.add(line)
    assert missing == NOT_YET


def test_every_configuration_opens_with_its_command() -> None:
    assert CONFIGS
    for path in CONFIGS:
        first = path.read_text("utf-8").partition("\n")[0]
        command = "compare" if "\nvariants:" in path.read_text("utf-8") else "simulate"
        assert first.startswith(f"# samaritan {command} {relative(path)}"), path.name


@pytest.mark.parametrize(
    "line",
    [
        "samaritan simulat configs/demo.yaml",
        "samaritan simulate configs/demo.yaml --rounds 3",
        "samaritan simulate configs/none.yaml",
        "samaritan simulate configs/demo.yaml --set rounds",
        "samaritan simulate configs/demo.yaml --set round=3",
        "samaritan data DIR",
        "samaritan evaluate --adapter",
        "samaritan doctor here",
        "make coffee",
    ],
)
def test_a_wrong_command_is_noticed(line: str) -> None:
    with pytest.raises(AssertionError):
        check_command(line)


def test_every_dependency_is_named_in_the_notices() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    listed = [*project["dependencies"]]
    for extra in project["optional-dependencies"].values():
        listed += extra
    notices = (ROOT / "THIRD_PARTY_NOTICES.md").read_text("utf-8")
    named = set(re.findall(r"^\| ([A-Za-z][A-Za-z0-9-]*) \|", notices, re.MULTILINE)) - {"Package"}
    needed = {re.split(r"[^A-Za-z0-9-]", item, maxsplit=1)[0] for item in listed}
    assert named == needed - {"samaritan"}


def test_documents_claim_nothing_they_cannot_show() -> None:
    claims = re.compile(
        r"\b(compliant|compliance|anonymous|anonymi[sz]ed|secure(?! aggregation))\b"
    )
    for page in PAGES:
        found = claims.findall(page.read_text("utf-8").lower())
        assert not found, f"{page.name}: {found}"


def without_code(text: str) -> str:
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`]*`", "", text)


def anchors(text: str) -> set[str]:
    """Anchors of the headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def commands(page: Path) -> Iterator[str]:
    """The commands of a page: lines of its shell blocks, and inline code."""
    text = page.read_text("utf-8").replace("\\\n", " ")
    if page.suffix == ".yaml":
        for line in re.findall(r"^#\s*((?:samaritan|make) .+)$", text, re.MULTILINE):
            yield re.sub(r"[\[\]]", "", line)  # [--option] may be left out
        return
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        if language in ("", "sh", "bash", "console", "shell"):
            lines = [line.strip().removeprefix("$ ") for line in block.splitlines()]
            yield from (line for line in lines if is_command(line))
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for code in re.findall(r"`([^`]+)`", prose):
        if is_command(" ".join(code.split())):
            yield " ".join(code.split())


def is_command(line: str) -> bool:
    return re.match(r"(\.venv/bin/)?samaritan \S|make \S", line) is not None


def check_command(line: str) -> None:
    """Whether a command line names a command, options and files that exist."""
    words = shlex.split(re.split(r"\s(?:[|>&;#])", line)[0])
    if words[0] == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
        assert set(words[1:]) <= set(targets), f"{line}: no such target"
        return
    command: Command = typer.main.get_command(app)
    rest = words[1:]
    while isinstance(command, Group) and rest and not rest[0].startswith("-"):
        assert rest[0] in command.commands, f"{line}: there is no command {rest[0]!r}"
        command = command.commands[rest.pop(0)]
    check_arguments(command, rest, line)


def check_arguments(command: Command, rest: list[str], line: str) -> None:
    """Options exist and have values, files exist; a command that is only named needs nothing."""
    options = {name: p for p in command.params for name in p.opts if name.startswith("-")}
    plain: list[str] = []
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            plain.append(word)
        elif word != "--help":
            assert word in options, f"{line}: there is no option {word}"
            if not getattr(options[word], "is_flag", False):
                assert rest, f"{line}: {word} needs a value"
                value = rest.pop(0)
                if word == "--set":
                    check_override(value, line)
    most = sum(p.param_type_name == "argument" for p in command.params)
    assert len(plain) <= most, f"{line}: too many arguments"
    for name in plain:
        if name.startswith("configs/"):
            assert (ROOT / name).is_file(), f"{line}: there is no {name}"


def check_override(value: str, line: str) -> None:
    key, equals, _ = value.partition("=")
    assert equals, f"{line}: --set {value} is not key=value"
    assert key in {*config_keys(), "key"}, f"{line}: there is no key {key}"


def test_every_test_the_page_of_faults_names_is_there() -> None:
    named = re.findall(r"`(test_\w+\.py)(?:::(test_\w+))?`", (ROOT / "docs/faults.md").read_text())
    assert len(named) > 50
    for file, test in named:
        text = (ROOT / "tests" / file).read_text("utf-8")
        assert f"def {test}(" in text or not test, f"{file}::{test}"
