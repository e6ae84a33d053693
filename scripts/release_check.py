"""Build the wheel of a commit and use it as a stranger would: ``make release-check``.

The wheel is built from a clean export of the commit, installed into an empty environment outside
the checkout with the versions of constraints.txt, and run from another folder with an empty home.
Every step is one line of the summary; the exit code is 1 if any failed. Steps after the
installation do not depend on each other, so one run shows all faults.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import venv
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LARGEST_WHEEL = 16_000_000
MODEL = "reference:qwen3"
PAGES = ("docs/tutorial.md", "docs/vhack-quickstart.md")
"""Pages that a new user follows after the README."""
PAGE_WAIT = (
    60.0  # seconds in which a page that is opened again and again must show what its scripts write
)
ROUND = ("--block-hash", "block_alpha", "--public-key", "node_A")
MISSING = {  # commands that need an extra, by the extra
    "serve": (
        ("poc", "serve", "--model", MODEL),
        ("poc", "receive"),
        ("poc", "validator", "--model", MODEL, "--pins", "pins.toml"),
    ),
    "train": (("vhack", "train", "--model", MODEL, "-o", "run", "--steps", "1"),),
    "vllm": (("poc", "prove", "--model", MODEL, *ROUND, "--engine", "vllm", "-o", "vllm.jsonl"),),
}


class Failed(Exception):
    """What a step saw instead of what it wanted."""


@dataclass
class Stranger:
    """An environment with nothing but the wheel, and the folder in which its commands run.

    Args:
        folder: Folder outside the checkout that holds the environment, an empty home and the place
            of work.
        results: Name, seconds, whether it held, and what was seen, of every step so far.
    """

    folder: Path
    results: list[tuple[str, float, bool, str]] = field(default_factory=list)

    @property
    def python(self) -> Path:
        """The interpreter of the empty environment."""
        return self.folder / "env" / "bin" / "python"

    @property
    def place(self) -> Path:
        """The folder in which every command runs."""
        return self.folder / "elsewhere"

    @property
    def environment(self) -> dict[str, str]:
        """What a new login has: no PYTHONPATH, no ASSAY_ variable, no virtual environment but its
        own.
        """
        kept = {
            name: os.environ[name]
            for name in os.environ
            if name.startswith(("PIP_", "LANG", "OMP_", "SSL_"))
        }
        path = f"{self.folder / 'env' / 'bin'}:/usr/local/bin:/usr/bin:/bin"
        return kept | {"HOME": str(self.folder / "home"), "PATH": path}

    def pip(self, *arguments: str) -> None:
        """Run pip in the environment; the first installation may take many minutes."""
        self.run([str(self.python), "-m", "pip", "--quiet", *arguments], minutes=30)

    def assay(self, *arguments: str, codes: tuple[int, ...] = (0,)) -> str:
        """Run the command and return what it printed; refuse other exit codes and every
        traceback.
        """
        return self.run(["assay", *arguments], codes=codes)

    def run(
        self,
        command: list[str],
        *,
        codes: tuple[int, ...] = (0,),
        minutes: float = 15,
        place: Path | None = None,
    ) -> str:
        """Run a command in that folder, and return its output, that to stderr too where it should
        fail.
        """
        done = subprocess.run(
            command,
            cwd=place or self.place,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=60 * minutes,
        )
        if done.returncode not in codes or "Traceback" in done.stderr:
            raise Failed(
                f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()[-600:]}"
            )
        return done.stdout + (done.stderr if 0 not in codes else "")

    def step(self, name: str, action: Callable[[], str]) -> bool:
        """Take one step and write down what it saw."""
        print(f"… {name}", flush=True)
        started = time.monotonic()
        try:
            held = True
            seen = action()
        except (Failed, OSError, ValueError, KeyError, subprocess.SubprocessError) as error:
            held = False
            seen = str(error)
        self.results.append((name, time.monotonic() - started, held, seen))
        print(f"  {'ok  ' if held else 'FAIL'} {seen}", flush=True)
        return held

    def summary(self) -> int:
        """Print every step, and return the exit code."""
        failed = [name for name, _, held, _ in self.results if not held]
        print("\nSummary")
        for name, seconds, held, seen in self.results:
            print(
                f"{'ok  ' if held else 'FAIL'} {seconds:6.1f} s  {name}: "
                f"{seen.splitlines()[0] if seen else ''}"
            )
        print(
            f"\n{len(self.results) - len(failed)} of {len(self.results)} steps hold"
            + (": " if failed else "")
        )
        print("\n".join(f"  {name}" for name in failed))
        return bool(failed)


def export(folder: Path) -> None:
    """Write the files of the commit, and none of the working tree, into a folder."""
    archive = subprocess.run(
        ["git", "archive", "HEAD"], cwd=ROOT, capture_output=True, check=True
    ).stdout
    folder.mkdir()
    subprocess.run(["tar", "-x"], cwd=folder, input=archive, check=True)


def built(stranger: Stranger) -> Path:
    """Return the wheel, which two exports must give byte for byte."""
    wheels = []
    for number in (1, 2):
        source = stranger.folder / f"source{number}"
        out = stranger.folder / f"dist{number}"
        export(source)
        stranger.pip("wheel", "--no-deps", "--wheel-dir", str(out), str(source))
        wheels += out.glob("*.whl")
    digests = {hashlib.sha256(wheel.read_bytes()).hexdigest() for wheel in wheels}
    if len(wheels) != 2 or len(digests) != 1:
        raise Failed(f"two builds of one commit give {len(digests)} different wheels")
    return wheels[0]


def check_size(wheel: Path) -> str:
    size = wheel.stat().st_size
    parts: dict[str, int] = defaultdict(int)
    with zipfile.ZipFile(wheel) as archive:
        for entry in archive.infolist():
            parts["/".join(entry.filename.split("/")[:4])] += entry.compress_size
    largest = sorted(parts.items(), key=lambda part: -part[1])[:3]
    said = ", ".join(f"{name} {bytes_ / 1e6:.1f}" for name, bytes_ in largest)
    if size > LARGEST_WHEEL:
        raise Failed(
            f"{wheel.name} has {size / 1e6:.1f} MB, wanted at most {LARGEST_WHEEL / 1e6:.0f}: "
            f"{said}"
        )
    return (
        f"{wheel.name} has {size / 1e6:.1f} MB of at most {LARGEST_WHEEL / 1e6:.0f}, of that {said}"
    )


def check_installed(stranger: Stranger) -> str:
    """The package comes from the environment, its requirements agree, and it says who wrote it."""
    code = (
        "import json, assay; from importlib.metadata import metadata; m = metadata('assay');"
        "print(json.dumps([assay.__file__, assay.__version__, m['Author'], "
        "len(m.get_all('Classifier'))]))"
    )
    place, version, author, classifiers = json.loads(
        stranger.run([str(stranger.python), "-c", code])
    )
    stranger.pip("check")
    if (
        not Path(place).is_relative_to(stranger.folder)
        or author != "assay contributors"
        or not classifiers
    ):
        raise Failed(f"{place} by {author!r} with {classifiers} classifiers")
    return f"assay {version} by {author}"


def check_demo(stranger: Stranger) -> str:
    found = json.loads(stranger.assay("demo", "--json"))
    if not found["all_as_expected"] or not (stranger.place / "demo" / "report.html").is_file():
        raise Failed(f"not as expected: {found['honest']}, {found['cheaters']}")
    flagged = found["filter"]
    if flagged["caught"] < flagged["asked"] / 2:
        raise Failed(f"a filter that caught {flagged['caught']} of {flagged['asked']}")
    return (
        f"all verdicts as expected, a filter caught {flagged['caught']} of {flagged['asked']}, "
        f"{found['seconds']} s"
    )


def check_proof(stranger: Stranger) -> str:
    stranger.assay(
        "poc", "prove", "--model", MODEL, *ROUND, "--nonces", "0:64", "-o", "proof.jsonl"
    )
    verdict = json.loads(
        stranger.assay("poc", "verify", "proof.jsonl", "--model", MODEL, *ROUND, "--json")
    )
    stranger.assay("poc", "verify", "proof.jsonl", "--model", MODEL, codes=(2,))
    return f"{verdict['verdict']} on {verdict['checked']} nonces; exit code 2 without block and key"


def check_vhack(stranger: Stranger) -> str:
    given = ("--model", MODEL, "--pairs", "generated:16")
    stranger.assay("vhack", "extract", *given, "-o", "basis.safetensors")
    answer = stranger.assay(
        "vhack", "check", *given, "--basis", "basis.safetensors", "--json", codes=(0, 1, 2)
    )
    checks = [check["verdict"] for check in json.loads(answer[: answer.rindex("}") + 1])["checks"]]
    return (
        f"a basis of {(stranger.place / 'basis.safetensors').stat().st_size / 1e6:.1f} MB; "
        f"{', '.join(checks)}"
    )


def check_pages(stranger: Stranger) -> str:
    """Run every block of the first pages in a fresh checkout, in order; `make test` is the one line
    left out.
    """
    checkout = stranger.folder / "source2"
    activated = ". .venv/bin/activate && python scripts/page_blocks.py "
    stranger.run(
        [sys.executable, "scripts/page_blocks.py", "README.md", "make test"],
        minutes=60,
        place=checkout,
    )
    for page in PAGES:
        stranger.run(["bash", "-c", activated + page], minutes=30, place=checkout)
    return ", ".join(("README.md", *PAGES))


def check_missing(stranger: Stranger, extra: str) -> str:
    """What needs an extra says so in three parts, without a traceback, and names the extra."""
    for command in MISSING[extra]:
        said = stranger.assay(*command, codes=(2,))
        if not all(part in said for part in ("error:", "wanted:", "to do:", f"[{extra}]")):
            raise Failed(f"assay {' '.join(command)} says {said!r}")
    return " ".join(stranger.assay(*MISSING[extra][0], codes=(2,)).split())


@contextmanager
def running(stranger: Stranger, ready: str, *arguments: str) -> Iterator[str]:
    """Run a server on a free port of this machine, once it is ready; in the end SIGTERM must end it
    with 0.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = stranger.folder / f"{arguments[1]}.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            ["assay", *arguments, "--port", str(port)],
            cwd=stranger.place,
            env=stranger.environment,
            stdout=out,
            stderr=out,
        )
    try:
        base = f"http://127.0.0.1:{port}"
        limit = time.monotonic() + 300
        while not (answers(f"{base}/health") and answers(base + ready)):
            if process.poll() is not None or time.monotonic() > limit:
                raise Failed(
                    f"{' '.join(arguments)} does not answer {ready}: {log.read_text()[-600:]}"
                )
            time.sleep(0.2)
        yield base
        process.send_signal(signal.SIGTERM)
        code = process.wait(90)
        if code or "Traceback" in log.read_text():
            raise Failed(
                f"{' '.join(arguments)} ended with {code} after SIGTERM: {log.read_text()[-600:]}"
            )
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def answers(url: str) -> bytes:
    """Return the body of a page, and nothing where there is no answer yet."""
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            return bytes(response.read())
    except OSError:
        return b""


def check_server(stranger: Stranger, ready: str, path: str, *arguments: str) -> str:
    with running(stranger, ready, *arguments) as base:
        page = answers(base + path)
        if not page:
            raise Failed(f"nothing at {path}")
        if path == "/":
            check_page(stranger, base, page)
        shown = " in Chromium" if path == "/" else ""
        return f"/health, {ready}, {path}{shown} of {len(page)} bytes, SIGTERM ends it with 0"


def check_page(stranger: Stranger, base: str, page: bytes) -> None:
    """Open a server's page in a real browser; its scripts write the name of the model, which is not
    in the page.
    """
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        raise Failed("no Chromium to open the page with: apt-get install chromium")
    profile = stranger.folder / "chromium"
    limit = time.monotonic() + PAGE_WAIT
    shown = ""
    while not shown or (MODEL not in shown and time.monotonic() < limit):
        # The browser's time runs ahead of the server's, so the first event may come after the page
        # was written out.
        shown = stranger.run(
            [
                browser,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                f"--user-data-dir={profile}",
                "--virtual-time-budget=10000",
                "--dump-dom",
                f"{base}/",
            ],
            minutes=2,
        )
    if MODEL in page.decode() or MODEL not in shown:
        raise Failed(f"the page in a browser does not name {MODEL}: {shown[-300:]!r}")


def check_all(stranger: Stranger) -> int:
    """Take all steps; a wheel that cannot be built or installed ends the run."""
    for name in ("home", "elsewhere"):
        (stranger.folder / name).mkdir(parents=True)
    venv.create(stranger.folder / "env", with_pip=True)
    wheels: list[Path] = []
    build = stranger.step(
        "build two wheels of the commit", lambda: wheels.append(built(stranger)) or "equal bytes"
    )
    if not build:
        return stranger.summary()
    wheel = wheels[0]
    stranger.step("size of the wheel", lambda: check_size(wheel))
    pinned = ("install", "--constraint", str(stranger.folder / "source1" / "constraints.txt"))
    if not stranger.step(
        "install it alone", lambda: stranger.pip(*pinned, str(wheel)) or "installed"
    ):
        return stranger.summary()
    stranger.step("package", lambda: check_installed(stranger))
    stranger.step("assay doctor", lambda: stranger.assay("doctor", "--json")[:60])
    stranger.step("assay demo", lambda: check_demo(stranger))
    stranger.step("assay poc prove, verify", lambda: check_proof(stranger))
    stranger.step("assay vhack extract, check", lambda: check_vhack(stranger))
    pins = (
        "poc",
        "pins",
        "new",
        "--model",
        MODEL,
        "--from-proof",
        "proof.jsonl",
        *ROUND[2:],
        "-o",
        "pins.toml",
    )
    stranger.step("assay poc pins new", lambda: stranger.assay(*pins) and "pins.toml written")
    stranger.step("blocks of the first pages", lambda: check_pages(stranger))
    for extra in MISSING:
        stranger.step(f"missing extra {extra}", lambda extra=extra: check_missing(stranger, extra))
    if stranger.step(
        "install the extra serve", lambda: stranger.pip(*pinned, f"{wheel}[serve]") or "installed"
    ):
        serve = ("poc", "serve", "--model", MODEL, "--data-dir", "node")
        stranger.step("assay poc serve", lambda: check_server(stranger, "/ready", "/", *serve))
        stranger.step(
            "assay poc receive",
            lambda: check_server(stranger, "/health", "/stats", "poc", "receive"),
        )
        stranger.step(
            "assay poc validator --help",
            lambda: stranger.assay("poc", "validator", "--help")[:40].strip(),
        )
        validator = (
            "poc",
            "validator",
            "--model",
            MODEL,
            "--pins",
            "pins.toml",
            "--data-dir",
            "judge",
        )
        stranger.step(
            "assay poc validator", lambda: check_server(stranger, "/ready", "/", *validator)
        )
    return stranger.summary()


def main() -> int:
    """Run the check in a temporary folder, or in a new one that stays."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--keep", type=Path, help="new folder to work in, which stays; else a temporary one"
    )
    folder = parser.parse_args().keep
    changed = subprocess.run(
        ["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    if changed.stdout:
        print(
            "the working tree has changes, which are not in the wheel: the last commit is checked"
        )
    if folder is not None:
        return check_all(Stranger(folder.resolve()))
    made = Path(tempfile.mkdtemp(prefix="assay-release-"))
    try:
        return check_all(Stranger(made))
    finally:
        shutil.rmtree(made, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
