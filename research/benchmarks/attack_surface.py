"""Tries of an outsider over the whole surface, each with what is wanted of it and what was seen.

    PYTHONPATH=src:research/src:. python research/benchmarks/attack_surface.py \
      -o research/results/attack_surface.json

A service and a validator run in processes of their own, with a small model of random weights. A try
has held where it is refused in words, or taken and harmless, within its seconds, and whatever
listens still answers. Every row of the readings before is there with variants: other fields, kinds
of files, encodings and orders. It takes some minutes; ``--areas`` runs some of it.
"""

import argparse
import asyncio
import hashlib
import json
import os
import socket
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple
from unicodedata import normalize

import redteam_surface as redteam
import torch

from assay.errors import AssayError
from tests.end_to_end.server import Server
from tests.poc.service.conftest import signed
from tests.poc.validator.conftest import API, BLOCK, HEIGHT, KEYS, proof_of, secret_of
from tests.poc.validator.conftest import body_of as callback_of

SECONDS = 20.0
"""Seconds that one try may take."""

VALUES = {
    "null": "null",
    "true": "true",
    "minus one": "-1",
    "half": "0.5",
    "2^53": str(2**53),
    "2^64": str(2**64),
    "5000 digits": "9" * 5000,
    "1e999": "1e999",
    "NaN": "NaN",
    "minus zero": "-0.0",
    "empty text": '""',
    "1025 letters": json.dumps("x" * 1025),
    "text that turns": '"a\\u202eb"',
    "null character": '"a\\u0000b"',
    "line feed": '"a\\nb"',
    "half a surrogate": '"\\ud800"',
    "taken apart": '"e\\u0301"',
    "empty list": "[]",
    "object": '{"a": 1}',
    "deep list": "[" * 300 + "]" * 300,
    "markup": '"<script>alert(1)</script>"',
}
"""Values of JSON that no field is made for."""

HARMLESS = {"markup", "minus zero", "half", "null", "empty text", "true"}
"""Those that some field may take: then they must change nothing but the field."""


class Row(NamedTuple):
    """One try and its outcome."""

    area: str
    attempt: str
    wanted: str
    seen: str
    held: bool
    seconds: float


def watch(area: str, attempt: str, wanted: str, act: Callable[[], tuple[str, bool]]) -> Row:
    """Make a try; whatever is raised and is no error of assay is a fault."""
    began = time.monotonic()
    try:
        seen, held = act()
    except AssayError as error:
        parts = all((error.seen, error.wanted, error.do))
        seen = f"refused: {type(error).__name__}: {error.seen}"
        held = "refused" in wanted and parts
    except Exception as error:
        seen = f"FAULT {type(error).__name__}: {error}"
        held = False
    seconds = time.monotonic() - began
    printable = seen.encode("ascii", "backslashreplace").decode()[:160]
    return Row(area, attempt, wanted, printable, held and seconds < SECONDS, round(seconds, 2))


def taken(value: object, expected: object = None) -> tuple[str, bool]:
    """Return what was seen of a try that nothing refused."""
    return f"taken: {value!r:.100}", expected is not None and value == expected


def ask_raw(port: int, text: bytes, *, pause: float = 0.0, half: bool = False) -> bytes:
    """Return what a server answers to some bytes; an end without an answer is an empty text."""
    answer = b""
    with socket.create_connection(("127.0.0.1", port), timeout=8) as connection, suppress(OSError):
        for piece in [text] if not pause else [text[:20], text[20:]]:
            connection.sendall(piece)
            time.sleep(pause)
        if half:
            connection.shutdown(socket.SHUT_WR)
        while len(answer) < 2**16 and (more := connection.recv(2**16)):
            answer += more
    return answer


def status_of(answer: bytes) -> int:
    """Return the status of the first answer; 0 where the connection ended without one."""
    parts = answer.split(b" ", 2)
    return int(parts[1]) if len(parts) > 2 and parts[0].startswith(b"HTTP/1") else 0


def alive(server: Server) -> bool:
    """Return whether a server answers within a second."""
    began = time.monotonic()
    status = redteam.ask(server.port, "GET", "/health")[0]
    return status == 200 and time.monotonic() - began < 1.0


def post(server: Server, path: str, body: bytes, **headers: str) -> tuple[str, bool]:
    """Post a body; return status and answer, and whether it was refused in words and harms none."""
    lines = [f"{name}: {value}" for name, value in headers.items()]
    lines += ["content-type: application/json", f"content-length: {len(body)}", "connection: close"]
    answer = ask_raw(server.port, redteam.head("POST", path, *lines) + body)
    status = status_of(answer)
    content = answer.partition(b"\r\n\r\n")[2]
    words = content[:120].decode("ascii", "backslashreplace")
    plain = not any(byte < 32 and byte not in b"\r\n\t" for byte in content)
    return f"{status} {words}", (400 <= status < 500 or status == 0) and plain and alive(server)


def body_with(base: dict[str, Any], field: str, value: str) -> bytes:
    """Return JSON in which one field has another text."""
    parts = {name: json.dumps(own) for name, own in base.items()} | {field: value}
    pairs = (f"{json.dumps(name)}: {text}" for name, text in parts.items())
    return f"{{{', '.join(pairs)}}}".encode()


GET = b"GET /health HTTP/1.1\r\nhost: x\r\n"
POST = b"POST /x HTTP/1.1\r\nhost: x\r\n"
CHUNKED = POST + b"transfer-encoding: chunked\r\n\r\n"

WIRE = {
    "two lengths": GET + b"content-length: 1\r\ncontent-length: 2\r\n\r\na",
    "length and chunks": POST + b"content-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "negative length": POST + b"content-length: -1\r\n\r\n",
    "length with a sign": POST + b"content-length: +4\r\n\r\nabcd",
    "length of 30 digits": POST + b"content-length: " + b"9" * 30 + b"\r\n\r\n",
    "length in Arabic digits": POST + "content-length: \u0664\r\n\r\n".encode(),
    "chunk of -1": CHUNKED + b"-1\r\n\r\n",
    "chunk of 2^64": CHUNKED + b"10000000000000000\r\n\r\n",
    "chunk that is no number": CHUNKED + b"zz\r\n",
    "long extension of a chunk": CHUNKED + b"1;" + b"a" * 2**17 + b"\r\n",
    "gzip, chunked": POST + b"transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "chunked twice": POST + b"transfer-encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
    "encoding with a tab": POST + b"transfer-encoding:\x0bchunked\r\n\r\n0\r\n\r\n",
    "trailers without end": CHUNKED + b"0\r\n" + b"a: b\r\n" * 20_000,
    "folded line": GET + b"a: b\r\n c\r\n\r\n",
    "line without a colon": GET + b"abc\r\n\r\n",
    "space before the colon": b"GET /health HTTP/1.1\r\nhost : x\r\n\r\n",
    "null in a value": GET + b"a: b\0c\r\n\r\n",
    "bare line feeds": b"GET /health HTTP/1.1\nhost: x\n\n",
    "bare carriage returns": b"GET /health HTTP/1.1\rhost: x\r\r",
    "no host": b"GET /health HTTP/1.1\r\n\r\n",
    "two hosts": GET + b"host: y\r\n\r\n",
    "version 2.0": b"GET /health HTTP/2.0\r\nhost: x\r\n\r\n",
    "version 0.9": b"GET /health\r\n\r\n",
    "preface of HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a TLS hello": bytes.fromhex("1603010200010001fc0303") + b"\0" * 100,
    "whole address": b"GET http://other/health HTTP/1.1\r\nhost: x\r\n\r\n",
    "CONNECT": b"CONNECT other:443 HTTP/1.1\r\nhost: x\r\n\r\n",
    "TRACE": b"TRACE /health HTTP/1.1\r\nhost: x\r\n\r\n",
    "unknown method": b"HACK /health HTTP/1.1\r\nhost: x\r\n\r\n",
    "method of 70 KB": b"A" * 70_000 + b" / HTTP/1.1\r\nhost: x\r\n\r\n",
    "path of 70 KB": b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n",
    "300 lines of a head": GET + b"" + b"a: b\r\n" * 300 + b"\r\n",
    "upgrade to websockets": GET + b"connection: upgrade\r\n"
    b"upgrade: websocket\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n",
    "expect: 100-continue": POST + b"expect: 100-continue\r\ncontent-length: 9\r\n\r\n",
    "out of the folder": b"GET /../../etc/passwd HTTP/1.1\r\nhost: x\r\n\r\n",
    "out of it, encoded": b"GET /%2e%2e/%2e%2e/etc/passwd HTTP/1.1\r\nhost: x\r\n\r\n",
    "null in the path": b"GET /health%00 HTTP/1.1\r\nhost: x\r\n\r\n",
    "overlong UTF-8": b"GET /%c0%ae%c0%ae/ HTTP/1.1\r\nhost: x\r\n\r\n",
    "line feed in the path": b"GET /health%0d%0aset-cookie:%20a HTTP/1.1\r\nhost: x\r\n\r\n",
    "a second request in the body": POST + b"content-length: 40\r\n\r\n"
    b"GET /api/v1/pow/status HTTP/1.1\r\nhost: x\r\n\r\n",
    "a body that never comes": POST + b"content-length: 99\r\n\r\nabc",
}
"""Requests as bytes. They must be refused, or answered as what they are, and nothing else."""

INIT = {
    "block_hash": "block_alpha",
    "block_height": 7,
    "public_key": "node_A",
    "r_target": 1.416,
    "node_id": 0,
    "node_count": 1,
    "batch_size": 4,
    "seq_len": 8,
}

BODIES = {
    "no JSON": b"{",
    "a list": b"[]",
    "a byte order mark": b"\xef\xbb\xbf{}",
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "UTF-7": b"+AHs-+AH0-",
    "latin-1": '{"block_hash": "é"}'.encode("latin-1"),
    "a key twice": b'{"block_hash": "a", "block_hash": "b"}',
    "a comment": b'{/* a */"block_hash": "a"}',
    "single quotes": b"{'block_hash': 'a'}",
    "a comma at the end": b'{"block_hash": "a",}',
    "100 000 keys": ("{" + ",".join(f'"k{i}": 0' for i in range(100_000)) + "}").encode(),
    "100 000 levels": b'{"a":' * 100_000 + b"0" + b"}" * 100_000,
    "ten megabytes of blanks": b" " * 10_000_000 + b"{}",
    "nothing": b"",
    "an unknown key": b'{"block_hsah": "a"}',
    "__proto__": b'{"__proto__": {"a": 1}, "constructor": 1}',
}


def tries_of_wire(opened: ExitStack, folder: Path, model: Any, checkpoint: Path) -> Iterator[Row]:
    """Requests that are no HTTP, or are read in two ways, whole and in two pieces."""
    server = opened.enter_context(redteam.network(folder, model, checkpoint))
    for name, text in WIRE.items():
        for pause, half in ((0.0, False), (0.05, True)):

            def act(
                text: bytes = text, pause: float = pause, half: bool = half
            ) -> tuple[str, bool]:
                answer = ask_raw(server.port, text, pause=pause, half=half)
                status = status_of(answer)
                answers = answer.count(b"HTTP/1.1 ")
                head = answer.partition(b"\r\n\r\n")[0].lower()
                leaks = b"root:" in answer or b"set-cookie" in head
                return f"{status}, {answers} answers", (
                    status < 500 and answers <= 2 and not leaks and alive(server)
                )

            way = "in two pieces" if half else "whole"
            yield watch("wire", f"{name}, {way}", "refused or answered once, and /health", act)


def tries_of_service(
    opened: ExitStack, folder: Path, model: Any, checkpoint: Path
) -> Iterator[Row]:
    """Bodies of a service: every field of a round with every value, and bodies without one."""
    keys = folder / "keys"
    keys.write_text(redteam.KEY)
    server = Server(folder, "--api-key-file", str(keys), model=checkpoint)
    server.start()
    opened.callback(server.close)
    server.wait_for("/ready")
    key = {"authorization": f"Bearer {redteam.KEY}"}
    routes = ("init", "init/generate", "init/validate", "generate", "validate", "phase/generate")
    for name, body in BODIES.items():
        for route in ("init/generate", "generate", "validate"):
            yield watch(
                "service bodies",
                f"{name} to /{route}",
                "refused in words, and /health",
                lambda body=body, route=route: post(server, f"/api/v1/pow/{route}", body, **key),
            )
    for field in INIT:
        for name, value in VALUES.items():

            def act(field: str = field, value: str = value, name: str = name) -> tuple[str, bool]:
                seen, held = post(server, "/api/v1/pow/init", body_with(INIT, field, value), **key)
                post(server, "/api/v1/pow/stop", b"{}", **key)
                return seen, held or (seen.startswith("200") and name in HARMLESS and alive(server))

            yield watch("service fields", f"{field}: {name}", "refused in words, and /health", act)
    for name, value in {
        "none": "",
        "another": "Bearer x",
        "prefix": f"Bearer {redteam.KEY[:-1]}",
        "twice": f"Bearer {redteam.KEY} {redteam.KEY}",
        "basic": "Basic YTpi",
        "a letter apart": f"Bearer {redteam.KEY[:-1]}K",
        "null": f"Bearer {redteam.KEY}\x00",
    }.items():
        for route in routes:
            yield watch(
                "service keys",
                f"{name} to /{route}",
                "refused in words, and /health",
                lambda value=value, route=route: post(
                    server, f"/api/v1/pow/{route}", json.dumps(INIT).encode(), authorization=value
                ),
            )
    for url in (
        "http://169.254.169.254/latest",
        "http://[::ffff:7f00:1]/",
        "http://0x7f.1/",
        "http://2130706433/",
        "http://localhost\\@example.org/",
        "http://example.org@127.0.0.1/",
        "gopher://127.0.0.1/",
        "file:///etc/passwd",
        "http://127.0.0.1:99999/",
        "http://\u2488\u2488/",
        "http://[fe80::1%25lo]/",
        "http://127.0.0.1.nip.io:0/\r\nx: y",
    ):
        yield watch(
            "callback addresses",
            url,
            "refused in words",
            lambda url=url: check_address(url),
        )


def check_address(url: str) -> tuple[str, bool]:
    """Return what becomes of an address for callbacks."""
    from assay.poc.net.callback_urls import check_url

    check_url(url, allow_private=False)
    return taken(url)


def tries_of_validator(
    opened: ExitStack, folder: Path, model: Any, checkpoint: Path
) -> Iterator[Row]:
    """Messages of a node that is known: every field with every value, ids, clocks, signatures."""
    server = opened.enter_context(redteam.network(folder, model, checkpoint))
    server.call(
        "POST",
        f"{API}/blocks",
        {"block_hash": BLOCK, "block_height": HEIGHT},
        authorization=f"Bearer {redteam.KEY}",
    )
    whole = callback_of(proof_of(model, KEYS[0]))

    def send(
        body: bytes, path: str = "generated", key: str = KEYS[0], **changes: str
    ) -> tuple[str, bool]:
        text = body.decode("latin-1")
        headers = signed(secret_of(key), text, f"m{time.time_ns()}") | changes
        return post(server, f"{API}/{path}", body, **headers)

    for field in whole:
        for name, value in VALUES.items():
            yield watch(
                "validator fields",
                f"{field}: {name}",
                "refused in words, and /health",
                lambda field=field, value=value: send(body_with(whole, field, value)),
            )
    lists = {
        "a nonce twice": {"nonces": [whole["nonces"][0]] * 2, "dist": whole["dist"][:2]},
        "fewer distances": {"dist": whole["dist"][:-1]},
        "nonces from the end": {"nonces": whole["nonces"][::-1]},
        "a nonce of another node": {"nonces": [n + 1 for n in whole["nonces"]]},
        "a nonce as a text": {"nonces": [str(n) for n in whole["nonces"]]},
        "a nonce as 1.0": {"nonces": [float(n) for n in whole["nonces"]]},
        "distances above the target": {"dist": [1.9] * len(whole["dist"])},
        "distances below zero": {"dist": [-1.0] * len(whole["dist"])},
        "a height of another block": {"block_height": HEIGHT + 1},
        "a block that is not open": {"block_hash": "block_never"},
        "both kinds at once": {"fraud_detected": True},
        "vectors beside distances": {"artifacts": []},
        "a nonce of 2^53": {"nonces": [*whole["nonces"][:-1], 2**53]},
    }
    for name, changes in lists.items():
        yield watch(
            "validator messages",
            name,
            "refused in words, and /health",
            lambda changes=changes: send(json.dumps(whole | changes).encode()),
        )
    now = int(time.time())
    heads = {
        "signed ten minutes ago": {"webhook-timestamp": str(now - 600)},
        "signed in ten minutes": {"webhook-timestamp": str(now + 600)},
        "a time that is NaN": {"webhook-timestamp": "nan"},
        "a time of 40 digits": {"webhook-timestamp": "9" * 40},
        "a time in hexadecimal": {"webhook-timestamp": hex(now)},
        "no signature": {"webhook-signature": ""},
        "a signature of version 2": {"webhook-signature": "v2,AAAA"},
        "a thousand signatures": {"webhook-signature": "v1,AAAA " * 1000},
        "another id than was signed": {"webhook-id": "another"},
        "an id of 129 letters": {"webhook-id": "i" * 129},
        "an id in latin-1": {"webhook-id": "\xe9"},
        "a public key header": {"x-public-key": KEYS[1], "webhook-signature": "v1,AAAA"},
    }
    for name, changes in heads.items():
        yield watch(
            "validator headers",
            name,
            "refused in words, and /health",
            lambda changes=changes: send(json.dumps(whole).encode(), **changes),
        )
    for name, own in {
        "another node's secret": (KEYS[1], KEYS[0]),
        "a key that is not pinned": (KEYS[0], "node_Z"),
        "a key in capitals": (KEYS[0], KEYS[0].upper()),
        "a key with a blank": (KEYS[0], f"{KEYS[0]} "),
        "a key in full width": (KEYS[0], KEYS[0].translate({65: 0xFF21})),
    }.items():
        yield watch(
            "validator keys",
            name,
            "refused in words, and /health",
            lambda own=own: send(json.dumps(whole | {"public_key": own[1]}).encode(), key=own[0]),
        )
    for path in ("generated/", "Generated", "generated%2f", "../validator/generated", "proofs"):
        yield watch(
            "validator paths",
            path,
            "refused in words, and /health",
            lambda path=path: send(json.dumps(whole).encode(), path=path),
        )


def tries_of_files(opened: ExitStack, folder: Path, model: Any, checkpoint: Path) -> Iterator[Row]:
    """Every reader with files that are empty, cut, of another kind, encoded, or no files."""
    contents = redteam.samples(folder, model)
    wholes = {name: whole for name, (whole, _) in contents.items()}
    for name, (whole, read) in contents.items():
        path = folder / name
        others = [other for other in wholes.values() if other != whole]
        cases = {
            "empty": b"",
            "one line feed": b"\n",
            "cut in the middle": whole[: len(whole) // 2],
            "cut by one byte": whole[:-1],
            "twice": whole + whole,
            "another kind": others[0],
            "yet another kind": others[-1],
            "nulls": b"\0" * 1000,
            "a byte order mark": b"\xef\xbb\xbf" + whole,
            "UTF-16": whole.decode("latin-1").encode("utf-16"),
            "other line ends": whole.replace(b"\n", b"\r\n"),
            "deep": b"[" * 200_000,
            "a header of 2^63 bytes": (2**63 - 1).to_bytes(8, "little") + b"{}",
            "a header of 2^31 bytes": (2**31).to_bytes(8, "little") + b"{}",
        }
        for case, content in cases.items():

            def act(
                content: bytes = content,
                path: Path = path,
                read: Callable[[Path], object] = read,
                case: str = case,
            ) -> tuple[str, bool]:
                path.write_bytes(content)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    value = read(path)
                lines = path.name in ("pairs.jsonl", "requests.jsonl") and case.startswith("cut")
                same = case in SAME_CONTENT and path.suffix in (".toml", ".json", ".jsonl")
                return f"taken: {value!r:.80}", lines or same or content == wholes[path.name]

            yield watch("files", f"{name}: {case}", "refused, or the same content", act)
        path.unlink()
        for case, make in {
            "a pipe": lambda path: os.mkfifo(path),
            "a folder": lambda path: path.mkdir(),
            "a link to itself": lambda path: path.symlink_to(path),
            "a link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
        }.items():

            def act_place(
                make: Callable[[Path], object] = make,
                path: Path = path,
                read: Callable[[Path], object] = read,
            ) -> tuple[str, bool]:
                make(path)
                try:
                    return taken(read(path))
                finally:
                    path.rmdir() if path.is_dir() else path.unlink()

            yield watch("files", f"{name}: {case}", "refused", act_place)
        path.write_bytes(whole)


def tries_of_pins(opened: ExitStack, folder: Path, model: Any, checkpoint: Path) -> Iterator[Row]:
    """Pins, whose keys have values of other types or claim other files."""
    from assay.poc import NetworkPins

    redteam.write_network(folder, model, KEYS)
    path = folder / "pins.toml"
    text = path.read_text()
    lines = [line for line in text.splitlines() if " = " in line]
    values = ("true", "-1", "nan", "inf", '""', '"*"', '"?"', "[]", "{}", "2026-01-01", '"\\u0000"')
    for line in lines:
        field = line.partition(" = ")[0]
        for value in values:

            def act(line: str = line, field: str = field, value: str = value) -> tuple[str, bool]:
                path.write_text(text.replace(line, f"{field} = {value}", 1))
                network = NetworkPins.load(path)
                free = value == '"*"' or field in ("name", "kernels")
                return f"taken: {network.round.preset}", free

            yield watch("pins", f"{field} = {value}", "refused, or a wildcard of a build", act)
    path.write_text(text)


PATHS = (
    "a?b",
    "a?mode=memory",
    "a#b",
    "a%3fb",
    "a%00b",
    "a b",
    " a",
    "a ",
    "a\nb",
    "a;b",
    "a'b",
    'a"b',
    "-a",
    ":memory:",
    "file:a?mode=rwc",
    "sqlite:a",
    "a:b@c",
    "a&b=c",
    "\u00e9",
    "e\u0301",
    "\u202ea",
    "\udce9",
    "a" * 200,
    "a.partial",
    "..a",
    "a\\b",
    "~a",
    "$HOME",
    "*",
)


def tries_of_paths(opened: ExitStack, folder: Path, model: Any, checkpoint: Path) -> Iterator[Row]:
    """Names of databases: of a ledger, of a validator's folder and of what is received."""
    from assay.poc.service.receiver import Received
    from assay.poc.validator.inbox import Inbox
    from assay.poc.verdict import Ledger

    kinds: dict[str, Callable[[Path], Any]] = {
        "ledger": lambda path: Ledger(path),
        "received": Received,
        "folder of a validator": lambda path: Inbox(path, epoch_seconds=60.0, sample=8),
    }
    for kind, make in kinds.items():
        for number, name in enumerate(PATHS):

            def act(make: Callable[[Path], Any] = make, name: str = name) -> tuple[str, bool]:
                place = Path(tempfile.mkdtemp(dir=folder))
                made = make(place / name)
                getattr(made, "close", str)()
                found = sorted(path.name for path in place.iterdir())
                ends = {name, f"{name}-wal", f"{name}-shm", f"{name}-journal"}
                closed = all(
                    path.stat().st_mode & 0o077 == 0 for path in place.rglob("*") if path.is_file()
                )
                return f"{found}, closed: {closed}", set(found) <= ends and name in found and closed

            yield watch("paths", f"{kind} {number}: {name!a:.40}", "that file alone, closed", act)


def tries_of_names(opened: ExitStack, folder: Path, model: Any, checkpoint: Path) -> Iterator[Row]:
    """Two spellings of one name, and names that look alike."""
    from assay.poc import Round
    from assay.poc.responses import Request
    from assay.poc.service import ServiceSettings
    from assay.poc.validator.registry import Registry

    names = ("modèle", "한국어", "\u212b", "\u1e9b\u0323", "q\u0323\u0307", "\u2126")
    for name in names:
        for form in ("NFC", "NFD", "NFKC", "NFKD"):
            spelt = normalize(form, name)
            wanted = "taken" if normalize("NFC", spelt) == spelt else "refused"
            for field, make in {
                "public_key": lambda spelt: Round(block_hash="b", public_key=spelt).public_key,
                "block_hash": lambda spelt: Round(block_hash=spelt, public_key="k").block_hash,
                "adapter": lambda spelt: Request(request_id="r", prompt="p", adapter=spelt).adapter,
            }.items():
                yield watch(
                    "names",
                    f"{field} {name!a} in {form}",
                    wanted,
                    lambda make=make, spelt=spelt: taken(make(spelt), spelt),
                )
    (pins := folder / "pins.toml").write_text("")
    redteam.write_network(folder, model, KEYS)
    for pair in (
        ("node", "n\u043ede"),
        ("node", "node\u200b"),
        ("node", "node\ufe0f"),
        ("node", "\uff4eode"),
        ("node", "node\u0301"),
        ("K", "\u212a"),
        ("fi", "\ufb01"),
        ("é", "e\u0301"),
    ):

        def act(pair: tuple[str, str] = pair) -> tuple[str, bool]:
            nodes = folder / "nodes.toml"
            tables = (f"[[nodes]]\npublic_key = {json.dumps(one)}\n" for one in pair)
            nodes.write_text("".join(tables))
            listed = Registry.load(pins, nodes, ServiceSettings()).senders
            differ = len({normalize("NFKC", one) for one in pair}) == 2
            return f"taken: {[*map(ascii, listed)][-2:]}", differ

        yield watch(
            "names", f"keys {pair[0]!a} and {pair[1]!a}", "refused, or two that differ", act
        )


def tries_of_weights(
    opened: ExitStack, folder: Path, model: Any, checkpoint: Path
) -> Iterator[Row]:
    """A second set of weights in a folder, whatever it is called, and hostile configurations."""
    import shutil

    from assay.models import load_model

    others = (
        "model-00001-of-00002.safetensors",
        "model.fp16.safetensors",
        "Model.safetensors",
        "model.SAFETENSORS",
        "consolidated.safetensors",
        "consolidated.00.pth",
        "pytorch_model.bin",
        "adapter_model.safetensors",
        "weights.safetensors",
        "ema.safetensors",
        "model.gguf",
        "model.onnx",
        "sub/model.safetensors",
        "tf_model.h5",
        "model.safetensors.index.json",
        "modèle.safetensors",
        "model.ckpt",
    )
    for name in others:

        def act(name: str = name) -> tuple[str, bool]:
            place = Path(tempfile.mkdtemp(dir=folder))
            shutil.copytree(checkpoint, place, dirs_exist_ok=True)
            (place / name).parent.mkdir(exist_ok=True)
            shutil.copy(place / "model.safetensors", place / name)
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                load_model(place, dtype="float32", device="cpu")
            words = " ".join(str(each.message) for each in warned)
            return f"named: {words[-90:]}", Path(name).name in words

        yield watch("weights", name, "refused or named", act)
    configs = {
        "code of its own": {"auto_map": {"AutoModelForCausalLM": "evil.Evil"}},
        "an unknown class": {"architectures": ["Evil"], "model_type": "evil"},
        "layers beyond memory": {"num_hidden_layers": 10**9},
        "a hidden size beyond memory": {"hidden_size": 2**40},
        "a negative size": {"intermediate_size": -1},
        "no heads": {"num_attention_heads": 0},
        "a vocabulary of nothing": {"vocab_size": 0},
        "a text as a size": {"hidden_size": "64"},
        "NaN": {"rms_norm_eps": float("nan")},
        "quantisation of its own": {"quantization_config": {"quant_method": "evil"}},
        "a dtype of its own": {"torch_dtype": "os.system"},
        "a rope of its own": {"rope_scaling": {"rope_type": "evil", "factor": 1e300}},
    }
    for name, changes in configs.items():

        def act_config(changes: dict[str, Any] = changes) -> tuple[str, bool]:
            place = Path(tempfile.mkdtemp(dir=folder))
            shutil.copytree(checkpoint, place, dirs_exist_ok=True)
            config = json.loads((place / "config.json").read_text()) | changes
            (place / "config.json").write_text(json.dumps(config))
            again = load_model(place, dtype="float32", device="cpu")
            same = again.digest == model.digest
            return f"taken: {again.architecture}", same and name_is_harmless(changes)

        yield watch("configurations", name, "refused, or the same model", act_config)


def name_is_harmless(changes: dict[str, Any]) -> bool:
    """Return whether a changed configuration may load: what it names is not read."""
    return not {"hidden_size", "num_hidden_layers", "vocab_size", "rope_scaling"} & changes.keys()


SAME_CONTENT = frozenset(
    ("cut by one byte", "other line ends", "a byte order mark", "twice", "one line feed", "empty")
)
"""Changes after which a file of text may say what it said, or nothing."""

TEMPLATES = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__ }}",
    "attr": "{{ ''|attr('__class__') }}",
    "format": "{{ '{0.__class__}'.format('') }}",
    "format_map": "{{ '{a.__class__}'.format_map({'a': ''}) }}",
    "an endless loop": "{% for i in range(10**12) %}a{% endfor %}",
    "nested loops": "{% for i in range(9**6) %}{% for j in range(9**6) %}{% endfor %}{% endfor %}",
    "a long text": "{{ 'a' * 10**9 }}",
    "a deep macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a file": "{% include '/etc/passwd' %}",
    "an import": "{% import 'os' as os %}{{ os }}",
    "a power": "{{ 9**9**9 }}",
    "a join of itself": "{% set x = [1] %}{{ x.append(x) }}{{ x }}",
    "an undefined filter": "{{ 1|evil }}",
    "half a tag": "{% if",
    "the environment": "{{ self.__init__ }}",
}

STOPS = ("。", "漢", "🛑", "STOP", " ", "\n", "e\u0301", "\ufffd", "</end>", "x + 1")


def tries_of_texts(opened: ExitStack, folder: Path, model: Any, checkpoint: Path) -> Iterator[Row]:
    """Chat templates, stop texts in every family of tokenizers, and prompts in two parts."""
    from assay.models.chat import read_chat, render_chat
    from assay.models.spelling import encode_parts
    from assay.poc.responses import Request
    from tests.models.tokenizer_families import CODE, FAMILIES, WORDS, family
    from tests.poc.responses.test_stop_texts import first_end, first_end_grown

    tokenizer = family(min(FAMILIES))
    for name, template in TEMPLATES.items():

        def act(template: str = template) -> tuple[str, bool]:
            tokenizer.chat_template = template
            text = render_chat(read_chat([{"role": "user", "content": "a"}]), tokenizer)
            return f"taken: {text!r:.80}", len(text) < 1000 and "root:" not in text

        yield watch("chat templates", name, "refused, or a harmless text", act)
    for name in sorted(FAMILIES):
        spelt = family(name)
        for stop in STOPS:

            def act_stop(spelt: Any = spelt, stop: str = stop) -> tuple[str, bool]:
                request = Request(request_id="r", prompt=(1, 2), stop=(stop,))
                output = spelt(f"漢字é {CODE[:30]}{stop}{WORDS}", add_special_tokens=False)
                ids = output["input_ids"][:48]
                grown = first_end_grown(spelt, request, ids)
                whole = first_end(spelt, request, ids)
                return f"{grown} growing, {whole} whole", grown == whole

            yield watch("stop texts", f"{name}: {stop!a}", "found at the same token", act_stop)
        for prompt, answer in (
            ("def solve(x):\n", "return x + 1\n"),
            ("a", " b"),
            ("a ", "b"),
            ("漢", "字"),
            ("e", "\u0301"),
            ("👩🏽", "\u200d💻"),
            ("x\r", "\ny"),
        ):

            def act_parts(
                spelt: Any = spelt, prompt: str = prompt, answer: str = answer
            ) -> tuple[str, bool]:
                ids = encode_parts(spelt, prompt, answer)[0]
                text = spelt.decode(ids, clean_up_tokenization_spaces=False)
                return f"{text!r}", normalize("NFC", text) == normalize("NFC", prompt + answer)

            yield watch(
                "prompts and completions",
                f"{name}: {prompt!a} + {answer!a}",
                "refused, or ids that spell both",
                act_parts,
            )


def tries_of_grading(
    opened: ExitStack, folder: Path, model: Any, checkpoint: Path
) -> Iterator[Row]:
    """Answers that are equal, fences, and what is wrong: the rows of graders with variants."""
    from assay.vhack.environment.grading import same_answer, wrong_values
    from assay.vhack.pairs.fences import find_programs

    pairs = (
        ({"b": 2, "a": 1}, {"a": 1, "b": 2}, True),
        ([{"b": [], "a": {}}], [{"a": {}, "b": []}], True),
        ({"a": {"d": 1, "c": 2}}, {"a": {"c": 2, "d": 1}}, True),
        ((1, 2), [1, 2], True),
        (-0.0, 0.0, True),
        ([-0.0], [0.0], True),
        ({"a": -0.0}, {"a": 0.0}, True),
        (0, 0.0, False),
        (True, 1, False),
        (1, 1.0, False),
        (float("nan"), float("nan"), False),
        ("e\u0301", "\u00e9", False),
        (None, None, True),
        ({1: 2}, {"1": 2}, True),
        (10**400, 10**400, True),
        ([1, 2], [2, 1], False),
    )
    for value, expected, equal in pairs:
        yield watch(
            "grading",
            f"{value!a:.40} for {expected!a:.40}",
            f"equal: {equal}",
            lambda value=value, expected=expected, equal=equal: taken(
                same_answer(value, expected), equal
            ),
        )
    for expected in (
        None,
        True,
        False,
        0,
        1,
        0.0,
        "",
        "a",
        [],
        [0],
        {},
        {"a": None},
        [None],
        1e308,
    ):
        yield watch(
            "grading",
            f"wrong values of {expected!r}",
            "none of them is right",
            lambda expected=expected: taken(
                any(same_answer(wrong, expected) for wrong in wrong_values(expected)), False
            ),
        )
    program = "def solve(x):\n    return x + 1"
    inner = program.replace("\n", "\n   ")
    draft = "def solve(x):\n    return x"
    texts = {
        "a shell block first": f"```sh\npip install x\n```\n```python\n{program}\n```",
        "a draft in think": f"<think>\n```py\n{draft}\n```\n</think>\n```py\n{program}\n```",
        "tildes": f"~~~python\n{program}\n~~~",
        "capitals": f"```Python\n{program}\n```",
        "a word beside the language": f"```python title=a\n{program}\n```",
        "braces": f"```{{.python}}\n{program}\n```",
        "four fences": f"````python\n{program}\n````",
        "fences in a list": f"1. a\n   ```python\n   {inner}\n   ```",
        "line ends of Windows": f"```python\r\n{program}\r\n```".replace("x):\n", "x):\r\n"),
        "a draft before": f"```python\n{draft}\n```\nBetter:\n```python\n{program}\n```",
        "output after": f"```python\n{program}\n```\n```text\n2\n```",
        "json after": f'```python\n{program}\n```\n```json\n{{"a": 1}}\n```',
        "no end": f"```python\n{program}",
        "reasoning": f"<reasoning>\n```py\n{draft}\n```\n</reasoning>\n```py\n{program}\n```",
        "no fence": program,
        "no language": f"```\n{program}\n```",
    }
    for name, text in texts.items():

        def act(text: str = text) -> tuple[str, bool]:
            found = [one.replace("\r", "").strip() for one in find_programs(text, "solve")]
            return f"{found!r:.90}", found == [program]

        yield watch("fences", name, "the program alone", act)


PROGRAMS = {
    "reads /etc/shadow": "print(open('/etc/shadow').read())",
    "reads the home": "import os; print(os.listdir('/root'))",
    "reads other processes": "print(open('/proc/1/environ').read())",
    "opens a socket": "import socket; socket.create_connection(('127.0.0.1', 80))",
    "opens a socket of the kernel": "import socket; socket.socket(16, 3, 0)",
    "a name server": "import socket; print(socket.gethostbyname('example.org'))",
    "writes outside": "open('/tmp/assay-was-here', 'w').write('x')",
    "writes in /dev/shm": "open('/dev/shm/assay-was-here', 'w').write('x')",
    "a fork": "import os; os.fork(); print('FORKED')",
    "a shell": "import subprocess; print(subprocess.run('id', capture_output=True))",
    "a thread": "import threading; threading.Thread(target=print, args=('THREAD',)).start()",
    "ptrace": "import ctypes; print(ctypes.CDLL(None).ptrace(16, 1, 0, 0) == 0 and 'TRACED')",
    "kill": "import os; os.kill(os.getppid(), 9); print('KILLED')",
    "kill all": "import os; os.kill(-1, 9)",
    "mount": "import ctypes; print(ctypes.CDLL(None).mount(b'x', b'/') == 0 and 'MOUNTED')",
    "unshare": "import ctypes; print(ctypes.CDLL(None).unshare(0x10000000) == 0 and 'UNSHARED')",
    "bpf": "import ctypes; print(ctypes.CDLL(None).syscall(321, 0, 0, 0) == 0 and 'BPF')",
    "io_uring": "import ctypes; print(ctypes.CDLL(None).syscall(425, 8, 0) >= 0 and 'URING')",
    "memfd and exec": "import os; fd = os.memfd_create('x'); print(fd >= 0 and 'MEMFD')",
    "memory": "x = bytearray(2**34); print('MEMORY')",
    "an endless loop": "while True: pass",
    "a sleep": "import time; time.sleep(600)",
    "much output": "while True: print('x' * 10**6)",
    "a link out": "import os; os.symlink('/etc', 'e'); print(os.listdir('e'))",
    "setuid": "import os; os.setuid(65534); print('SETUID')",
    "the clock": "import time; time.clock_settime(0, 0); print('CLOCK')",
    "a signal in a handler": "import signal; signal.signal(15, signal.SIG_IGN); signal.pause()",
    "closes all": "import os; os.closerange(0, 100)",
    "ends hard": "import os; os._exit(0)",
    "replaces print": "import builtins; builtins.print = None",
    "an audit hook": "import sys; sys.addaudithook(lambda *a: 1 / 0)",
    "a deep recursion": "f = lambda n: f(n + 1)\nimport sys; sys.setrecursionlimit(10**9); f(0)",
    "gc objects": "import gc; print([o for o in gc.get_objects() if 'expected' in repr(type(o))])",
    "many files": "for i in range(10**6): open(str(i), 'w')",
    "a large file": "open('x', 'wb').truncate(2**40); open('x', 'r+b').write(b'y' * 2**31)",
}
SHOUTS = (
    "root:",
    "FORKED",
    "uid=",
    "TRACED",
    "KILLED",
    "MOUNTED",
    "UNSHARED",
    "BPF",
    "URING",
    "CLOCK",
)


def tries_of_sandboxes(
    opened: ExitStack, folder: Path, model: Any, checkpoint: Path
) -> Iterator[Row]:
    """Programs that reach for the machine, in both sandboxes."""
    from assay.vhack.environment import Limits, backends, run

    before = backends.available_backend
    opened.callback(setattr, backends, "available_backend", before)
    for backend in backends.BACKENDS:
        if reason := backends.unusable(backend):
            yield Row(
                f"sandbox {backend}", "any program", "a sandbox", f"not run: {reason}", False, 0
            )
            continue
        backends.available_backend = lambda backend=backend: backend
        for name, program in PROGRAMS.items():

            def act(program: str = program) -> tuple[str, bool]:
                result = run(program, limits=Limits(seconds=2.0, memory_mib=256))
                said = result.stdout + result.stderr
                out = [Path("/tmp/assay-was-here"), Path("/dev/shm/assay-was-here")]
                escaped = [word for word in SHOUTS if word in result.stdout] + [
                    str(path) for path in out if path.exists()
                ]
                again = run("print(6 * 7)").stdout == "42\n"
                return f"{said[-90:]!r} escaped: {escaped}", not escaped and again

            yield watch(f"sandbox {backend}", name, "nothing outside, and the next one runs", act)


def tries_of_pages(opened: ExitStack, folder: Path, model: Any, checkpoint: Path) -> Iterator[Row]:
    """Hostile text in every place of a page."""
    from assay.pages.report import Report

    texts = (
        "<script>alert(1)</script>",
        '"><img src=x onerror=alert(1)>',
        "`<b>`",
        "javascript:alert(1)",
        "{{ 7 * 7 }}",
        "{% raw %}",
        "</title><svg onload=alert(1)>",
        "&lt;script&gt;",
        "\x1b[2J\x07",
        "\u202egnp.exe",
        "a\0b",
        "]]><!--",
        "\ud800",
        "x" * 100_000,
    )
    for text in texts:
        for place in (
            "title",
            "subtitle",
            "section",
            "paragraph",
            "table",
            "definitions",
            "command",
        ):

            def act(text: str = text, place: str = place) -> tuple[str, bool]:
                about = {name: text for name in ("title", "subtitle", "command") if name == place}
                page = Report(**{"title": "a", "origin": {}} | about)
                if place == "section":
                    page.section(text)
                elif place == "paragraph":
                    page.paragraph(text)
                elif place == "table":
                    page.table([text, "b"], [[text, text]], caption=text)
                elif place == "definitions":
                    page.definitions({text: text})
                written = page.render()
                written.encode()
                bad = [
                    mark
                    for mark in ("<script>alert", "<img src=x", "<svg onload", ">49<", "\x1b")
                    if mark in written
                ]
                return f"{len(written)} letters, {bad}", not bad and "\0" not in written

            yield watch("pages", f"{text[:24]!a} as {place}", "text, escaped", act)


def tries_of_settings(
    opened: ExitStack, folder: Path, model: Any, checkpoint: Path
) -> Iterator[Row]:
    """Variables of the environment and configuration files with values that no setting takes."""
    from assay.poc.validator import ValidatorSettings
    from assay.poc.vllm.preflight import PluginSettings

    words = ("", " ", "-1", "nan", "inf", "1e999", "true", "x" * 10_000, "\u0663", "0x10", "1_000")
    for name in ("epoch", "sample", "minimum_share", "max_kept", "keep", "poll_interval"):
        for word in words:

            def act(name: str = name, word: str = word) -> tuple[str, bool]:
                chosen = ValidatorSettings(pins=folder / "pins.toml", **{name: word})
                value = getattr(chosen, name)
                return f"taken: {value}", isinstance(value, int | float) and 0 < value < 1e18

            yield watch("settings", f"{name} = {word[:12]!a}", "refused, or a finite number", act)
    for field in PluginSettings.model_fields:
        name = PluginSettings.environment_name(field) or field.upper()
        for word in ("nan", "1e999", "\u0663", "x" * 10_000):

            def act_variable(name: str = name, word: str = word) -> tuple[str, bool]:
                os.environ[name] = word
                try:
                    chosen = repr(PluginSettings())
                finally:
                    del os.environ[name]
                finite = not any(f"={one}" in chosen for one in ("nan", "inf"))
                return f"taken: {chosen.count('=')} settings", finite

            attempt = f"{name}={word[:12]!a}"
            yield watch("variables", attempt, "refused, or a finite value", act_variable)


def tries_of_copies(opened: ExitStack, folder: Path, model: Any, checkpoint: Path) -> Iterator[Row]:
    """Copies of honest messages beside a cheap one, under other ids, in other orders and sizes."""
    from assay.poc.service import ServiceSettings
    from assay.poc.validator.claims import Block, Reader
    from assay.poc.validator.inbox import Inbox, Message
    from assay.poc.validator.registry import Registry

    whole = callback_of(proof_of(model, KEYS[0], range(100)))
    redteam.write_network(folder, model, KEYS)
    registry = Registry.load(folder / "pins.toml", folder / "nodes.toml", ServiceSettings())
    reader = Reader(registry, {whole["block_hash"]: Block(None)}, 2**22)
    pins = reader.pins(KEYS[0])
    half = len(whole["nonces"]) // 2

    def message(name: str, first: int, end: int) -> Message:
        body = whole | {field: whole[field][first:end] for field in ("nonces", "dist")}
        made = reader.claim(body, registry.senders[KEYS[0]])
        return Message(KEYS[0], name, "generated", end - first, b"x", made.encode(), pins)

    for copies in (0, 1, 9, 99, 999):
        for order in ("copies last", "copies first", "copies cut", "an hour later"):

            def act(copies: int = copies, order: str = order) -> tuple[str, bool]:
                place = Path(tempfile.mkdtemp(dir=folder))
                inbox = Inbox(place, epoch_seconds=86_400.0, sample=8)
                cheap = message("cheap", 0, half)
                honest = [message("honest", half, 2 * half)]
                cut = order == "copies cut"
                honest += [
                    message(f"h{i}", half + (i % 5 if cut else 0), 2 * half) for i in range(copies)
                ]
                listed = [*honest, cheap] if order == "copies first" else [cheap, *honest]
                for start in range(0, len(listed), 100):
                    inbox.add(listed[start : start + 100])
                drawn = Counter[str]()
                for _ in range(2 * half // 8 + 4):
                    for one in inbox.plan([KEYS[0]], 8):
                        drawn["cheap" if one.id == "cheap" else "honest"] += one.planned - one.drawn
                        inbox.finish([one])
                inbox.close()
                return f"{dict(drawn)}", drawn["cheap"] == half and drawn["honest"] == half

            yield watch(
                "copies", f"{copies} copies, {order}", "every nonce once, no pass more", act
            )


def tries_of_hooks(opened: ExitStack, folder: Path, model: Any, checkpoint: Path) -> Iterator[Row]:
    """What a reward function may return to a trainer, and what a file of tasks may hold."""
    from assay.vhack.directions.delta import arm_named
    from assay.vhack.training.rewards import OwnReward

    returns = {
        "None": None,
        "a number": 1.0,
        "None for each": [None, None],
        "NaN": [float("nan"), 0.0],
        "an infinity": [float("inf"), 0.0],
        "texts": ["1", "2"],
        "one too few": [1.0],
        "one too many": [1.0, 1.0, 1.0],
        "lists": [[1.0], [2.0]],
        "complex": [1j, 1j],
        "2^2000": [2**2000, 0],
        "a mapping without a reward": [{"exploited": True}] * 2,
        "a reward of text": [{"reward": "1"}] * 2,
        "a mark that is no truth": [{"reward": 1.0, "exploited": "maybe"}] * 2,
        "an unknown mark": [{"reward": 1.0, "explotied": True}] * 2,
        "a text for all": "11",
        "a type": int,
    }
    for name, value in returns.items():

        def act(value: Any = value, name: str = name) -> tuple[str, bool]:
            tasks = [{"prompt": "a"}, {"prompt": "b"}]
            reward = OwnReward(tasks, lambda **_: value, arm_named("none"))
            return f"taken: {reward.grade([0, 1], ['x', 'y'])!r:.80}", name == "an unknown mark"

        yield watch("reward hooks", f"returns {name}", "refused in words", act)

    def raises(error: BaseException) -> Callable[..., object]:
        def function(**columns: object) -> object:
            raise error

        return function

    for error in (ValueError("x"), SystemExit(3), MemoryError(), RecursionError(), KeyError("x")):

        def act_raise(error: BaseException = error) -> tuple[str, bool]:
            reward = OwnReward([{"prompt": "a"}], raises(error), arm_named("none"))
            return taken(reward.grade([0], ["x"]))

        yield watch("reward hooks", f"raises {type(error).__name__}", "refused in words", act_raise)


HEADERS = (
    b"",
    b" ",
    b"a" * 1025,
    b"a\x1b[2J",
    b"a\x7f",
    b"a\xa0",
    b"a\xad",
    b"\xff\xfe",
    b"a\tb",
    "\u202e".encode(),
    "e\u0301".encode(),
    b"a_b_c",
    b"../../a",
    b"1:a2:b",
)


def tries_of_plugin(opened: ExitStack, folder: Path, model: Any, checkpoint: Path) -> Iterator[Row]:
    """Headers that seed an answer of a vLLM server, parsed without vLLM."""
    from types import SimpleNamespace

    from starlette.datastructures import Headers

    from assay.poc.vllm.preflight import PluginSettings
    from assay.poc.vllm.recorded_answers import REQUEST_ID, USER_SEED, Responses

    responses = Responses(PluginSettings())
    responses.sink = SimpleNamespace(check=lambda client: None)
    responses.post("block_alpha")
    for header in (REQUEST_ID, USER_SEED):
        for value in HEADERS:

            def act(header: str = header, value: bytes = value) -> tuple[str, bool]:
                headers = Headers({REQUEST_ID: "r", header: value.decode("latin-1")})
                found = asyncio.run(responses.accept(headers, "/v1/completions", None))
                text = str(found.request_id if header == REQUEST_ID else found.user_seed)
                return f"taken: {text!a:.60}", text.isprintable() and len(text) <= 1024

            yield watch("plugin", f"{header}: {value[:24]!r}", "refused, or printable", act)


def tries_of_supply(opened: ExitStack, folder: Path, model: Any, checkpoint: Path) -> Iterator[Row]:
    """What is installed, and by what."""
    root = Path(__file__).parents[2]
    lock = (root / "requirements.lock").read_text()
    beside = (root / "requirements-beside.lock").read_text()
    make = (root / "Makefile").read_text()
    flow = (root / ".github" / "workflows" / "publish.yml").read_text()
    install = (root / "scripts" / "install.py").read_text()
    setup = make.partition("$(READY):")[2].partition("\n\n")[0]
    facts = {
        "every entry of the lock has a hash": lock.count("==") <= lock.count("--hash=sha256:"),
        "every entry beside it has a hash": all(
            "--hash=sha256:" in part for part in beside.split("\n\n") if "==" in part
        ),
        "no address in a lock": "://" not in lock + beside,
        "setup calls no pip of its own": "pip install" not in setup,
        "hashes are required": "--require-hashes" in install,
        "nothing is built from sources": '"--only-binary", ":all:"' in install,
        "a fallback says so": "without hashes" in install,
        "actions are pinned by commit": all(
            len(line.rpartition("@")[2].split()[0]) == 40
            for line in flow.splitlines()
            if "uses:" in line
        ),
        "no model is downloaded with code": "trust_remote_code=True"
        not in "".join(path.read_text() for path in (root / "src").rglob("*.py")),
        "no pickle is loaded": not any(
            "pickle.load" in path.read_text() or "weights_only=False" in path.read_text()
            for path in (root / "src").rglob("*.py")
        ),
        "no shell": not any(
            "shell=True" in path.read_text() for path in (root / "src").rglob("*.py")
        ),
        "no eval of a text": not any(
            "eval(" in path.read_text().replace(".eval(", "").replace("_eval(", "")
            for path in (root / "src").rglob("*.py")
        ),
    }
    for name, holds in facts.items():
        yield watch("supply", name, "true", lambda holds=holds: taken(holds, True))


AREAS: dict[str, Callable[..., Iterator[Row]]] = {
    name.removeprefix("tries_of_"): make
    for name, make in list(globals().items())
    if name.startswith("tries_of_")
}


def run_areas(names: list[str], folder: Path, checkpoint: Path, model: Any) -> Iterator[Row]:
    """Make the tries of some areas, each in a folder of its own."""
    for name in names:
        with ExitStack() as opened:
            (place := folder / name).mkdir()
            yield from AREAS[name](opened, place, model, checkpoint)


def main() -> int:
    """Run, print what did not hold, and write the table; return 1 where something did not."""
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--areas", nargs="*", default=[*AREAS], choices=AREAS)
    options.add_argument("-o", "--output", type=Path, help="other areas of this file are kept")
    chosen = options.parse_args()
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from assay.models import load_model
    from conftest import SMALL

    began = time.monotonic()
    rows = list[Row]()
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        torch.manual_seed(0)
        Qwen3ForCausalLM(Qwen3Config(**SMALL)).save_pretrained(folder / "small")
        model = load_model(folder / "small", dtype="float32", device="cpu")
        for row in run_areas(chosen.areas, folder, folder / "small", model):
            # The result is committed, and the folder is of this machine alone.
            rows.append(row._replace(seen=row.seen.replace(text, "FOLDER")))
            if not row.held:
                print("NOT HELD", json.dumps(row._asdict()), flush=True)
    held = sum(row.held for row in rows)
    print(f"{held} of {len(rows)} held after {time.monotonic() - began:.0f} s")
    if chosen.output and chosen.output.is_file():
        run_now = {row.area for row in rows}
        before = json.loads(chosen.output.read_text())["rows"]
        rows = [Row(**row) for row in before if row["area"] not in run_now] + rows
    by_area = {
        area: [len(own), sum(row.held for row in own)]
        for area in dict.fromkeys(row.area for row in rows)
        if (own := [row for row in rows if row.area == area])
    }
    if chosen.output:
        report = {
            "schema": "assay.attack_surface/1",
            "script": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
            "tries": len(rows),
            "held": sum(row.held for row in rows),
            "areas": by_area,
            "rows": [row._asdict() for row in rows],
        }
        chosen.output.write_text(json.dumps(report, indent=1, ensure_ascii=True) + "\n")
    return int(held < len(rows))


if __name__ == "__main__":
    sys.exit(main())
