"""Ports: taken before anything is loaded, so that a port in use is told at once."""

from __future__ import annotations

import errno
import socket

from grc.errors import GrcError


class PortError(GrcError):
    """The address can't be listened on."""


def listen(host: str, port: int, flag: str) -> socket.socket:
    """A socket bound to the address. Raises PortError naming what is wrong and the flag that mends it."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
            0
        ]
        found = socket.socket(family, kind)
    except OSError as error:
        raise PortError(f"{host} is no address of this host: {error.strerror}", "choose another --host") from None
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind(address)
    except OSError as error:
        found.close()
        if error.errno == errno.EADDRINUSE:
            raise PortError(f"port {port} of {host} is in use", f"choose another {flag}, or 0 for any") from None
        if error.errno == errno.EACCES:
            raise PortError(f"port {port} needs more rights", f"choose a {flag} above 1023") from None
        raise PortError(f"{host} is no address of this host: {error.strerror}", "choose another --host") from None
    return found


def free_port(host: str, port: int, flag: str) -> int:
    """A port that can be bound now, for a listener that binds by itself. Raises PortError where it is in use."""
    with listen(host, port, flag) as probe:
        return probe.getsockname()[1]
