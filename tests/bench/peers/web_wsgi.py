"""The application of web_waitress on our WSGI server, with its default options."""

from iocp_ctypes.wsgi import WSGIServer

from .web_application import application

if __name__ == "__main__":
    server = WSGIServer(("127.0.0.1", 0), application)
    print("listening on {}:{}".format(*server.address), flush=True)
    server.serve_forever()
