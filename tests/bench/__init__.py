"""The benchmark: our server against its peers, under one Wine or on Windows: `python3 tests/bench/run.py`."""
