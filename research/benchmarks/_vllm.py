"""Real vLLM servers on loopback for the benchmarks and tests of the plugin: started, asked, and ended by process id."""

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil

POW = "/api/v1/pow"
MODEL = "qwen3"
KEY = "a-key-for-tests-on-loopback"
ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "src/assay/models/reference/qwen3"
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_PLUGINS": "assay",
    "ASSAY_ALLOW_PRIVATE_CALLBACKS": "1",
    "ASSAY_API_KEY": KEY,
}
OPTIONS = {
    "--model": str(REFERENCE),
    "--served-model-name": MODEL,
    "--dtype": "float32",
    "--enforce-eager": None,
    "--max-model-len": "512",
    "--max-num-batched-tokens": "1024",
    "--enable-prompt-embeds": None,
    "--worker-extension-cls": "assay.poc.vllm.WorkerExtension",
    "--scheduling-policy": "priority",
    "--disable-uvicorn-access-log": None,
}


def free_port():
    """Return a port without a listener, below those that the system gives to others while a server starts."""
    while True:
        port = random.randrange(20000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class Server:
    """A vLLM server with the plugin.

    ``options`` and ``environment`` change the ones above; an option of ``False`` is left out.
    """

    def __init__(self, data_dir, *, python=sys.executable, options=None, environment=None, log=None):
        self.data_dir, self.python = Path(data_dir), python
        self.data_dir.mkdir(parents=True, exist_ok=True)
        self.options, self.environment = OPTIONS | (options or {}), ENVIRONMENT | (environment or {})
        self.log = Path(log or self.data_dir / "server.log")
        self.process = self.client = None
        self.port = 0

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *error):
        self.stop()

    def launch(self):
        """Start the process, and return before it answers."""
        self.choose_port()
        template = self.data_dir / "chat.jinja"  # the bundled models have none
        template.write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
        options = self.options | {"--host": "127.0.0.1", "--port": str(self.port), "--chat-template": str(template)}
        words = [word for name, value in options.items() if value is not False for word in (name, value) if word]
        command = [self.python, "-m", "vllm.entrypoints.openai.api_server", *words]
        self.process = self.run(command, os.environ | self.environment | {"ASSAY_DATA_DIR": str(self.data_dir)})

    def choose_port(self):
        """Choose the port of the next process, and make the client that asks there."""
        self.port = free_port()
        self.client = httpx.Client(base_url=self.url, timeout=120.0, headers={"Authorization": f"Bearer {KEY}"})

    def run(self, command, environment):
        """Return the process of a command, which writes into the log."""
        with self.log.open("ab") as log:
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=self.data_dir)

    def start(self, timeout=900.0):
        """Start, and wait until chat and the service answer."""
        self.launch()
        self.wait_until_ready(timeout)

    def wait_until_ready(self, timeout=900.0, *, pause=0.5):
        """Wait until chat and the service of a process that was launched answer."""
        deadline = time.monotonic() + timeout
        while True:
            if self.process.poll() is not None or time.monotonic() > deadline:
                code, tail = self.process.poll(), self.tail()
                self.stop()
                raise RuntimeError(f"the server did not start (exit code {code}):\n{tail}")
            with contextlib.suppress(httpx.HTTPError):
                if self.client.get(f"{POW}/status", timeout=5).json().get("ready"):
                    return
            time.sleep(pause)

    @property
    def url(self):
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def tail(self, size=6000):
        """Return the end of the log."""
        return self.log.read_text(errors="replace")[-size:] if self.log.exists() else ""

    def kill(self):
        """SIGKILL the server; its engine processes are ended too, as a supervisor would."""
        children = self._children()
        self._hang_up()
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        end_processes(children, grace=0.0)

    def stop(self, grace=40.0):
        """SIGTERM, then whatever is needed."""
        if self.process is None:
            return None
        self._hang_up()
        children = self._children()
        if self.process.poll() is None:
            self.process.terminate()
        try:
            code = self.process.wait(grace)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        end_processes(children, grace=5.0)
        self.process = None
        return code

    def _hang_up(self):
        if self.client is not None:
            self.client.close()

    def _children(self):
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self.process.pid).children(recursive=True)
        return []

    # Calls

    def post(self, path, body=None):
        """POST to the service."""
        return self.client.post(f"{POW}{path}", json=body)

    def get(self, path, **params):
        """GET from the service."""
        return self.client.get(f"{POW}{path}", params=params)

    def begin(self, block, *, key="node", seq_len=64, batch_size=8, r_target=2.0, url=None, **other):
        """Begin to generate a round."""
        body = {"block_hash": block, "block_height": 1, "public_key": key, "seq_len": seq_len}
        body |= {"batch_size": batch_size, "r_target": r_target, "node_id": 0, "node_count": 1, "callback_url": url}
        response = self.post("/init/generate", body | other)
        response.raise_for_status()
        return response.json()

    def checked(self):
        """Return the nonces that are on disk."""
        return self.get("/status").json()["total_checked"]

    def wait_for(self, count, timeout=240.0):
        """Wait until so many nonces are on disk; return how many are."""
        deadline = time.monotonic() + timeout
        while (found := self.checked()) < count:
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise RuntimeError(f"{found} of {count} nonces in time:\n{self.tail()}")
            time.sleep(0.1)
        return found

    def idle_counts(self, timeout=60.0):
        """Return what the workers hold once nothing is in flight, or what is left then."""
        deadline = time.monotonic() + timeout
        while True:
            status = self.get("/engine").json()
            held = sum(worker["rows"] + worker["filled"] + worker["streams"] for worker in status["workers"])
            if not (held or status["nonces"] or status["chat"]) or time.monotonic() > deadline:
                return status
            time.sleep(0.1)


def distribution(folder, name, entry_points):
    """Write the description of an installed package with entry points, by group and name; return its folder."""
    info = Path(folder) / f"{name}-0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0\n")
    groups = (
        f"[{group}]\n" + "".join(f"{word} = {target}\n" for word, target in named.items())
        for group, named in entry_points.items()
    )
    (info / "entry_points.txt").write_text("\n".join(groups))
    return info.parent


def end_processes(processes, grace):
    """End processes by their id: wait, then SIGKILL."""
    _, alive = psutil.wait_procs(processes, timeout=grace)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=10)


BEGINNINGS = (
    "import os\nimport sys\n\n",
    "class Node{0}:\n    def __init__(self, ",
    "for index in range({0}):\n    ",
    "def main(argv=None):\n    parser = ",
    "try:\n    import number{0}\nexcept ",
    "with open(path{0}, 'rb') as ",
    "    return np.array([{0}, ",
    "raise ValueError(f'",
    "@pytest.mark.parametrize('value{0}', ",
    "async def fetch(session, url):\n    async with ",
    "if __name__ == '__main__':\n    ",
    "x = torch.zeros({0}, ",
)


async def chat_alone(url, index, *, tokens=24):
    """Send what :func:`chat_once` sends over a connection of its own."""
    async with httpx.AsyncClient(base_url=url, timeout=240.0) as client:
        return await chat_once(client, index, tokens=tokens)


async def talk(url, count, *, tokens=12, at_once=4):
    """Send requests as :func:`chat_alone` does, so many at once; return what each gave."""
    gate = asyncio.Semaphore(at_once)

    async def one(index):
        async with gate:
            return await chat_alone(url, index, tokens=tokens)

    return await asyncio.gather(*(one(index) for index in range(count)))


async def chat_once(client, index, *, tokens=24, prompt=None):
    """Send one chat, completion or streaming request; return its text, status and seconds to the first token."""
    kind = ("chat", "completion", "stream-chat", "stream-completion")[index % 4]
    prompt = prompt or BEGINNINGS[index // 4 % len(BEGINNINGS)].format(index)
    body = {"model": MODEL, "max_tokens": tokens, "temperature": 0.0, "stream": kind.startswith("stream")}
    if kind.endswith("chat"):
        path, body = "/v1/chat/completions", body | {"messages": [{"role": "user", "content": prompt}]}
    else:
        path, body = "/v1/completions", body | {"prompt": prompt}
    started = time.perf_counter()
    if not body["stream"]:
        response = await client.post(path, json=body)
        return {"kind": kind, "status": response.status_code, "text": _text(response.json()), "first": None}
    first, text = None, []
    async with client.stream("POST", path, json=body) as response:
        async for line in lines_of(response):
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            first = first or time.perf_counter() - started
            text.append(_text(json.loads(line[6:])))
    return {"kind": kind, "status": response.status_code, "text": "".join(text), "first": first}


async def lines_of(response):
    """Yield the lines of a stream, which end at line feeds; httpx ends them at separators that a text may have, too."""
    rest = b""
    async for part in response.aiter_bytes():
        *whole, rest = (rest + part).split(b"\n")
        for line in whole:
            yield line.decode()


def _text(body):
    if "choices" not in body:
        return json.dumps(body)
    choice = (body["choices"] or [{}])[0]
    message = choice.get("message") or choice.get("delta") or choice
    return message.get("content") or message.get("text") or ""
