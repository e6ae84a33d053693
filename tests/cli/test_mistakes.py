"""Commands that cannot work end with code 2 and an error in three parts, without a traceback and
without a file.
"""

import codecs
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from assay import poc
from assay.files.references import CATALOGUE
from tests.settings_files import with_file

HOME = Path(os.path.expanduser("~"))  # noqa: PTH111 - that of Path fails for a user without an entry
ROUND = "--block-hash block_alpha --public-key node_A"
PROVE = f"poc prove --model model {ROUND}"
VERIFY = f"poc verify %s --model model {ROUND} --seq-len 8"
MISTAKES = (
    "pc",
    "demo --speed",
    "vhack train --model model -o new --arm nope",  # arms of research import torch
    "demo --config /none.toml",
    "poc prov --model model",
    "poc prove --modle model",
    "poc prove --model model --block-hash block_alpha -o a.jsonl",
    "poc prove --model",
    "poc verify --model model",
    *(f"streams normal --seed-text a -n {count}" for count in ("many", "0", "1000000000000")),
    "streams normal --seed-text \udcff -n 4",
    *(
        f"streams normal --seed-text a -n 4 --{wrong}"
        for wrong in ("backend cupy", "device tpu", "strength 64")
    ),
    "streams normal --seed-text a -n 4 --dtype float8",
    "streams gumbel --seed-text a -n 4 --dtype float16",
    "streams normals --seed-text a -n 4",
    "models random reference:llama -o new --weights odd",
    f"poc prove --model shape:none {ROUND} -o a.jsonl",
    *(f"{PROVE} -o a.jsonl --{wrong}" for wrong in ("dtype fp16", "device gpu")),
    *(f"{PROVE} -o {name}" for name in ("nodir/a.jsonl", "proof.jsonl")),
    f"{PROVE} -o a.jsonl --preset poc-2",
    *(
        f"{PROVE} -o a.jsonl --nonces {nonces}"
        for nonces in ("0", "5.5", "5:5", "5:1", "0:99999999999999999999", "٣:٥")
    ),
    f"{PROVE} -o a.jsonl --nonces=-4:4",
    *(f"{PROVE} -o a.jsonl --r-target {target}" for target in ("0", "2.5", "nan")),
    *(f"{PROVE} -o a.jsonl --seq-len {length}" for length in ("0", "1000000")),
    *(f"{PROVE} -o a.jsonl --batch-size {size}" for size in ("0", "1000000000")),
    *(f"{PROVE} -o a.jsonl --{wrong}" for wrong in ("engine onnx", "node-id 4", "strength 1")),
    "poc prove --model model --block-hash '' --public-key node_A -o a.jsonl",
    VERIFY % "absent.jsonl",
    VERIFY % "proof.jsonl" + " --calibration absent.json",
    VERIFY.replace("block_alpha", "''")
    % "proof.jsonl",  # a shell variable that is not set switches no check off
    VERIFY.replace("node_A", "''") % "proof.jsonl",
    "poc calibrate proof.jsonl proof.jsonl -o calibration.json",
    "poc ledger show absent.jsonl",
    "poc serve --model model --port 99999 --data-dir new",
    *(f"config {words}" for words in ("poc prov", "poc")),
    *(f"models info {words}" for words in ("a b", "empty")),
    "models random shape:nope -o new",
    *(
        f"poc prove --config {name} --model model --block-hash B --public-key K -o a.jsonl"
        for name in ("number.toml", "true.toml", "json.toml", "empty")
    ),
    *(
        f"{PROVE} -o {words}"
        for words in (
            "empty",
            "a.jsonl --pins nothing",
            "a.jsonl --preset tokens-1 --frame text.txt",
            "loop",
        )
    ),
    f"{PROVE} -o a.jsonl --batch-size 1.5",
    *(VERIFY % name for name in ("empty", "nothing", "nüll.jsonl", "bytes.jsonl")),
    *(VERIFY % "proof.jsonl" + words for words in (" --alpha 5%", " --sample all", " --sample -5")),
    "poc replay nothing --model model",
    "poc respond --model model --block-hash B --public-key K --prompts empty -o r.jsonl",
    *(f"poc frame {words} -o f.safetensors" for words in ("text.txt", "--model model")),
    "poc collect --model model --blocks 0 -o new",
    "poc calibrate empty text.txt -o c.json",
    "poc pins new --model model --from-proof text.txt -o n.toml",
    *(f"poc pins check {name}" for name in ("empty", "nothing")),
    *(
        f"poc ledger show {words}"
        for words in ("empty", "proof.jsonl --limit 99999999999999999999999")
    ),
    "poc calibrate proof.jsonl copy.jsonl -o c.json",
    "vhack train --model model -o new --seed 4294967296 --arm none",
    "vhack check --model model --pairs generated:12 --seed 99999999999999999999999",
    *(
        f"vhack sample --model model -o s.jsonl {how}"
        for how in ("--tasks os:getcwd", "--temperature 1e-320")
    ),
    f"vhack sample --model model -o s.jsonl --per-task {'9' * 20}",
    "poc serve --model model --port eighty --data-dir new",
    *(
        f"vhack extract --model model --pairs {name} -o b.safetensors"
        for name in ("empty", "generated:x")
    ),
    *(f"vhack pairs generate -n {words}" for words in ("0 -o p.jsonl", "5 -o empty")),
    *(
        f"vhack pairs {words}"
        for words in ("match absent.jsonl -o p.jsonl", "verify list.json", "list text.txt")
    ),
)


PINS = f"""
schema = 1
[round]
preset = "poc-2.0"
seq_len = 256
[[models]]
reference = "reference:qwen3"
digest = "{CATALOGUE["reference:qwen3"]["digest"]}"
[[models.builds]]
engine = "hf"
dtype = "float32"
device = "*"
attention = "*"
batch_size = "*"
threads = "*"
torch = "*"
library = "*"
kernels = "*"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, small_checkpoint, small_model, pytestconfig):
    """A folder with a checkpoint, a proof of it, and files that are broken in one way each."""
    made = tmp_path_factory.mktemp("mistakes")
    (made / "model").symlink_to(small_checkpoint)
    poc.prove(
        small_model,
        poc.Round(block_hash="block_alpha", public_key="node_A", seq_len=8),
        range(8),
        output=made / "proof.jsonl",
    )
    (made / "other.jsonl").write_text(
        (made / "proof.jsonl").read_text().replace(small_model.digest, "0" * 64)
    )
    (made / "copy.jsonl").write_bytes((made / "proof.jsonl").read_bytes())
    (made / "truncated.jsonl").write_text((made / "proof.jsonl").read_text()[:-30])
    config = json.loads((small_checkpoint / "config.json").read_text())
    for name, positions in {"weightless": 128, "corrupt": 128, "short": 4}.items():
        (made / name).mkdir()
        changed = config | {"max_position_embeddings": positions}
        (made / name / "config.json").write_text(json.dumps(changed))
    (made / "corrupt" / "model.safetensors").write_text("no safetensors")
    (made / "short" / "model.safetensors").symlink_to(small_checkpoint / "model.safetensors")
    (made / "empty").mkdir()
    (made / "loop").symlink_to("loop")
    (made / "frame.safetensors").symlink_to(
        pytestconfig.rootpath / "tests/vectors/frame_qwen3.safetensors"
    )
    (made / "bytes.jsonl").write_bytes(b"\xff\xfe\x00")
    proof = (made / "proof.jsonl").read_bytes()
    (made / "within.jsonl").write_bytes(proof[: proof.index(b"\n") + 4])
    for name, content in {"marked.jsonl": proof, "marked.toml": b"[poc.prove]\n"}.items():
        (made / name).write_bytes(codecs.BOM_UTF8 + content)
    (made / "pairs.csv").write_text("prompt,hack,clean\na,b,c\n")
    texts = {"nothing": "", "text.txt": "words\n", "list.json": "[1]", "nüll.jsonl": "null\n"}
    wrong = {"number": "nonces = 5.5", "true": "seq_len = true", "json": 'json = "no"'}
    for name, text in (
        texts | {f"{name}.toml": f"[poc.prove]\n{text}\n" for name, text in wrong.items()}
    ).items():
        (made / name).write_text(text)
    (made / "qwen3.toml").write_text(PINS)
    (made / "typo.toml").write_text('[poc.prove]\nmodle = "model"\n')
    return made


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_answered_in_three_parts(command, folder, refused, monkeypatch):
    monkeypatch.chdir(folder)
    before = {path: path.lstat().st_mtime_ns for path in folder.rglob("*")}
    refused(*shlex.split(command))
    after = {path: path.lstat().st_mtime_ns for path in folder.rglob("*")}
    assert after == before, "a mistake leaves no file and changes none"


WITHOUT_TORCH = (
    *(
        f"{command} {place}"
        for command in ("models info", "models path", "demo --model", "poc frame -o f.safetensors")
        for place in ("./absent", "/absent/model", "text.txt", "../absent")
    ),
    VERIFY % "truncated.jsonl",
    *(
        VERIFY % f"proof.jsonl --{one}"
        for one in ("calibration list.json", "pins typo.toml", "ledger proof.jsonl")
    ),
    *(
        f"poc calibrate {words} -o c.json"
        for words in ("proof.jsonl other.jsonl", "--model model --frame text.txt")
    ),
    "poc calibrate bytes.jsonl text.txt -o c.json",
    *(f"poc {words} text.txt" for words in ("pins check", "ledger show")),
    "poc pins new --model model --from-proof truncated.jsonl -o n.toml",
    "poc replay text.txt --model model",
    f"poc respond --model model {ROUND} --prompts bytes.jsonl -o r.jsonl",
    "vhack extract --model model --pairs bytes.jsonl -o b.safetensors",
    "vhack check --model model --basis text.txt",
    "poc prove --model reference:qwen4 --block-hash B --public-key K -o a.jsonl",
    f"poc prove --model Reference:qwen3 {ROUND} -o a.jsonl",
    f"{PROVE} -o a.jsonl --frame frame.safetensors",
    "poc pins new --model model --public-key '' -o n.toml",
    f"poc prove --model empty {ROUND} -o a.jsonl",
    *(f"{PROVE} -o a.jsonl --{one}" for one in ("batch-size 0", "device cdua", "engine vllm")),
    *(() if torch.cuda.is_available() else (f"{PROVE} -o a.jsonl --device cuda",)),
    "models info https://host/a/b",
    "demo --model model -o text.txt",
    "poc serve --model model --data-dir text.txt/new",
    *(
        f"vhack train --model model -o new --{one}"
        for one in ("detector labels=nope", "detector labels=")
    ),
    *(
        f"vhack train --model model -o new --{one}"
        for one in ("tracker nope", "teacher proof.jsonl", "reward os:nope")
    ),
    *(f"{PROVE} -o a.jsonl --preset {one}" for one in ("decode --kernels compiled", "tokens-1")),
    *(VERIFY % f"proof.jsonl --{one}" for one in ("sample 1000", "preset hardened", "control")),
    VERIFY.replace("block_alpha", "block_beta") % "proof.jsonl",
    "poc collect --model model --seq-len 0 -o new",
    "poc calibrate --merge list.json --merge list.json -o c.json",
    *(
        f"poc calibrate --model model --{one} -o c.json"
        for one in ("formats fp9", "formats ''", "blocks 1 --nonces 9")
    ),
    "poc pins new --model model --preset nope -o n.toml",
    "poc respond --model model --prompts nothing --block-hash '' --public-key K -o r.jsonl",
    *(f"poc serve --model model --data-dir {folder}" for folder in ("text.txt", "/proc/new")),
    "poc serve --model model --host 0.0.0.0 --data-dir new",
    "poc callbacks list --data-dir empty",
    "vhack extract --model model --method pca -o b.safetensors",
    "vhack merge --model model --delta text.txt -o text.txt",
    *(
        f"vhack report {name} -o p.html"
        for name in ("list.json", "nothing", "proof.jsonl", "empty")
    ),
    *(
        f"vhack check --model model --pairs {one}"
        for one in ("generated:4", "generated:2 --method lda")
    ),
    *(
        f"vhack extract --model model --{one} -o b.safetensors"
        for one in ("pairs generated:2", "heldout-group nope")
    ),
    # What headers and configurations of a checkpoint show.
    *(f"poc prove --model {name} {ROUND} -o a.jsonl" for name in ("weightless", "corrupt")),
    VERIFY.replace("--model model", "--model corrupt") % "proof.jsonl",
    f"{PROVE} -o a.jsonl --seq-len 129",
    f"{PROVE} -o a.jsonl --preset decode --seq-len 128",
    *(
        f"poc {words} --seq-len 129"
        for words in (
            "calibrate --model model -o c.json",
            "collect --model model -o new",
            "pins new --model model -o n.toml",
        )
    ),
    VERIFY.replace("--model model", "--model reference:llama") % "proof.jsonl",
    f"poc prove --pins qwen3.toml --model reference:llama {ROUND} -o a.jsonl",
    VERIFY.replace("--model model", "--model short") % "proof.jsonl",
    "poc calibrate --vectors absent -o c.json",
    "poc calibrate --model model --pins /proc/pins.toml -o c.json",
    "vhack sample --model model --tasks os:nope -o s.jsonl",
    *(f"vhack evaluate{words}" for words in ("", " --samples text.txt")),
    "poc selftest --model reference:qwen3 --url http://127.0.0.1:1/api/v1/pow",
    "poc selftest --model reference:qwen3 --preset decode",
)


# A fork of a process that has imported the command line, and no torch, answers each command.
FORKS = """
import json, os, sys, tempfile, traceback
import assay.cli.app, assay.cli.calibrate, assay.cli.foundation, assay.cli.poc, assay.cli.vhack
import assay.poc.audit, assay.poc.launch, assay.poc.network_pins, assay.poc.verdict.ledger
from assay.cli import run
for line in sys.stdin:
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = os.fork()
        if process == 0:
            code = 70
            try:
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                code = run(json.loads(line))
                print(sorted({"torch", "transformers", "scipy.stats"} & set(sys.modules)))
                sys.stdout.flush()
                sys.stderr.flush()
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        texts = [file.seek(0) or file.read() for file in (out, err)]
    print(json.dumps([code, *texts]), flush=True)
"""


@pytest.fixture(scope="module")
def fresh(folder):
    """Run a command where nothing but the command line is imported: code, stdout and stderr."""
    with subprocess.Popen(
        [sys.executable, "-c", FORKS],
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:

        def call(*words):
            server.stdin.write(json.dumps(words) + "\n")
            server.stdin.flush()
            return json.loads(server.stdout.readline())

        yield call
        server.stdin.close()


@pytest.mark.parametrize("command", WITHOUT_TORCH)
def test_what_needs_no_model_is_refused_before_torch_is_imported(command, folder, fresh):
    code, out, err = fresh(*with_file(*shlex.split(command)))
    assert (code, out) == (2, "[]\n"), err
    assert all(part in err for part in ("error: ", "wanted: ", "to do: "))
    assert not (folder / "f.safetensors").exists()


PLAIN_WORDS = {
    "vhack extract --model model --pairs pairs.csv -o b.safetensors": "this is CSV",
    "vhack merge --model model --delta pairs.csv -o merged": "no safetensors file",
    f"poc prove --model corrupt {ROUND} -o a.jsonl": "corrupt or cut short",
    f"poc prove --model '~/absent' {ROUND} -o a.jsonl": str(HOME / "absent"),
    VERIFY % "marked.jsonl": "byte order mark",
    f"{PROVE} --config marked.toml -o a.jsonl": "byte order mark",
    "poc calibrate --valid-rate 10%": "a number such as 0.1, without a sign for percent",
    "vhack pairs generate --count 1e9 -o g.jsonl": "a whole number such as 64",
    "vhack train --model model --detector cin -o new": "did you mean cin-svd or cin-lda?",
    VERIFY % "within.jsonl": "line 2: the file ends within this line",
    "ledger show": "did you mean assay poc ledger?",
    "poc calibrate --quick -o c.json": "leave --quick out, or pass --model",
    "poc replay proof.jsonl --model model": "check that this is the file you mean",
    "poc calibrate proof.jsonl -o c.json": "no --model, and one proof",
    "models random reference:llama -o empty": "wanted: a new directory",
    "streams": "What is drawn: hash",
}


@pytest.mark.parametrize("command", PLAIN_WORDS)
def test_a_mistake_is_called_by_its_name_once(command, folder, fresh):
    """On 0944c8c1 the words are those of a parser, or the parts of two errors."""
    code, _, err = fresh(*with_file(*shlex.split(command)))
    assert code == 2
    assert PLAIN_WORDS[command] in err
    assert (err.count("wanted: "), err.count("to do: ")) == (1, 1)
