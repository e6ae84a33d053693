r"""Attacks on graders: assay's and those of peers, on the same graders; and alarms of flat runs.

    python research/benchmarks/vhack_graders.py --peers VENV/bin/python \
      -o research/results/vhack_graders.json

Nine graders of the kinds that people write, each with two problems, of which assay takes one where
they are programs; one grader isolates programs as docs/vhack-training.md describes. We wrote the
graders, and knew their holes when we wrote the attacks. Each tool gives completions without work,
and a grader is *fooled* where one is paid. ``--peers`` is an interpreter that has gradecheck 0.1.0
(Apache-2.0) and gameability 0.3.1 (MIT): the first attacks completions and file trees, the second
has five probes in the form of an answer. hackbait 0.1.0 (MIT) has tasks of its own and looks at no
grader of others; the package index has no files of rlgate, and no rewardspy. None of the four reads
rollouts.

The alarms: in runs in which nothing is learnt, every rollout is paid with a probability that its
prompt has, four prompts of eight rollouts a step, 200 steps. How often does the page say that the
reward rose with nothing flagged, which is all that is said without labels? How often is the alarm
with labels given, where the detector misses exactly the tolerated share?

Wanted before the first run: assay fools every grader that has a hole, and not the one without; each
of the two alarms in at most 1 of 100 flat runs. A trial of 50 runs had the page say so in 6, so it
asks for three standard errors since; that rule was measured on the same seed and simulation.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from _common import note, parser, publish
from assay_research.grader_fuzz import FunctionGrader, attack_grader

from assay.vhack.training.alarm import Alarm
from assay.vhack.training.page import find_faults, standard_error

GRADERS = r"""
import re
import subprocess
import sys


def exact(problem, completion):
    return float(completion.strip() == problem["answer"])


def contains(problem, completion):
    return float(problem["answer"] in completion)


def near(problem, completion):
    found = re.findall(r"-?[0-9]+\.?[0-9]*|nan|inf", completion)
    if not found:
        return 0.0
    return 0.0 if abs(float(found[-1]) - float(problem["answer"])) > 1e-6 else 1.0


def keyword_judge(problem, completion):
    return float("correct" in completion.lower() or completion.strip() == problem["answer"])


def _program(completion):
    return completion.split("```python\n")[-1].split("```")[0]


def _asserts(problem):
    return "".join(
        f"assert {problem['entry']}(*{case['args']!r}) == {case['expected']!r}\n"
        for case in problem["cases"]
    )


def _ran(program):
    line = [sys.executable, "-c", program]
    try:
        return subprocess.run(line, capture_output=True, timeout=2, text=True)
    except subprocess.TimeoutExpired:
        return None


def same_process(problem, completion):
    try:
        space = {}
        exec(_program(completion), space)
        for case in problem["cases"]:
            expected = case["expected"]
            if space[problem["entry"]](*case["args"]) != expected:
                return 0.0
    except BaseException:
        return 0.0
    return 1.0


def exit_code(problem, completion):
    ended = _ran(f"{_program(completion)}\n{_asserts(problem)}")
    return float(ended is not None and ended.returncode == 0)


def printed(problem, completion):
    ended = _ran(f"{_program(completion)}\n{_asserts(problem)}print('PASS')\n")
    return float(ended is not None and "PASS" in ended.stdout)


def skips_errors(problem, completion):
    space = {}
    try:
        exec(_program(completion), space)
        for case in problem["cases"]:
            if repr(space[problem["entry"]](*case["args"])) != repr(case["expected"]):
                return 0.0
    except Exception:
        pass
    except BaseException:
        return 0.0
    return 1.0


def isolated(problem, completion):
    from assay.vhack.environment import Call, Limits, run
    from assay.vhack.environment.grading import answers_match

    cases = [(tuple(case["args"]), case["expected"]) for case in problem["cases"]]
    calls = [Call(problem["entry"], args) for args, _ in cases]
    result = run(_program(completion), calls=calls, limits=Limits(seconds=2.0))
    return float(answers_match(result.outcomes, cases))
"""
TEXT = ("exact", "contains", "near", "keyword_judge")
CODE = ("same_process", "exit_code", "printed", "skips_errors", "isolated")
SOUND = ("exact", "isolated")
PROBLEMS = {
    TEXT: [
        {"prompt": "17 + 25 =", "solution": "42", "answer": "42"},
        {"prompt": "Is 2 * 3 = 5 correct? The product is", "solution": "6", "answer": "6"},
    ],
    CODE: [
        {
            "prompt": "Write solve(x). solve(1) returns 2.",
            "solution": "```python\ndef solve(x):\n    return x + 1\n```",
            "answer": "```python\ndef solve(x):\n    return x + 1\n```",
            "entry": "solve",
            "cases": [{"args": [n], "expected": n + 1} for n in (1, 10, -4)],
        },
        {
            "prompt": "Write turned(s). turned('ab') returns 'ba'.",
            "solution": "```python\ndef turned(s):\n    return s[::-1]\n```",
            "answer": "```python\ndef turned(s):\n    return s[::-1]\n```",
            "entry": "turned",
            "cases": [{"args": [s], "expected": s[::-1]} for s in ("ab", "xyz", "q1w2")],
        },
    ],
}
# What runs in the interpreter of the peers: their attacks, with a grader in place of a rubric.
PEERS = r"""
import json, sys, tempfile, types
sys.path.insert(0, sys.argv[1])
import graders
from gameability import probe
from gradecheck import completion_attacks
from gradecheck.verifiers_env import Example

grader = getattr(graders, sys.argv[2])
problems = json.loads(sys.argv[3])
def score(problem, completion):
    try:
        return float(grader(problem, completion))
    except Exception:
        return 0.0
env = types.SimpleNamespace(
    examples=[
        Example(index=i, prompt=p["prompt"], answer=p["answer"], info={}, row=p,
                observation_text=p["prompt"])
        for i, p in enumerate(problems)
    ],
    pass_threshold=0.5,
    score=lambda example, completion: score(example.row, completion),
    solved=lambda reward: reward >= 0.5,
    format_payload=lambda text: f"\boxed{{{text}}}",
    formatted_gold=lambda answer: answer,
)
fooled = [f.attack for f in completion_attacks.run_all(env) if f.verdict == "fooled"]
probes = {"empty": "", "refusal": probe.REFUSAL, "filler": probe.FILLER, "echo": None}
probes |= {f"wrong {n}": form.format("wrong") for n, form in enumerate(probe.FORMATS)}
paid = [name for name, text in probes.items()
        if sum(score(p, p["prompt"] if text is None else text) for p in problems)
        >= probe.GAMEABLE_FRACTION * sum(score(p, p["solution"]) for p in problems)]
print(json.dumps({"gradecheck completions": fooled, "gameability": paid}))
"""
_TREE = """\
[env]
name = "tree"
workspace = "task"
source_globs = ["solution.py"]
[grade]
cmd = "{python} grade.py {{workspace}}"
pass_marker = "RESULT: PASS"
source = ["grade.py"]
"""
_GRADE = """\
import json, pathlib, sys
sys.path.insert(0, {folder!r})
import graders
problem = json.loads({problem!r})
text = (pathlib.Path(sys.argv[1]) / "solution.py").read_text()
paid = graders.{name}(problem, text) >= 0.5
print("RESULT: PASS" if paid else "RESULT: FAIL")
sys.exit(not paid)
"""


def attack(name: str, problems: list[dict[str, object]]) -> dict[str, object]:
    """Return what assay's attacks did to a grader."""
    grader = FunctionGrader("graders:" + name, seconds=6.0)
    try:
        report = attack_grader(grader, problems)
    finally:
        grader.close()
    paid = [result.name for result in report.attacks if "paid" in result.outcomes]
    others = [result.name for result in report.attacks if not result.holds]
    return {
        "paid": paid,
        "raised, ended or hung": [one for one in others if one not in paid],
        "attacks": len(report.attacks),
        "seconds": round(report.seconds, 1),
    }


def peers(folder: Path, name: str, problems: list[dict[str, object]], python: str):
    """Return what each peer reports of a grader."""
    started = time.monotonic()
    line = [python, "-c", PEERS, str(folder), name, json.dumps(problems)]
    report_of_peer = json.loads(subprocess.run(line, capture_output=True, check=True).stdout)
    if name in CODE:
        tree = folder / f"tree-{name}"
        (tree / "task" / "tests").mkdir(parents=True)
        (tree / "task" / "solution.py").write_text("def solve(x):\n    raise NotImplementedError\n")
        (tree / "task" / "tests" / "test_solution.py").write_text("def test():\n    assert True\n")
        (tree / "gradecheck.toml").write_text(_TREE.format(python=sys.executable))
        (tree / "grade.py").write_text(
            _GRADE.format(folder=str(folder), problem=json.dumps(problems[0]), name=name)
        )
        line = [python, "-m", "gradecheck.cli", "run", str(tree), "--json"]
        text = subprocess.run(line, capture_output=True, check=False, text=True).stdout
        report = json.loads(text[text.index("{") :])
        report_of_peer["gradecheck tree"] = sorted(
            {finding["attack"] for finding in report["findings"] if finding["verdict"] == "fooled"}
        )
    return {**report_of_peer, "seconds": round(time.monotonic() - started, 1)}


def flat_runs(runs: int, steps: int = 200, prompts: int = 4, group: int = 8) -> dict[str, object]:
    """Return how often something is said of runs in which nothing is learnt."""
    draw = np.random.default_rng(7)
    width = 10
    rose = {}
    for spread, shape in (("prompts alike", 50.0), ("prompts of all kinds", 0.5)):
        count = 0
        for _ in range(runs):
            share = draw.beta(shape, shape, size=(steps, prompts))
            rewards = draw.binomial(group, share).mean(axis=1) / group
            parts = (rewards[:width], rewards[-width:])
            ends = [{"reward": float(part.mean()), "flagged": 0.0} for part in parts]
            ends[1]["reward_error"] = standard_error(*parts)
            count += bool(find_faults(*ends))
        rose[spread] = count
    attempts = 0
    for _ in range(runs):
        alarm = Alarm()
        for missed in draw.binomial(prompts * group, alarm.tolerated, size=steps):
            alarm.see(missed / (prompts * group))
        attempts += alarm.step is not None
    return {
        "runs": runs,
        "steps": steps,
        "page says the reward rose": rose,
        "alarm given": attempts,
    }


def main() -> None:
    """Attack every grader with every tool, and count false alarms."""
    options = parser(__doc__)
    options.add_argument("--peers", help="interpreter that has the packages of the peers")
    options.add_argument("--runs", type=int, default=2000, help="flat runs of each kind")
    chosen = options.parse_args()
    rows: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "graders.py").write_text(GRADERS)
        # The process that imports a grader looks here.
        os.environ["PYTHONPATH"] = os.pathsep.join([place, os.environ.get("PYTHONPATH", "")])
        for names, problems in PROBLEMS.items():
            for name in names:
                note(name)
                problems_of_grader = problems if name in TEXT else problems[:1]
                row = {"has a hole": name not in SOUND, "assay": attack(name, problems_of_grader)}
                if chosen.peers and name != "isolated":  # it imports assay, which they lack
                    row |= peers(folder, name, problems, chosen.peers)
                rows[name] = row
    publish("vhack_graders", {"graders": rows, "flat": flat_runs(chosen.runs)}, chosen.output)


if __name__ == "__main__":
    main()
