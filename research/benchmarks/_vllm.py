"""Real vLLM servers on loopback for the benchmarks and tests of the plugin: started, asked, and
ended by process id.

:class:`Server` starts as vLLM has it. Imports are most of a start, so :class:`ForkedServer` is
forked from a process that has imported vLLM: this file run as a program, which reads one JSON
object a line, forks, and answers with the process id. Such a server is the same program as one that
the command line starts, with the same processes; its engine and its worker are forked as well. On a
GPU both start as vLLM has it.
"""

import asyncio
import atexit
import contextlib
import importlib
import importlib.metadata
import json
import multiprocessing
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from uuid import uuid4

import httpx
import psutil
import torch

from assay.files.jsonl import dumps
from assay.poc.responses import Receipts, Request, Sampling, replay, respond
from assay.poc.responses.receipts import parse_receipt

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
MODULE = "vllm.entrypoints.openai.api_server"
COMMAND_LINE = "vllm.entrypoints.cli.main"
"""What ``vllm serve`` runs."""
IMPORTED = (
    MODULE,
    COMMAND_LINE,
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.models.qwen3",
    "assay.poc.vllm.endpoint_plugin",
)
CHOOSING = "PYTHONPATH", "VLLM_PLUGINS"
"""What says where modules are found and which platform vLLM has, once they are imported."""
BLOCK = "block-of-responses"
NODE = "node"
SEEDED = {"ASSAY_RESPONSES": "seeded", "ASSAY_RESPONSES_PUBLIC_KEY": NODE}
ON_GPU = {
    "--gpu-memory-utilization": "0.15",
    "--kv-cache-memory-bytes": "8000000000",
}  # many start at once


def free_port():
    """Return a port without a listener, below those that the system gives to others while a server
    starts.
    """
    while True:
        port = random.randrange(20000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class Server:
    """A vLLM server with the plugin.

    ``options`` and ``environment`` change the ones above; an option of ``False`` is left out.
    """

    def __init__(
        self, data_dir, *, python=sys.executable, options=None, environment=None, log=None
    ):
        self.data_dir = Path(data_dir)
        self.python = python
        self.data_dir.mkdir(parents=True, exist_ok=True)
        self.options = OPTIONS | (options or {})
        self.environment = ENVIRONMENT | (environment or {})
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
        options = (
            {"--chat-template": str(template)}
            | self.options
            | {"--host": "127.0.0.1", "--port": str(self.port)}
        )
        words = [
            word
            for name, value in options.items()
            if value is not False
            for word in (name, value)
            if word
        ]
        command = [self.python, "-m", "vllm.entrypoints.openai.api_server", *words]
        self.process = self.run(
            command, os.environ | self.environment | {"ASSAY_DATA_DIR": str(self.data_dir)}
        )

    def choose_port(self):
        """Choose the port of the next process, and make the client that asks there."""
        self.port = free_port()
        self.client = httpx.Client(
            base_url=self.url, timeout=120.0, headers={"Authorization": f"Bearer {KEY}"}
        )

    def run(self, command, environment):
        """Return the process of a command, which writes into the log."""
        with self.log.open("ab") as log:
            return subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, cwd=self.data_dir
            )

    def start(self, timeout=900.0):
        """Start, and wait until chat and the service answer."""
        self.launch()
        self.wait_until_ready(timeout)

    def wait_until_ready(self, timeout=900.0, *, pause=0.5):
        """Wait until chat and the service of a process that was launched answer."""
        deadline = time.monotonic() + timeout
        plain = self.environment.get("VLLM_PLUGINS") == ""  # has no service
        while True:
            if self.process.poll() is not None or time.monotonic() > deadline:
                code = self.process.poll()
                tail = self.tail()
                self.stop()
                raise RuntimeError(f"the server did not start (exit code {code}):\n{tail}")
            with contextlib.suppress(httpx.HTTPError):
                answer = self.client.get("/health" if plain else f"{POW}/status", timeout=5)
                if answer.is_success if plain else answer.json().get("ready"):
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

    def begin(
        self, block, *, key="node", seq_len=64, batch_size=8, r_target=2.0, url=None, **other
    ):
        """Begin to generate a round."""
        body = {"block_hash": block, "block_height": 1, "public_key": key, "seq_len": seq_len}
        body |= {
            "batch_size": batch_size,
            "r_target": r_target,
            "node_id": 0,
            "node_count": 1,
            "callback_url": url,
        }
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
            rows = sum(
                worker["rows"] + worker["filled"] + worker["streams"]
                for worker in status["workers"]
            )
            if not (rows or status["nonces"] or status["chat"]) or time.monotonic() > deadline:
                return status
            time.sleep(0.1)


def distribution(folder, name, entry_points):
    """Write the description of an installed package with entry points, by group and name; return
    its folder.
    """
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
    """Send one chat, completion or streaming request; return its text, status and seconds to the
    first token.
    """
    kind = ("chat", "completion", "stream-chat", "stream-completion")[index % 4]
    prompt = prompt or BEGINNINGS[index // 4 % len(BEGINNINGS)].format(index)
    body = {
        "model": MODEL,
        "max_tokens": tokens,
        "temperature": 0.0,
        "stream": kind.startswith("stream"),
    }
    if kind.endswith("chat"):
        path = "/v1/chat/completions"
        body = body | {"messages": [{"role": "user", "content": prompt}]}
    else:
        path = "/v1/completions"
        body = body | {"prompt": prompt}
    started = time.perf_counter()
    if not body["stream"]:
        response = await client.post(path, json=body)
        return {
            "kind": kind,
            "status": response.status_code,
            "text": _text(response.json()),
            "first": None,
        }
    first = None
    text = []
    async with client.stream("POST", path, json=body) as response:
        async for line in lines_of(response):
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            first = first or time.perf_counter() - started
            text.append(_text(json.loads(line[6:])))
    return {"kind": kind, "status": response.status_code, "text": "".join(text), "first": first}


async def lines_of(response):
    """Yield the lines of a stream, which end at line feeds; httpx ends them at separators that a
    text may have, too.
    """
    tail = b""
    async for part in response.aiter_bytes():
        *complete, tail = (tail + part).split(b"\n")
        for line in complete:
            yield line.decode()


def _text(body):
    if "choices" not in body:
        return json.dumps(body)
    choice = (body["choices"] or [{}])[0]
    message = choice.get("message") or choice.get("delta") or choice
    return message.get("content") or message.get("text") or ""


async def answer(engine, ids, tokens, **options):
    """Let a vLLM engine of this process answer a prompt; return its tokens and the seconds to the
    first.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    kind = RequestOutputKind.DELTA
    sampling = SamplingParams(
        max_tokens=tokens, temperature=0.0, detokenize=False, ignore_eos=True, output_kind=kind
    )
    prompt = {"type": "token", "prompt_token_ids": ids}
    started = time.perf_counter()
    first = None
    pieces = []
    async for output in engine.client.llm.generate(prompt, sampling, uuid4().hex, **options):
        first = first or time.perf_counter() - started
        pieces += output.outputs[0].token_ids
    return pieces, first


# Servers forked from one process that has imported vLLM.


class ForkedServer(Server):
    """A server with the plugin that starts faster than the first one. ``kill`` and ``stop`` are
    those of any other.

    ``serves`` starts it as ``vllm serve`` does.
    """

    def __init__(self, data_dir, *, serves=False, **options):
        super().__init__(data_dir, **options)
        self._serves = serves

    def run(self, command, environment):
        """Fork a server; the first one of an interpreter and a choice waits until vLLM is
        imported.
        """
        argv = [COMMAND_LINE, "serve", *command[3:]] if self._serves else command[2:]
        if torch.cuda.is_available():
            return super().run([self.python, "-m", *argv], environment)
        kind = self.python, *(environment.get(name, "") for name in CHOOSING)
        if kind not in _parents:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            with self.log.open("ab") as log:
                _parents[kind] = subprocess.Popen(
                    [self.python, __file__], env=environment, stderr=log, **pipes
                )
        parent = _parents[kind]
        code = self.data_dir / "exit-code"
        code.unlink(missing_ok=True)
        order = {"argv": argv, "log": str(self.log), "cwd": str(self.data_dir), "code": str(code)}
        print(json.dumps(order | {"environment": environment}), file=parent.stdin, flush=True)
        return _Process(int(parent.stdout.readline()), code)


_parents: dict[tuple[str, ...], subprocess.Popen] = {}
"""The process that forks the servers of an interpreter and a choice. It ends with this one, which
closes its input.
"""


@atexit.register
def _end_parents():
    for parent in _parents.values():
        parent.stdin.close()
        parent.wait()
        parent.stdout.close()


class _Process(psutil.Process):
    """The part of ``subprocess.Popen`` that a server needs, of a process that is not a child.

    Its exit code is in a file; without one it was killed.
    """

    def __init__(self, pid, code):
        super().__init__(pid)
        self._code = code

    def poll(self):
        return None if self.is_running() else self._ended()

    def _ended(self):
        return int(self._code.read_text()) if self._code.exists() else -signal.SIGKILL

    def wait(self, timeout=None):
        try:
            super().wait(timeout)
            return self._ended()
        except psutil.TimeoutExpired:
            raise subprocess.TimeoutExpired(MODULE, timeout) from None


def prepare():
    """Import vLLM, and have every process that this one and its children start be a fork that has
    it already.
    """
    from vllm.utils import network_utils, system_utils

    # On a CPU vLLM has every process import everything anew.
    forked = multiprocessing.get_context("fork")
    system_utils.get_mp_context = lambda: forked
    multiprocessing.get_context = lambda method=None: forked
    # A forked engine holds the server's port, too. A server that ends reads the command line of
    # every process that does, to warn of it, which raises if that process ends at the same moment.
    network_utils.find_process_using_port = lambda port: None
    for name in IMPORTED:
        importlib.import_module(name)
    _hide_wrapped_library()


def fork_servers():
    """Import vLLM, then fork a server for every line of the input."""
    prepare()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system reaps what ends
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child:
            print(child, flush=True)
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        os.chdir(order["cwd"])
        os.environ.clear()
        os.environ.update(order["environment"])
        sys.argv = order["argv"]
        code = serve()
        Path(order["code"]).write_text(str(code))
        os._exit(code)


def _hide_wrapped_library():
    """Let numba be imported before a worker starts: on a CPU vLLM reads the ``__dict__`` of
    everything that is there.

    That of numba's library would be a function of the library.
    """
    library = importlib.import_module("llvmlite.binding.ffi")._lib_wrapper
    functions = library.__getattr__

    def function(self, name):
        if name == "__dict__":
            raise AttributeError(name)
        return functions(self, name)

    library.__getattr__ = function


def _name_package():
    """Let the command line find its version: it asks for one of ``vllm``, and the CPU build has
    another name.
    """
    known = importlib.metadata.version

    def version(name):
        try:
            return known(name)
        except importlib.metadata.PackageNotFoundError:
            return known({"vllm": "vllm-cpu"}.get(name, name))

    importlib.metadata.version = version


def serve():
    """Run the server in this process; return its exit code, as the interpreter would."""
    if sys.argv[0] == COMMAND_LINE:
        _name_package()
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except KeyboardInterrupt:
        return 130
    except SystemExit as end:
        if isinstance(end.code, int | None):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    return 0


# Requests of mixed parameters, as clients send them, and the receipts of what is answered.


def mixed(count, tokenizer, *, seed=0, tokens=(1, 80), drafts=False):
    """Return requests of mixed prompts and parameters, the first of them with one parameter of each
    kind.

    ``drafts`` leaves out what vLLM refuses beside them.
    """
    chosen = random.Random(seed)
    kinds = [
        {},
        {"temperature": 0.0},
        {"temperature": 0.0, "repetition_penalty": 1.3, "logit_bias": {10: 2.0, 65: -3.0}},
        {"temperature": 0.5, "top_k": 5},
        {"top_p": 0.8},
        {"temperature": 1.3, "min_p": 0.05},
        {"frequency_penalty": 0.5, "presence_penalty": 0.3},
        {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 1.1},
    ]
    if drafts:
        kinds = [kind for kind in kinds if not {"min_p", "logit_bias"} & set(kind)]
    requests = []
    for number in range(count):
        sampling = (
            kinds[number]
            if number < len(kinds)
            else chosen.choice(kinds) | {"temperature": chosen.random() + 0.1}
        )
        text = chosen.choice(BEGINNINGS).format(number) * chosen.choice((1, 1, 4))
        requests.append(
            Request(
                prompt=tuple(tokenizer.encode(text)),
                request_id=f"mixed-{seed}-{number}",
                user_seed=str(number) if number % 3 else "",
                sampling=Sampling(**sampling),
                max_tokens=chosen.randint(*tokens),
            )
        )
    return requests


def body_of(request, **other):
    """Return the body of a completion, as any client of vLLM would send it."""
    sampling = request.sampling.as_dict()
    seed = {"seed": int(request.user_seed)} if request.user_seed else {}
    fixed = {"model": MODEL, "prompt": list(request.prompt), "max_tokens": request.max_tokens}
    return fixed | sampling | seed | other


async def send(client, request, gate, **other):
    """Send one request; return its status, text, finish reason and the times at which its pieces
    came.
    """
    async with gate:
        headers = {"X-Request-Id": request.request_id}
        body = body_of(request, **other)
        if not body.get("stream"):
            answer = await client.post("/v1/completions", json=body, headers=headers)
            choice = (
                answer.json()["choices"][0] if answer.status_code == 200 else {"text": answer.text}
            )
            return {"status": answer.status_code, "text": choice["text"], "times": []}
        times = [time.perf_counter()]
        text = []
        async with client.stream("POST", "/v1/completions", json=body, headers=headers) as answer:
            async for line in lines_of(answer):
                if line.startswith("data: {"):
                    times.append(time.perf_counter())
                    piece = json.loads(line[6:])
                    if "choices" not in piece:
                        return {"status": 500, "text": line, "times": times}
                    text.append(piece["choices"][0]["text"])
        return {"status": answer.status_code, "text": "".join(text), "times": times}


async def send_all(url, requests, *, at_once=8, **other):
    """Send requests, some at a time; ``stream`` alternates where it is not given."""
    async with httpx.AsyncClient(base_url=url, timeout=600.0) as client:
        gate = asyncio.Semaphore(at_once)
        extras = [
            other if "stream" in other else other | {"stream": bool(i % 2)}
            for i in range(len(requests))
        ]
        return await asyncio.gather(
            *(
                send(client, request, gate, **more)
                for request, more in zip(requests, extras, strict=True)
            )
        )


def receipts_of(server, request_id):
    """Return the receipts of a request, by index."""
    answer = server.client.get(f"/api/v1/receipts/{request_id}")
    answer.raise_for_status()
    lines = [(dumps(entry["receipt"]) + "\n").encode() for entry in answer.json()["receipts"]]
    return sorted((parse_receipt(line) for line in lines), key=lambda receipt: receipt.index)


def begin(server, block=BLOCK):
    """Post a block, from which on answers are seeded."""
    server.post("/responses/block", {"block_hash": block}).raise_for_status()


def agreement(server, model, requests, wanted=None):
    """Return how many receipts of a server have the tokens and the sketches that transformers
    give.
    """
    wanted = wanted or respond(model, requests, block_hash=BLOCK, public_key=NODE)
    answers = asyncio.run(send_all(server.url, requests))
    odd = [reply for reply in answers if reply["status"] != 200]
    assert not odd, odd
    found = [receipts_of(server, request.request_id)[0] for request in requests]
    same = [
        ours.output == theirs.output for ours, theirs in zip(found, wanted.receipts, strict=True)
    ]
    distances = [
        float(abs(ours.sketches.astype(float) - theirs.sketches.astype(float)).max())
        for ours, theirs, equal in zip(found, wanted.receipts, same, strict=True)
        if equal
    ]
    replays = replay(Receipts.build(wanted.header, found, 0.0), model, requests=requests)
    return {
        "requests": len(requests),
        "same_tokens": sum(same),
        "tokens": sum(len(receipt.output) for receipt in found),
        "match_on_replay": sum(reply.matches for reply in replays)
        / sum(len(reply.margins) for reply in replays),
        "largest_difference_of_sketches": max(distances, default=0.0),
        "different": [
            request.request_id for request, equal in zip(requests, same, strict=True) if not equal
        ][:5],
    }


if __name__ == "__main__":
    fork_servers()
