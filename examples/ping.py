"""Ping: ICMP echo requests over a raw socket, which Windows gives to administrators only.

From the checkout's root, elevated: `py -m examples.ping HOST [--count N]`
"""

import argparse
import os
import socket
import struct
import sys
import threading
import time
from typing import Any

from iocp_ctypes import Datagram


def checksum(packet: bytes) -> int:
    total: int = sum(struct.unpack(f">{len(packet) // 2}H", packet))  # RFC 1071
    total = (total >> 16) + (total & 0xFFFF)
    return ~(total + (total >> 16)) & 0xFFFF


class Ping(Datagram):
    def __init__(self) -> None:
        super().__init__(("0.0.0.0", 0), type=socket.SOCK_RAW, protocol=socket.IPPROTO_ICMP)
        self.ours = os.urandom(2)  # every raw socket gets everybody's answers
        self.asked, self.asked_at = b"", 0.0
        self.answered = threading.Event()

    def ask(self, host: str, number: int) -> None:
        self.answered.clear()
        body = self.ours + struct.pack(">H", number) + b"iocp_ctypes ping"
        packet = b"\x08\x00" + struct.pack(">H", checksum(b"\x08\x00" + body)) + body
        self.asked, self.asked_at = body[:4], time.perf_counter()
        self.send_to(packet, (host, 0))

    def on_datagram(self, data: bytes, address: tuple[Any, ...]) -> None:
        took = (time.perf_counter() - self.asked_at) * 1000
        message = data[(data[0] & 15) * 4 :]  # behind the IP header
        if message[:1] == b"\x00" and message[4:8] == self.asked:  # else it comes too late
            number = int.from_bytes(message[6:8], "big")
            print(f"{len(message)} bytes from {address[0]}: number {number}, {took:.1f} ms", flush=True)
            self.answered.set()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Asks a host for answers.")
    parser.add_argument("host")
    parser.add_argument("--count", type=int, default=4)
    options = parser.parse_args()
    try:
        host = str(socket.getaddrinfo(options.host, None, socket.AF_INET)[0][4][0])
        with Ping() as ping:
            for number in range(options.count):
                ping.ask(host, number)
                if not ping.answered.wait(5):
                    print(f"no answer to number {number}", flush=True)
    except OSError as exc:
        sys.exit(f"ping: {exc.strerror or exc}")
