"""Commands run by forks of a process that has imported all they need, which saves their start.

    python warm.py serve SOCKET PACKAGE ...     the process, until it is killed
    python warm.py run SOCKET kedro run ...     stands for `kedro run ...`

A fork has the environment, folder, streams and process group of what stands for it, so that a
signal to that group finds it; it ends at once where what stands for it has been killed alone.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
from pathlib import Path

ENTRY_POINTS = {
    "almrr": "almrr_pipeline.cli:main",
    "dvc": "dvc.cli:main",
    "kedro": "kedro.framework.cli:main",
}


def stand_for(address: str, command: list[str]) -> None:
    """Let a fork run a command, and end as it does."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    mask = os.umask(0o077)
    request = json.dumps([command, dict(os.environ), str(Path.cwd()), mask, os.getpgrp()])
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(address)
        socket.send_fds(connection, [request.encode()], [0, 1, 2])
        status = int(connection.recv(100) or signal.SIGKILL)
    if os.WIFSIGNALED(status):
        signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.waitstatus_to_exitcode(status))


def serve(address: str) -> None:
    """Fork for each request; returns in the forks alone, where `sys.argv` is the command."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        listening.bind(address)
        listening.listen()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that watch
        while True:
            connection, _ = listening.accept()
            if not os.fork():
                break
            connection.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    request, streams, _, _ = socket.recv_fds(connection, 1 << 20, 3)
    sys.argv, environment, folder, mask, group = json.loads(request)
    if fork := os.fork():
        _watch(fork, group, connection)
    connection.close()
    _join(os.getpid(), group)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    os.umask(mask)


def _watch(fork: int, group: int, connection: socket.socket) -> None:
    """Tell how the fork ends; end it where nobody stands for it any more."""
    _join(fork, group)
    ended = os.pidfd_open(fork)
    if ended not in select.select([ended, connection], [], [])[0]:
        os.kill(fork, signal.SIGKILL)
    _, status = os.waitpid(fork, 0)
    try:
        connection.send(str(status).encode())
    finally:
        os._exit(0)


def _join(process: int, group: int) -> None:
    try:
        os.setpgid(process, group)
    except OSError:  # the group is dead
        if process == os.getpid():
            os._exit(1)


def import_all(packages: list[str]) -> None:
    """Import all modules of some packages."""
    import gc
    from contextlib import suppress
    from importlib import import_module
    from pkgutil import walk_packages

    for package in packages:
        for module in walk_packages(import_module(package).__path__, f"{package}."):
            with suppress(Exception):
                if not module.name.endswith("__main__"):
                    import_module(module.name)
    gc.freeze()  # or each fork copies all objects when it collects garbage


def main() -> None:
    """Begin the process or a command, see above."""
    task, address, *arguments = sys.argv[1:]
    if task == "run":
        stand_for(address, arguments)
    import_all(arguments)
    serve(address)
    from pkgutil import resolve_name

    sys.exit(resolve_name(ENTRY_POINTS[sys.argv[0]])())


if __name__ == "__main__":
    main()
