"""What the tests of the reports share: the tags of a page, the SVG inside it, a real browser."""

from __future__ import annotations

import base64
import html
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


class Page(HTMLParser):
    """The tags and the text of an HTML page."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.pre: list[str] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        self._open.append(tag)
        if tag == "pre":
            self.pre.append("")

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "style" in self._open:
            return
        self.texts.append(data)
        if "pre" in self._open:
            self.pre[-1] += data

    @property
    def text(self) -> str:
        """All text, every run of white space one space."""
        return " ".join(" ".join(self.texts).split())

    def all(self, tag: str, **attributes: str) -> list[dict[str, str]]:
        """The attributes of every such tag; `class_` asks for one class among several."""
        wanted = attributes.pop("class_", None)
        return [
            found
            for name, found in self.tags
            if name == tag
            and (wanted is None or wanted in found.get("class", "").split())
            and all(found.get(key) == value for key, value in attributes.items())
        ]


def svg_of(uri: str) -> str:
    """The SVG text of a data URI."""
    head, _, body = uri.partition(",")
    assert head == "data:image/svg+xml;base64"
    return base64.b64decode(body).decode("utf-8")


def browser() -> str:
    """The path of a Chromium; without one the test is skipped, or fails when GNOMON_REQUIRE_BROWSER=1."""
    for name in BROWSERS:
        if path := shutil.which(name):
            return path
    message = f"none of {', '.join(BROWSERS)} is on PATH"
    if os.environ.get("GNOMON_REQUIRE_BROWSER") == "1":
        pytest.fail(message)
    pytest.skip(message)


def dump_dom(url: str, profile: Path) -> str:
    """The document as the browser holds it after loading."""
    command = [
        browser(), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        f"--user-data-dir={profile}", "--virtual-time-budget=8000", "--dump-dom", url,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, timeout=120, check=False)
    text = done.stdout.decode("utf-8", errors="replace")
    assert "</html>" in text, f"the browser gave no document (exit {done.returncode}): {done.stderr[-800:]!r}"
    return text


_MEASURE = """
const result = {};
for (const frame of document.querySelectorAll('iframe')) {
  const doc = frame.contentDocument, root = doc.documentElement, wide = [];
  for (const node of doc.querySelectorAll('body *')) {
    if (node.closest('.scroll, pre, details:not([open]), .skip')) continue;
    if (node.getBoundingClientRect().right > root.clientWidth + 1) wide.push(node.tagName + '.' + node.className);
  }
  result[frame.width] = {
    inner: frame.contentWindow.innerWidth, scroll: root.scrollWidth, client: root.clientWidth, wide: wide,
    images: [...doc.images].map(i => [i.complete, i.naturalWidth, i.getBoundingClientRect().width]),
    stages: doc.querySelectorAll('tr.stage').length, effects: doc.querySelectorAll('tr.effect').length,
    claims: doc.querySelectorAll('tr.claim').length, scripts: doc.scripts.length,
    odd: doc.querySelectorAll('[onerror], img:not([src^="data:"])').length, hit: frame.contentWindow.hit === 1,
    cut: [...doc.querySelectorAll('.badge, .tile, h1, h2, h3, figcaption, p, li')]
      .filter(n => n.offsetParent && n.scrollWidth > n.clientWidth + 1 && getComputedStyle(n).display !== 'inline')
      .map(n => n.tagName + '.' + n.className),
  };
}
document.getElementById('measured').textContent = JSON.stringify(result);
"""


def measured(page: str, folder: Path, widths: tuple[int, ...] = (390, 1280)) -> dict[int, dict[str, Any]]:
    """Lay a page out at several widths in a real browser and return what it measured.

    Chromium's window is never narrower than 500 pixels, and the page itself carries no script and forbids any. So the
    page is put, unchanged, into frames of the wanted widths, and the measuring script stands in the document around
    them, which then is dumped.
    """
    frames = "".join(
        f'<iframe width="{width}" height="900" style="border:0" srcdoc="{html.escape(page)}"></iframe>'
        for width in widths
    )
    around = folder / "around.html"
    around.write_text(
        f"<!doctype html><html><body><pre id=measured></pre>{frames}"
        f"<script>addEventListener('load', () => {{{_MEASURE}}});</script></body></html>",
        encoding="utf-8",
    )
    dom = dump_dom(around.as_uri(), folder / "profile")
    found = re.search(r'<pre id="measured">(.*?)</pre>', dom, re.S)
    assert found, "the measuring script did not run"
    return {int(width): facts for width, facts in json.loads(html.unescape(found.group(1))).items()}
