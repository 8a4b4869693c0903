"""`stillhouse scheduler`: the process itself, beside a cluster's head or as a job on it."""

from __future__ import annotations

import logging
import signal
import sys
import threading

from jobs.client import address_inside, connect
from jobs.contexts import Context
from jobs.schedules.ledger import Ledger
from jobs.schedules.scheduler import Scheduler


def run_scheduler(address: str | None) -> None:
    """Start nights until told to end; what runs then goes on.

    Args:
        address: of the job server; none means the cluster that this process runs on.

    Raises:
        RunError: there is no cluster, it refuses the token, or the database cannot be opened.
    """
    logging.basicConfig(
        stream=sys.stdout, level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S"
    )
    ledger = Ledger()
    client = connect(Context(address=address or address_inside()))
    # The client is made quiet for commands that a person types; this process has a log of its own.
    logging.disable(logging.NOTSET)
    logging.getLogger("ray").setLevel(logging.WARNING)
    stop = threading.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: stop.set())
    scheduler = Scheduler(ledger, client)
    scheduler.serve(stop)
