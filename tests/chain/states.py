"""A model of the states of the chain's own servers, and random legal sequences of calls."""

import random
from dataclasses import dataclass, field
from typing import Any

CALLS = (
    *("status", "begin", "queue", "ask", "stop", "run", "poll"),
    *("other model", "other artifacts", "malformed", "begin again elsewhere", "restart"),
)
WEIGHTS = (8, 6, 6, 4, 4, 4, 4, 1, 1, 1, 2, 0.1)
NONCES = range(1, 40)


@dataclass
class Upstream:
    """What a server of the chain would hold, and how it would answer."""

    round: dict[str, Any] | None = None
    """The round that generates, as a status shows it."""
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Queued jobs that a client may ask for, by their id."""

    def begin(self, body: dict[str, Any], config: dict[str, Any]) -> int:
        """Return the status of the answer to ``init/generate``."""
        if self.round is not None:
            return 409
        self.round = config
        return 200

    def stop(self) -> None:
        """Forget the round and all jobs."""
        self.round = None
        self.jobs.clear()

    def status(self) -> dict[str, Any]:
        """Return state and config of a status."""
        return {"status": "IDLE" if self.round is None else "GENERATING", "config": self.round}


def draw(chance: random.Random) -> str:
    """Return a call of a random sequence."""
    return chance.choices(CALLS, WEIGHTS)[0]
