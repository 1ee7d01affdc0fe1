"""In PYTHONPATH, this notes in $SOCKET_LOG which command reaches for another machine."""

from __future__ import annotations

import os
import sys
from typing import Any

_REACHING = {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"}
_HERE = {"127.0.0.1", "::1", "localhost", None}


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if event not in _REACHING or "SOCKET_LOG" not in os.environ:
        return
    of_socket = event in {"socket.connect", "socket.sendto"}
    address = arguments[1] if of_socket else arguments
    if isinstance(address, tuple) and address[0] not in _HERE:  # a string is of this machine
        with open(os.environ["SOCKET_LOG"], "a", encoding="utf-8") as log:  # noqa: PTH123 - early
            log.write(f"{os.environ.get('SOCKET_STAGE', sys.orig_argv)}: {event} {address[:2]}\n")


_command = " ".join(sys.orig_argv[1:])
if "kedro run" in _command or "stage_settings" in _command:
    os.environ["SOCKET_STAGE"] = _command  # for the processes that a stage starts, too
sys.addaudithook(_note)
