"""Hello over HTTPS, with a certificate of yours or one that is made for the moment.

Browsers warn of the latter; `curl -k https://localhost:8443/` does not ask.

From the checkout's root: `py -m examples.https_hello [--port N] [--cert FILE] [--key FILE]`.
"""

import argparse
import ssl

from iocp_ctypes import Server
from iocp_ctypes.certificate import throwaway_certificate
from iocp_ctypes.http import HTTPConnection, Request, Response


class Hello(HTTPConnection):
    def on_request(self, request: Request) -> Response:
        assert self.tls is not None
        return Response(f"hello {request.client[0]}, this is {self.tls.version()}\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Says hello over HTTPS.")
    parser.add_argument("--port", type=int, default=8443, help="0 is any that is free (%(default)s)")
    parser.add_argument("--cert", help="PEM file; without, a certificate is made for the moment")
    parser.add_argument("--key", help="PEM file; without, it is in the certificate's")
    given = parser.parse_args()
    if given.cert is None:
        context = throwaway_certificate().server_context()
    else:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(given.cert, given.key)
    context.set_alpn_protocols(["http/1.1"])
    server = Server(("127.0.0.1", given.port), Hello, tls=context)
    print("listening on {}:{}".format(*server.address), flush=True)
    server.serve_forever()
