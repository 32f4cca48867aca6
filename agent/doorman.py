"""A listening socket that lets in only so many at once: connections cost memory.

Whoever reaches a port can open connections and say nothing. Above the most there may be, the oldest
of the address that has most of them is hung up on: a flood drowns itself, and not an API server.
"""

import socket
from collections import Counter
from contextlib import suppress
from typing import Any

_BACKLOG = 1024


class Doorman(socket.socket):
    """Bound, listening, for `asyncio` to accept from. Raises OSError where it cannot be bound."""

    def __init__(self, host: str, port: int, *, most: int) -> None:
        """`host` "" is all addresses of this machine, by IPv4 and IPv6."""
        v6 = ":" in host or (not host and socket.has_dualstack_ipv6())
        super().__init__(socket.AF_INET6 if v6 else socket.AF_INET, socket.SOCK_STREAM)
        self._most = most
        self._open: dict[socket.socket, str] = {}
        try:
            self.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if v6:
                self.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, bool(host))
            self.bind((host, port))
            self.listen(_BACKLOG)
            self.setblocking(False)
        except OSError:
            self.close()
            raise

    def accept(self) -> tuple[socket.socket, Any]:
        connection, address = super().accept()
        if len(self._open) >= self._most:
            self._make_room()
        self._open[connection] = address[0]
        return connection, address

    def _make_room(self) -> None:
        self._open = {one: host for one, host in self._open.items() if one.fileno() != -1}
        if len(self._open) < self._most:
            return
        ((crowd, _),) = Counter(self._open.values()).most_common(1)
        oldest = next(one for one, host in self._open.items() if host == crowd)
        del self._open[oldest]
        with suppress(OSError):  # it went by itself just now
            oldest.shutdown(socket.SHUT_RDWR)  # whose it is sees its end, and closes it
