"""Ports of this machine."""

import random
import socket


def is_taken(port: int) -> bool:
    """Whether somebody listens there on loopback."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def free_port() -> int:
    """A port that is free, as is the one 10,000 above it; both below those that the system gives by itself."""
    while True:
        port = random.randrange(20_100, 22_700)
        if not is_taken(port) and not is_taken(port + 10_000):
            return port
