"""Advice: the flags that an error names exist, and so do the commands."""

import ast
import inspect
import re
from collections.abc import Iterator

import click
import pytest

from assay.cli import app
from assay.framework.groups import leaves
from tests.cli.test_settings_are_read import SOURCES, module_tree, reachable

FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
QUOTED = re.compile(r"`assay ((?:[a-z][a-z-]+ ?)+)([^`]*)`")
COMMANDS = {" ".join(words): command for words, command in leaves(app)}
COMMON = {"--config", "--json", "--help", "--set"}
MODULES = sorted(
    ".".join(path.relative_to(SOURCES).with_suffix("").parts)
    for path in (SOURCES / "assay").rglob("*.py")
)


def texts(node: ast.AST) -> str:
    """Return the text of an expression, with a space in the place of what is computed."""
    parts = (part.value for part in ast.walk(node) if isinstance(part, ast.Constant))
    return " ".join(part for part in parts if isinstance(part, str))


def advice_of(module: str) -> Iterator[str]:
    """Yield what errors of a module say to do."""
    tree = module_tree(module)
    for node in ast.walk(tree) if tree else ():
        if (isinstance(node, ast.keyword) and node.arg == "do") or (
            isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "do"
        ):
            yield texts(node.value)


def test_the_help_says_what_each_option_takes():
    """`demo -o` took a FILE, and `sample` took PER_TASK and MAX_NEW_TOKENS."""
    for name, command in COMMANDS.items():
        for field, setting in command.settings.items():
            shows = command.is_shown(field) and setting.field.annotation is not bool
            if shows and not setting.flag.argument:
                says_folder = (setting.field.description or "").startswith("Directory")
                assert (setting.unit == "DIRECTORY") == says_folder, (name, field)
                assert "_" not in setting.unit, (name, field)


def test_the_help_marks_arguments_that_may_be_missing_or_repeated():
    usage = {name: COMMANDS[name].get_usage(click.Context(COMMANDS[name])) for name in COMMANDS}
    assert usage["poc calibrate"].endswith("[PROOFS...]")
    assert usage["poc pins check"].endswith("PINS [PROOF]")
    assert usage["vhack report"].endswith("RESULTS...")


def flags_of(command: str) -> set[str]:
    settings = COMMANDS[command].settings.values()
    own = {flag for setting in settings for flag in setting.flag.names if not setting.flag.argument}
    return own | COMMON


def reached_by() -> dict[str, set[str]]:
    """Return the commands that reach each module."""
    commands: dict[str, set[str]] = {}
    for name, command in COMMANDS.items():
        start = inspect.unwrap(command.function).__module__
        for module in reachable({start}):
            commands.setdefault(module, set()).add(name)
    return commands


@pytest.mark.slow
def test_a_flag_in_advice_is_one_of_a_command_that_reaches_it():
    """Flags of vLLM are named where its server is refused."""
    reached = reached_by()
    faults = []
    advising = 0
    for module in (name for name in MODULES if ".vllm." not in name):
        flags = COMMON.union(*(flags_of(name) for name in reached.get(module, COMMANDS)))
        for advice in advice_of(module):
            advising += 1
            faults += [(module, fault, advice) for fault in faults_of(advice, flags)]
    assert advising > 400
    assert not faults


def faults_of(advice: str, flags: set[str]) -> Iterator[str]:
    """Yield the unknown commands of an advice, and flags beyond its command and these."""
    groups = {command.rpartition(" ")[0] for command in COMMANDS}
    for words, more in QUOTED.findall(advice):
        name = next((name for name in COMMANDS if f"{words} ".startswith(f"{name} ")), None)
        if name:
            yield from {*FLAG.findall(more)} - flags_of(name)
        elif words.strip() not in groups:
            yield words
    yield from {*FLAG.findall(QUOTED.sub("", advice))} - flags
