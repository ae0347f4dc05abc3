"""Requests that two parsers could read in two ways, and their answers; and such that are good.

After the public lists: RFC 9112 sections 2 to 7 and 11, the CL.TE, TE.CL and TE.TE families, tricks with line
ends, white space and chunk sizes.
"""

from __future__ import annotations

GET = b"GET / HTTP/1.1\r\nHost: a\r\n"
POST = b"POST / HTTP/1.1\r\nHost: a\r\n"
TE = b"Transfer-Encoding: chunked\r\n"
SMUGGLED = b"0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n"

#: Name: what is sent, and the status of the answer. The head alone decides.
REFUSED: dict[str, tuple[bytes, int]] = {
    # two lengths
    "cl-te": (POST + b"Content-Length: 4\r\n" + TE + b"\r\n" + SMUGGLED, 400),
    "te-cl": (POST + TE + b"Content-Length: 4\r\n\r\n" + SMUGGLED, 400),
    "cl-0-te": (POST + b"Content-Length: 0\r\n" + TE + b"\r\n" + SMUGGLED, 400),
    "cl-cl-other": (POST + b"Content-Length: 4\r\nContent-Length: 5\r\n\r\nabcde", 400),
    "cl-cl-same": (POST + b"Content-Length: 4\r\nContent-Length: 4\r\n\r\nabcd", 400),
    "cl-list": (POST + b"Content-Length: 4, 4\r\n\r\nabcd", 400),
    "cl-list-other": (POST + b"Content-Length: 4, 5\r\n\r\nabcde", 400),
    "cl-cl-case": (POST + b"Content-Length: 4\r\ncontent-length: 4\r\n\r\nabcd", 400),
    # lengths that are no numbers
    "cl-plus": (POST + b"Content-Length: +4\r\n\r\nabcd", 400),
    "cl-minus": (POST + b"Content-Length: -4\r\n\r\nabcd", 400),
    "cl-hex": (POST + b"Content-Length: 0x4\r\n\r\nabcd", 400),
    "cl-underscore": (POST + b"Content-Length: 1_0\r\n\r\nabcd", 400),
    "cl-space": (POST + b"Content-Length: 4 4\r\n\r\nabcd", 400),
    "cl-point": (POST + b"Content-Length: 4.0\r\n\r\nabcd", 400),
    "cl-empty": (POST + b"Content-Length:\r\n\r\nabcd", 400),
    "cl-word": (POST + b"Content-Length: four\r\n\r\nabcd", 400),
    "cl-arabic": (POST + b"Content-Length: \xd9\xa4\r\n\r\nabcd", 400),
    "cl-vast": (POST + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n", 400),
    "cl-large": (POST + b"Content-Length: 99999999999999999999\r\n\r\n", 413),
    # codings
    "te-te": (POST + TE + TE + b"\r\n" + SMUGGLED, 400),
    "te-te-other": (POST + TE + b"Transfer-Encoding: identity\r\n\r\n" + SMUGGLED, 400),
    "te-te-x": (POST + b"Transfer-Encoding: x\r\n" + TE + b"\r\n" + SMUGGLED, 400),
    "te-xchunked": (POST + b"Transfer-Encoding: xchunked\r\n\r\n" + SMUGGLED, 400),
    "te-identity": (POST + b"Transfer-Encoding: identity\r\n\r\n" + SMUGGLED, 400),
    "te-chunked-identity": (POST + b"Transfer-Encoding: chunked, identity\r\n\r\n" + SMUGGLED, 400),
    "te-identity-chunked": (POST + b"Transfer-Encoding: identity, chunked\r\n\r\n" + SMUGGLED, 400),
    "te-chunked-chunked": (POST + b"Transfer-Encoding: chunked, chunked\r\n\r\n" + SMUGGLED, 400),
    "te-comma": (POST + b"Transfer-Encoding: ,chunked\r\n\r\n" + SMUGGLED, 400),
    "te-comma-after": (POST + b"Transfer-Encoding: chunked,\r\n\r\n" + SMUGGLED, 400),
    "te-parameter": (POST + b"Transfer-Encoding: chunked;q=1\r\n\r\n" + SMUGGLED, 400),
    "te-quoted": (POST + b'Transfer-Encoding: "chunked"\r\n\r\n' + SMUGGLED, 400),
    "te-cow": (POST + b"Transfer-Encoding: cow\r\n\r\n" + SMUGGLED, 400),
    "te-empty": (POST + b"Transfer-Encoding:\r\n\r\n" + SMUGGLED, 400),
    "te-gzip": (POST + b"Transfer-Encoding: gzip\r\n\r\n" + SMUGGLED, 400),
    "te-gzip-chunked": (POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + SMUGGLED, 501),
    "te-vertical-tab": (POST + b"Transfer-Encoding: \x0bchunked\r\n\r\n" + SMUGGLED, 400),
    "te-form-feed": (POST + b"Transfer-Encoding: chunked\x0c\r\n\r\n" + SMUGGLED, 400),
    "te-nul": (POST + b"Transfer-Encoding: chunked\0\r\n\r\n" + SMUGGLED, 400),
    "te-nbsp": (POST + b"Transfer-Encoding: \xa0chunked\r\n\r\n" + SMUGGLED, 400),
    "te-http-1.0": (b"POST / HTTP/1.0\r\nHost: a\r\n" + TE + b"\r\n" + SMUGGLED, 400),
    # names of fields
    "space-before-colon": (POST + b"Content-Length : 4\r\n\r\nabcd", 400),
    "te-space-before-colon": (POST + b"Transfer-Encoding : chunked\r\n\r\n" + SMUGGLED, 400),
    "tab-before-colon": (POST + b"Transfer-Encoding\t: chunked\r\n\r\n" + SMUGGLED, 400),
    "space-before-name": (GET[:-2] + b"\r\n Transfer-Encoding: chunked\r\n\r\n" + SMUGGLED, 400),
    "space-before-first-name": (b"GET / HTTP/1.1\r\n Host: a\r\n\r\n", 400),
    "no-colon": (GET + b"Transfer-Encoding chunked\r\n\r\n", 400),
    "no-name": (GET + b": x\r\n\r\n", 400),
    "name-nul": (GET + b"Content-Length\0: 4\r\n\r\n", 400),
    "name-high": (GET + b"X\xff: 4\r\n\r\n", 400),
    "name-brackets": (GET + b"X[y]: 4\r\n\r\n", 400),
    # line ends
    "obs-fold": (GET + b"X: a\r\n b\r\n\r\n", 400),
    "obs-fold-tab": (GET + b"X: a\r\n\tb\r\n\r\n", 400),
    "obs-fold-te": (POST + b"Transfer-Encoding:\r\n chunked\r\n\r\n" + SMUGGLED, 400),
    "bare-lf-line": (b"GET / HTTP/1.1\nHost: a\r\n\r\n", 400),
    "bare-lf-field": (GET + b"X: a\nTransfer-Encoding: chunked\r\n\r\n", 400),
    "bare-lf-all": (b"GET / HTTP/1.1\nHost: a\n\n", 400),
    "bare-lf-end": (GET[:-2] + b"\n\nGET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "bare-cr-field": (GET + b"X: a\rTransfer-Encoding: chunked\r\n\r\n", 400),
    "bare-cr-line": (b"GET / HTTP/1.1\rHost: a\r\n\r\n", 400),
    "bare-cr-end": (GET + b"X: a\r\r\n\r\n", 400),
    "cr-cr-lf": (GET + b"X: a\r\n\r\r\n\r\n", 400),
    # bytes
    "nul-value": (GET + b"X: a\0b\r\n\r\n", 400),
    "control-value": (GET + b"X: a\x01b\r\n\r\n", 400),
    "escape-value": (GET + b"X: \x1b[2J\r\n\r\n", 400),
    "delete-value": (GET + b"X: \x7f\r\n\r\n", 400),
    "nul-target": (b"GET /\0 HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    # request lines
    "two-spaces": (b"GET  / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "tab-line": (b"GET\t/\tHTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "space-target": (b"GET /a b HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "space-after-version": (b"GET / HTTP/1.1 \r\nHost: a\r\n\r\n", 400),
    "no-version": (b"GET /\r\nHost: a\r\n\r\n", 400),
    "no-target": (b"GET HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "method-brackets": (b"G(T / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "version-2": (b"GET / HTTP/2.0\r\nHost: a\r\n\r\n", 505),
    "version-0": (b"GET / HTTP/0.9\r\nHost: a\r\n\r\n", 505),
    "preface-2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    "version-1.10": (b"GET / HTTP/1.10\r\nHost: a\r\n\r\n", 400),
    "version-case": (b"GET / http/1.1\r\nHost: a\r\n\r\n", 400),
    "version-plus": (b"GET / HTTP/+1.1\r\nHost: a\r\n\r\n", 400),
    "target-relative": (b"GET index.html HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "target-star": (b"GET * HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "target-scheme": (b"GET ftp://a/ HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "target-high": (b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "connect": (b"CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n", 501),
    # hosts
    "no-host": (b"GET / HTTP/1.1\r\n\r\n", 400),
    "two-hosts": (GET + b"Host: b\r\n\r\n", 400),
    "two-hosts-same": (GET + b"Host: a\r\n\r\n", 400),
    "host-list": (b"GET / HTTP/1.1\r\nHost: a, b\r\n\r\n", 400),
    "host-path": (b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n", 400),
    "host-user": (b"GET / HTTP/1.1\r\nHost: a@b\r\n\r\n", 400),
    "host-space": (b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n", 400),
    "host-port": (b"GET / HTTP/1.1\r\nHost: a:b\r\n\r\n", 400),
}

#: The same for what only the body shows.
VIA_BODY: dict[str, tuple[bytes, int]] = {
    "size-no-hex": (POST + TE + b"\r\nxyz\r\nabc\r\n0\r\n\r\n", 400),
    "size-0x": (POST + TE + b"\r\n0x3\r\nabc\r\n0\r\n\r\n", 400),
    "size-plus": (POST + TE + b"\r\n+3\r\nabc\r\n0\r\n\r\n", 400),
    "size-minus": (POST + TE + b"\r\n-3\r\nabc\r\n0\r\n\r\n", 400),
    "size-underscore": (POST + TE + b"\r\n1_0\r\nabc\r\n0\r\n\r\n", 400),
    "size-space-before": (POST + TE + b"\r\n 3\r\nabc\r\n0\r\n\r\n", 400),
    "size-empty": (POST + TE + b"\r\n\r\nabc\r\n0\r\n\r\n", 400),
    "size-vast": (POST + TE + b"\r\n" + b"f" * 21 + b"\r\nabc\r\n0\r\n\r\n", 400),
    "size-bare-lf": (POST + TE + b"\r\n3\nabc\r\n0\r\n\r\n", 400),
    "size-bare-cr": (POST + TE + b"\r\n3\rabc\r\n0\r\n\r\n", 400),
    "extension-bare-lf": (POST + TE + b"\r\n3;x\nabc\r\n0\r\n\r\n", 400),
    "too-long": (POST + TE + b"\r\n3\r\nabcd\r\n0\r\n\r\n", 400),
    "end-bare-lf": (POST + TE + b"\r\n3\r\nabc\n0\r\n\r\n", 400),
    "end-missing": (POST + TE + b"\r\n3\r\nabc0\r\n\r\n", 400),
    "last-bare-lf": (POST + TE + b"\r\n3\r\nabc\r\n0\r\n\nGET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "trailer-bare-lf": (POST + TE + b"\r\n0\r\nX: y\n\nGET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "trailer-mixed": (POST + TE + b"\r\n0\r\nX: y\n\r\nGET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "trailer-no-colon": (POST + TE + b"\r\n0\r\nGET / HTTP/1.1\r\n\r\n", 400),
}

#: Name: what is sent, its method, target and body.
GOOD: dict[str, tuple[bytes, str, str, bytes]] = {
    "get": (GET + b"\r\n", "GET", "/", b""),
    "get-1.0": (b"GET /old HTTP/1.0\r\n\r\n", "GET", "/old", b""),
    "query": (b"GET /a?b=c&d HTTP/1.1\r\nHost: a\r\n\r\n", "GET", "/a?b=c&d", b""),
    "length": (POST + b"Content-Length: 4\r\n\r\nabcd", "POST", "/", b"abcd"),
    "length-0": (POST + b"Content-Length: 0\r\n\r\n", "POST", "/", b""),
    "length-zeros": (POST + b"Content-Length: 004\r\n\r\nabcd", "POST", "/", b"abcd"),
    "chunks": (POST + TE + b"\r\n3\r\nabc\r\n02\r\nde\r\n0\r\n\r\n", "POST", "/", b"abcde"),
    "chunks-case": (
        POST + b"transfer-encoding:CHUNKED\r\n\r\nA\r\n0123456789\r\n0\r\n\r\n",
        "POST",
        "/",
        b"0123456789",
    ),
    "extension": (POST + TE + b'\r\n3;x=y;z="1"\r\nabc\r\n0;last\r\n\r\n', "POST", "/", b"abc"),
    "trailers": (POST + TE + b"\r\n3\r\nabc\r\n0\r\nX: y\r\nContent-Length: 5\r\n\r\n", "POST", "/", b"abc"),
    "no-chunks": (POST + TE + b"\r\n0\r\n\r\n", "POST", "/", b""),
    "absolute": (b"GET http://other/a?b HTTP/1.1\r\nHost: a\r\n\r\n", "GET", "/a?b", b""),
    "absolute-bare": (b"GET http://other HTTP/1.1\r\nHost: a\r\n\r\n", "GET", "/", b""),
    "options-star": (b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n", "OPTIONS", "*", b""),
    "host-port": (b"GET / HTTP/1.1\r\nHost: a.example:8000\r\n\r\n", "GET", "/", b""),
    "host-v6": (b"GET / HTTP/1.1\r\nHost: [::1]:8000\r\n\r\n", "GET", "/", b""),
    "host-empty": (b"GET / HTTP/1.1\r\nHost:\r\n\r\n", "GET", "/", b""),
    "value-high": (GET + b"X: gr\xfc\xdfe\r\n\r\n", "GET", "/", b""),
    "value-tabs": (GET + b"X: \t a\tb \t\r\n\r\n", "GET", "/", b""),
    "upgrade": (GET + b"Connection: Upgrade\r\nUpgrade: other\r\n\r\n", "GET", "/", b""),
}
