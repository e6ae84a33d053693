"""Settings of ``assay poc ledger``."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from assay.cli.flags import OUTPUT
from assay.settings import Settings


class ShowSettings(Settings):
    """Settings of ``assay poc ledger show``."""

    public_key: str | None = Field(
        None, description="Key of one node, whose audits are listed too; all nodes if left out."
    )
    limit: int = Field(100, ge=1, description="Largest number of accounts, and of audits of each, the newest of these.")


class AuditSettings(Settings):
    """Settings of ``assay poc ledger audit``."""

    head: str | None = Field(None, description="Hash of the head that was published; entries up to it must be there.")


class MergeSettings(Settings):
    """Settings of ``assay poc ledger merge``."""

    public_key: str | None = Field(None, description="Key of the node to decide on; all nodes if left out.")
    alpha: float | None = Field(
        None, description="Bound on the chance that this decision accuses an honest node; else that of the ledgers."
    )
    beta: float | None = Field(
        None, description="Bound on the chance that this decision calls a cheater honest; else that of the ledgers."
    )


class ExportSettings(Settings):
    """Settings of ``assay poc ledger export``."""

    output: Annotated[Path, OUTPUT] = Field(description="JSON Lines file to write.")
    overwrite: bool = Field(False, description="Replace an existing file.")
