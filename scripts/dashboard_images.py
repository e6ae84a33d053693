"""Takes the pictures of the dashboard in docs/images from a real service on the bundled model.

``python -m scripts.dashboard_images`` writes them; it takes a minute or two.
"""

import argparse
import tempfile
import time
from pathlib import Path

import assay
from assay.poc import Proof, Round
from assay.poc.cheats import rounded
from scripts.report_images import save_picture
from tests.end_to_end.receiver import FlakyReceiver
from tests.end_to_end.server import Server
from tests.poc.service.dashboard.browser import Watched, chromium

MODEL = "reference:qwen3"
IMAGES = Path(__file__).parents[1] / "docs" / "images"
BLOCK = {
    "block_hash": "0x5f1c2ab7d0c9443e8b6f0d9a7e21c3b4a5968778695a4b3c2d1e0f0918273645",
    "block_height": 1_204_551,
}
SHAPE = {"r_target": 1.416, "node_id": 0, "node_count": 3, "batch_size": 32, "seq_len": 16}
VIEWS = {
    "dashboard": {"color_scheme": "light", "viewport": {"width": 1120, "height": 700}},
    "dashboard-dark": {"color_scheme": "dark", "viewport": {"width": 1120, "height": 700}},
    "dashboard-phone": {
        "color_scheme": "light",
        "viewport": {"width": 360, "height": 740},
        "device_scale_factor": 2,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=IMAGES)
    parser.add_argument(
        "--nonces", type=int, default=6000, help="how many are checked before the pictures"
    )
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        receiver = FlakyReceiver(trouble=0.3)
        server = Server(Path(directory), "--callback-interval", "2", model=MODEL, fork=False)
        try:
            server.start()
            server.wait_for()
            _validate(server)
            body = (
                BLOCK
                | SHAPE
                | {"public_key": "gonka1qz8f5m0h7v2n4s6k3d9x", "callback_url": receiver.url}
            )
            server.post("/init/generate", body)
            _photograph(server, arguments.out, arguments.nonces)
        finally:
            server.close()
            receiver.close()


def _validate(server: Server) -> None:
    """Let the service judge an honest node, one with four-bit weights, and one that sent too little
    to tell.
    """
    model = assay.load_model(MODEL)
    for key, prover, count in (
        ("node_A", model, 48),
        ("node_B", rounded(model), 48),
        ("node_C", model, 2),
    ):
        round = Round(
            block_hash=BLOCK["block_hash"],
            public_key=key,
            block_height=BLOCK["block_height"],
            seq_len=SHAPE["seq_len"],
        )
        server.post("/init/validate", BLOCK | SHAPE | {"public_key": key, "node_count": 1})
        proof = assay.poc.prove(prover, round, nonces=range(count), batch_size=SHAPE["batch_size"])
        server.post("/validate", BLOCK | {"public_key": key, "node_id": 0} | _valid(proof))


def _valid(proof: Proof) -> dict[str, list]:
    records = [record for record in proof.records if record.distance < SHAPE["r_target"]]
    return {
        "nonces": [record.nonce for record in records],
        "dist": [record.distance for record in records],
    }


def _photograph(server: Server, out: Path, nonces: int) -> None:
    with chromium() as browser:
        pages = {name: Watched(browser, **options) for name, options in VIEWS.items()}
        for watched in pages.values():
            watched.page.goto(server.base)
        while server.status()["total_checked"] < nonces:
            time.sleep(0.5)
            browser.contexts[0].pages[0].wait_for_timeout(1)  # lets the browser's messages in
        for name, watched in pages.items():
            watched.wait("document.body.dataset.link === 'live'")
            save_picture(
                watched.page.screenshot(full_page=name != "dashboard-phone"), out / f"{name}.png"
            )
            print(f"{out / name}.png", watched.errors)


if __name__ == "__main__":
    main()
