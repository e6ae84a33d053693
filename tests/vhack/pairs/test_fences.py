"""Which block of an answer is its program."""

import pytest

from assay.vhack.pairs.fences import find_programs

GOOD = "def solve(x):\n    return x + 1\n"
DRAFT = "def solve(x):\n    return x\n"
QUOTED = 'def solve(x):\n    """\n    ```\n    hi\n    ```\n    """\n    return x + 1\n'
TAGGED = "def solve(x):\n    return x.split('</think>')\n"
USES = "def solve(x):\n    return more(x)\n"
TESTS = "import math\n\n\ndef run_tests():\n    assert solve(1) == 2\n"
ONE = {
    "no block": (GOOD, GOOD),
    "prose": (f"Sure.\n```python\n{GOOD}```\nDone.", GOOD),
    "tildes": (f"~~~ python\n{GOOD}~~~\n", GOOD),
    "braces": (f"```{{.python .numberLines}}\n{GOOD}```\n", GOOD),
    "a shell first": (f"```sh\npip install x\n```\n```py\n{GOOD}```\n", GOOD),
    "a shell behind": (f"```Python\n{GOOD}```\n```bash\npython solve.py\n```\n", GOOD),
    "output without a language": (f"```python\n{GOOD}```\n```\n2\n```\n", GOOD),
    "a draft": (f"```python\n{DRAFT}```\nBetter:\n```python\n{GOOD}```\n", GOOD),
    "its use behind": (f"```python\n{GOOD}```\n```python\nprint(solve(1))\n```\n", GOOD),
    "indented": ("1. So:\n   ```python\n   def solve(x):\n       return x + 1\n   ```\n", GOOD),
    "longer fences": (f"````python\n{QUOTED}````\n", QUOTED),
    "a fence in a docstring": (f"```python\n{QUOTED}```\n", QUOTED),
    "reasoning": (f"<think>\n```python\n{DRAFT}```\n</think>\n```python\n{GOOD}```\n", GOOD),
    "reasoning in one line": (f"<think>so</think>```python\n{DRAFT}```\n", DRAFT),
    "reasoning that the prompt opened": (
        f"Hm.\n```python\n{DRAFT}```\n</think>\n\n```python\n{GOOD}```\n",
        GOOD,
    ),
    "reasoning without an end": (f"<think>\n```python\n{DRAFT}```\n", ""),
    "reasoning and no block": (f"<think>so</think>{GOOD}", GOOD),
    "a tag in the program": (TAGGED, TAGGED),
    "a tag in a block": (f"```python\n{TAGGED}```\n", TAGGED),
    "without an end": (f"```python\n{GOOD}", GOOD),
    "line ends of Windows": ("```python\r\nsolve = abs\r\n```\r\n", "solve = abs\r\n"),
    "a version": (f"```python3.11\n{GOOD}```\n", GOOD),
    "a mark of the byte order": (f"\ufeff{GOOD}", GOOD),
    "a helper of its own": (
        f"```python\ndef more(x):\n    return x + 1\n```\n```python\n{USES}```\n",
        f"def more(x):\n    return x + 1\n\n{USES}",
    ),
    "tests of their own": (
        f"```python\n{DRAFT}```\nNo:\n```python\n{GOOD}```\n```python\n{TESTS}```\n",
        f"{GOOD}\n{TESTS}",
    ),
    "no language": (f"```\n{GOOD}```\n```\n2\n```\n", GOOD),
    "said twice": (f"```python\n{GOOD}```\nSo:\n```python\n{GOOD}```\n", GOOD),
    "taken back": (
        f"```python\n{GOOD}```\n```python\n{DRAFT}```\nNo:\n```python\n{GOOD}```\n",
        GOOD,
    ),
    "said twice without a language": (f"```\n{GOOD}```\nSo:\n```\n{GOOD}```\n", GOOD),
    "a constant of its own": (
        "```python\nTABLE: dict = {\n    1: 2,\n}\n```\n```python\nsolve = TABLE.get\n```\n",
        "TABLE: dict = {\n    1: 2,\n}\n\nsolve = TABLE.get\n",
    ),
    "an odd quote": (
        f"```python\nQ = 1  # \x27\x27\x27\n{GOOD}```\nIt's done.\n",
        f"Q = 1  # \x27\x27\x27\n{GOOD}",
    ),
    "answer tags": (f"<think>so</think>\n<answer>\n{GOOD}</answer>", f"\n\n{GOOD}"),
    "answer tags at the fence": (f"<answer>```python\n{GOOD}```</answer>\n", GOOD),
    "reasoning that ends in a line": (
        f"Hm.\n```python\n{DRAFT}```\nso it is.</think>\n{GOOD}",
        f"\n{GOOD}",
    ),
    "reasoning of Magistral": (f"[THINK]\n```py\n{DRAFT}```\n[/THINK]\n```\n{GOOD}```\n", GOOD),
    "reasoning of OpenThinker": (
        f"<|begin_of_thought|>\n```py\n{DRAFT}```\n<|end_of_thought|>\n```\n{GOOD}```\n",
        GOOD,
    ),
    "line numbers": (f"```python=\n{GOOD}```\n", GOOD),
    "inside Markdown": (f"````markdown\n# So\n```python\n{GOOD}```\n````\n", GOOD),
}


@pytest.mark.parametrize("name", ONE)
def test_the_program_is_the_last_block_of_python_after_the_reasoning(name):
    completion, program = ONE[name]
    (found,) = find_programs(completion, "solve")
    assert found.rstrip("\n") == program.rstrip("\n")


def test_blocks_without_a_language_that_both_solve_are_both_found():
    completion = f"```\n{DRAFT}```\nor\n```\n{GOOD}```\n"
    assert find_programs(completion, "solve") == [DRAFT, GOOD]


@pytest.mark.timeout(60)
def test_a_completion_of_many_fences_is_read_in_a_time_that_grows_as_it_does():
    """Where each block looks through all that follows, 8000 fences take four seconds."""
    fences = "```\n" * 100_000
    good = "def solve(x):\n    return x\n"
    assert find_programs(f"{fences}```python\n{good}```\n", "solve") == [good]


@pytest.mark.timeout(60)
def test_a_program_of_many_blocks_is_read_in_a_time_that_grows_as_they_do():
    """Where each block is looked for among all others, this takes minutes."""
    lines = [f"a{row} = 1\n" for row in range(150_000)]
    blocks = [f"```python\n{line}```\n" for line in (*lines, "solve = a0\n")]
    (program,) = find_programs("".join(blocks), "solve")
    assert program == "\n".join((*lines, "solve = a0\n"))


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "fences",
    [
        "```markdown\n",
        "~~~md\n```md\n",
        "```\n'''\n```\n\"\"\"\n",
        "```md\n'''\n",
        "```python\n'''\n```\n\"\"\"\n",
    ],
    ids=["markdown", "two-fences", "quotes", "quoted-markdown", "quoted-python"],
)
def test_blocks_that_do_not_end_are_read_in_a_time_that_grows_as_they_do(fences: str):
    """Where each looks through all that follows, this takes minutes."""
    find_programs(fences * (500_000 // len(fences)), "solve")
