"""Client: ask a server line by line, with blocking calls; serve such lines with a function that may block.

From the checkout's root: `py -m examples.client [--port N] [--ask WORD ...]`; with `-m` the root is
importable.
Without `--ask` it serves: each line is answered by how often its word was asked for. With it, it asks.
"""

import argparse
import threading
from collections import Counter

from iocp_ctypes import Stream, StreamServer, open_stream

WORDS_MAX = 10_000
counts: Counter[bytes] = Counter()
lock = threading.Lock()


def count(stream: Stream) -> None:
    """Serve one connection; its own thread may wait for as long as it takes."""
    for line in stream:
        word = line.strip()
        with lock:
            if word in counts or len(counts) < WORDS_MAX:
                counts[word] += 1
            number = counts[word]
        stream.write(b"%d\n" % number)


def ask(port: int, words: list[str]) -> None:
    """Ask for each word, all at once, then read the answers."""
    with open_stream(("127.0.0.1", port), timeout=10) as stream:
        for word in words:
            stream.write(word.encode() + b"\n")
        stream.write_eof()
        for word, answer in zip(words, stream, strict=True):
            print(word, int(answer), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Counts words for those who ask.")
    parser.add_argument("--port", type=int, default=9003, help="0 is any that is free (%(default)s)")
    parser.add_argument("--ask", nargs="+", metavar="WORD", help="ask for words instead of serving")
    given = parser.parse_args()
    if given.ask:
        ask(given.port, given.ask)
    else:
        # 60 s without a line end a connection: its thread is one of 64.
        server = StreamServer(("127.0.0.1", given.port), count, timeout=60)
        print("listening on {}:{}".format(*server.address), flush=True)
        server.serve_forever()
