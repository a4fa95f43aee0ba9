"""A command that a server of :mod:`testkit.fork_server` runs, for shells and programs.

``python -I -S forked_command.py SERVER COMMAND …`` takes a hundredth of a second: the command
has the same streams, gets SIGINT and SIGTERM that come here, and this ends as it ends.
It imports nothing of ours, so that it starts at once.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from contextlib import suppress

PASSED_ON = signal.SIGINT, signal.SIGTERM


def main(server: str, command: list[str]) -> None:
    """Have ``server`` run it, and end with its status."""
    # One that comes before it is known whom to pass it on to waits.
    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as answers:
        answers.connect(f"\0{server}")
        where = {"command": command, "env": dict(os.environ), "cwd": os.getcwd()}  # noqa: PTH109  (pathlib is slow)
        request = json.dumps({**where, "finalizes": False, "outlives": False})
        socket.send_fds(answers, [request.encode()], [0, 1, 2])
        forked = int(answers.recv(64))

        def pass_on(number: int, _: object) -> None:
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(forked, number)

        for number in PASSED_ON:
            signal.signal(number, pass_on)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
        status = int(answers.recv(64))
    if status < 0:
        if -status != signal.SIGKILL:  # which nobody can handle
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
