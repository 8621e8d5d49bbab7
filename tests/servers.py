"""A web server of a folder, in a thread of the test. It may be slow, cut answers, refuse, or serve a changed file."""

import threading
import time
from collections import Counter
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class FolderServer(ThreadingHTTPServer):
    """Serves `folder` at `address`. asked: how often each path was asked for its content (GET).

    trouble: path -> what happens to its next answers, in order: "cut" (half of it comes), "changed", "short", a status
    such as 500, or seconds to wait before each tenth of it; then all is well.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.folder, self.asked, self.trouble = folder, Counter(), {}
        self.address = f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer(None)

    def do_GET(self):
        self.server.asked[self.path] += 1
        troubles = self.server.trouble.get(self.path)
        self.answer(troubles.pop(0) if troubles else None)

    def answer(self, trouble):
        file = self.server.folder / self.path.lstrip("/")
        if isinstance(trouble, int) or not file.is_file():
            self.send_error(trouble or 404)
            return
        data = file.read_bytes()
        data = {"changed": bytes(len(data)), "short": data[:-1]}.get(trouble, data)
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if trouble == "cut":
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self.close_connection = True
        elif isinstance(trouble, float):
            part = len(data) // 10 + 1
            for start in range(0, len(data), part):
                time.sleep(trouble)
                self.wfile.write(data[start : start + part])
        else:
            self.wfile.write(data)

    def handle(self):
        with suppress(ConnectionError):  # the reader was ended
            super().handle()

    def log_message(self, *_):
        pass


@contextmanager
def serving(folder: Path):
    """A FolderServer of a folder, while the context lasts."""
    server = FolderServer(folder)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
