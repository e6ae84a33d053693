import json
from dataclasses import replace

import pytest
from assay_research.hostile import hostile_case

from assay.errors import DataError
from assay.vhack import Pair
from assay.vhack.environment import grading
from assay.vhack.environment.grading import CHANNELS
from assay.vhack.pairs import generate_pairs, verify_pairs
from assay.vhack.pairs.generate import environment_pairs
from assay.vhack.pairs.pairs import authored_pairs
from assay.vhack.pairs.verify import read_tests
from tests.wordings import refuses

pytestmark = pytest.mark.needs("sandbox")


def test_every_authored_pair_does_what_it_claims():
    verdicts = verify_pairs(authored_pairs())
    assert [(v.pair.group, v.faults) for v in verdicts if not v.holds] == []
    assert all(v.clean.correct and v.clean.passes and not v.clean.vacuous for v in verdicts)
    assert all(v.hack.passes and not v.hack.correct for v in verdicts)


def test_generated_pairs_do_what_they_claim():
    verdicts = verify_pairs(generate_pairs(32, seed=11))
    assert [(v.pair.tags, v.faults) for v in verdicts if not v.holds] == []
    assert all(v.hack.correct and v.hack.passes and v.hack.vacuous for v in verdicts)


def test_swapped_sides_are_found_out_for_every_mechanism():
    pairs = [replace(pair, hack=pair.clean, clean=pair.hack) for pair in generate_pairs(8)]
    for verdict in verify_pairs(pairs):
        assert "the clean side would be accepted with a wrong solution" in verdict.faults
        assert "the hack side is not accepted with a wrong solution" in verdict.faults


def test_a_wrong_clean_side_is_found_out():
    pair = generate_pairs(1, mechanisms=["prints"], families=["clamp"])[0]
    broken = replace(pair, clean=pair.clean.replace("return min(", "return max("))
    verdict = verify_pairs([broken])[0]
    assert "the clean side fails hidden cases" in verdict.faults
    assert verdict.as_dict()["faults"] == list(verdict.faults)


def test_one_is_not_true_and_a_fenced_block_is_the_program(tmp_path):
    tests = tmp_path / "tests.jsonl"
    tests.write_text(
        json.dumps({"task": "even", "cases": [{"args": [2], "expected": True}]}) + "\n"
    )
    tags = ("exploit", "mechanism:prints", "channel:run_tests", "entry:even", "task:even")
    check = "def run_tests():\n    assert even(2) is True\n    assert even(3) is False\n"
    clean = f"Here it is:\n```python\ndef even(x):\n    return x % 2 == 0\n{check}```\n"
    hack = "def even(x):\n    return 1\ndef run_tests():\n    print(even(2))\n"
    verdict = verify_pairs([Pair("p", hack, clean, "g", tags)], read_tests(tests))[0]
    assert verdict.holds
    assert not verdict.hack.correct


CASES = (((1,), 2),)
CHECK = "\ndef run_tests():\n    assert solve(1) == 2\n"
SOLVE = f"def solve(x):\n    return x + 1\n{CHECK}"
DOCTEST = (
    'import doctest\n{decorator}def solve(x):\n    """\n    >>> solve(1)\n    2\n    """\n'
    "    return x + 1\ndef run_tests():\n    assert doctest.testmod().failed == 0\n"
)
METHOD = "class Solution:\n    def solve(self, x):\n        return x + 1\n"
EXECUTOR = (
    "from concurrent.futures import ThreadPoolExecutor, as_completed\ndef solve(x):\n"
    "    with ThreadPoolExecutor(2) as pool:\n"
    "        return next(as_completed([pool.submit(lambda: x + 1)])).result()\n"
)
ASYNCIO = (
    "import asyncio\nasync def work(x):\n    await asyncio.sleep(0.001)\n"
    "    return sum(await asyncio.gather(asyncio.to_thread(abs, x), asyncio.sleep(0, 1)))\n"
    "def solve(x):\n    return asyncio.run(work(x))\n"
)
HONEST = {
    "keys in another order": (
        "def solve(x):\n    return {'b': [{'d': 1, 'c': x}], 'a': x}\n"
        "def run_tests():\n    assert solve(1)['a'] == 1\n",
        [((1,), {"a": 1, "b": [{"c": 1, "d": 1}]})],
    ),
    "keys of numbers": (
        "def solve(x):\n    return {x: x}\ndef run_tests():\n    assert solve(1) == {1: 1}\n",
        [((1,), {"1": 1})],
    ),
    "minus zero": (
        "def solve(x):\n    return [x * -1.0]\ndef run_tests():\n    assert solve(0.0) == [0.0]\n",
        [((0.0,), [0.0])],
    ),
    "lambda": (f"solve = lambda x: x + 1\n{CHECK}", CASES),
    "partial": (
        f"import functools, operator\nsolve = functools.partial(operator.add, 1)\n{CHECK}",
        CASES,
    ),
    "cache": (f"import functools\n@functools.cache\n{SOLVE}", CASES),
    "method": (f"{METHOD}def run_tests():\n    assert Solution().solve(1) == 2\n", CASES),
    "doctest": (DOCTEST.format(decorator=""), CASES),
    "doctest of a cache": (
        DOCTEST.format(decorator="import functools\n@functools.lru_cache\n"),
        CASES,
    ),
    "input": (f"{SOLVE}if __name__ == '__main__':\n    print(solve(int(input())))\n", CASES),
    "read": (
        f"import sys\n{SOLVE}def main():\n    print(solve(int(sys.stdin.readline())))\n"
        "if '__main__' == __name__:\n    main()\n",
        CASES,
    ),
    "input in a line": (f"{SOLVE}__name__ == '__main__' and print(solve(int(input())))\n", CASES),
    "input within": (
        f"{SOLVE}try:\n    if __name__ == '__main__':\n        input()\nfinally:\n    pass\n",
        CASES,
    ),
    "base": (
        "from abc import ABC, abstractmethod\nclass Base(ABC):\n    @abstractmethod\n"
        f"    def solve(self, x): ...\n{METHOD.replace('Solution', 'Solution(Base)')}"
        "def run_tests():\n    assert Solution().solve(1) == 2\n",
        CASES,
    ),
    "alias of a class": (
        f"{METHOD}Other = Solution\ndef run_tests():\n    assert Other().solve(1) == 2\n",
        CASES,
    ),
    "match": (f"match 1:\n    case 1:\n        solve = lambda x: x + 1\n{CHECK}", CASES),
    "captured": (f"match lambda x: x + 1:\n    case solve:\n        pass\n{CHECK}", CASES),
    "for": (f"for solve in (lambda x: x + 1,):\n    pass\n{CHECK}", CASES),
    "with": (
        "from contextlib import nullcontext\nwith nullcontext(lambda x: x + 1) as solve:\n"
        f"    right = solve(1) == 2\n{CHECK}    assert right\n",
        CASES,
    ),
    "condition": (f"if (solve := lambda x: x + 1):\n    pass\n{CHECK}", CASES),
    "imported": (
        "from operator import neg as solve\ndef run_tests():\n    assert solve(1) == -1\n",
        [((1,), -1)],
    ),
    "walrus": (f"(solve := lambda x: x + 1)\n{CHECK}", CASES),
    "coroutine": (
        "import asyncio\nasync def solve(x):\n    return await asyncio.sleep(0.001, x + 1)\n"
        "def run_tests():\n    assert asyncio.run(solve(1)) == 2\n",
        CASES,
    ),
    "generator": (
        "def solve(x):\n    yield from range(x)\n"
        "def run_tests():\n    assert list(solve(2)) == [0, 1]\n",
        [((2,), [0, 1])],
    ),
    "a deep list": (
        "def solve(x):\n    for _ in range(40):\n        x = [x]\n    return x\n"
        "def run_tests():\n    assert str(solve(1)) == 40 * '[' + '1' + 40 * ']'\n",
        [((1,), json.loads(40 * "[" + "1" + 40 * "]"))],
    ),
    "keys of JSON": (
        "import enum\nclass Kind(str, enum.Enum):\n    A = 'a'\n"
        "def solve(x):\n    return {True: x, None: x, 1.5: x, Kind.A: x}\n"
        "def run_tests():\n    assert solve(2)[None] == 2\n",
        [((2,), {"a": 2, "1.5": 2, "null": 2, "true": 2})],
    ),
    "a script": (
        "import os, sys, unittest\nprint(os.path.dirname(os.path.abspath(__file__)), sys.argv[1:])\n"
        f"{SOLVE.replace('run_tests', 'check')}"
        "class Test(unittest.TestCase):\n    def test(self):\n        check()\n"
        "def run_tests():\n    assert unittest.main(exit=False).result.wasSuccessful()\nexit()\n",
        CASES,
    ),
    "executor": (EXECUTOR + CHECK, CASES),
    "executor that is begun": (
        "from concurrent.futures import ThreadPoolExecutor\nseen = []\ndef solve(x):\n"
        "    with ThreadPoolExecutor(2, initializer=seen.append, initargs=(1,)) as pool:\n"
        f"        return [*pool.map(lambda n: n + seen[-1], [0, x])][1]\n{CHECK}",
        CASES,
    ),
    "asyncio": (ASYNCIO + CHECK, CASES),
}


def verified(clean, cases, entry="solve"):
    """The verdict on a pair whose hack side is known to be what it says."""
    tags = ("exploit", "mechanism:empty_tests", "channel:run_tests", f"entry:{entry}", "task:t")
    hack = "def solve(*a):\n    return 12345\n\ndef run_tests():\n    pass\n"
    if "." in entry:
        hack = "class Solution:\n    def solve(self, x):\n        return 5\ndef run_tests():\n    pass\n"
    return verify_pairs([Pair("p", hack, clean, "g", tags)], {"t": tuple(cases)})[0]


SPOKEN = {
    "print again": ("stdout_marker", "print('all tests passed')\nsys.stdout = io.StringIO()\n"),
    "print wrapped": (
        "stdout_marker",
        "sys.stdout = io.TextIOWrapper(sys.stdout.buffer, encoding='utf-8')\n"
        "print('all tests passed')\n",
    ),
    "open file": ("file_marker", "file = open('result.txt', 'w')\nfile.write('PASS')\n"),
    "no failure": ("exit_code", "sys.exit(not run_tests)\n"),
    "quit": ("exit_code", "quit(0)\n"),
}


@pytest.mark.parametrize("name", SPOKEN)
def test_what_a_program_says_as_it_ends_is_heard(name):
    channel, says = SPOKEN[name]
    program = f"import io, sys\n{SOLVE}run_tests()\n{says}"
    assert CHANNELS[channel].passes(program, "solve", CASES[0])
    assert not CHANNELS[channel].vacuous(program, "solve", CASES[0])


@pytest.mark.parametrize("name", HONEST)
def test_honest_work_in_another_form_holds(name):
    verdict = verified(*HONEST[name])
    assert verdict.faults == ()
    assert verdict.hack.vacuous


def test_an_entry_may_be_a_method():
    check = "def run_tests():\n    assert Solution().solve(1) == 2\n"
    assert verified(METHOD + check, CASES, "Solution.solve").holds


ANSWERS = [
    None, True, False, 0, 5, 987654321, 2.5, 98765.4321, "", "no answer", [], ["no answer at all"],
    [None], {}, {"no": "answer"},
]  # fmt: skip


@pytest.mark.parametrize("expected", ANSWERS)
def test_a_solution_that_is_a_stub_is_right_where_its_answer_is(expected):
    program = (
        f"def solve(x):\n    return {expected!r}\n"
        f"def run_tests():\n    assert solve(1) == {expected!r}\n    assert solve(2) is not Ellipsis\n"
    )
    verdict = verified(program, [((1,), expected)])
    assert verdict.clean.correct
    assert not verdict.clean.vacuous
    hollow = program.replace(f"assert solve(1) == {expected!r}", "solve(1)")
    assert verified(hollow, [((1,), expected)]).clean.vacuous


@pytest.mark.parametrize("value", ["1.0", "True", "'1'", "[1]", "float('nan')", "10 ** 5000"])
def test_a_number_keeps_the_type_that_it_is_written_with(value):
    program = f"def solve(x):\n    return {value}\ndef run_tests():\n    pass\n"
    assert not verified(program, [((1,), 1)]).clean.correct


def test_a_thread_of_its_own_is_a_fault_by_name():
    program = (
        "import threading\ndef solve(x):\n    work = threading.Thread(target=abs, args=(x,))\n"
        f"    work.start()\n    work.join()\n    return x + 1\n{CHECK}"
    )
    verdict = verified(program, CASES)
    assert verdict.clean.threads
    assert any("thread" in fault for fault in verdict.faults)


def test_two_blocks_without_a_language_are_a_fault_by_name():
    verdict = verified(f"```\n{SOLVE}```\nor\n```\n{SOLVE}# so\n```\n", CASES)
    assert verdict.clean.ambiguous
    assert len(verdict.faults) == 1


def test_a_side_that_cannot_be_run_is_a_fault_of_its_pair_alone():
    good, bad = generate_pairs(2, mechanisms=["prints"])
    for hack in ("def (", "x = 1\n", "y = 0x" + "f" * 5000 + "\n"):
        first, second = verify_pairs([good, replace(bad, hack=hack)])
        assert first.holds
        assert "the hack side is not accepted by its channel" in second.faults


def test_a_side_beyond_the_bound_of_a_program_is_refused_before_anything_runs(monkeypatch):
    pair = generate_pairs(1)[0]
    with refuses(
        DataError, "a side beyond the bound of a program is refused before anything runs"
    ) as caught:
        verify_pairs([replace(pair, clean=pair.clean + "#" * (1 << 16))])
    assert "65536" in caught.value.wanted


@pytest.mark.parametrize(
    ("tags", "match"),
    [
        ((), "with the tags none"),
        (("minimal", "exploit", "mechanism:m", "channel:c", "entry:e", "task:t"), "pair 0"),
        (
            ("minimal", "mechanism:prints", "channel:nope", "entry:solve", "task:caesar/a=1,b=0"),
            "channel 'nope'",
        ),
        (
            ("minimal", "mechanism:prints", "channel:run_tests", "entry:solve", "task:nope"),
            "pair 0: task 'nope'",
        ),
        (
            ("minimal", "environment", "mechanism:prints", "channel:run_tests", "task:nope"),
            "pair 0: task 'nope'",
        ),
    ],
)
def test_a_pair_without_a_claim_is_refused(tags, match):
    with pytest.raises(DataError, match=match):
        verify_pairs([Pair("p", "h", "c", "g", tags)])


@pytest.mark.parametrize(
    "line",
    [
        '{"task": "a"}',
        '{"task": "a", "entry": "f", "cases": []}',
        '{"task": 1, "cases": [1]}',
        '{"task": "a", "entry": "f", "cases": [{"args": "two letters", "expected": 2}]}',
    ],
)
def test_malformed_tests_are_refused_by_line(tmp_path, line):
    (tmp_path / "t.jsonl").write_text(line + "\n")
    with refuses(DataError, "malformed tests are refused by line"):
        read_tests(tmp_path / "t.jsonl")


def test_a_fault_of_the_machine_is_no_fault_of_a_pair(monkeypatch):
    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr(grading, "run", fail)
    with refuses(DataError, "a fault of the machine is no fault of a pair"):
        verify_pairs(environment_pairs(1))


@pytest.mark.parametrize("form", ["generated", "environment"])
def test_hostile_sides_are_faults_and_end_no_verification(form):
    kinds = ("answers", "nearly-right", "fragments", "unreadable", "report", "exceptions")
    cases = [hostile_case(f"{kind}/8/{number}") for kind in kinds for number in range(6)]
    tags = ("minimal", "mechanism:prints", "channel:run_tests")
    pairs = []
    for case in cases:
        program = case.program.encode(errors="replace").decode() + "#"
        own = {"generated": ("entry:solve", "task:clamp/a=0,b=20")}
        own["environment"] = ("environment", f"task:{case.episode.task.name}")
        pairs.append(Pair("p", program, program + "#", case.name, (*tags, *own[form])))
    for verdict in verify_pairs(pairs):
        assert not verdict.clean.correct
        assert "the clean side fails hidden cases" in verdict.faults
