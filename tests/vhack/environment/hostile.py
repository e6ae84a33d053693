"""Programs and reports that are made to break whatever reads them; each follows from its seed alone."""

import json
import random

from assay.vhack.environment import MODES, Episode, tasks

HUGE = {
    "digits": "y = 0x" + "f" * 5000 + "\n",
    "terms": "y = " + " + ".join(["1"] * 800) + "\n",
    "attributes": "y = lambda z: z" + ".a" * 600 + "\n",
    "subscripts": "y = lambda z: z" + "[0]" * 2000 + "\n",
    "parentheses": "y = " + "(" * 150 + "1" + ")" * 150 + "\n",
    "lists": "y = " + "[" * 90 + "]" * 90 + "\n",
    "negations": "y = " + "-" * 900 + "1\n",
    "comparisons": "y = " + " < ".join(["1"] * 2000) + "\n",
    "branches": "if 0:\n    pass\n" + "elif 0:\n    pass\n" * 700,
    "strings": "y = " + "'a' " * 5000 + "\n",
    "formats": "y = f'" + "{1}" * 2000 + "'\n",
    "names": "y" * 60000 + " = 1\n",
}
"""Lines of Python that the interpreter runs or refuses, and that some reader of a syntax tree cannot bear."""

_FRAGMENTS = (
    *(
        "def solve(x):\n",
        "    return x\n",
        "    x = x + 1\n",
        "class solve:\n",
        "async def solve(x): pass\n",
        "@solve\n",
    ),
    *("solve = lambda x: x\n", "solve.valid = True\n", "def run_tests():\n    pass\n", "print('all tests passed')\n"),
    *("open('result.txt', 'w').write('PASS')\n", "raise SystemExit(0)\n", "import os\nos._exit(0)\n", "del solve\n"),
    *(
        "    def solve(self): pass\n",
        "# -*- coding: utf-7 -*-\n",
        "\ud800",
        "π = 1\n",
        "\x0c",
        "\0",
        "\t",
        "\\",
        "'''",
        "(",
    ),
    *("def solve(x):\n    return [[x]] * 50\n", "def solve(x):\n    return 10 ** 5000\n", "global x\n", "yield\n"),
    *("def solve(x, solve=lambda: 0):\n    def solve(): pass\n    return solve\n", "match 1:\n    case _: pass\n"),
    *("from __future__ import annotations\n", "from __future__ import braces\n"),
    *("import sys\nsys.setrecursionlimit(9)\n", "await x\n", ")", "'''", "@solve\n"),
)
"""Pieces of programs, some of which no program can hold."""

_REPORTS = """
import os, sys
frame = sys._getframe()
while frame and "job" not in frame.f_locals:
    frame = frame.f_back
line = {line!r}.replace(b"NONCE", frame.f_locals["job"]["nonce"].encode())
try:
    while line:
        line = line[os.write(3, line):]
finally:
    os._exit(0)
"""


def value(rng, depth=0):
    """Any value that JSON has a form for, and some that only Python's parser has."""
    plain = (None, True, False, 0, -1, 1.5, 10**30, 1e308, float("nan"), "", "value", "NONCE", "\x00é", "x" * 300)
    made = rng.random()
    if depth > 3 or made < 0.5:
        return rng.choice(plain)
    if made < 0.75:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    keys = ("kind", "value", "name", "nonce", "outcomes", "files", "a")
    return {rng.choice(keys): value(rng, depth + 1) for _ in range(rng.randrange(4))}


def report(seed):
    """The bytes of a report, often nearly right; ``NONCE`` stands for the nonce."""
    rng = random.Random(f"report {seed}")
    kinds = ("value", "error", "opaque", "none", [], {}, None, 7, ["value"], {"value": 1})
    answers = [{"kind": rng.choice(kinds), "value": value(rng), "name": value(rng)} for _ in range(rng.randrange(12))]
    whole = {"nonce": "NONCE", "finished": True, "raised": "", "outcomes": answers, "files": {"result.txt": "PASS"}}
    for name in rng.sample(list(whole), rng.randrange(3)):
        whole[name] = value(rng)
    text = json.dumps(whole if rng.random() < 0.9 else value(rng))
    made = rng.randrange(8)
    if made == 0:
        depth = rng.choice((50, 900, 20_000))
        text = text.replace('"value": ', '"value": ' + "[" * depth + "]" * depth + ', "x": ', 1)
    if made == 1:
        text = text.replace('"value": ', '"value": ' + "9" * rng.choice((400, 5000)) + ', "x": ', 1)
    if made == 2:
        text = text[: rng.randrange(len(text) + 1)]
    if made == 3:
        text = text.replace('"name"', '"kind"', 1)
    return text.encode() + rng.choice((b"", b"\n", b"\xff", b"\x00", b'{"nonce": "NONCE"}'))


def program(seed):
    """A program: fragments in any order, an exploit with lines that are hard to read, or one that forges its report."""
    rng = random.Random(f"program {seed}")
    made = rng.randrange(3)
    episode = Episode(rng.choice(TASKS), rng.choice(MODES))
    if made == 0:
        return episode, "".join(rng.choice(_FRAGMENTS) for _ in range(rng.randrange(1, 12)))
    if made == 1:
        lines = [line + "\n" for line in episode.exploit().split("\n")]
        lines.insert(rng.choice((0, len(lines))), HUGE[rng.choice(list(HUGE))])
        return episode, "".join(lines)
    return episode, _REPORTS.replace("{line!r}", repr(report(seed)))


TASKS = tasks(8, seed=5, difficulty=(1, 2))
