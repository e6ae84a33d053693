"""The configurations of proxies: the real programs read them, and serve a service over TLS with
them.
"""

import getpass
import re
import socket
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from assay.poc.service import ServiceSettings
from assay.poc.service.service_controller import Controller
from tests.poc.service.conftest import PREFIX, Rig
from tests.poc.service.listening import listening
from tests.programs import place
from tests.waiting import until

DEPLOY = Path(__file__).parents[3] / "deploy"
NAMES = ("node.example", "validator.example")
KEY = "read-" + "x" * 20


@pytest.fixture(scope="module")
def certificates(tmp_path_factory) -> Path:
    """A folder with a certificate and a key of both names."""
    folder = tmp_path_factory.mktemp("certificates")
    for name in NAMES:
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={name}",
             "-addext", f"subjectAltName=DNS:{name}", "-keyout", f"{name}.key", "-out", f"{name}.pem"],
            cwd=folder, capture_output=True, check=True,
        )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def upstream(tmp_path_factory) -> Iterator[int]:
    """The port of a service with a key."""
    controller = Controller(
        Rig().deployment,
        ServiceSettings(data_dir=tmp_path_factory.mktemp("proxied"), api_keys=(KEY,)),
    )
    with listening(controller) as port:
        yield port


def ports(count: int) -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    found = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return found


@contextmanager
def running(command: list[str], folder: Path, port: int) -> Iterator[None]:
    """Run a proxy until it answers, and to the end of the block."""
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=folder, stdout=log, stderr=log, env={"HOME": str(folder)}
        )
    try:
        until(lambda: process.poll() is not None or _answers(port))
        assert process.poll() is None, (folder / "log").read_text()
        yield
    finally:
        process.terminate()
        process.wait(30)


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def check_proxy(secure: int, plain: int, certificate: Path) -> None:
    """Hold a proxy to what a service needs of it."""
    trusted = ssl.create_default_context(cafile=certificate)
    base = f"https://127.0.0.1:{secure}"
    extensions = {"sni_hostname": "node.example"}
    headers = {"Host": "node.example", "Authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=base, verify=trusted, headers=headers, timeout=30) as client:

        def get(path: str, **changes: str) -> httpx.Response:
            return client.get(path, headers=changes, extensions=extensions)

        assert get("/health").status_code == 200
        assert get("/health").headers["strict-transport-security"].startswith("max-age=")
        assert (
            get(f"{PREFIX}/status").status_code,
            get("/metrics", Authorization="Bearer x").status_code,
        ) == (
            200,
            401,
        )
        for _ in range(
            20
        ):  # an answer that came before the body was sent got lost one time in fifty
            large = client.post(
                f"{PREFIX}/validate", content=b" " * (3 << 20), extensions=extensions
            )
            assert (large.status_code, large.json()["wanted"]) == (413, "at most 1048576 bytes")
        huge = client.post(f"{PREFIX}/validate", content=b" " * (5 << 20), extensions=extensions)
        assert huge.status_code in (413, 502)  # of the proxy itself: nginx, Caddy
        with client.stream("GET", f"{PREFIX}/events", extensions=extensions) as stream:
            lines = stream.iter_lines()
            assert sum(line.startswith("data:") for line in (next(lines) for _ in range(12))) >= 3
    answer = httpx.get(f"http://127.0.0.1:{plain}/health", headers={"Host": "node.example"})
    assert answer.status_code in (301, 308)
    assert answer.headers["location"].startswith("https://node.example")


def changed(text: str, changes: dict[str, str]) -> str:
    """Return a configuration with what is other in a test; each part must be there."""
    for before, after in changes.items():
        assert before in text, before
        text = text.replace(before, after)
    return text


def test_proxies_name_their_clients_and_keep_no_connection_longer_than_the_service():
    """What a client writes into X-Forwarded-For, nginx would pass on; and a kept connection may
    just be ending.
    """
    nginx, caddy = ((DEPLOY / name).read_text() for name in ("nginx.conf", "Caddyfile"))
    assert (
        nginx.count("proxy_pass")
        == nginx.count("X-Forwarded-For $remote_addr;")
        == nginx.count("Connection close;")
    )
    kept = re.findall(r"keepalive (\d+)s", caddy)
    assert len(kept) == caddy.count("reverse_proxy") == 2
    assert all(int(seconds) < ServiceSettings().header_timeout for seconds in kept)


@pytest.mark.pages
@pytest.mark.needs("nginx", "openssl")
def test_nginx(certificates: Path, upstream: int, tmp_path: Path):
    secure, plain = ports(2)
    text = changed(
        (DEPLOY / "nginx.conf").read_text(),
        {
            "    listen [::]:80;\n": "",
            "    listen [::]:443 ssl;\n": "",
            "listen 80;": f"listen 127.0.0.1:{plain};",
            "listen 443 ssl;": f"listen 127.0.0.1:{secure} ssl;",
            "/etc/ssl/assay": str(certificates),
            "127.0.0.1:8100": f"127.0.0.1:{upstream}",
        },
    )
    (tmp_path / "assay.conf").write_text(text)
    kept = "".join(
        f"{kind}_temp_path {tmp_path}/{kind};"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (tmp_path / "nginx.conf").write_text(
        # A worker of another user than the test's could not open the folders of the test.
        f"user {getpass.getuser()}; daemon off; pid {tmp_path}/pid; error_log "
        f"{tmp_path}/error.log; events {{}}\n"
        f"http {{ access_log off; {kept} include {tmp_path}/assay.conf; }}\n"
    )
    with running(
        [place("nginx"), "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf")], tmp_path, secure
    ):
        check_proxy(secure, plain, certificates / "node.example.pem")


@pytest.mark.pages
@pytest.mark.needs("caddy", "openssl")
def test_caddy(certificates: Path, upstream: int, tmp_path: Path):
    secure, plain = ports(2)
    sites = {
        f"\n{name} {{": f"\n{name} {{\n\ttls {certificates}/{name}.pem "
        f"{certificates}/{name}.key\n\tbind 127.0.0.1"
        for name in NAMES
    }
    options = {
        "\n\tservers {": f"\n\tadmin off\n\thttp_port {plain}\n\thttps_port {secure}\n\tservers {{"
    }
    text = changed(
        (DEPLOY / "Caddyfile").read_text(),
        sites | options | {"127.0.0.1:8100": f"127.0.0.1:{upstream}"},
    )
    (tmp_path / "Caddyfile").write_text(text)
    command = [
        place("caddy"),
        "run",
        "--config",
        str(tmp_path / "Caddyfile"),
        "--adapter",
        "caddyfile",
    ]
    with running(command, tmp_path, secure):
        check_proxy(secure, plain, certificates / "node.example.pem")
