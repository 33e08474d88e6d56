"""The server process: a socket, uvicorn, and an orderly end."""

from __future__ import annotations

import logging
import signal
import socket
import sys
from typing import Any

import uvicorn

from pgm_scale.errors import UserError
from pgm_scale.serve.app import create_app
from pgm_scale.serve.connections import Connection
from pgm_scale.serve.service import Service

_LOG = logging.getLogger(__name__)

# A thread that holds the interpreter is asked for it this often, 5 ms by default: so long the model's thread could
# wait between two of a step's hundred operations while the other thread reads requests.
_SWITCH_INTERVAL_S = 0.0005
_BACKLOG = 1024


class Server(uvicorn.Server):
    """Ends by refusing what waits before uvicorn waits for what runs."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.service.engine.stop()
        await super().shutdown(sockets)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises:
        UserError: the address is taken or not ours.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(_BACKLOG)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"cannot listen at {host}:{port} ({error}); choose another --host or --port"
        ) from None
    listening.setblocking(False)
    return listening


def make_server(service: Service, **options: Any) -> Server:
    """A uvicorn server of the service, which does not log every request."""
    config = uvicorn.Config(
        create_app(service),
        log_level="warning",
        access_log=False,
        lifespan="on",
        http=Connection,
        ws="none",
        # Streams and answers get a little longer than the engine, whose last word they pass on.
        timeout_graceful_shutdown=int(service.settings.grace_s) + 5,
        **options,
    )
    return Server(config, service)


def serve(service: Service, host: str, port: int) -> None:
    """Serve until SIGTERM or Ctrl-C, and finish what runs; returns then.

    Raises:
        UserError: the address is taken, or the model could not be used.
    """
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    listening, server = bind(host, port), make_server(service)

    def end(*_: object) -> None:
        server.should_exit = True

    # Until uvicorn listens to signals; at its end it hands on those that it has heard, which must not kill us.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    bound_host, bound_port = listening.getsockname()[:2]
    shown = f"[{bound_host}]" if ":" in bound_host else bound_host
    print(f"{service.name} at http://{shown}:{bound_port}", flush=True)
    server.run(sockets=[listening])
    if service.engine.state == "failed":
        raise UserError("the model could not be used; its error is above")
