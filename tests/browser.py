"""A headless Chromium, driven through chromedriver's own protocol (W3C WebDriver, plain HTTP)."""

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.request
from contextlib import contextmanager

FLAGS = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
]  # fmt: skip
KEYS = {"right": "\ue014", "left": "\ue012", "home": "\ue011", "end": "\ue010", "tab": "\ue004",
        "down": "\ue015", "up": "\ue013", "enter": "\ue007", "space": " "}  # fmt: skip


def missing():
    """Why there is no browser here; "" if there is one."""
    lacks = [name for name in ("chromium", "chromedriver") if not shutil.which(name)]
    return f"needs {' and '.join(lacks)} (Debian: chromium-driver)" if lacks else ""


class Browser:
    """One window."""

    def __init__(self, port):
        self.at = f"http://127.0.0.1:{port}"
        options = {"binary": shutil.which("chromium"), "args": FLAGS}
        wanted = {"goog:chromeOptions": options}
        wanted["goog:loggingPrefs"] = {"browser": "ALL", "performance": "ALL"}
        answer = self.post("/session", {"capabilities": {"alwaysMatch": wanted}})
        self.at += f"/session/{answer['sessionId']}"

    def post(self, path, body):
        request = urllib.request.Request(
            self.at + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as reply:
            return json.load(reply)["value"]

    def cdp(self, name, **params):
        return self.post("/goog/cdp/execute", {"cmd": name, "params": params})

    def open(self, path, width=1280, height=900, scheme="light"):
        """Load a file in a window of this size, in a light or a dark scheme."""
        self.cdp("Emulation.setDeviceMetricsOverride", width=width, height=height,
                 deviceScaleFactor=1, mobile=False)  # fmt: skip
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.cdp("Emulation.setEmulatedMedia", features=features)
        self.logs()
        self.post("/url", {"url": path.resolve().as_uri()})

    def js(self, body, *args):
        """What the body of a function returns in the page."""
        return self.post("/execute/sync", {"script": body, "args": list(args)})

    def press(self, *keys):
        """Real key presses, on whatever has the focus."""
        strokes = []
        for key in keys:
            value = KEYS.get(key, key)
            strokes += [{"type": "keyDown", "value": value}, {"type": "keyUp", "value": value}]
        self.post("/actions", {"actions": [{"type": "key", "id": "k", "actions": strokes}]})

    def logs(self):
        """What stands in the console, and what was asked for, since the last look."""
        console = self.post("/se/log", {"type": "browser"})
        events = self.post("/se/log", {"type": "performance"})
        asked = []
        for event in events:
            message = json.loads(event["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                asked.append(message["params"]["request"]["url"])
        return [entry["message"] for entry in console], asked

    def picture(self, path):
        """A picture of the whole page."""
        shot = self.cdp("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))


@contextmanager
def browser():
    """A Browser; it ends with the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    driver = subprocess.Popen(
        ["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(150):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/status", timeout=5)
                break
            except OSError:
                time.sleep(0.2)
        window = Browser(port)
        try:
            yield window
        finally:
            request = urllib.request.Request(window.at, method="DELETE")
            urllib.request.urlopen(request, timeout=60)
    finally:
        driver.terminate()
        driver.wait(timeout=30)
