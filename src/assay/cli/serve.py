"""``assay poc serve``, ``receive`` and ``callbacks``: the service, a receiver, and its dead letters."""

from typing import TYPE_CHECKING, Annotated

import typer

from assay.cli.commands import App
from assay.cli.engines import check_loadable, compiles, load
from assay.cli.output import JsonFlag, emit_json, table
from assay.cli.settings import settings
from assay.errors import UsageError

if TYPE_CHECKING:
    from assay.cli.service_settings import ListSettings, ReceiveSettings, ReplaySettings, ServeSettings
    from assay.poc.service.deployment import Deployment


FLAGS = (
    "model", "host", "port", "dtype", "device", "kernels", "log_format",
    "data_dir", "api_keys", "api_key_file", "validate_keys", "read_keys", "seq_len", "calibration", "pins",
    "callback_secrets", "callback_interval", "callback_backoff", "callback_backoff_max", "callback_attempts",
    "callback_timeout", "allow_private_callbacks", "max_pending", "max_positions", "drain", "ledger",
)  # fmt: skip
"""The settings of ``serve`` that have a flag; the others are for the environment alone."""
RECEIVE_FLAGS = ("host", "port", "output", "log_format", "callback_secrets", "api_keys", "api_key_file", "read_keys")


@settings("assay.cli.service_settings:ServeSettings", only=FLAGS)
def serve(chosen: "ServeSettings") -> None:
    """Serve the published API until SIGTERM. A restart continues where the service was stopped.

    Settings that have no flag can be set in the environment; docs/configuration.md lists them.
    """
    from assay.models.load import model_info
    from assay.poc import service
    from assay.poc.engines.hf.memory import check_shape
    from assay.poc.protocol.round import Round
    from assay.poc.service.deployment import Deployment
    from assay.poc.verdict.ledger import check_ledger

    # Before there is a database. A round has a length of its own, so only one that was chosen here must fit.
    info = model_info(chosen.model)
    if chosen.service.seq_len != Round.seq_len:
        check_shape(info, batch_size=1, seq_len=chosen.service.seq_len)
    check_loadable(chosen.model, chosen.dtype, chosen.device)
    if chosen.service.ledger is not None:
        check_ledger(chosen.service.ledger, alpha=chosen.service.alpha, beta=chosen.service.beta)
    service.configure_logs(chosen.log_format)

    def deploy() -> "Deployment":
        loaded = load(chosen.model, chosen.dtype, chosen.device)
        return Deployment.of(loaded, compiled=compiles(loaded, chosen.kernels))

    service.serve(deploy, chosen.service, host=chosen.host, port=chosen.port)


@settings("assay.cli.service_settings:ReceiveSettings", only=RECEIVE_FLAGS)
def receive(chosen: "ReceiveSettings") -> None:
    """Receive callbacks until SIGTERM: check signatures, and keep each callback once."""
    from assay.poc.service import configure_logs, receiver

    configure_logs(chosen.log_format)
    receiver.receive(chosen.service, chosen.output, host=chosen.host, port=chosen.port)


callbacks = App(help="Look at undelivered callbacks, and send dead ones again.")


@callbacks.command("list", epilog="Example: assay poc callbacks list --all")
@settings("assay.cli.service_settings:ListSettings")
def list_callbacks(chosen: "ListSettings", as_json: JsonFlag = False) -> None:
    """List pending and dead callbacks."""
    from assay.poc.service.outbox import open_outbox

    statuses = ["open", "pending", "dead"] + (["delivered"] if chosen.every else [])
    with open_outbox(chosen.data_dir) as outbox:
        rows, counts = outbox.rows(statuses, chosen.limit), outbox.counts()
    if as_json:
        emit_json("assay.poc.callbacks/1", {**counts, "callbacks": [vars(row) for row in rows]})
        return
    columns = ("id", "kind", "status", "attempts", "nonces", "last_error")
    table(columns, [[getattr(row, name) for name in columns] for row in rows])


@callbacks.command("replay", epilog="Example: assay poc callbacks replay msg_1a2b")
@settings("assay.cli.service_settings:ReplaySettings")
def replay(
    chosen: "ReplaySettings",
    ids: Annotated[list[str] | None, typer.Argument(help="Ids of dead callbacks; all of them when left out.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Make dead callbacks pending again. A running service delivers them, and so does the next start."""
    from assay.poc.service.outbox import open_outbox

    with open_outbox(chosen.data_dir) as outbox:
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
