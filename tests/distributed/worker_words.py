"""One rank of test_cli.py: stops with the message given for its rank; `-` means no message."""

from __future__ import annotations

import sys
import time

from giantdet import cli
from giantdet.distributed import comm

if __name__ == "__main__":
    comm.start()
    message = sys.argv[1 + comm.rank()]
    if message == "-":
        time.sleep(6)
    else:
        cli._say(message)
    comm.stop()
