"""A server that is started by the command of docs/vllm.md for machines without a GPU, as an
operator would copy it.

MODEL stands for a checkpoint there. Host and port are added behind the command, for tests listen on
loopback only.
"""

import os
import re
import shlex
from pathlib import Path
from typing import Any

from _vllm import KEY, MODEL, REFERENCE, ForkedServer, Server

from tests.vllm.conftest import ROOT

SECTION = (
    (ROOT / "docs/vllm.md").read_text().partition("## Three commands\n")[2].partition("\n## ")[0]
)
_, ON_GPU, BEGIN, INSTALL, SERVE = re.findall(
    r"^```sh\n(.*?)^```$", SECTION, flags=re.MULTILINE | re.DOTALL
)
SET_THERE = ("ASSAY_API_KEY", "VLLM_PLUGINS", "VLLM_CPU_KVCACHE_SPACE")


class RecipeServer(ForkedServer):
    """A server whose folder has what the command names: a checkpoint with a chat template, and the
    file of the key.
    """

    def __init__(self, data_dir: Path, environment: dict[str, str]) -> None:
        super().__init__(data_dir, environment=environment)
        for name in SET_THERE:
            del self.environment[name]
        checkpoint = self.data_dir / MODEL
        checkpoint.mkdir()
        for path in REFERENCE.iterdir():
            (checkpoint / path.name).symlink_to(path)
        (checkpoint / "chat_template.jinja").write_text(
            "{% for message in messages %}{{ message.content }}{% endfor %}"
        )
        (self.data_dir / "key").write_text(KEY)

    def launch(self) -> None:
        """Start the process, and return before it answers."""
        self.choose_port()
        command = SERVE.strip().replace("MODEL", MODEL) + f" --host 127.0.0.1 --port {self.port}"
        inherited = {name: value for name, value in os.environ.items() if name not in SET_THERE}
        environment = self.with_commands(inherited | self.environment)
        if not self.log.exists():
            self.process: Any = Server.run(self, ["bash", "-c", command], environment)
            return
        words = shlex.split(command.replace("\\\n", " "))
        start = words.index("python")
        given = dict(word.split("=", 1) for word in words[:start])
        self.process = self.run(words[start:], environment | given)

    def begin_round(self, url: str) -> list[str]:
        """Return the words of the command that begins a round, with a receiver of callbacks."""
        command = (
            BEGIN.strip()
            .replace("localhost:8000", f"127.0.0.1:{self.port}")
            .replace("https://…", url)
        )
        return ["bash", "-c", command]

    def with_commands(self, environment: dict[str, str]) -> dict[str, str]:
        """Return an environment in which the commands of the tested installation are found
        first.
        """
        folder = str(Path(self.python).parent)
        data = {
            "ASSAY_DATA_DIR": str(self.data_dir),
            "PATH": f"{folder}{os.pathsep}{environment['PATH']}",
        }
        return environment | data
