"""A stand-in for the Hub on loopback, for tests: ``python tests/hub_server [port]``; prints its address.

It answers what ``huggingface_hub`` 2.4 asks (create, push with LFS, branches, tags, pull requests, download), keeps private
repositories from others, and can break an upload on purpose. It agrees with the client, not with the real Hub: no quotas, no
rate limits, no Xet, no Spaces.
"""

from __future__ import annotations

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from answers import Answer, Request, dispatch
from storage import Hub, HubError


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def respond(self) -> None:
        parts = urlsplit(self.path)
        hub: Hub = self.server.hub
        try:
            body = self.read_body(parts.path)
            if body is None:
                return
            with hub.lock:
                answer = self.answer(hub, parts.path, parse_qs(parts.query, keep_blank_values=True), body)
        except HubError as error:
            if "other words" in hub.quirks and error.status != 401:
                error.message = "Nope."
            headers = {"X-Error-Message": error.message, **error.extra.pop("headers", {})}
            headers |= {"X-Error-Code": error.code} if error.code else {}
            answer = Answer({"error": error.message, **error.extra}, error.status, headers)
        if not parts.path.startswith("/_control"):
            hub.log.append({"method": self.command, "path": parts.path, "status": answer.status})
        self.send(answer)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = respond

    def answer(self, hub: Hub, path: str, query: dict[str, list[str]], body: bytes) -> Answer:
        user = hub.user(self.headers.get("Authorization"))
        request = Request(hub, self.server.endpoint, user, query, body, self.headers)
        return dispatch("GET" if self.command == "HEAD" else self.command, path, request)

    def read_body(self, path: str) -> bytes | None:
        """The body, chunked or not; None where the connection was cut on purpose."""
        hub: Hub = self.server.hub
        name = path.rpartition("/")[2]
        if self.command == "PUT" and hub.cuts.get(name):
            hub.cuts[name] -= 1
            self.rfile.read(100)
            hub.log.append({"method": self.command, "path": path, "status": 0})
            self.close_connection = True
            self.connection.close()
            return None
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def send(self, answer: Answer) -> None:
        raw = isinstance(answer.data, bytes)
        body = answer.data if raw else json.dumps(answer.data).encode()
        self.send_response(answer.status)
        self.send_header("Content-Type", "application/octet-stream" if raw else "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, value in answer.headers.items():
            self.send_header(name.lower() if "small headers" in self.server.hub.quirks else name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Silent: the log is ``hub.log``."""


def main() -> None:
    server: Any = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1]) if len(sys.argv) > 1 else 0), Handler)
    server.hub, server.endpoint = Hub(), f"http://127.0.0.1:{server.server_address[1]}"
    print(server.endpoint, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
