"""``assay poc serve``, ``receive``, ``callbacks`` and ``validator``: the servers."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

import assay
from assay.cli.flags import ARGUMENT, FOLDER, KernelName, Limit, ModelSettings
from assay.cli.poc import poc
from assay.errors import UsageError
from assay.files.storage import check_folder
from assay.framework.output import show_tables, show_text
from assay.settings import Flag, Settings

if TYPE_CHECKING:
    from assay.poc.net.deployment import Deployment
    from assay.poc.net.server_settings import ListenerSettings, ServerSettings
    from assay.poc.service.service_settings import ServiceSettings
    from assay.poc.validator.validator_settings import ValidatorSettings


Port = Annotated[
    int, "PORT", Field(ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
]

callbacks = poc.group_of("callbacks", "Undelivered callbacks of a service.", panel="Node")


class ListenSettings(Settings):
    """Where a server listens, and what its log looks like."""

    host: Annotated[str, "ADDRESS"] = Field(
        "127.0.0.1", description="Address to listen on; one that others reach needs a key."
    )
    port: Port = 8100
    log_format: Literal["console", "json"] = Field("console", description="Form of the log.")

    def configure_logs(self) -> None:
        """Let the log have its form."""
        from assay.poc.net.logs import configure_logs

        configure_logs(self.log_format)


class RunSettings(ListenSettings, ModelSettings):
    """Settings of a server: what it runs, and where."""

    kernels: KernelName = "auto"

    def check_address(self, server: "ServerSettings") -> None:
        """Refuse an address that is in use, or that others reach without a key; begin the log."""
        from assay.poc.net.server import check_port
        from assay.poc.net.server_settings import check_host

        check_host(self.host, server)
        check_port(self.host, self.port)
        self.configure_logs()

    def check_loadable(self, *dtypes: str | None) -> None:
        """Refuse what cannot be loaded in some number formats, before weights are read."""
        from assay.poc.launch import check_loadable

        for dtype in dtypes:
            check_loadable(self.model, dtype, self.device)

    def deploy(
        self, pins: "assay.poc.NetworkPins | None", dtype: str | None = None
    ) -> "Deployment":
        """Load the model with the frame that the network agreed on, and return it with its
        kernels.
        """
        from assay.poc.launch import compiles, load
        from assay.poc.net.deployment import Deployment

        loaded = load(self.model, self.dtype or dtype, self.device)
        loaded = loaded.with_frame(None if pins is None else pins.frame(loaded.digest))
        return Deployment.of(loaded, compiled=compiles(loaded, self.kernels))


class ReceiveSettings(ListenSettings):
    """Settings of ``assay poc receive``."""

    port: Port = 8081
    output: Annotated[Path, FOLDER] = Field(
        Path("received.sqlite3"), description="SQLite file that keeps the callbacks."
    )


class DataSettings(Settings):
    """The data of a service."""

    data_dir: Annotated[Path, Flag(variable="ASSAY_DATA_DIR")] = Field(
        Path("assay-data"), description="Directory of the database. One service runs per directory."
    )


class CallbackSettings(DataSettings):
    """Settings of ``assay poc callbacks replay``."""

    ids: Annotated[tuple[str, ...], ARGUMENT] = Field(
        (), description="Ids of dead callbacks; all when left out."
    )


class CallbackListSettings(DataSettings):
    """Settings of ``assay poc callbacks list``."""

    every: Annotated[bool, Flag(("--all",))] = Field(
        False, description="List delivered callbacks too."
    )
    limit: Limit = 100


@poc.add(
    "serve",
    RunSettings,
    "assay.poc.service.service_settings:ServiceSettings",
    panel="Node",
    shown="model data_dir host port api_key_file allow_private_callbacks pins ledger device dtype",
    rare="log_format",
    example="assay poc serve --model reference:qwen3 --api-key-file keys",
)
def serve(chosen: RunSettings, service: "ServiceSettings") -> None:
    """Serve the published API until SIGTERM.

    A restart continues where the service was stopped. Keys and callback secrets come from files or
    from the variables ASSAY_API_KEY and ASSAY_CALLBACK_SECRET.
    """
    from assay.poc.verdict.calibration_file import account_alpha
    from assay.poc.verdict.ledger import check_ledger

    check_folder(service.data_dir)  # first what needs no torch
    if service.ledger is not None:
        check_ledger(
            service.ledger, alpha=account_alpha(service.pins, service.alpha), beta=service.beta
        )
    chosen.check_address(service)
    from assay.poc.engines.hf.shapes import check_shape
    from assay.poc.service.service_api import serve

    # Before there is a database. A round has a length of its own, so only one that was chosen here
    # must fit.
    info = assay.models.model_info(chosen.model)
    if service.seq_len != assay.poc.Round.seq_len:
        check_shape(info, batch_size=1, seq_len=service.seq_len)
    chosen.check_loadable(chosen.dtype)
    serve(lambda: chosen.deploy(service.pins), service, host=chosen.host, port=chosen.port)


@poc.add(
    "receive",
    ReceiveSettings,
    "assay.poc.net.server_settings:ListenerSettings",
    panel="Node",
    instead={"data_dir": "--output"},
    shown="host port output api_key_file log_format",
    example="assay poc receive --port 8081",
)
def receive(chosen: ReceiveSettings, listener: "ListenerSettings") -> None:
    """Receive callbacks: check and keep each once.

    Signatures are checked with the secrets of ASSAY_CALLBACK_SECRET. It runs until SIGTERM.
    """
    from assay.poc.service.receiver import receive

    chosen.configure_logs()
    receive(listener, chosen.output, host=chosen.host, port=chosen.port)


@callbacks.add("list", CallbackListSettings, example="assay poc callbacks list --all")
def list_callbacks(chosen: CallbackListSettings, as_json: bool) -> None:
    """List pending and dead callbacks."""
    from assay.poc.service.outbox import open_outbox

    delivered = ["delivered"] if chosen.every else []
    with open_outbox(chosen.data_dir) as outbox:
        rows = outbox.rows(["open", "pending", "dead", *delivered], chosen.limit)
        values = {**outbox.counts(), "callbacks": [row._asdict() for row in rows]}
    columns = ("id", "kind", "status", "attempts", "nonces", "last_error")
    listed = [[getattr(row, name) for name in columns] for row in rows]
    is_cut = len(rows) == chosen.limit
    title = "the dead ones first; --limit shows more" if is_cut else ""
    show_tables("assay.poc.callbacks/1", values, as_json, (columns, listed, title))


@callbacks.add("replay", CallbackSettings, example="assay poc callbacks replay msg_1a2b")
def replay(chosen: CallbackSettings, as_json: bool) -> None:
    """Make dead callbacks pending again.

    A running service delivers them, and so does the next start.
    """
    from assay.poc.service.outbox import open_outbox

    with open_outbox(chosen.data_dir) as outbox:
        count = outbox.replay(list(chosen.ids) or None)
    if chosen.ids and count < len(chosen.ids):
        raise UsageError(
            f"{count} of {len(chosen.ids)} callbacks were dead",
            wanted="ids of dead callbacks",
            do="`assay poc callbacks list` shows them",
        )
    show_text(
        "assay.poc.callbacks.replay/1",
        {"replayed": count},
        as_json,
        f"{count} callbacks are pending again",
    )


class ValidatorRunSettings(RunSettings):
    """Settings of ``assay poc validator``: what it runs, and where."""

    port: Port = 8090


@poc.add(
    "validator",
    ValidatorRunSettings,
    "assay.poc.net.server_settings:ServerSettings",
    "assay.poc.validator.validator_settings:ValidatorSettings",
    panel="Validator",
    shown="model data_dir pins nodes nonces_per_hour calibration api_key_file host port log_format",
    example="assay poc validator --model reference:qwen3 --pins pins.toml",
)
def validator(
    chosen: ValidatorRunSettings, server: "ServerSettings", settings: "ValidatorSettings"
) -> None:
    """Recompute samples of many nodes until SIGTERM.

    It takes the work of the nodes, recomputes a secret sample of it, and keeps the ledger of their
    lives. A restart continues where the validator was stopped. Messages that it has acknowledged
    are on disk.
    """
    from assay.poc.network_pins import pinned_format
    from assay.poc.validator.registry import Registry
    from assay.poc.verdict.ledger import check_ledger

    check_folder(server.data_dir)  # first what needs no torch
    registry = Registry.load(settings.pins, settings.nodes, server, model=chosen.model)
    chosen.check_address(server)
    from assay.poc.validator.validator_api import validate
    from assay.poc.validator.validator_controller import LEDGER

    registry.check_length(assay.models.model_info(chosen.model))  # before there is a database
    dtype = chosen.dtype or pinned_format(settings.pins, chosen.model)
    chosen.check_loadable(dtype, *settings.controls)
    check_ledger(server.data_dir / LEDGER, alpha=registry.alpha, beta=server.beta)

    def load() -> "Deployment":
        pins = assay.poc.NetworkPins.load(settings.pins)
        controls = (
            chosen.model_copy(update={"dtype": name}).deploy(pins) for name in settings.controls
        )
        return replace(chosen.deploy(pins, dtype), controls=tuple(controls))

    validate(load, settings, server, reference=chosen.model, host=chosen.host, port=chosen.port)
