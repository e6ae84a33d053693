"""The block that seeds a response: what the node's chain follower posted last, or posts next."""

import asyncio


class Beacon:
    """Block hashes in the order in which they were posted. It belongs to one event loop."""

    def __init__(self) -> None:
        self.newest: str | None = None
        """Hash of the block that was posted last; None before the first."""
        self._posted = asyncio.Event()

    def post(self, block_hash: str) -> None:
        """Take a block. The same one again is no news."""
        if block_hash == self.newest:
            return
        self.newest = block_hash
        posted, self._posted = self._posted, asyncio.Event()
        posted.set()

    async def next(self, seconds: float) -> str | None:
        """Wait for a block that is posted from now on; return None if no block comes in time."""
        try:
            async with asyncio.timeout(seconds):
                await self._posted.wait()
        except TimeoutError:
            return None
        return self.newest
