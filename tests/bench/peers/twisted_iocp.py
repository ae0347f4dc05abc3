"""Echo server on Twisted's IOCP reactor (pip install twisted); off Windows on its default reactor."""

import importlib
import site
import sys
from pathlib import Path
from typing import Any

LISTEN_BACKLOG = 200  # the same kernel queue for every server; its own default is 50
protocol: Any = importlib.import_module("twisted.internet.protocol")


class Echo(protocol.Protocol):  # type: ignore[misc]  # untyped: Twisted is optional
    """Sends back what it receives; stops reading while the peer does not read."""

    def connectionMade(self) -> None:
        self.transport.setTcpNoDelay(True)
        self.transport.registerProducer(self.transport, True)

    def dataReceived(self, data: bytes) -> None:
        self.transport.write(data)


def main() -> None:
    if sys.platform == "win32":
        # pywin32, which the reactor imports, is only found by its .pth file, which PYTHONPATH does not read.
        for folder in [folder for folder in sys.path if Path(folder, "pywin32.pth").exists()]:
            site.addsitedir(folder)
        importlib.import_module("twisted.internet.iocpreactor").install()
    reactor: Any = importlib.import_module("twisted.internet.reactor")
    factory = protocol.Factory.forProtocol(Echo)
    port = reactor.listenTCP(0, factory, backlog=LISTEN_BACKLOG, interface="127.0.0.1")
    reactor.callWhenRunning(lambda: print(f"listening on 127.0.0.1:{port.getHost().port}", flush=True))
    reactor.run(installSignalHandlers=False)


if __name__ == "__main__":
    main()
