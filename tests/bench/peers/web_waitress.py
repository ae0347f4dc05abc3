"""The same answers by waitress, with its default options."""

import importlib
from typing import Any

from .web_application import application

waitress: Any = importlib.import_module("waitress")

if __name__ == "__main__":
    server = waitress.create_server(application, host="127.0.0.1", port=0)
    print(f"listening on 127.0.0.1:{server.effective_port}", flush=True)
    server.run()
