"""Requests at a fixed rate over TLS, from a process of its own: an open loop.

    python -m bench.load PORT CA SECONDS RATE < BODIES

A request has its time whether or not others were answered, and its latency counts from that time:
who answers late is not asked later. BODIES is a JSON list of texts, which are posted in turn to
/mutate. Prints a JSON object: the latencies in seconds, and the answers that were none of a patch.
"""

import asyncio
import json
import ssl
import sys
import time
from collections.abc import Sequence

CONNECTIONS = 64


async def run(port: int, ca: str, seconds: float, rate: float, bodies: Sequence[str]) -> str:
    requests = [_request(body.encode()) for body in bodies]
    waiting: asyncio.Queue[tuple[float, bytes] | None] = asyncio.Queue()
    latencies: list[float] = []
    others: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while (asked := await waiting.get()) is not None:
            due, request = asked
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            body = await reader.readexactly(_length(head))
            latencies.append(time.perf_counter() - due)
            if b'"patch"' not in body:
                others.append((head + body).decode())
        writer.close()

    tls = ssl.create_default_context(cafile=ca)
    streams = [
        await asyncio.open_connection("127.0.0.1", port, ssl=tls) for _ in range(CONNECTIONS)
    ]
    async with asyncio.TaskGroup() as group:
        for stream in streams:
            group.create_task(serve(*stream))
        begun = time.perf_counter()
        for n in range(int(seconds * rate)):
            due = begun + n / rate
            await asyncio.sleep(due - time.perf_counter())
            waiting.put_nowait((due, requests[n % len(requests)]))
        for _ in streams:
            waiting.put_nowait(None)
    return json.dumps({"latencies": latencies, "others": others[:3]})


def _request(body: bytes) -> bytes:
    head = (
        "POST /mutate HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def _length(head: bytes) -> int:
    lines = head.lower().split(b"\r\n")
    return int(next(line for line in lines if line.startswith(b"content-length:"))[15:])


if __name__ == "__main__":
    port, ca, seconds, rate = sys.argv[1:5]
    texts = json.load(sys.stdin)
    print(asyncio.run(run(int(port), ca, float(seconds), float(rate), texts)))
