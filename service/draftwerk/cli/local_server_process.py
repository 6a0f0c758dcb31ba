"""The process of a server of one's own: `draftwerk` as ever, but SIGTERM comes when its stdin ends.

The other end of that pipe is in the command that started it. So the server ends with the command, however that ends.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

from draftwerk.cli.main import app


def _terminate_at_the_end_of_stdin() -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=_terminate_at_the_end_of_stdin, daemon=True).start()
    app(prog_name="draftwerk")
