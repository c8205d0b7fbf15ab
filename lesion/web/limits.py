"""Nobody takes all the places: connections by address, requests with an end, wrong secrets that slow down.

A thin layer over waitress, which has none of the three as a setting. `FairServer` accepts every connection and then makes
room: where one address holds more than `PER_ADDRESS`, or all hold more than `PLACES`, the largest holder loses the
connection that has waited longest without a whole request. Idle and dripping connections therefore give way, also to a
person at the same address; a request being answered never does, and a browser whose idle connection was closed opens
another. `Guesses` lets an address be wrong ten times, then once every two seconds.
Proven by tests/web/test_limits.py.
"""
import ipaddress
import threading
import time
from collections import Counter

from waitress.channel import HTTPChannel
from waitress.server import TcpWSGIServer

PLACES = 400       # connections in all
PER_ADDRESS = 100  # of them from one address: fifty readers behind one router have two each
REQUEST_S = 20     # from a request's first byte to its last
REPLY_S = 120      # for the client to take the reply
IDLE_S = 60        # without a byte


def place_of(address: str) -> str:
    """What counts as one address: an IPv4 address, or the /64 network that one IPv6 customer has."""
    try:
        parsed = ipaddress.ip_address(address.split("%")[0])
    except ValueError:
        return address
    if parsed.version == 6:
        parsed = parsed.ipv4_mapped or ipaddress.ip_network((int(parsed) >> 64 << 64, 64))
    return str(parsed)


class FairChannel(HTTPChannel):
    """A connection that knows since when it waits, and since when its unfinished request is under way."""

    def __init__(self, server, sock, addr, adj, map=None):
        super().__init__(server, sock, addr, adj, map)
        self.place = place_of(addr[0])
        self.since = self.began = time.monotonic()

    def received(self, data: bytes) -> bool:
        """Bytes from the client; the clock of a request starts with its first one."""
        before = self.request
        taken = super().received(data)
        if self.request is not before:
            self.began = time.monotonic()
        return taken

    def service(self) -> None:
        """Answer one request (in a worker's thread), and wait from then on."""
        super().service()
        self.since = time.monotonic()

    def is_overdue(self, now: float) -> bool:
        """Whether its request takes too long to arrive, or its reply too long to leave."""
        if self.requests:
            return False
        return (self.request is not None and now - self.began > REQUEST_S) or \
            (self.total_outbufs_len > 0 and now - self.since > REPLY_S)


class FairServer(TcpWSGIServer):
    """waitress' server with the limits of the module docstring."""
    channel_class = FairChannel

    def handle_accept(self) -> None:
        """Take one connection, then see that nobody holds too many."""
        super().handle_accept()
        here = [channel for channel in self.active_channels.values() if not channel.will_close]
        if not here:
            return
        place, most = Counter(channel.place for channel in here).most_common(1)[0]
        if most > PER_ADDRESS or len(here) > PLACES:
            waiting = [channel for channel in here if channel.place == place and not channel.requests]
            if waiting:
                min(waiting, key=lambda channel: channel.since).will_close = True
            else:
                max(here, key=lambda channel: channel.creation_time).will_close = True

    def maintenance(self, now: float) -> None:
        """Every few seconds: close what is idle or overdue."""
        super().maintenance(now)
        for channel in self.active_channels.values():
            if channel.is_overdue(time.monotonic()):
                channel.will_close = True


class Guesses:
    """Wrong secrets by address: `allowed` at once, then one every `every_s` seconds."""

    def __init__(self, allowed: int = 10, every_s: float = 2.0):
        self.allowed, self.every_s = allowed, every_s
        self._paid = {}  # place -> when all its wrong guesses are paid for
        self._lock = threading.Lock()

    def wait_s(self, address: str) -> float:
        """Seconds until this address may try again; 0 if it may now."""
        debt = self._paid.get(place_of(address), 0.0) - time.monotonic()
        return max(0.0, debt - (self.allowed - 1) * self.every_s)

    def wrong(self, address: str) -> None:
        """Note a wrong guess."""
        now = time.monotonic()
        with self._lock:
            if len(self._paid) > 10_000:  # long paid ones go; memory stays small under any number of addresses
                self._paid = {place: at for place, at in self._paid.items() if at > now}
            place = place_of(address)
            self._paid[place] = max(now, self._paid.get(place, now)) + self.every_s
