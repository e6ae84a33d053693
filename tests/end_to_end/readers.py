"""Many readers of one page at the same moment."""

import asyncio
import resource
import time


def allow_files(count: int) -> None:
    """Let this process open so many sockets."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 256
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard) if hard > 0 else wanted, hard))


async def _read(port: int, path: str, everyone: asyncio.Event) -> tuple[int, float]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        await everyone.wait()
        started = time.perf_counter()
        writer.write(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
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
    """Open ``count`` connections, ask for a page on all of them at once; return statuses and seconds."""
    allow_files(count)
    return asyncio.run(_all(port, path, count))


async def _one_after_another(port: int, path: str, count: int, pause: float) -> list[float]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    times = []
    for _ in range(count):
        started = time.perf_counter()
        writer.write(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(int(x.split(b":")[1]) for x in head.lower().split(b"\r\n") if x.startswith(b"content-length"))
        await reader.readexactly(length)
        times.append(time.perf_counter() - started)
        await asyncio.sleep(pause)
    writer.close()
    return times


def answer_times(port: int, path: str, count: int, pause: float) -> list[float]:
    """Ask for a page again and again on one connection; return the seconds of every answer."""
    return asyncio.run(_one_after_another(port, path, count, pause))
