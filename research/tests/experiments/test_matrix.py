"""The matrix: plans, the table of the published tests, and two real tests against a live
service.
"""

import json

import pytest
from assay_research.matrix import PUBLISHED, MatrixPlan, configurations
from assay_research.runs.report import build_report
from assay_research.runs.runs import open_run, read_run

BLOCKS = ("block_alpha", "block_beta", "block_gamma")


def published_cells() -> list[dict]:
    """The 36 published tests as cells: rates of 4960 and 3104 nonces each."""
    cells = []
    for (name, mode), rates in PUBLISHED.items():
        n = 4960 if name == "qwen" else 3104
        for block, row in zip(BLOCKS, rates, strict=True):
            for key, rate in zip(("node_A", "node_B", "node_C"), row, strict=True):
                valid = round(n * rate / 100)
                cells.append({
                    "key": f"{name} {mode} {block} {key}", "model": name, "mode": mode, "block_hash": block,
                    "public_key": key, "checked": n, "valid": valid, "valid_rate": valid / n, "r_target": 1.416,
                    "nonces_per_second": 120.0, "callback_nonces": valid, "dtype": "bfloat16",
                    "hidden_size": 1024 if name == "qwen" else 2048,
                })  # fmt: skip
    return cells


def test_the_published_table_is_read_as_its_authors_did_and_with_its_noise():
    found = {(c["model"], c["mode"]): c for c in configurations(published_cells())}
    spreads = {name: round(100 * c["spread"], 1) for name, c in found.items()}
    assert spreads == {
        ("qwen", "sign-flips"): 1.1,
        ("llama", "sign-flips"): 0.9,
        ("qwen", "layer-hooks"): 3.9,
        ("llama", "layer-hooks"): 10.3,
    }
    assert [c["verdict"] for c in found.values()] == [
        "inside noise", "inside noise", "beyond noise", "over 5%",
    ]  # fmt: skip
    assert found["qwen", "sign-flips"]["expected"] == pytest.approx(0.5905, abs=1e-4)
    assert found["qwen", "sign-flips"]["undelivered"] == 0
    assert json.dumps(found["llama", "layer-hooks"])


def test_two_tests_against_a_live_service(small_checkpoint, tmp_path):
    """Real processes and HTTP; one of three tests is there already, as after a stop. Every callback
    is counted.
    """
    values = {
        "models": (str(small_checkpoint),),
        "modes": ("layer-hooks",),
        "duration": 0.7,
        "seq_len": 8,
    }
    plan = MatrixPlan(
        **values, blocks=("one", "two", "three"), public_keys=("k",), batch_size=8, device="cpu"
    )
    first, *_ = plan.tests()
    with open_run(tmp_path, "matrix", plan.settings) as run:
        run.append(
            first.key, published_cells()[0] | {"key": first.key, "test": 1, "public_key": "k"}
        )
    said: list[str] = []
    seen: list[tuple[int, int]] = []
    plan.measure(
        tmp_path, note=said.append, progress=lambda done, total: seen.append((done, total))
    )
    assert [sentence.split(":")[0] for sentence in said[1:]] == ["test  2", "test  3"]
    assert seen == [(2, 3), (3, 3)]
    cells = read_run(tmp_path, "matrix").cells[1:]
    for cell in cells:
        assert cell["checked"] > 0
        assert cell["checked"] % 8 == 0
        assert cell["callback_nonces"] == cell["valid"]
        assert (cell["hidden_size"], cell["effective_dimension"]) == (64, None)
    for name, cell in zip(("two", "three"), cells, strict=True):
        (callbacks,) = (tmp_path / "logs").glob(f"test_0{cell['test']}_*_{name}_k_callback.log")
        assert (
            sum(json.loads(line)["nonces"] for line in callbacks.read_text().splitlines())
            == cell["valid"]
        )
        (log,) = (tmp_path / "logs").glob(f"test_0{cell['test']}_*_{name}_k_server.log")
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        assert [line["state"] for line in lines if line["event"] == "state"] == [
            "GENERATING",
            "VALIDATING",
        ]
    assert "Throughput of live services" in build_report(tmp_path).read_text()
    plan.measure(tmp_path, note=pytest.fail)
