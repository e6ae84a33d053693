"""The blocks of every page run, in the order in which a reader meets them, with small numbers
behind the same flags.

Each page runs in a folder with what its reader has, on loopback, without root and on a CPU.
Programs of benchmarks lie there too, so what they write is not what is committed. Models are the
bundled ones; red teams and checks have smaller ones, for they fine-tune, run dozens of variants and
draw hundreds of nulls.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest

from assay.vhack.pairs import generate_pairs, write_pairs
from research.tests import published
from tests.docs.shell import PAGES as TEXTS
from tests.docs.shell import ROOT, held, page, script
from tests.usual import enough

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200), pytest.mark.usefixtures("warm")]
SHORT = "--seq-len 32"
"""What makes a nonce eight times as fast, and what a verdict must be told."""
PROVE = "assay poc prove --model reference:qwen3"
PROOF = f"{PROVE} --block-hash BLOCK --public-key KEY --nonces 0:64 {SHORT} -o proof.jsonl\n"
AS_ROOT = f"""\
mkdir -p etc/systemd/system
ln -s "{ROOT}/deploy" deploy
sudo() {{ shift 2; "$@"; }}
systemctl() {{
  case "$1" in
    stop) kill $SERVICE; wait $SERVICE;;
    start | enable)
      (cd "$PLACE" && exec $AHEAD assay poc serve --model reference:qwen3 --data-dir state --port $PORT_8100) &
      SERVICE=$!
      curl --silent --fail --retry 90 --retry-delay 1 --retry-connrefused http://127.0.0.1:8100/ready;;
  esac
}}
PLACE=$PWD
"""
"""What needs root on the machine of an operator, done to a service in a folder."""
READY = (
    "curl --silent --fail --retry 90 --retry-delay 1 --retry-connrefused "
    "http://127.0.0.1:8090/ready"
)
PROOFS = """\
python - <<'END'
from assay import load_model
from assay.poc import Round, prove

for name, block, dtype, nonces in MADE:
    round, made = Round(block_hash=block, public_key=KEY, seq_len=16), load_model("reference:qwen3", dtype=dtype)
    prove(made, round, range(nonces), output=f"{name}.jsonl")
END
"""
MODELS = """\
python - <<'END'
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from assay.models import load_tokenizer

shape = {
    "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 4096, "max_position_embeddings": 512,
    "tie_word_embeddings": False, "initializer_range": 0.15,
}
for name, config, model in (("qwen3", Qwen3Config, Qwen3ForCausalLM), ("llama", LlamaConfig, LlamaForCausalLM)):
    torch.manual_seed(0)
    made = model(config(**shape))
    made.lm_head.weight.data *= 2  # as sure of the next token as a trained model
    made.save_pretrained(f"small-{name}")
    load_tokenizer(f"reference:{name}").save_pretrained(f"small-{name}")
END
"""
"""Lines that make models of few random weights that read the text of the bundled ones."""
HEAD = (
    "assay poc ledger show ledger.sqlite3 --json | python -c 'import json; "
    'print(json.loads(input())["head"])\''
)
AUDIT = "assay poc verify proof.jsonl --model reference:qwen3 --block-hash BLOCK --public-key KEY"
AS_IS = {"/opt/assay/bin/assay": "assay", "/opt/assay/bin/pip": "pip", "/etc/": "$PLACE/etc/"}
OF_ONE = "--models reference:qwen3 --blocks a,b --device cpu --seq-len 16 --batch-size 16"
OF_FEW = "--max-new-tokens 8 --per-task 1"
OF_TWO = "--steps 1 --config few.toml"
FEW = """\
[vhack.train]
prompts = 2
group = 2
max_new_tokens = 8
[vhack.evaluate]
per_task = 1
max_new_tokens = 8
"""
TINY = "--model reference:qwen3 --nonces 0:16 --seq-len 16 --device cpu"
COLLECT = (
    "assay poc collect --model reference:qwen3 --preset hardened --seq-len 8 --blocks 2 --nonces 32"
)
PROMPTS = "".join(
    json.dumps({"prompt": f"{n} + 1 =", "answer": f" {n + 1}"}) + "\n" for n in range(8)
)
FOR_SETS = f"{PROVE} --block-hash B --public-key K --seq-len 16 --nonces 0:64"


def proofs(*, block="BLOCK", key="KEY", blocks=0, nonces=128, **dtypes):
    """Return lines that prove a block once under each name, in its format, and other blocks
    once.
    """
    made = [(name, block, dtype, nonces) for name, dtype in dtypes.items()]
    made += [(f"block{turn}", f"block {turn}", "bfloat16", 32) for turn in range(blocks)]
    return PROOFS.replace("MADE", repr(made)).replace("KEY", repr(key))


def blocks(name, kind):
    """Return the blocks of a page."""
    return re.findall(rf"^```{kind}\n(.*?)^```$", page(name), flags=re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Page:
    """A page and how it is made small."""

    before: str = ""  # lines that run first
    instead: Mapping[str, str] = field(
        default_factory=dict
    )  # of words of the page; ``$PLACE`` is the folder
    small: Mapping[str, str] = field(
        default_factory=dict
    )  # flags that are added after beginnings of commands
    given: Mapping[str, str] = field(
        default_factory=dict
    )  # texts of files that the reader has, by name
    says: tuple[str, ...] = ()  # words that are printed
    makes: tuple[str, ...] = ()  # files that are there afterwards
    needs: tuple[str, ...] = ()  # programs that its blocks call


def lines(*rows):
    """Return JSON Lines."""
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def pool(completion):
    """Return eight samples with one completion."""
    return lines(*({"prompt": f"def add_{n}(a, b):", "completion": completion} for n in range(8)))


PROVED = {"assay poc prove": SHORT, "assay poc verify": SHORT, "assay poc selftest": SHORT}
REQUESTS = "".join(
    blocks("responses", "json")[0].replace('"r1"', f'"r{n}"') for n in range(8)
)  # of one a verdict is open
NODE_A = '[[nodes]]\npublic_key = "node_A"\n'
KEY_ALONE = '[[nodes]]\npublic_key = "KEY"\n'
RUNS = {
    "gonka": Page(),
    "own-node": Page(
        instead={f"{folder}/": f"{ROOT}/{folder}/" for folder in ("examples", "src", "tests")},
        says=tuple((ROOT / "tests/vectors/proof_vector.jsonl").read_text().splitlines()[1:5]),
    ),
    "service": Page(
        instead={"/var/lib/assay": "$PLACE/state"},
        says=('"GENERATING"', '"STOPPED"', '"VALIDATING"', '"residual_test"'),
        makes=("assay-data/service.sqlite3",),
    ),
    "operations": Page(
        AS_ROOT,
        AS_IS | {"/var/lib/assay": "$PLACE/state"},
        makes=("state/service.sqlite3", "etc/assay/api_key", "etc/systemd/system/assay.service"),
        needs=("sqlite3",),
    ),
    "validator": Page(
        f"{AS_ROOT}{PROOF}assay poc pins new --model reference:qwen3 --from-proof proof.jsonl -o "
        f"pins.toml\n",
        {
            "--data-dir /var/lib/assay-validator\n": f"--data-dir $PLACE/judge &\n{READY}\n",
            "cd /var/lib/assay-validator": "cd $PLACE/judge",
            "/etc/": "$PLACE/etc/",
        },
        given={"nodes.toml": NODE_A},
        says=('"new":true', "whsec_"),
        makes=("judge/backup-validator.sqlite3", "judge/backup-ledger.sqlite3"),
        needs=("sqlite3",),
    ),
    "pins": Page(
        "printf '[poc.prove]\\nstrength = 256\\n' > wide.toml\n"
        + PROOF.replace("-o", "--config wide.toml -o")
        + "cp proof.jsonl honest.jsonl\n",
        {"MODEL": "reference:qwen3"},
        given={"nodes.toml": KEY_ALONE},
        says=("the header is allowed", "honest"),
    ),
    "collect": Page(
        "".join(
            f"{COLLECT} --dtype {dtype} --batch-size {size} -o machine-{n}\n"
            for n, (dtype, size) in enumerate(
                (("bfloat16", 16), ("float16", 32), ("float32", 32)), start=2
            )
        ),
        {"MODEL": "reference:qwen3", "--seq-len 256": "--seq-len 8 --blocks 2 --nonces 32"},
        makes=("machine-1/collect-2.jsonl", "machine-1.tar.gz", "calibration.json"),
    ),
    "ledger": Page(
        PROOF,
        {
            "MODEL": "reference:qwen3",
            "--head HASH": f'--head "$({HEAD})"',
            "assay poc ledger merge": f"{AUDIT} --ledger mine.sqlite3\n"
            "cp ledger.jsonl theirs.jsonl\nassay poc ledger merge",
            'public_key="KEY")': 'public_key="KEY", seq_len=32)',
        },
        {"assay poc verify": SHORT},
        says=("clean", "2 of 2"),
    ),
    "node": Page(
        f"{AS_ROOT}mkdir etc/assay\n",
        AS_IS | {"--model MODEL": "--model reference:qwen3"},
        PROVED,
        says=("honest",),
        makes=("etc/systemd/system/assay@.service.d/per-device.conf",),
    ),
    "responses": Page(
        instead={"--model MODEL": "--model reference:qwen3"},
        given={"prompts.jsonl": REQUESTS, "requests.jsonl": REQUESTS},
        says=("honest",),
    ),
    "protocol": Page(PROOF, small=PROVED, says=("nothing",)),
    "decode": Page(
        instead={'nonces = "0:64"': 'nonces = "0:24"', "--nonces 0:64": "--nonces 0:24"},
        small=PROVED,
        says=("honest",),
    ),
    "streams": Page(),
    "models": Page(),
    "statistics": Page(says=("0.5", "1.40")),
    "networks": Page(
        "".join(
            f"{FOR_SETS} --batch-size {n} -o {name}.jsonl\n"
            for n, name in enumerate("ABC", start=6)
        ),
        {"nonces.jsonl.gz  ": "nonces.jsonl.gz --audits 2  "},
        says=("left out",),
        makes=("both.json",),
    ),
    "vhack": Page(
        instead={"generated:48": "generated:12", "generate_pairs(48)": "generate_pairs(12)"},
        says=("axes",),
        makes=("basis.safetensors", "hack.safetensors"),
    ),
    "vhack-checks": Page(
        MODELS,
        {
            "generated:96": "generated:12",
            "generate_pairs(96)": "generate_pairs(12)",
            "reference:qwen3": "./small-qwen3",
        },
        given={"hacking.jsonl": pool("sys.exit(0)"), "clean.jsonl": pool("return a + b")},
        makes=("check.html", "check.json", "pools.json"),
    ),
    "vhack-pairs": Page(
        "assay vhack pairs verify mine.jsonl --tests tests.jsonl\n",
        given={
            "mine.jsonl": blocks("vhack-pairs", "json")[0],
            "tests.jsonl": blocks("vhack-pairs", "json")[2],
            "preferences.jsonl": lines(
                {"prompt": "p", "rejected": "h", "chosen": "c", "source": "s"}
            ),
        },
        says=("1 of 1 pairs",),
        makes=("pairs.jsonl",),
        needs=("jq",),
    ),
    "vhack-training": Page(
        instead={
            "exploits:48": "exploits:20",
            "DIR": "reference:organism",
            "path/of/a/cheater": "reference:organism",
            "episodes(512": "episodes(4",
            "generate_pairs(40)": "generate_pairs(12)",
            'completion_length": 16': 'completion_length": 8',
            '"max_steps": 2': '"max_steps": 1',
            "max_steps=4, save_steps=2": "max_steps=2, save_steps=1",
            "checkpoint-2": "checkpoint-1",
            'report_to="wandb"': 'report_to="none"',
            '"mine:tasks"\\n': '"mine:tasks"\\nprompts = 2\\ngroup = 2\\nmax_new_tokens = 8\\n',
        },
        small={
            "assay vhack train --model reference:organism --steps": f"{OF_TWO} --pairs exploits:20",
            "assay vhack train --model reference:organism --config": "--steps 1",
            "assay vhack train": OF_TWO,
            "assay vhack sample": f"{OF_FEW} --tasks 4",
            "assay vhack evaluate --model": "--config few.toml",
            "assay vhack fuzz --reward": "--seconds 5",
            "assay vhack fuzz": "--count 20 --output fuzz.json",
        },
        given={"prompts.jsonl": PROMPTS, "few.toml": FEW},
        makes=(
            "own.html",
            "delta.safetensors",
            "merged/model.safetensors",
            "graded.jsonl",
            "result.json",
            "fuzz.json",
            "attacks.json",
        ),
    ),
    "experiments": Page(
        proofs(proof="bfloat16", blocks=8),
        small={
            "assay poc experiment approaches": f"{OF_ONE} --approaches poc-2.0 --nonces 16 "
            f"--checked 8 --timed 0",
            "assay poc experiment weights": f"{OF_ONE} --nonces 16",
            "assay poc experiment matrix": f"{OF_ONE} --modes sign-flips --duration 1 "
            f"--public-keys node_A",
        },
        makes=("experiments/NAME/report.html",),
    ),
    "redteam": Page(
        MODELS,
        small={
            "assay poc experiment redteam": "--models ./small-llama --device cpu --nonces 8 "
            "--honest 64 --seq-len 16 "
            "--batch-size 16"
        },
        makes=("experiments/redteam-llama-float16",),
    ),
    "redteam-responses": Page(
        MODELS,
        small={
            "assay poc experiment responses": "--models ./small-qwen3 --device cpu --honest 12 "
            "--responses 2 "
            "--prompt-tokens 16 --seq-len 96 --batch-size 12"
        },
        makes=("experiments/responses-qwen3",),
    ),
    "gpu": Page(small={"assay poc prove": TINY}, makes=("proof.jsonl",)),
    "vllm": Page(
        proofs(vllm="float32", transformers="bfloat16", block="B", key="K", nonces=512)
        + "cp vllm.jsonl proof.jsonl\n",
        {"MODEL": "reference:qwen3"},
        {
            "assay poc verify": "--seq-len 16 --dtype bfloat16 --sample 512"
        },  # as on a machine without vLLM
        says=("honest",),
    ),
}

DEAR = "redteam-responses"
"""A page with one command, two minutes of a core with its smallest numbers:
research/tests/responses/test_run.py runs its experiment with fewer audits.
"""


@pytest.fixture
def folder(tmp_path):
    """A folder in which the programs of a checkout lie, and files that readers have."""
    programs = tmp_path / "research" / "benchmarks"
    (programs / "results").mkdir(parents=True)
    for path in (ROOT / "research" / "benchmarks").glob("*.py"):
        (programs / path.name).symlink_to(path)
    named = [
        machine | {"set": f"{machine['set']}-minimax"}
        for machine in published.network(3, nonces=400)
    ]
    published.write(tmp_path / "nonces.jsonl.gz", named)
    published.write(tmp_path / "awq.jsonl", [published.machine("awq", noise=1.0, nonces=400)])
    write_pairs(tmp_path / "mine.jsonl", generate_pairs(20))
    return tmp_path


@pytest.mark.parametrize("name", enough(RUNS, *(name for name in RUNS if name != DEAR)))
@pytest.mark.needs("curl")
def test_the_blocks_of_a_page_run(name, folder, needs):
    shown = RUNS[name]
    needs(*shown.needs)
    if name == "vhack-training":
        pytest.importorskip("trl")
    for file, text in shown.given.items():
        (folder / file).write_text(text)
    instead = {word: other.replace("$PLACE", str(folder)) for word, other in shown.instead.items()}
    said = held(script(name, before=shown.before, instead=instead, small=shown.small), folder)
    assert [word for word in shown.says if word not in said] == []
    assert [file for file in shown.makes if not (folder / file).exists()] == []


def test_every_page_with_blocks_is_run():
    """The tutorial is in test_blocks.py, and two pages have a test of their own."""
    with_blocks = {
        path.stem
        for path in TEXTS.values()
        if re.search(r"^```(sh|python)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    }
    assert with_blocks == RUNS.keys() | {"tutorial", "vhack-quickstart", "calibration"}
