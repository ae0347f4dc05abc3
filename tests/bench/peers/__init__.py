"""The peers: each prints `listening on HOST:PORT` when ready, and runs until it is ended."""
