"""A web server without ranges, as Python's own is."""

from __future__ import annotations

import contextlib
import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass

    def copyfile(self, source: object, target: object) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the reader has seen enough
            super().copyfile(source, target)  # type: ignore[arg-type, misc]


@contextlib.contextmanager
def web_server(directory: Path) -> Iterator[str]:
    handler = functools.partial(Quiet, directory=str(directory))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
