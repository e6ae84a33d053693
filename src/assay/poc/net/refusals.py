"""The error of the HTTP surface, which holds what an HTTP status and its body are made of."""

from collections.abc import Mapping
from typing import Any

from assay.errors import AssayError, ModelError, OutOfMemory, ResourceError


class Refusal(AssayError):
    """A request that the service does not do, with the HTTP status that says so.

    Args:
        status: HTTP status, 4xx, or 503 while the service cannot work.
        seen: Fault that was found; it becomes ``detail`` of the response body.
        wanted: Description of what would have been right.
        do: Action that the client can take.
        retry_after: Seconds after which the same request may succeed.
        fields: Further members of the response body.
        field: Name of the setting that is at fault, as of every :class:`assay.errors.AssayError`.
    """

    def __init__(
        self,
        status: int,
        seen: str,
        *,
        wanted: str,
        do: str,
        retry_after: int | None = None,
        fields: Mapping[str, Any] | None = None,
        field: str = "",
    ) -> None:
        super().__init__(seen, wanted=wanted, do=do, field=field)
        self.status = status
        self.retry_after = retry_after
        self.fields = dict(fields or {})

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body: ``detail``, which other servers have too, ``wanted`` and ``do``."""
        return {"detail": self.seen, "wanted": self.wanted, "do": self.do, **self.fields}

    @property
    def headers(self) -> dict[str, str]:
        """The header ``Retry-After``, if there is one."""
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}


def refusal_of(error: AssayError) -> Refusal:
    """Return the refusal that stands for an error.

    Its status is 422 for impossible values, among them a batch that does not fit, and 503 for a
    disk or an engine that fails.
    """
    if isinstance(error, Refusal):
        return error
    may_recover = isinstance(error, ResourceError) and not isinstance(error, OutOfMemory)
    status = 503 if may_recover or isinstance(error, ModelError) else 422
    return Refusal(
        status, error.seen, wanted=error.wanted, do=error.do, retry_after=5 if may_recover else None
    )
