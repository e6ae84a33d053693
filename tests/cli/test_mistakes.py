"""Commands that cannot work end with code 2 and an error in three parts, without a traceback and without a file."""

import shlex

import pytest

from assay import poc

ROUND = "--block-hash block_alpha --public-key node_A"
PROVE = f"poc prove --model model {ROUND}"
VERIFY = f"poc verify %s --model model {ROUND} --seq-len 8"
MISTAKES = (
    "pc",
    "demo --speed",
    "demo --config /none.toml",
    "poc prov --model model",
    "poc prove --modle model",
    "poc prove --model model --block-hash block_alpha -o a.jsonl",
    "poc prove --model",
    "poc verify --model model",
    "streams normal --seed-text a -n many",
    "streams normal --seed-text a -n 0",
    "streams normal --seed-text a -n 1000000000000",
    "streams normal --seed-text \udcff -n 4",
    "streams normal --seed-text a -n 4 --backend cupy",
    "streams normal --seed-text a -n 4 --device tpu",
    "streams normal --seed-text a -n 4 --strength 64",
    "streams normal --seed-text a -n 4 --dtype float8",
    "streams gumbel --seed-text a -n 4 --dtype float16",
    "streams normals --seed-text a -n 4",
    "models info ./nope",
    "models random reference:llama -o new --weights odd",
    f"poc prove --model reference:qwen4 {ROUND} -o a.jsonl",
    f"poc prove --model shape:none {ROUND} -o a.jsonl",
    f"{PROVE} -o a.jsonl --dtype fp16",
    f"{PROVE} -o a.jsonl --device gpu",
    f"{PROVE} -o nodir/a.jsonl",
    f"{PROVE} -o proof.jsonl",
    f"{PROVE} -o a.jsonl --preset poc-2",
    *(f"{PROVE} -o a.jsonl --nonces {nonces}" for nonces in ("5", "5:5", "5:1", "0:99999999999999999999", "٣:٥")),
    f"{PROVE} -o a.jsonl --nonces=-4:4",
    *(f"{PROVE} -o a.jsonl --r-target {target}" for target in ("0", "2.5", "nan")),
    *(f"{PROVE} -o a.jsonl --seq-len {length}" for length in ("0", "129", "1000000")),
    *(f"{PROVE} -o a.jsonl --batch-size {size}" for size in ("0", "1000000000")),
    f"{PROVE} -o a.jsonl --engine onnx",
    f"{PROVE} -o a.jsonl --node-id 4",
    f"{PROVE} -o a.jsonl --strength 1",
    "poc prove --model model --block-hash '' --public-key node_A -o a.jsonl",
    VERIFY % "absent.jsonl",
    VERIFY % "truncated.jsonl",
    VERIFY % "proof.jsonl" + " --calibration absent.json",
    VERIFY % "proof.jsonl" + " --pins typo.toml",
    VERIFY % "proof.jsonl" + " --ledger proof.jsonl",
    VERIFY.replace("block_alpha", "block_beta") % "proof.jsonl",
    VERIFY.replace("block_alpha", "''") % "proof.jsonl",  # a shell variable that is not set switches no check off
    VERIFY.replace("node_A", "''") % "proof.jsonl",
    "poc calibrate proof.jsonl proof.jsonl -o calibration.json",
    "poc ledger show absent.jsonl",
    "poc serve --model model --host 0.0.0.0 --data-dir new",
    "poc serve --model model --port 99999 --data-dir new",
    "poc serve --model model --data-dir proof.jsonl",
    "vhack extract --model model --pairs absent.jsonl -o basis.safetensors",
    "vhack check --model model --basis proof.jsonl",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, small_checkpoint, small_model):
    """A folder with a checkpoint, a proof of it, and files that are broken in one way each."""
    made = tmp_path_factory.mktemp("mistakes")
    (made / "model").symlink_to(small_checkpoint)
    poc.prove(
        small_model,
        poc.Round(block_hash="block_alpha", public_key="node_A", seq_len=8),
        range(8),
        output=made / "proof.jsonl",
    )
    (made / "truncated.jsonl").write_text((made / "proof.jsonl").read_text()[:-30])
    (made / "typo.toml").write_text('[poc.prove]\nmodle = "model"\n')
    return made


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_answered_in_three_parts(command, folder, refused, monkeypatch):
    monkeypatch.chdir(folder)
    before = {path: path.lstat().st_mtime_ns for path in folder.rglob("*")}
    refused(*shlex.split(command))
    after = {path: path.lstat().st_mtime_ns for path in folder.rglob("*")}
    assert after == before, "a mistake leaves no file and changes none"
