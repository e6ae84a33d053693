"""The entry point that vLLM calls in each of its processes, in the first one while it builds its command line.

That is ``AsyncEngineArgs.add_cli_args``. Nothing of the service is imported before it is known that this process is a
server: vLLM logs an entry point that cannot be imported and goes on, and would answer chat and prove nothing.
"""

import multiprocessing
import os
import sys
from pathlib import Path

from assay.errors import AssayError, UsageError
from assay.poc.vllm.compatibility import EXTENSION

MODULES = ("api_server.py", "entry.py")
"""Files that ``python -m`` runs as a server: the second one since 0.32, where the first is deprecated."""


def before_start() -> None:
    """Refuse a server that could not prove, in the first seconds, and set what float32 and responses need.

    It reads the command line and a ``--config`` file with vLLM's own parser, and the settings of the model with vLLM's
    own configuration. Only the first process of a server with the plugin, or with its worker extension, is checked; all
    others are left alone.

    Raises:
        SystemExit: Exit code 1 with the refusal, or whatever vLLM's parser raises for arguments that it refuses itself.
    """
    if multiprocessing.parent_process() is not None:
        return
    if not (sys.argv[1:2] == ["serve"] or Path(sys.argv[0]).name in MODULES):
        return
    chosen = "assay" in os.environ.get("VLLM_PLUGINS", "").split(",")
    try:
        if chosen:
            from assay.poc.vllm.preflight import check_server

            check_server()
        elif any(EXTENSION in word for word in sys.argv):
            raise UsageError(
                "vLLM with the worker extension of assay and without VLLM_PLUGINS=assay",
                wanted="the plugin too: without it the server has no /api/v1/pow and proves nothing",
                do="set VLLM_PLUGINS=assay, with the names of the other plugins that you need",
            )
    except AssayError as error:
        raise SystemExit(f"assay refuses to start: {error}") from None
