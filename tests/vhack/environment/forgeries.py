"""Programs that try to forge their verdict, to end the grader, or never to end themselves.

Braces that stay are doubled, as in `escapes`.
"""

FORGERIES = {
    "exit_zero": """
import os
def solve(x):
    os._exit(0)
""",
    "exit_at_once": "import os\nos._exit(0)\n",
    "closed_descriptors": "import os, time\nos.closerange(0, 64)\nwhile True:\n    time.sleep(1)\n",
    "ignored_signals": """
import signal, sys
for number in range(1, 65):
    try:
        signal.signal(number, lambda *_: None)
    except (OSError, ValueError):
        pass
sys.setrecursionlimit(10**6)
while True:
    try:
        while True:
            pass
    except BaseException:
        pass
""",
    "sleep": "import time\ndef solve(x):\n    while True:\n        time.sleep(1)\n",
    "spin": "def solve(x):\n    while True:\n        pass\n",
    "stdin": "import sys, time\nprint(sys.stdin.read())\nopen(0).read()\nwhile True:\n    "
    "time.sleep(1)\n",
    "patched_builtins": """
import builtins, json
class Right:
    def __eq__(self, other): return True
    def __len__(self): return 8
outcomes = [{{"kind": "value", "value": 0}}] * 9
forged = json.dumps({{"finished": True, "raised": "", "files": {{}}, "outcomes": outcomes}})
json.dumps = lambda *a, **k: forged
builtins.len = lambda x: 8
builtins.all = lambda x: True
builtins.bool = lambda x: True
builtins.isinstance = builtins.issubclass = lambda *a: True
def solve(x):
    return Right()
""",
    "equality": """
class Same(int):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 0
    def __index__(self): return 0
    def __repr__(self): return "0"
class Text(str):
    def __eq__(self, other): return True
    __hash__ = str.__hash__
class Everything(list):
    def __eq__(self, other): return True
    def __iter__(self): return iter(())
    def __len__(self): return 0
def solve(x):
    return {{int: Same(1), str: Text("?")}}.get(type(x), Everything())
""",
    "forged_report": """
import json, os, sys
frame, nonce = sys._getframe(), None
while frame:
    job = frame.f_locals.get("job") or frame.f_locals.get("description")
    if isinstance(job, dict) and "nonce" in job:
        nonce = job["nonce"]
    frame = frame.f_back
outcomes = [{{"kind": "value", "value": True, "correct": True, "name": ""}}] * 20
line = json.dumps({{"nonce": nonce, "finished": True, "raised": "", "files": {{}}, "outcomes": outcomes,
                   "correct": True, "verdict": "correct", "paid": True}}).encode()
for fd in range(3, 16):
    try:
        os.write(fd, line)
    except OSError:
        pass
os._exit(0)
""",
    "searched_answers": """
import gc, sys
seen = []
frame = sys._getframe()
while frame:
    seen.append(dict(frame.f_locals))
    frame = frame.f_back
seen += [o for o in gc.get_objects() if isinstance(o, dict)]
calls = [c for d in seen for c in (d.get("calls") or []) if isinstance(c, dict)]
print("ESCAPED" if any(set(c) - {{"target", "args"}} for c in calls) else len(calls))
answers = {{}}
for d in seen:
    if d.get("expected") is not None or d.get("hidden") is not None:
        print("ESCAPED")
def solve(x):
    return answers.get(str(x), calls[0]["args"] if calls else None)
""",
    "import_hooks": """
import sys
class Hook:
    def find_spec(self, name, path=None, target=None):
        return None
sys.meta_path.insert(0, Hook())
sys.path_hooks.insert(0, lambda path: Hook())
sys.path.insert(0, "/work")
open("json.py", "w").write("def dumps(*a, **k): return '{{}}'\\n")
open("sitecustomize.py", "w").write("print('ESCAPED')\\n")
class Fake:
    def dumps(self, *a, **k): return '{{"finished": true, "outcomes": []}}'
    def loads(self, *a, **k): return {{}}
sys.modules["json"] = Fake()
""",
    "traced_harness": """
import sys
def trace(frame, event, argument):
    if "answer" in frame.f_locals:
        frame.f_locals["answer"] = True
    return trace
sys.settrace(trace)
sys.setprofile(lambda *a: None)
def solve(x):
    return None
""",
    "harness_functions": """
import sys
frame = sys._getframe()
while frame:
    for name in ("_answer", "_plain", "_resolve"):
        if name in frame.f_globals:
            frame.f_globals[name] = lambda *a: {{"kind": "value", "value": True}}
    frame = frame.f_back
def solve(x):
    return x
""",
    "crash": "import ctypes\nctypes.string_at(0)\n",
    "abort": "import os\nos.abort()\n",
    "recursion": "import sys\nsys.setrecursionlimit(10**6)\ndef solve(x):\n    return solve(x)\n",
    "huge_values": """
deep = []
for _ in range(10000):
    deep = [deep]
def solve(x):
    return [x] * 3_000_000
""",
    "odd_values": """
values = iter([float("nan"), float("inf"), 10**5000, "\\ud800", b"x", {{1: 2}}, {{"a": object()}}, lambda: 0])
def solve(x):
    return next(values)
""",
}
