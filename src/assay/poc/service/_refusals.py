"""The one error of the HTTP surface: what an HTTP status and its body are made of."""

from collections.abc import Mapping
from typing import Any

from assay.errors import AssayError, ModelError, OutOfMemory, ResourceError

__all__ = ["Refusal", "refusal_of"]


class Refusal(AssayError):
    """A request that is not done, with the HTTP status that says so.

    Args:
        status: HTTP status, 4xx, or 503 where the service cannot work yet.
        seen: as in every error of assay; likewise ``wanted`` and ``do``.
        retry_after: seconds after which the same request may succeed.
        fields: further members of the response body.
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
    ) -> None:
        super().__init__(seen, wanted=wanted, do=do)
        self.status = status
        self.retry_after = retry_after
        self.fields = dict(fields or {})

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body: ``detail`` as other servers have it, then our three parts."""
        return {"detail": self.seen, "wanted": self.wanted, "do": self.do, **self.fields}

    @property
    def headers(self) -> dict[str, str]:
        """``Retry-After`` where there is one."""
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}


def refusal_of(error: AssayError) -> Refusal:
    """Return the refusal that stands for any error of assay.

    422 for values that cannot be, among them a batch that does not fit; 503 for a disk or an engine that fails.
    """
    if isinstance(error, Refusal):
        return error
    if isinstance(error, ResourceError) and not isinstance(error, OutOfMemory):
        return Refusal(503, error.seen, wanted=error.wanted, do=error.do, retry_after=5)
    if isinstance(error, ModelError):
        return Refusal(503, error.seen, wanted=error.wanted, do=error.do)
    return Refusal(422, error.seen, wanted=error.wanted, do=error.do)
