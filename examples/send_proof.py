"""Send a proof file to a validator that runs as a service, signed as it wants it, with Python
alone.

    assay poc validator --model reference:qwen3 --pins pins.toml --nodes nodes.toml --data-dir judge
    SECRET=whsec_… python examples/send_proof.py proof.jsonl http://127.0.0.1:8090

deploy/assay-validator.service runs the same command under systemd. The signature is that of
Standard Webhooks: HMAC-SHA-256 over id, time and body. A message that was acknowledged is on disk;
the same id may be sent again and counts once.
"""

import base64
import hashlib
import hmac
import json
import os
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path


def signed(body: bytes, secret: str) -> dict[str, str]:
    """Return the headers of a message. Its id is the hash of the proof, so that sending twice is
    sending once.
    """
    name = f"proof_{hashlib.sha256(body).hexdigest()[:32]}"
    now = str(int(time.time()))
    key = base64.b64decode(secret.removeprefix("whsec_"))
    signature = base64.b64encode(
        hmac.digest(key, b".".join((name.encode(), now.encode(), body)), "sha256")
    ).decode()
    return {"webhook-id": name, "webhook-timestamp": now, "webhook-signature": f"v1,{signature}"}


def main(path: str, base: str) -> int:
    """Send the proof and print the answer; 0 if it was taken."""
    body = Path(path).read_bytes()
    headers = signed(body, os.environ["SECRET"]) | {"content-type": "application/jsonl"}
    request = urllib.request.Request(f"{base}/api/v1/validator/proofs", body, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            print(json.dumps(json.load(answer)))
            return 0
    except (
        urllib.error.HTTPError
    ) as error:  # 401 another secret, 409 what the pins do not allow, 503 send it again
        print(error.code, error.read().decode(), file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
