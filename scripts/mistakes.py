"""Make the mistakes of new users, and write what assay says of each to docs/troubleshooting.md.

``python scripts/mistakes.py`` writes the page; tests/docs/test_mistakes.py holds that every error has three parts and
names what to change, and that no model is loaded before it. All run in a folder with the files that :func:`prepare`
makes, beside the service of :func:`service`; all but those of :data:`MISSING` run in this process.
"""

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from unittest import mock

PAGE = Path(__file__).parents[1] / "docs" / "troubleshooting.md"
ROUND = "--block-hash block_alpha --public-key node_A"
PROVE = f"assay poc prove --model reference:qwen3 {ROUND}"
VERIFY = f"assay poc verify %s --model reference:qwen3 {ROUND} --seq-len 8"
PORT = "8000"
"""Port of the service that already runs, as it is shown; in truth that is a free one."""
MODULE = "mine"
"""A module in the folder, with nothing in it."""
RESPOND = f"assay poc respond --model reference:qwen3 --prompts %s {ROUND} -o receipts.jsonl"
EXTRACT = "assay vhack extract --model reference:qwen3 --pairs %s -o basis.safetensors"

MISTAKES = {
    "The command": (
        "assay pc",
        "assay poc prov --model reference:qwen3",
        "assay vhack chekc --model reference:qwen3",
        "assay poc prove --modle reference:qwen3",
        "assay poc prove --model reference:qwen3 --block-hash block_alpha -o a.jsonl",
        "assay poc prove --model",
        "assay models info reference:qwen3 reference:llama",
        "assay poc verify --model reference:qwen3",
        f"{PROVE} -o a.jsonl --overwrite=yes",
        "assay streams normal --seed-text a -n many",
        "assay streams normal --seed-text a -n 0",
        "assay streams normal --seed-text a -n 4 --backend cuda",
        "assay --config absent.toml doctor",
        "assay --config typo.toml doctor",
        f"ASSAY_MODLE=reference:llama {PROVE} -o a.jsonl",
        f"ASSAY_POC_PROVE_BATCHSIZE=8 {PROVE} -o a.jsonl",
        "ASSAY_CALLBACK_SECERT=whsec_A assay poc serve --model reference:qwen3",
    ),
    "The model": (
        "assay models info ./nope",
        "assay models info reference:qwen",
        "assay models info qwen3",
        "assay models info shape:qwen3-7b",
        "assay models info empty",
        f"assay poc prove --model pickle {ROUND} -o a.jsonl",
        "assay models random reference:llama -o random --weights zero",
        f"assay poc prove --model ./nope {ROUND} -o a.jsonl",
        "assay demo --model ./nope -o pages",
        f"{PROVE} -o a.jsonl --dtype fp16",
        f"{PROVE} -o a.jsonl --device gpu",
        f"{PROVE} -o a.jsonl --engine VLLM",
        f"{PROVE} -o a.jsonl --kernels fast",
    ),
    "Proving": (
        f"{PROVE} -o nodir/a.jsonl",
        f"{PROVE} -o empty",
        f"{PROVE} -o proof.jsonl",
        f"{PROVE} -o a.jsonl --preset poc-2",
        f"{PROVE} -o a.jsonl --nonces 5:1",
        f"{PROVE} -o a.jsonl --nonces 64",
        f"{PROVE} -o a.jsonl --nonces=-1:5",
        f"{PROVE} -o a.jsonl --seq-len -5",
        f"{PROVE} -o a.jsonl --seq-len 1000000",
        f"{PROVE} -o a.jsonl --batch-size 0",
        f"{PROVE} -o a.jsonl --batch-size lots",
        f"{PROVE} -o a.jsonl --node-id 3 --node-count 3",
        f"{PROVE} -o a.jsonl --r-target 3",
        f"{PROVE} -o a.jsonl --strength 64",
        f"{PROVE} -o a.jsonl --tensor-parallel 2",
        f"{PROVE} -o a.jsonl --preset decode --kernels compiled",
        f"{PROVE} -o a.jsonl --engine vllm --deterministic",
        "assay poc prove --model reference:qwen3 --block-hash '' --public-key node_A -o a.jsonl",
    ),
    "Verifying": (
        VERIFY % "absent.jsonl",
        VERIFY % "empty.jsonl",
        VERIFY % "picture.png",
        VERIFY % "empty",
        VERIFY % "typo.toml",
        VERIFY % "truncated.jsonl",
        VERIFY % "unfinished.jsonl",
        VERIFY % "crlf.jsonl",
        VERIFY % "edited.jsonl",
        VERIFY % "future.jsonl",
        VERIFY % "proof.jsonl" + " --sample 0",
        VERIFY % "proof.jsonl" + " --sample 99",
        VERIFY % "proof.jsonl" + " --alpha 2",
        VERIFY % "proof.jsonl" + " --calibration absent.json",
        VERIFY % "proof.jsonl" + " --calibration fields.jsonl",
        VERIFY % "proof.jsonl" + " --pins typo.toml",
        VERIFY % "proof.jsonl" + " --ledger proof.jsonl",
        "assay poc verify proof.jsonl --model reference:qwen3 --block-hash block_beta --public-key node_A --seq-len 8",
        VERIFY % "proof.jsonl" + " --preset artifact",
        VERIFY % "proof.jsonl" + " --calibration proof.jsonl",
        "assay poc calibrate proof.jsonl theirs.jsonl -o proof.jsonl",
        "assay poc calibrate proof.jsonl -o calibration.json",
        "assay poc calibrate proof.jsonl proof.jsonl -o calibration.json",
        "assay poc calibrate few.jsonl theirs.jsonl -o calibration.json",
        "assay poc calibrate --valid-rate 2",
        "assay poc calibrate",
        "assay poc ledger show absent.jsonl",
        "assay poc ledger audit proof.jsonl",
        "assay poc pins check typo.toml",
        "assay poc pins new --model reference:qwen3 -o pins.toml --calibration proof.jsonl",
        f"assay poc replay proof.jsonl --model reference:qwen3 {ROUND}",
        RESPOND % "proof.jsonl",
        RESPOND % "prompts.jsonl" + " --max-tokens 0",
        RESPOND % "prompts.jsonl" + " --max-tokens 9999",
        "assay poc calibrate-responses answers.jsonl --model reference:qwen3 -o responses.json",
    ),
    "Measuring": (
        "assay poc experiment approaches --models reference:qwen",
        "assay poc experiment weights --dtype fp16",
        "assay poc experiment redteam --dtypes int4",
        "assay poc experiment simulate --stake-spread -1",
        "assay research clusters absent.gz",
        "assay research clusters proof.jsonl",
    ),
    "Serving": (
        "assay poc serve --model reference:qwen3 --seq-len 99999",
        "assay poc serve --model reference:qwen3 --ledger empty",
        "assay poc validator --model reference:qwen3 --pins long.toml",
        "assay poc serve --model reference:qwen3 --host 0.0.0.0",
        "assay poc serve --model reference:qwen3 --api-key short",
        "assay poc serve --model reference:qwen3 --api-key-file absent.key",
        "assay poc serve --model reference:qwen3 --api-key-file empty.jsonl",
        "assay poc serve --model reference:qwen3 --callback-secret secret",
        "assay poc serve --model reference:qwen3 --port web",
        "assay poc serve --model reference:qwen3 --port 99999",
        f"assay poc serve --model reference:qwen3 --data-dir mine --port {PORT}",
        "assay poc serve --model reference:qwen3 --data-dir busy --port 0",
        "assay poc serve --model reference:qwen3 --data-dir proof.jsonl",
        "assay poc serve --model ./nope",
        "assay poc receive --host 0.0.0.0",
        "assay poc receive -o proof.jsonl",
        "assay poc validator --model reference:qwen3 --pins absent.toml",
        "assay poc callbacks list --data-dir absent",
    ),
    "Hack directions": (
        EXTRACT % "absent.jsonl",
        EXTRACT % "generate:48",
        EXTRACT % "generated:0",
        EXTRACT % "broken.jsonl",
        EXTRACT % "fields.jsonl",
        EXTRACT % "preferences.jsonl",
        EXTRACT % "latin.jsonl",
        EXTRACT % "marked.jsonl",
        EXTRACT % "empty.jsonl",
        EXTRACT % "generated:12" + " --method pca",
        EXTRACT % "generated:12" + " --rank 0",
        EXTRACT % "generated:12" + " --n-heldout 12",
        EXTRACT % "generated:12" + " --heldout-group nowhere",
        "assay vhack check --model reference:qwen3 --method pca",
        "assay vhack check --model reference:qwen3 --basis absent.safetensors",
        "assay vhack check --model reference:qwen3 --basis proof.jsonl",
        "assay vhack check --model reference:qwen3 --basis weights.safetensors",
        "assay vhack check --model reference:qwen3 --alpha 7",
        "assay vhack check --model reference:qwen3 --log proof.jsonl",
        "assay vhack check --model reference:qwen3 --pairs marked.jsonl -o marked.jsonl",
        "assay vhack check --model reference:qwen3 --pairs generated:1",
        EXTRACT % "generated:12" + " --top-k 0",
        "assay vhack merge --model reference:organism --delta proof.jsonl -o merged",
        "assay vhack sample --model reference:organism -o samples.jsonl --difficulty 4:2",
        "assay vhack sample --model reference:organism -o samples.jsonl --max-new-tokens 9999",
        "assay vhack evaluate",
        "assay vhack evaluate --samples preferences.jsonl --model reference:organism",
        "assay vhack evaluate --samples preferences.jsonl",
        "assay vhack check --model reference:qwen3 --html nodir/check.html",
        "assay vhack pairs verify absent.jsonl",
        "assay vhack pairs generate -o proof.jsonl",
        "assay vhack train --model reference:organism -o run --arm displaced",
        "assay vhack train --model reference:organism -o run --arm erase-gradiant",
        "assay vhack train --model reference:organism -o run --modes run_test",
        "assay vhack train --model reference:organism -o run --steps 0",
        f"assay vhack train --model reference:organism -o run --tasks {MODULE}:nothing",
        "assay vhack report absent -o page.html",
        "assay vhack report empty -o page.html",
    ),
    "What is not installed": (
        "assay poc serve --model reference:qwen3",
        f"{PROVE} -o a.jsonl --engine vllm",
        f"{PROVE} -o a.jsonl --dtype int8",
        "assay vhack train --model reference:organism -o run",
    ),
    "What only the weights can tell": (
        f"assay poc verify proof.jsonl --model reference:llama {ROUND} --seq-len 8",
        "assay vhack check --model reference:qwen3 --basis stale.safetensors",
    ),
}
"""Commands that cannot work, by what they are about; those of the last kind load a model."""

MISSING = MISTAKES["What is not installed"]
EXTRAS = ("fastapi", "trl", "torchao", "vllm")
"""Packages of which :data:`MISSING` need one each."""
WITH_WEIGHTS = MISTAKES["What only the weights can tell"]

INTRODUCTION = """\
# Mistakes, and what assay says of them

*Generated by `make docs` from the commands, which a test runs.*

Every error has three parts: what was seen, what was wanted, and what to do next, with the flag to change; a name in
capitals is an argument without a flag. `ASSAY_ERRORS=json` prints them as JSON. Exit code 2 is bad input or an open
verdict, and never fraud, which is 1. Nothing but the last table loads a model first. A traceback in place of three
parts is a fault of assay.

What goes wrong on a running service is in [operations](operations.md), and what a verdict means in
[protocol](protocol.md).
"""


@dataclass(frozen=True)
class Outcome:
    """What a command left behind.

    Args:
        code: Exit code.
        text: Text on stderr.
        parts: What was seen, what was wanted and what to do; empty where the error has another form.
    """

    code: int
    text: str
    parts: tuple[str, ...]


_WITHOUT_EXTRAS = f"""
import json, shlex, sys
from importlib.machinery import PathFinder

sys.path.insert(0, {str(Path(__file__).parent)!r})
import mistakes

find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name in {EXTRAS} else find(name, *rest)
with mistakes._without_weights():
    print(json.dumps([mistakes._said(shlex.split(command)[1:]) for command in sys.argv[1:]]))
"""
"""Runs commands where no package of an extra can be found, and prints what :func:`_said` returns of each."""


class Loaded(Exception):
    """A model would have been loaded."""


def prepare(folder: Path) -> None:
    """Write the files that the commands read; the proofs and the basis are real ones."""
    _compute(folder)
    text = (folder / "proof.jsonl").read_text()
    lines = text.splitlines(keepends=True)
    pair = {"prompt": "p", "hack": "h", "clean": "c", "group": "g"}
    files = {
        "empty.jsonl": "",
        "truncated.jsonl": "".join(lines[:4])[: -len(lines[3]) + 10],
        "unfinished.jsonl": "".join(lines[:-1]),
        "crlf.jsonl": text.replace("\n", "\r\n"),
        "edited.jsonl": re.sub(r'"distance":.*?,"valid":\w+', '"distance":1.25,"valid":false', text, count=1),
        "future.jsonl": text.replace('"schema":1', '"schema":99', 1),
        "prompts.jsonl": json.dumps({"prompt": [1, 2, 3]}) + "\n",
        "broken.jsonl": '{"prompt": "p",\n',
        "fields.jsonl": json.dumps({name: pair[name] for name in ("prompt", "hack", "group")}) + "\n",
        "preferences.jsonl": json.dumps({"prompt": "p", "chosen": "c", "rejected": "h"}) + "\n",
        "typo.toml": '[poc.prove]\nmodle = "reference:qwen3"\n',
        "marked.jsonl": "\ufeff" + json.dumps(pair) + "\n",
        f"{MODULE}.py": "",
        "long.toml": (folder / "agreed.toml").read_text().replace("seq_len = 8", "seq_len = 99999"),
    }
    for name, content in files.items():
        (folder / name).write_text(content, newline="")
    (folder / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\x00\xff" * 9)
    (folder / "latin.jsonl").write_bytes(json.dumps(pair).replace("h", "é").encode("latin-1"))
    (folder / "weights.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    (folder / "empty").mkdir()
    (folder / "pickle").mkdir()
    (folder / "pickle" / "config.json").write_text('{"model_type": "llama"}')
    (folder / "pickle" / "pytorch_model.bin").write_bytes(b"\x80\x02.")


def _compute(folder: Path) -> None:
    """Write two proofs of a node, the shorter one twice, pins, receipts, and a basis of weights not of the bundle."""
    import torch

    from assay import load_model, poc, vhack
    from assay.poc import responses

    model = load_model("reference:qwen3", device="cpu")
    round = poc.Round(block_hash="block_alpha", public_key="node_A", seq_len=8)
    for name, count in (("proof", 32), ("few", 8), ("theirs", 8)):
        poc.prove(model, round, range(count), output=folder / f"{name}.jsonl")
    pins = f"poc pins new --model reference:qwen3 --from-proof {folder}/proof.jsonl --public-key node_A"
    _said([*shlex.split(pins), "-o", str(folder / "agreed.toml")])
    prompt = {"block_hash": "block_alpha", "public_key": "node_A", "max_tokens": 8}
    responses.respond(model, ["def add(a, b):"], **prompt, output=folder / "answers.jsonl")
    with torch.no_grad():
        next(iter(vhack.target_modules(model).values())).weight.mul_(2)
    vhack.extract(vhack.pairs.generate_pairs(4), model, rank=2).save(folder / "stale.safetensors")


@contextmanager
def service(folder: Path) -> Iterator[int]:
    """Run a service on the data directory ``busy`` of a folder, and yield its port."""
    command = shlex.split("assay poc serve --model reference:qwen3 --data-dir busy --port 0 --log-format json")
    with _place(folder), (folder / "service.log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-m", *command], stdout=log, stderr=log)
    try:
        yield _port(process, folder / "service.log")
    finally:
        process.terminate()
        process.wait(60)


def _port(process: "subprocess.Popen[bytes]", log: Path) -> int:
    """Return the port that a service names in its log once it listens."""
    limit = time.monotonic() + 120
    while not (said := re.search(r'"port": ?(\d+)', log.read_text())):
        if process.poll() is not None or time.monotonic() > limit:
            raise RuntimeError(f"the service does not start: {log.read_text()}")
        time.sleep(0.1)
    return int(said[1])


@contextmanager
def _place(folder: Path) -> Iterator[None]:
    """Work in the folder without a network and with no variable that sets a value; forget what was imported from it."""
    left_out = {name: "" for name in os.environ if name.startswith("ASSAY_")}
    with (
        contextlib.chdir(folder),
        mock.patch.dict(os.environ, {"HF_HUB_OFFLINE": "1", "XDG_CONFIG_HOME": str(folder)}),
        mock.patch.object(sys, "path", list(sys.path)),
    ):
        for name in left_out:
            del os.environ[name]
        try:
            yield
        finally:
            sys.modules.pop(MODULE, None)


@contextmanager
def _without_weights() -> Iterator[None]:
    """Raise where weights would be read."""
    with (
        mock.patch("assay.models._load._digest", side_effect=Loaded("weights are read")),
        mock.patch("assay.models._load._load_trained", side_effect=Loaded("a model is loaded")),
    ):
        yield


def outcomes(folder: Path) -> dict[str, Outcome]:
    """Make all mistakes in a folder that is prepared, and return what each command left behind."""
    with service(folder) as port:
        found = {made: outcome(made, folder, port) for made in chain(*MISTAKES.values()) if made not in MISSING}
    with _place(folder):
        done = subprocess.run([sys.executable, "-c", _WITHOUT_EXTRAS, *MISSING], capture_output=True, check=True)
    for command, (code, text) in zip(MISSING, json.loads(done.stdout), strict=True):
        found[command] = Outcome(code, text, _parts(text))
    return found


def outcome(command: str, folder: Path, port: int = 0) -> Outcome:
    """Run a command in that folder, beside a service on that port, and return what it left behind."""
    words = shlex.split(command.replace(f"--port {PORT}", f"--port {port}"))
    begins = words.index("assay")
    weights = contextlib.nullcontext() if command in WITH_WEIGHTS else _without_weights()
    with _place(folder), weights, mock.patch.dict(os.environ, dict(word.split("=") for word in words[:begins])):
        code, text = _said(words[begins + 1 :])
    text = text.replace(f"{folder}/", "").replace(f":{port}:", f":{PORT}:")
    return Outcome(code, text, _parts(text))


def _said(arguments: list[str]) -> tuple[int, str]:
    """Run a command in this process; return its exit code and its text on stderr."""
    from assay.cli import run

    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        return run(arguments), said.getvalue()


def _parts(text: str) -> tuple[str, ...]:
    """Return what an error saw, wanted and says to do; nothing where it has another form."""
    _, found, error = text.partition("error: ")
    seen, _, rest = error.partition("\n  wanted: ")
    wanted, _, do = rest.partition("\n  to do:  ")
    parts = (seen, wanted, do.strip())
    return parts if found and all(parts) else ()


def page(found: dict[str, Outcome]) -> str:
    """Return docs/troubleshooting.md."""
    text = [INTRODUCTION]
    for about, commands in MISTAKES.items():
        text.append(f"\n## {about}\n\n| typed | seen | wanted | to do | exit |\n|---|---|---|---|---|\n")
        for command in commands:
            cells = (f"`{command}`", *map(_cell, found[command].parts), str(found[command].code))
            text.append(f"| {' | '.join(cells)} |\n")
    return "".join(text)


def _cell(text: str) -> str:
    """Return a part of an error as a cell of a table, in which nothing is markup."""
    text = " ".join(text.split())
    for sign in "\\`*_[]<|":
        text = text.replace(sign, f"\\{sign}")
    return text


def main() -> int:
    """Write the page; print what has no three parts."""
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory).resolve()
        prepare(folder)
        found = outcomes(folder)
    PAGE.write_text(page(found), encoding="utf-8")
    wrong = [command for command in found if not found[command].parts]
    for command in wrong:
        print(f"{command}: [{found[command].code}] {found[command].text}", file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
