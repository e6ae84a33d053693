"""Many readers of one page at the same moment."""

import asyncio
import resource
import time


async def _read(port: int, path: str, everyone: asyncio.Event) -> tuple[int, float]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        await everyone.wait()
        started = time.perf_counter()
        writer.write(
            f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode()
        )
        answer = await reader.read()
        return int(answer.split(b" ", 2)[1]), time.perf_counter() - started
    finally:
        writer.close()


async def _all(port: int, path: str, count: int) -> list[tuple[int, float]]:
    everyone = asyncio.Event()
    reads = [asyncio.create_task(_read(port, path, everyone)) for _ in range(count)]
    await asyncio.sleep(0.5)  # every connection is open before the first request is sent
    everyone.set()
    return await asyncio.gather(*reads)


def read_at_once(port: int, path: str, count: int) -> list[tuple[int, float]]:
    """Open ``count`` connections, ask for a page on all of them at once; return statuses and
    seconds.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 256  # sockets of this process
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (min(wanted, hard) if hard > 0 else wanted, hard)
        )
    return asyncio.run(_all(port, path, count))
