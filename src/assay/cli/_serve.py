"""``assay poc serve``, ``receive`` and ``callbacks``: the service, a receiver, and its dead letters."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from assay.cli._commands import App
from assay.cli._engines import check_kernels, compiles
from assay.cli._flags import DeviceFlag, DtypeFlag, ModelFlag
from assay.cli._output import JsonFlag, emit_json, table
from assay.errors import UsageError

if TYPE_CHECKING:
    from assay.poc.service.runtime import Deployment

__all__ = ["callbacks", "receive", "serve"]


def _option(name: str, text: str, *flags: str, **bounds: Any) -> Any:
    """Return an option that the environment may set: ``ASSAY_NAME``, or the longer name that every flag has."""
    variables = [f"ASSAY_{name.upper()}", f"ASSAY_POC_SERVE_{name.upper()}"]
    return typer.Option(*flags, help=text, envvar=variables, **bounds)


DataDir = Annotated[Path, _option("data_dir", "Directory of the service's database.")]
LogFormat = Annotated[str, _option("log_format", "Form of the log: console or json.")]
_HOST = "Address to listen on. Addresses other than this machine's need a key."
_PORT = "Port to listen on. 0 takes a free one."
Keys = list[str] | None

LISTS = {name: f"{name}s" for name in ("api_key", "validate_key", "read_key", "callback_secret")}
"""The settings that a flag sets by being repeated, and that are therefore named in the plural."""


def serve(
    context: typer.Context,
    model: ModelFlag,
    host: Annotated[str, _option("host", _HOST)] = "127.0.0.1",
    port: Annotated[int, _option("port", _PORT, min=0, max=65535)] = 8000,
    data_dir: DataDir = Path("assay-data"),
    api_key: Annotated[Keys, _option("api_key", "Key that may do everything.")] = None,
    api_key_file: Annotated[Path | None, _option("api_key_file", "File with such keys, one per line.")] = None,
    validate_key: Annotated[Keys, _option("validate_key", "Key that may validate, submit jobs and read.")] = None,
    read_key: Annotated[Keys, _option("read_key", "Key that may only read.")] = None,
    dtype: DtypeFlag = None,
    device: DeviceFlag = None,
    kernels: Annotated[str, _option("kernels", "Kernels: compiled, eager, or auto (compiled on CUDA).")] = "auto",
    seq_len: Annotated[int, _option("seq_len", "Positions per nonce of artifact rounds and jobs.")] = 256,
    calibration: Annotated[Path | None, _option("calibration", "Calibration file: the honest noise, measured.")] = None,
    callback_secret: Annotated[
        Keys, _option("callback_secret", "Standard Webhooks secret (whsec_…) that signs callbacks.")
    ] = None,
    callback_interval: Annotated[
        float, _option("callback_interval", "Seconds for which valid nonces are collected into one callback.")
    ] = 5.0,
    callback_backoff: Annotated[
        float, _option("callback_backoff", "Seconds between the first two attempts. The pause doubles each time.")
    ] = 1.0,
    callback_backoff_max: Annotated[
        float, _option("callback_backoff_max", "Longest pause between two attempts, in seconds.")
    ] = 1800.0,
    callback_attempts: Annotated[
        int, _option("callback_attempts", "Attempts after which a callback becomes a dead letter.")
    ] = 20,
    callback_timeout: Annotated[float, _option("callback_timeout", "Seconds that one delivery may take.")] = 10.0,
    allow_private_callbacks: Annotated[
        bool,
        _option(
            "allow_private_callbacks",
            "Let callback URLs point into private networks and to this machine.",
            "--allow-private-callbacks",
        ),
    ] = False,
    max_pending: Annotated[
        int, _option("max_pending", "Undelivered callbacks of a round at which generation waits.")
    ] = 1000,
    max_positions: Annotated[int, _option("max_positions", "Largest product of batch_size and seq_len.")] = 2**18,
    drain: Annotated[float, _option("drain", "Seconds that a stopping service waits for the running batch.")] = 30.0,
    log_format: LogFormat = "console",
) -> None:
    """Serve the published API until SIGTERM. A restart continues where the service was stopped.

    Every setting of the service, those without a flag included, can be set in the environment: docs/configuration.md.
    """
    from assay.poc import service

    service.configure_logs(_log_format(log_format))
    check_kernels(kernels)
    # The environment is left to the settings, which know more names than there are flags.
    given = {name for name in context.params if _source(context, name) in ("COMMANDLINE", "DEFAULT_MAP")}
    values = {LISTS.get(name, name): context.params[name] for name in given}
    settings = service.Settings(**{name: values[name] for name in values.keys() & service.Settings.model_fields.keys()})

    def load() -> "Deployment":
        from assay.models import load_model

        loaded = load_model(model, dtype=dtype, device=device)
        return service.Deployment.of(loaded, compiled=compiles(loaded, kernels))

    service.serve(service.Controller(load, settings), host=host, port=port)


def _source(context: typer.Context, name: str) -> str:
    """Return where the value of a parameter comes from, in the words of click's ``ParameterSource``."""
    found = context.get_parameter_source(name)
    return found.name if found is not None else ""


def receive(
    host: Annotated[str, typer.Option(help=_HOST)] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help=_PORT)] = 8081,
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


def _log_format(value: str) -> Literal["console", "json"]:
    if value not in ("console", "json"):
        raise UsageError(f"--log-format {value}", wanted="console or json", do="leave it out for console")
    return "json" if value == "json" else "console"
