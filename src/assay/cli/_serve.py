"""``assay poc serve``, ``receive`` and ``callbacks``: the service, a receiver, and its dead letters."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from assay.cli._commands import App
from assay.cli._engines import check_kernels, compiles
from assay.cli._flags import DeviceFlag, DtypeFlag, ModelFlag
from assay.cli._output import JsonFlag, emit_json, table
from assay.errors import UsageError

if TYPE_CHECKING:
    from assay.poc.service.runtime import Deployment

__all__ = ["callbacks", "receive", "serve"]

DataDir = Annotated[Path, typer.Option(help="Holds the database of the service.", envvar="ASSAY_DATA_DIR")]
LogFormat = Annotated[str, typer.Option(help="console or json.", envvar="ASSAY_LOG_FORMAT")]
HostFlag = Annotated[str, typer.Option(help="Address to listen on; others than this machine need a key.")]


def serve(
    model: ModelFlag,
    host: HostFlag = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.")] = 8000,
    data_dir: DataDir = Path("assay-data"),
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            help="Key that may do everything; the environment or a file hides it better.", envvar="ASSAY_API_KEY"
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File with such keys, one per line.", envvar="ASSAY_API_KEY_FILE")
    ] = None,
    validate_key: Annotated[
        list[str] | None, typer.Option(help="Key that may validate and read.", envvar="ASSAY_VALIDATE_KEY")
    ] = None,
    read_key: Annotated[list[str] | None, typer.Option(help="Key that may read.", envvar="ASSAY_READ_KEY")] = None,
    dtype: DtypeFlag = None,
    device: DeviceFlag = None,
    kernels: Annotated[str, typer.Option(help="compiled, eager, or auto: compiled on CUDA.")] = "auto",
    seq_len: Annotated[int, typer.Option(help="Positions per nonce of artifact rounds and jobs.")] = 256,
    calibration: Annotated[Path | None, typer.Option(help="Measured honest noise, for verdicts.")] = None,
    callback_secret: Annotated[
        list[str] | None,
        typer.Option(help="Standard Webhooks secret (whsec_…) that signs callbacks.", envvar="ASSAY_CALLBACK_SECRET"),
    ] = None,
    callback_interval: Annotated[float, typer.Option(help="Seconds over which valid nonces are collected.")] = 5.0,
    callback_backoff: Annotated[float, typer.Option(help="Seconds before the second attempt; doubles.")] = 1.0,
    callback_backoff_max: Annotated[float, typer.Option(help="The longest pause between attempts.")] = 1800.0,
    callback_attempts: Annotated[int, typer.Option(help="Attempts before a callback is a dead letter.")] = 20,
    callback_timeout: Annotated[float, typer.Option(help="Seconds for one delivery.")] = 10.0,
    allow_private_callbacks: Annotated[
        bool, typer.Option("--allow-private-callbacks", help="Let callbacks go into private networks.")
    ] = False,
    max_pending: Annotated[int, typer.Option(help="Generation waits at so many undelivered callbacks.")] = 1000,
    max_positions: Annotated[int, typer.Option(help="Bound on batch_size × seq_len.")] = 2**18,
    drain: Annotated[float, typer.Option(help="Seconds a stopping service waits for the running batch.")] = 30.0,
    log_format: LogFormat = "console",
) -> None:
    """Serve the published API until SIGTERM; a restart continues where it was."""
    from assay import poc
    from assay.poc import service

    service.configure_logs(_log_format(log_format))
    check_kernels(kernels)
    settings = service.Settings(
        data_dir=data_dir,
        seq_len=seq_len,
        api_keys=(*(api_key or ()), *_keys_of(api_key_file)),
        validate_keys=tuple(validate_key or ()),
        read_keys=tuple(read_key or ()),
        callback_secrets=tuple(callback_secret or ()),
        callback_interval=callback_interval,
        callback_backoff=callback_backoff,
        callback_backoff_max=callback_backoff_max,
        callback_attempts=callback_attempts,
        callback_timeout=callback_timeout,
        allow_private_callbacks=allow_private_callbacks,
        max_pending=max_pending,
        max_positions=max_positions,
        drain=drain,
        calibration=poc.Calibration.load(calibration) if calibration else None,
    )

    def load() -> "Deployment":
        from assay.models import load_model

        loaded = load_model(model, dtype=dtype, device=device)
        return service.Deployment.of(loaded, compiled=compiles(loaded, kernels))

    service.serve(service.Controller(load, settings), host=host, port=port)


def receive(
    host: HostFlag = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.")] = 8081,
    output: Annotated[Path, typer.Option("-o", "--output", help="SQLite file that keeps what arrives.")] = Path(
        "received.sqlite3"
    ),
    callback_secret: Annotated[
        list[str] | None,
        typer.Option(help="Secret (whsec_…) that must have signed callbacks.", envvar="ASSAY_CALLBACK_SECRET"),
    ] = None,
    log_format: LogFormat = "console",
) -> None:
    """Receive callbacks until SIGTERM: check signatures, keep each callback once."""
    from assay.poc import service

    service.configure_logs(_log_format(log_format))
    secrets = tuple(callback_secret or ())
    service.check_secrets(secrets)
    if not (secrets or service.is_loopback(host)):
        raise UsageError(
            f"--host {host} without a secret",
            wanted="a secret where others reach the port",
            do="pass --callback-secret, the same as to the service",
        )
    service.run_app(service.create_receiver(service.Received(output), secrets), host=host, port=port)


callbacks = App(help="Look at undelivered callbacks, and send dead ones again.")


@callbacks.command("list")
def list_callbacks(
    data_dir: DataDir = Path("assay-data"),
    every: Annotated[bool, typer.Option("--all", help="Delivered ones too.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="At most so many, the newest first.")] = 100,
    as_json: JsonFlag = False,
) -> None:
    """List pending and dead callbacks."""
    statuses = ["open", "pending", "dead"] + (["delivered"] if every else [])
    from assay.poc.service.store import open_outbox

    with open_outbox(data_dir) as outbox:
        rows, counts = outbox.rows(statuses, limit), outbox.counts()
    if as_json:
        emit_json("assay.poc.callbacks/1", {**counts, "callbacks": rows})
        return
    columns = ("id", "kind", "status", "attempts", "nonces", "last_error")
    table(columns, [[row[name] if row[name] is not None else "" for name in columns] for row in rows])


@callbacks.command("replay")
def replay(
    ids: Annotated[list[str] | None, typer.Argument(help="Ids of dead callbacks; all of them when left out.")] = None,
    data_dir: DataDir = Path("assay-data"),
    as_json: JsonFlag = False,
) -> None:
    """Make dead callbacks pending again. A running service delivers them, and so does the next start."""
    from assay.poc.service.store import open_outbox

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


def _keys_of(path: Path | None) -> list[str]:
    if path is None:
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--api-key-file {path}: {error}", wanted="a text file", do="one key per line") from None
    return [line.strip() for line in lines if line.strip()]


def _log_format(value: str) -> Literal["console", "json"]:
    if value not in ("console", "json"):
        raise UsageError(f"--log-format {value}", wanted="console or json", do="leave it out for console")
    return "json" if value == "json" else "console"
