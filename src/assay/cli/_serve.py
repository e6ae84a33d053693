"""``assay poc serve``, ``receive`` and ``callbacks``: the service, a receiver, and its dead letters."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from assay.cli._commands import App
from assay.cli._engines import check_kernels, compiles
from assay.cli._output import JsonFlag, emit_json, table
from assay.cli._settings import settings
from assay.errors import UsageError

if TYPE_CHECKING:
    from assay.poc.service import Deployment, Settings


DataDir = Annotated[Path, typer.Option(help="Directory of the service's database.", envvar="ASSAY_DATA_DIR")]
LogFormat = Annotated[str, typer.Option(help="Form of the log: console or json.", envvar="ASSAY_LOG_FORMAT")]
_HOST = "Address to listen on. Addresses that other machines reach need a key."
_PORT = "Port to listen on. 0 takes a free one."
FLAGS = (
    "data_dir", "api_keys", "api_key_file", "validate_keys", "read_keys", "seq_len", "calibration",
    "callback_secrets", "callback_interval", "callback_backoff", "callback_backoff_max", "callback_attempts",
    "callback_timeout", "allow_private_callbacks", "max_pending", "max_positions", "drain",
)  # fmt: skip
"""The settings of the service that have a flag; the others are for the environment alone."""


@settings("assay.poc.service:Settings", only=FLAGS)
def serve(
    settings: "Settings",
    model: Annotated[str, typer.Option(help="Model: a directory, a hub id, or reference:…", envvar="ASSAY_MODEL")],
    host: Annotated[str, typer.Option(help=_HOST, envvar="ASSAY_HOST")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help=_PORT, envvar="ASSAY_PORT")] = 8000,
    dtype: Annotated[
        str | None, typer.Option(help="Dtype of the weights: float32, float16 or bfloat16.", envvar="ASSAY_DTYPE")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Device: cpu or cuda.", envvar="ASSAY_DEVICE")] = None,
    kernels: Annotated[str, typer.Option(help="Kernels: compiled, eager, or auto (compiled on CUDA).")] = "auto",
    log_format: LogFormat = "console",
) -> None:
    """Serve the published API until SIGTERM. A restart continues where the service was stopped.

    Settings that have no flag can be set in the environment; docs/configuration.md lists them.
    """
    from assay.poc import service

    service.configure_logs(_log_format(log_format))
    check_kernels(kernels)

    def load() -> "Deployment":
        from assay.models import load_model

        loaded = load_model(model, dtype=dtype, device=device)
        return service.Deployment.of(loaded, compiled=compiles(loaded, kernels))

    service.serve(load, settings, host=host, port=port)


@settings("assay.poc.service:Settings", only=("callback_secrets", "api_keys", "api_key_file", "read_keys"))
def receive(
    settings: "Settings",
    host: Annotated[str, typer.Option(help=_HOST)] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help=_PORT)] = 8081,
    output: Annotated[Path, typer.Option("-o", "--output", help="SQLite file that keeps the callbacks.")] = Path(
        "received.sqlite3"
    ),
    log_format: LogFormat = "console",
) -> None:
    """Receive callbacks until SIGTERM: check signatures, and keep each callback once."""
    from assay.poc import service

    service.configure_logs(_log_format(log_format))
    service.receive(settings, output, host=host, port=port)


callbacks = App(help="Look at undelivered callbacks, and send dead ones again.")


@callbacks.command("list", epilog="Example: assay poc callbacks list --all")
def list_callbacks(
    data_dir: DataDir = Path("assay-data"),
    every: Annotated[bool, typer.Option("--all", help="Delivered ones too.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="At most so many, the newest first.")] = 100,
    as_json: JsonFlag = False,
) -> None:
    """List pending and dead callbacks."""
    statuses = ["open", "pending", "dead"] + (["delivered"] if every else [])
    from assay.poc.service import open_outbox

    with open_outbox(data_dir) as outbox:
        rows, counts = outbox.rows(statuses, limit), outbox.counts()
    if as_json:
        emit_json("assay.poc.callbacks/1", {**counts, "callbacks": rows})
        return
    columns = ("id", "kind", "status", "attempts", "nonces", "last_error")
    table(columns, [[row[name] if row[name] is not None else "" for name in columns] for row in rows])


@callbacks.command("replay", epilog="Example: assay poc callbacks replay msg_1a2b")
def replay(
    ids: Annotated[list[str] | None, typer.Argument(help="Ids of dead callbacks; all of them when left out.")] = None,
    data_dir: DataDir = Path("assay-data"),
    as_json: JsonFlag = False,
) -> None:
    """Make dead callbacks pending again. A running service delivers them, and so does the next start."""
    from assay.poc.service import open_outbox

    with open_outbox(data_dir) as outbox:
        count = outbox.replay(ids or None)
    if ids and count < len(ids):
        raise UsageError(
            f"{count} of {len(ids)} callbacks were dead",
            wanted="ids of dead callbacks",
            do="`assay poc callbacks list` shows them",
        )
    if as_json:
        emit_json("assay.poc.callbacks.replay/1", {"replayed": count})
    else:
        typer.echo(f"{count} callbacks are pending again")


def _log_format(value: str) -> Literal["console", "json"]:
    if value not in ("console", "json"):
        raise UsageError(f"--log-format {value}", wanted="console or json", do="leave it out for console")
    return "json" if value == "json" else "console"
