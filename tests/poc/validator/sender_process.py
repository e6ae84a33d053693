"""A node's sender that can be killed: ``python sender_process.py PORT MESSAGES ACKNOWLEDGED SEED
PAUSE``.

MESSAGES has one JSON object per line with id, secret and body. Every message is sent until it is
answered with 200, and then its id is written to ACKNOWLEDGED; one of which the id is there is sent
again now and then, as a node does that did not see its answer. It needs the standard library alone,
so that it starts quickly and signs by itself.
"""

import base64
import hashlib
import hmac
import http.client
import json
import os
import random
import sys
import time


def sign(secret: str, id: str, timestamp: str, body: str) -> str:
    key = base64.b64decode(secret.removeprefix("whsec_"))
    mac = hmac.new(key, f"{id}.{timestamp}.{body}".encode(), hashlib.sha256).digest()
    return "v1," + base64.b64encode(mac).decode()


def post(connection: http.client.HTTPConnection, message: dict) -> int:
    timestamp = str(int(time.time()))
    headers = {
        "Content-Type": "application/json",
        "webhook-id": message["id"],
        "webhook-timestamp": timestamp,
        "webhook-signature": sign(message["secret"], message["id"], timestamp, message["body"]),
    }
    connection.request("POST", "/api/v1/validator/generated", message["body"].encode(), headers)
    response = connection.getresponse()
    response.read()
    return response.status


def main() -> None:
    port, messages_path, acknowledged_path, seed, pause = sys.argv[1:]
    rng = random.Random(int(seed))
    with open(messages_path, encoding="utf-8") as file:  # noqa: PTH123
        messages = [json.loads(line) for line in file]
    known = set()
    if os.path.exists(acknowledged_path):  # noqa: PTH110
        with open(acknowledged_path, encoding="utf-8") as file:  # noqa: PTH123
            known = {line.strip() for line in file}
    fresh = iter([message for message in messages if message["id"] not in known])
    connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=10)
    with open(acknowledged_path, "a", encoding="utf-8", buffering=1) as acknowledged:  # noqa: PTH123
        acknowledged.write("\n")  # the last line may have been cut off
        while True:
            message = None if rng.random() < 0.5 else next(fresh, None)
            again = message is None
            message = message or rng.choice(messages)
            status = 0
            while status != 200:
                try:
                    status = post(connection, message)
                except (OSError, http.client.HTTPException):
                    connection.close()
                if status not in (0, 200, 503):
                    sys.exit(f"{message['id']}: {status}")
                if status != 200:
                    time.sleep(0.05)
            if not again or message["id"] not in known:
                acknowledged.write(message["id"] + "\n")
                known.add(message["id"])
            time.sleep(rng.random() * 2 * float(pause))


if __name__ == "__main__":
    main()
