"""L5: where a server listens: addresses become bound sockets and names of pipes, and those take connections.

Laws
1. What is bound is bound before a server's constructor returns; where one of several cannot be had, none is.
2. A listening socket that was made elsewhere, in another process even, is taken as it is.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any, Final

from ._addresses import Address, format_address, resolve_listening
from ._errors import error_from_code
from ._options import Settings
from ._pipeops import ListeningPipe, PipeName
from ._sockops import ListeningSocket

if TYPE_CHECKING:
    from ._acceptor import Listening
    from .engine import Engine

Place = socket.socket | PipeName

#: listen_backlog where the user names none; above 200 Windows takes the number as it is (SOMAXCONN_HINT).
LISTEN_BACKLOG_MIN: Final = 200


def bind_all(addresses: list[Any], settings: Settings) -> list[Place]:
    """Bind to all addresses; OSError names the one that cannot be had. May ask the name service."""
    backlog = settings.listen_backlog or max(LISTEN_BACKLOG_MIN, settings.backlog)
    exclusive, nodelay = settings.exclusive, settings.nodelay
    made: list[Place] = []
    try:
        for address in addresses:
            if isinstance(address, socket.socket):
                address.listen(backlog)
                made.append(address)
            elif isinstance(address, str):
                made.append(PipeName(address, settings.pipe_security, settings.reject_remote))
            else:
                for family, numeric, dualstack in resolve_listening(address, settings.dualstack):
                    made.append(listen(family, numeric, backlog, exclusive, dualstack, nodelay))
    except BaseException:
        for place in made:
            place.close()
        raise
    return made


def address_of(place: Place) -> Address | str:
    """The address a client connects to."""
    if isinstance(place, PipeName):
        return place.name
    address: Address = place.getsockname()
    return address


def listen_on(place: Place, engine: Engine) -> Listening:
    """Bind a place to an engine's port."""
    if isinstance(place, PipeName):
        return ListeningPipe(place, engine.proactor, engine.port)
    return ListeningSocket(place, engine.proactor, engine.port)


def listen(
    family: int,
    address: Address,
    listen_backlog: int,
    exclusive: bool,
    dualstack: bool,
    nodelay: bool = False,
) -> socket.socket:
    """Make a listening socket; OSError names the address where it cannot be had.

    `nodelay` is for what it accepts.
    """
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        if exclusive:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not dualstack)
        if nodelay:
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        made.bind(address)
        made.listen(listen_backlog)
    except OSError as exc:
        made.close()
        code = getattr(exc, "winerror", None) or exc.errno or 0
        raise error_from_code(code, f"cannot listen on {format_address(address)}") from exc
    return made
