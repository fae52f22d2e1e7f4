"""Open pages of a built book in a headless Chromium, from the folder, and tell what it finds. No network."""

import asyncio
import json
import shutil
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from tornado.websocket import websocket_connect

AXE = Path(__file__).parent / "vendor" / "axe" / "axe.min.js"
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--remote-debugging-port=0",
)
READY = """(async () => {
  if (window.MathJax && MathJax.startup) await MathJax.startup.promise;
  await new Promise((done) => setTimeout(done, 100)); // what else waits for MathJax
  for (const image of document.images) { image.loading = "eager"; await image.decode().catch(() => {}); }
})()"""
IMAGES = """[...document.images].flatMap((image) => [
  ...(image.complete && image.naturalWidth ? [] : [`image ${image.src} does not load`]),
  ...(image.hasAttribute("alt") ? [] : [`image ${image.src} has no alt`]),
])"""
WIDTH = """[document.documentElement.scrollWidth, window.innerWidth]"""
RULES = """axe.run(document, {resultTypes: ["violations"], preload: false}).then((found) => found.violations
  .filter((rule) => ["serious", "critical"].includes(rule.impact))
  .map((rule) => `${rule.id}: ${rule.nodes.slice(0, 3).map((node) => node.target.join(" ")).join(", ")}`))"""


def executable() -> str | None:
    """The browser, where one is installed."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def browser() -> Iterator[int]:
    """Start a browser of its own; yield the port that it listens on."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [executable(), *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            told = Path(profile, "DevToolsActivePort")
            for _ in range(300):
                if told.exists() and told.read_text().count("\n"):
                    break
                time.sleep(0.1)
            yield int(told.read_text().splitlines()[0])
        finally:
            process.terminate()
            process.wait(20)


class Tab:
    """One tab, spoken to by the DevTools protocol."""

    def __init__(self, socket: Any) -> None:
        self.socket, self.ids, self.events = socket, count(1), []

    async def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self.ids)
        await self.socket.write_message(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(await self.socket.read_message())
            if message.get("id") == number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return message["result"]
            self.events.append(message)

    async def until(self, method: str) -> None:
        while not any(event["method"] == method for event in self.events):
            self.events.append(json.loads(await self.socket.read_message()))

    async def evaluate(self, expression: str) -> Any:
        done = await self.send(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        if "exceptionDetails" in done:
            raise RuntimeError(f"{expression[:60]}...: {done['exceptionDetails']}")
        return done["result"].get("value")

    async def size(self, width: int, height: int, *, mobile: bool) -> None:
        await self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=mobile,
        )


@contextmanager
def _no_proxy() -> Iterator[Any]:
    yield urllib.request.build_opener(urllib.request.ProxyHandler({}))


def visit(port: int, html: Path, page: str, *, expressions: tuple[str, ...] = ()) -> dict[str, list]:
    """Open a page and try it.

    Parameters
    ----------
    port : int
        Of :func:`browser`.
    html : Path
        Folder of the built book.
    page : str
        Name of the page in it, perhaps with a query.
    expressions : tuple of str
        JavaScript to evaluate at last, in order.

    Returns
    -------
    dict of str to list
        errors (of scripts and console), outside (addresses), images, rules (of axe-core), wide (if the page
        scrolls sideways on a phone); values of the expressions.
    """
    return asyncio.run(asyncio.wait_for(_visit(port, html, page, expressions), 180))


async def _visit(port: int, html: Path, page: str, expressions: tuple[str, ...]) -> dict[str, list]:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/json/new?about:blank", method="PUT")
    with _no_proxy() as opener, opener.open(request, timeout=20) as answer:
        target = json.load(answer)
    tab = Tab(await websocket_connect(target["webSocketDebuggerUrl"], max_message_size=1 << 28))
    try:
        for domain in ("Page", "Runtime", "Log", "Network"):
            await tab.send(f"{domain}.enable")
        await tab.size(1200, 900, mobile=False)
        await tab.send("Page.navigate", url=f"{html.resolve().as_uri()}/{page}")
        await tab.until("Page.loadEventFired")
        await tab.evaluate(READY)
        found = {"images": await tab.evaluate(IMAGES)}
        await tab.evaluate(AXE.read_text(encoding="utf-8"))
        found["rules"] = await tab.evaluate(RULES)
        await tab.size(360, 740, mobile=True)
        needed, there = await tab.evaluate(WIDTH)
        found["wide"] = [f"{needed} pixels wide on a phone of {there}"] if needed > there + 1 else []
        found["values"] = [await tab.evaluate(expression) for expression in expressions]
        return found | _events(tab.events, html)
    finally:
        tab.socket.close()
        with _no_proxy() as opener:
            opener.open(f"http://127.0.0.1:{port}/json/close/{target['id']}", timeout=20).close()


def _events(events: list[dict[str, Any]], html: Path) -> dict[str, list]:
    """What the browser reported while the page was open: errors, and requests for what is not in the book."""
    inside = (f"{html.resolve().as_uri()}/", "data:", "blob:", "about:")
    errors, outside = [], []
    for event in events:
        given = event.get("params", {})
        if event["method"] == "Runtime.exceptionThrown":
            errors.append(given["exceptionDetails"].get("exception", {}).get("description", "exception"))
        elif event["method"] == "Runtime.consoleAPICalled" and given["type"] in ("error", "assert"):
            errors.append(" ".join(str(part.get("value", part)) for part in given["args"]))
        elif event["method"] == "Log.entryAdded" and given["entry"]["level"] == "error":
            errors.append(f"{given['entry']['text']} {given['entry'].get('url', '')}")
        elif event["method"] == "Network.requestWillBeSent":
            address = given["request"]["url"]
            if not address.startswith(inside):
                outside.append(address)
    return {"errors": errors, "outside": outside}
