"""A small Hub on this machine: what HF_ENDPOINT=http://127.0.0.1:PORT makes of the real client.

It serves folders as repositories. `Hub.faults` spoils its answers: {"kind": how, "on": part of the
names of the files that it meets, "times": how often}. Without "on" it meets all requests.
"""

import hashlib
import json
import re
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

CLOSED = {  # kind of fault -> status, error code and message, as huggingface.co sends them
    "gated": (401, "GatedRepo", "Access to model is restricted. Please log in."),
    "no access": (403, "GatedRepo", "Access to model is restricted, ask for it."),
    "private": (401, "RepoNotFound", "Invalid username or password."),
    "bad token": (401, "", "Invalid credentials in Authorization header"),
}
API = re.compile(r"/api/(?:models|datasets)/([^/]+/[^/]+)(?:/(?:revision|tree)/([^/]+))?/?")
FILE = re.compile(r"/(?:datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
PORTAL = b"<html><body>Welcome to the airport. Please log in.</body></html>"


class Hub:
    """Repositories under `root`, a folder for each of their commits."""

    def __init__(self, root: Path):
        self.root, self.faults, self.asked = root, {}, []
        self.branches: dict[str, dict[str, str]] = {}
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Of", (Answer,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=[0.05], daemon=True).start()

    def commit(self, repo: str, number: int, branch: str = "main") -> tuple[Path, str]:
        """A new folder for a commit, to which the branch moves at once; and the commit's id."""
        commit = f"{number:040x}"
        folder = self.root / repo / commit
        folder.mkdir(parents=True)
        self.branches.setdefault(repo, {})[branch] = commit
        return folder, commit

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class Answer(BaseHTTPRequestHandler):
    """To one request."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlparse(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        kind = self.fault(path)
        if kind == "silent":  # and hangs up: else the client waits for six minutes
            time.sleep(1)
            self.close_connection = True
        elif kind == "portal":
            self.send(200, PORTAL, {"Content-Type": "text/html"})
        elif kind == "no JSON":
            self.send(200, b'{"sha": 7')
        elif kind == "other JSON":
            self.send(200, b'{"ok": true}', {"Content-Type": "application/json"})
        elif kind in CLOSED:
            self.refuse(*CLOSED[kind])
        elif str(kind).isdigit():
            self.send(int(kind), b"oops")
        elif found := API.fullmatch(path):
            self.about(*found.groups())
        elif found := FILE.fullmatch(path):
            self.file(kind, *found.groups())
        else:
            self.refuse(404, "RepoNotFound", "Repository not found")

    def fault(self, path):
        """The kind of fault that this request meets, or None."""
        faults = self.hub.faults
        if faults.get("on", "") not in path or faults.get("times", 1) < 1:
            return None
        if "times" in faults and self.command == "GET":
            faults["times"] -= 1
        return faults.get("kind")

    def send(self, status, body=b"", headers=None, size=None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if size is None else size))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status, code, message):
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.send(status, json.dumps({"error": message}).encode(), headers)

    def folder(self, repo, revision):
        """The folder of a commit, or None after a refusal."""
        branches = self.hub.branches.get(repo)
        if branches is None:
            return self.refuse(401, "RepoNotFound", "Repository not found")
        folder = self.hub.root / repo / branches.get(revision or "main", revision or "main")
        if not folder.is_dir():
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return folder

    def about(self, repo, revision):
        if folder := self.folder(repo, revision):
            names = [{"rfilename": path.name} for path in sorted(folder.iterdir())]
            about = {"id": repo, "sha": folder.name, "siblings": names}
            about |= {"private": False, "downloads": 0, "likes": 0, "tags": []}
            self.send(200, json.dumps(about).encode(), {"Content-Type": "application/json"})

    def file(self, kind, repo, revision, name):
        if not (folder := self.folder(repo, revision)):
            return
        if not (folder / name).is_file():
            self.refuse(404, "EntryNotFound", "Entry not found")
            return
        body = (folder / name).read_bytes()
        sha256, headers = hashlib.sha256(body).hexdigest(), {"X-Repo-Commit": folder.name}
        if name.endswith(".safetensors"):  # large files are stored apart, under their sha256
            headers |= {"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(body))}
        else:  # small ones under git's id
            git = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
            headers["ETag"] = f'"{git}"'
        self.give(kind, body, headers)

    def give(self, kind, body, headers):
        """A file, with what a fault makes of it."""
        if self.command == "HEAD":
            self.send(200, body, headers)
            return
        if kind == "wrong bytes":
            body = body[:-1] + bytes([body[-1] ^ 1])
        elif kind == "short":
            body = body[: len(body) // 2]
        elif kind in ("cut", "stall"):
            self.send(200, body[: len(body) // 3], headers, size=len(body))
            self.wfile.flush()
            time.sleep(60 if kind == "stall" else 0)
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.send(200, body, headers)
