"""Bytes: from a locator to a proven file on disk. Knows no scheme, no model and no cache.

    engine       several files at once; retries by reason, asks for a fresh link once
    exchange     one GET (or one local file): redirects, ranges, what a status means
    connections  sockets: TLS, proxies, keep-alive, and how to interrupt them
    pump         receive, write and hash one body at the same time, in reused buffers
    archives     what is in a .tar, .tar.gz or .zip, read twice, never extracted blindly
    sink         the partial file: its hashes, its resume, its proof
    throttle     the bandwidth cap

The event loop never touches a byte: aiohttp costs 1.3 to 2 times the CPU of plain sockets in
threads, whose `recv_into`, `write` and hashlib release the GIL (measured; see `bench/`).
"""

from agent.transfer.archives import Target
from agent.transfer.engine import Engine, FileJob

__all__ = ["Engine", "FileJob", "Target"]
