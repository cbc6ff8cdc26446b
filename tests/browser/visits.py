"""What a visitor does with a node's pages in headless Chromium: `python -m tests.browser.visits NAME '{"door": URL}'`.

Rules: a process of its own, since Playwright's sync API runs an event loop inside. Each visit prints one JSON object of
what it saw, and leaves screenshots where it is told; tests/browser/test_pages.py judges. Whatever the console says
above `info`, every script error and every breach of the content policy is part of what was seen.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, Route, expect, sync_playwright

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
DESK, TELEPHONE = {"width": 1280, "height": 900}, {"width": 360, "height": 780}
WAIT_MS = 120_000  # a busy machine is slow, not wrong
HOSTILE = '<img src=x onerror="document.title=1">\n\n```html\n<script>document.title=2</script>\n```\nand `<b>`'
# what a page hides from this visit must not be seen: the policy's breaches are events of the document
WATCH_POLICY = """
window.breaches = [];
document.addEventListener('securitypolicyviolation', (event) => window.breaches.push(event.violatedDirective));
"""


def chromium() -> str | None:
    """Where a Chromium is, or None."""
    return next((path for name in CHROMIUM if (path := shutil.which(name))), None)


class Visitor:
    """A browser, the nodes' addresses, and what was complained about."""

    def __init__(self, browser: Browser, urls: dict[str, str], pictures: Path | None) -> None:
        self.browser = browser
        self.urls = urls
        self.complaints: list[str] = []
        self._pictures = pictures

    @contextmanager
    def page(self, path: str, *, node: str = "door", **context: Any) -> Iterator[Page]:
        """A page of a node, in a fresh profile."""
        made = self.browser.new_context(**{"viewport": DESK, **context})
        made.set_default_timeout(WAIT_MS)
        made.add_init_script(WATCH_POLICY)
        page = made.new_page()
        page.on("console", self._heard)
        page.on("pageerror", lambda error: self.complaints.append(f"script: {error}"))
        page.goto(self.urls[node] + path)
        yield page
        self.complaints += [f"policy: {breach}" for breach in page.evaluate("window.breaches")]
        made.close()

    def picture(self, page: Page, name: str) -> None:
        """Keep a screenshot, if they are wanted."""
        if self._pictures is not None:
            page.screenshot(path=self._pictures / f"{name}.png", full_page=True)

    def _heard(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(f"console: {message.text}")


def live(page: Page) -> None:
    """Wait until the dashboard is told by its node."""
    expect(page.locator("#live")).to_have_text("live")
    page.wait_for_selector(".tile")


def ask(page: Page, text: str, *, tokens: int | None = None) -> None:
    """Ask as a person does, and do not wait for the answer."""
    expect(page.locator("#model")).not_to_have_value("")
    if tokens is not None:
        page.click("#settings")
        page.fill("#tokens", str(tokens))
        page.click("#settings")
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")


def answered(page: Page) -> str:
    """Wait for the end of the last answer; its text."""
    page.wait_for_selector(".answer:not(.running) .acts")
    return page.locator(".answer .text").last.inner_text()


def dashboard(visitor: Visitor) -> dict[str, Any]:
    """The door's dashboard, before and after somebody asks the door."""
    with visitor.page("/") as page:
        live(page)
        page.wait_for_selector("#peers tbody tr")
        before = page.inner_text("#tiles")
        seen = {
            name: page.inner_text(f"#{name}") for name in ("headline", "peers", "model", "training", "health", "wait")
        }
        page.request.post(
            visitor.urls["door"] + "/v1/completions",
            data={"model": "default", "prompt": "Once upon a time", "max_tokens": 24},
            timeout=WAIT_MS,
        )
        expect(page.locator("#tiles")).to_contain_text("of 1 request")
        expect(page.locator("#wait")).to_contain_text("First token")
        after = page.inner_text("#tiles")
        page.wait_for_selector("#speed .line.first")
        page.click("#join")
        visitor.picture(page, "dashboard-door")
        return {**seen, "before": before, "after": after, "joining": page.inner_text("#joining")}


def chat(visitor: Visitor) -> dict[str, Any]:
    """An answer through the door, its parts; the picker; a retry; copy; a new chat."""
    with visitor.page("/chat", permissions=["clipboard-read", "clipboard-write"]) as page:
        expect(page.locator("#model")).not_to_have_value("")
        options = page.locator("#model option").all_inner_texts()
        page.evaluate(
            """window.grown = [];
            new MutationObserver(() => grown.push(document.querySelector('.answer .text')?.textContent.length))
              .observe(document.querySelector('#talk'), {childList: true, subtree: true, characterData: true})"""
        )
        ask(page, "Tell me a story", tokens=40)
        text = answered(page)
        grown = sorted({length for length in page.evaluate("grown") if length})
        who = page.inner_text(".who")
        page.click(".who >> text=Copy")
        page.wait_for_selector(".who >> text=Copied")
        copied = page.evaluate("navigator.clipboard.readText()")
        visitor.picture(page, "chat-door")
        page.click("button >> text=Try again")
        again = answered(page)
        page.click("#fresh")
        return {
            "options": options,
            "text": text,
            "grown": grown,
            "who": who,
            "copied": copied,
            "again": again,
            "turns": page.locator(".turn").count(),
            "spoken": page.inner_text("#spoken"),
        }


def stop(visitor: Visitor) -> dict[str, Any]:
    """A long answer that is stopped by the keyboard."""
    with visitor.page("/chat") as page:
        ask(page, "Tell me a long story", tokens=900)
        expect(page.locator(".answer .text")).to_have_text(re.compile(".{21,}", re.DOTALL))
        page.keyboard.press("Escape")
        page.wait_for_selector(".answer:not(.running)")
        return {"who": page.inner_text(".who"), "focus": page.evaluate("document.activeElement.id")}


def failing(visitor: Visitor) -> dict[str, Any]:
    """A request that the node refuses; a node that wants a key; a node that is gone."""
    with visitor.page("/chat") as page:
        expect(page.locator("#model")).not_to_have_value("")
        page.click("#settings")
        page.fill("#temperature", "99")
        page.keyboard.press("Escape")
        page.fill("#prompt", "hello")
        page.press("#prompt", "Enter")
        page.wait_for_selector(".failed:not([hidden])")
        refused = page.inner_text(".failed")
    complaints = [each for each in visitor.complaints if "400" not in each]  # the browser logs every status by itself
    visitor.complaints.clear()
    with visitor.page("/chat") as page:
        expect(page.locator("#model")).not_to_have_value("")
        page.route("**/v1/chat/completions", _wants_key)
        ask(page, "hello", tokens=8)
        page.wait_for_selector(".failed:not([hidden])")
        locked = page.inner_text(".failed")
        focus = page.evaluate("document.activeElement.id")
        page.fill("#api-key", "sk-right")
        page.press("#api-key", "Tab")
        page.click("button >> text=Try again")
        opened = answered(page)
        kept = page.evaluate("[Object.values(sessionStorage), Object.values(localStorage)]")
        page.route("**/v1/chat/completions", lambda route: route.abort())
        page.click("button >> text=Try again")
        page.wait_for_selector(".failed:not([hidden])")
        gone = page.inner_text(".failed")
    with visitor.page("/") as page:
        page.route("**/api/v1/events", _wants_key)
        page.reload()
        page.wait_for_selector("#key-field")
        asks = page.inner_text("dialog")
        page.fill("#key-field", "sk-wrong")
        page.click("dialog button")
        page.wait_for_selector("dialog .note")
        asks_again = page.inner_text("dialog")
    complaints += [each for each in visitor.complaints if "401" not in each and "ERR_FAILED" not in each]
    visitor.complaints[:] = complaints
    told = {"refused": refused, "locked": locked, "focus": focus, "opened": opened, "kept": kept, "gone": gone}
    return {**told, "asks": asks, "asks_again": asks_again}


def _wants_key(route: Route) -> None:
    if route.request.headers.get("authorization") == "Bearer sk-right":
        route.continue_()
    else:
        told = {"error": {"type": "authentication_error", "code": "no_key", "message": "this node wants an API key"}}
        route.fulfill(status=401, content_type="application/json", body=json.dumps(told))


def keyboard(visitor: Visitor) -> dict[str, Any]:
    """Every stop of the Tab key on both pages, with how its focus is shown."""
    seen: dict[str, Any] = {}
    for path in ("/", "/chat"):
        with visitor.page(path) as page:
            page.wait_for_selector(".tile" if path == "/" else ".welcome .button")
            page.evaluate("document.body.tabIndex = -1; document.body.focus()")  # as if the page were just opened
            stops = []
            for _ in range(12):
                page.keyboard.press("Tab")
                stops.append(page.evaluate(_FOCUS))
            seen[path] = stops
    return seen


_FOCUS = """(() => {
  const at = document.activeElement;
  if (at === document.body) return {name: '', shown: true};  // past the last stop: the browser's own
  const drawn = getComputedStyle(at);
  const frame = getComputedStyle(at.closest('.field') || at);
  return {name: at.id || at.textContent.trim(), shown: drawn.outlineStyle !== 'none' || frame.boxShadow !== 'none'};
})()"""


def itself(visitor: Visitor) -> dict[str, Any]:
    """The panel of the node's own state: a formula by the keyboard, the walk, and how often the node is asked."""
    with visitor.page("/", node="door") as page:
        live(page)
        page.wait_for_selector("#peers tbody tr")
        without = page.is_hidden("#self-card")
    with visitor.page("/", node="server") as page:
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url) if request.url.endswith("/api/v1/self") else None)
        live(page)
        group = page.locator("#self-fields details").filter(has=page.locator("summary", has_text=re.compile("^Load")))
        group.locator("summary").focus()
        page.keyboard.press("Enter")
        page.keyboard.press("Tab")
        name = group.locator(".member-name").first
        formula = group.locator(".formula").first
        expect(name).to_be_focused()
        expect(formula).to_be_visible()
        shown = {"formula": formula.inner_text(), "described": name.get_attribute("aria-describedby")}
        before = len(asked)
        with page.expect_request(lambda request: request.url.endswith("/api/v1/self")):
            pass
        expect(name).to_be_focused()
        page.keyboard.press("Escape")
        expect(formula).to_be_hidden()
        page.click("#self-verify")
        expect(page.locator("#self-verified")).to_contain_text("hole")
        page.evaluate(_SEEN, "hidden")
        page.wait_for_timeout(500)
        unseen = len(asked)
        page.wait_for_timeout(11_000)
        quiet = len(asked) - unseen
        with page.expect_request(lambda request: request.url.endswith("/api/v1/self")):
            page.evaluate(_SEEN, "visible")
        visitor.picture(page, "dashboard-self")
        return {
            **shown,
            "without": without,
            "again": len(asked) > before,
            "quiet": quiet,
            "now": page.inner_text("#self-now"),
            "before": page.inner_text("#self-before"),
            "load": group.inner_text(),
            "memory": page.inner_text("#self-memory"),
            "verified": page.inner_text("#self-verified"),
            "plots": page.locator("#self-plots svg").count(),
            "card": page.inner_text("#self-card"),
        }


_SEEN = """(state) => {
  Object.defineProperty(document, 'visibilityState', {value: state, configurable: true});
  document.dispatchEvent(new Event('visibilitychange'));
}"""


def text(visitor: Visitor) -> dict[str, Any]:
    """A hostile answer, as the page shows it; and what stands still for who wants no motion."""
    with visitor.page("/chat", reduced_motion="reduce") as page:
        shown = page.evaluate(
            """async (hostile) => {
              const {rendered} = await import('/static/render.js');
              const holder = document.createElement('div');
              document.body.append(holder);
              holder.append(...rendered(hostile));
              const names = [...holder.querySelectorAll('*')].map((each) => each.localName);
              return {names, text: holder.textContent};
            }""",
            HOSTILE,
        )
        moving = page.evaluate(
            """(() => {
              const answer = document.createElement('div');
              answer.className = 'answer running';
              answer.append(Object.assign(document.createElement('div'), {className: 'text'}));
              document.body.append(answer);
              return getComputedStyle(answer.firstChild, '::after').animationName;
            })()"""
        )
        return {**shown, "title": page.title(), "moving": moving}


def access(visitor: Visitor) -> dict[str, Any]:
    """axe-core on both pages of both nodes, in both schemes, at a desk and on a telephone; and what sticks out."""
    from axe_playwright_python.sync_playwright import Axe

    axe, seen = Axe(), {}
    for scheme in ("light", "dark"):
        for size, viewport in (("desk", DESK), ("telephone", TELEPHONE)):
            context: dict[str, Any] = {"viewport": viewport, "color_scheme": scheme, "bypass_csp": True}
            with visitor.page("/", node="server", **context) as page:
                live(page)
                page.click("#join")
                page.locator("#self-fields summary").first.click()
                page.locator("#self-fields .member-name").first.focus()
                seen[f"dashboard {scheme} {size}"] = _faults(axe, page)
                visitor.picture(page, f"dashboard-{scheme}-{size}")
            with visitor.page("/chat", node="server", **context) as page:
                ask(page, "Tell me a story", tokens=12)
                answered(page)
                page.click("#settings")
                seen[f"chat {scheme} {size}"] = _faults(axe, page)
                visitor.picture(page, f"chat-{scheme}-{size}")
    return seen


def _faults(axe: Any, page: Page) -> list[str]:
    found = axe.run(page).response["violations"]
    faults = [
        f"{each['id']}: {each['nodes'][0]['html'][:200]}" for each in found if each["impact"] in ("serious", "critical")
    ]
    wide = page.evaluate("document.documentElement.scrollWidth > innerWidth")
    return faults + (["the page is wider than the window"] if wide else [])


def ending(visitor: Visitor) -> dict[str, Any]:
    """A dashboard that is open while its node stops: reads a line from whoever stops it, then looks."""
    with visitor.page("/") as page:
        live(page)
        print("open", flush=True)
        sys.stdin.readline()
        expect(page.locator("#live")).to_have_class(re.compile("bad"))
        seen = {"live": page.inner_text("#live"), "headline": page.inner_text("#headline")}
    visitor.complaints[:] = [each for each in visitor.complaints if "ERR_" not in each]
    return seen


VISITS: dict[str, Callable[[Visitor], dict[str, Any]]] = {
    each.__name__: each for each in (dashboard, chat, stop, failing, keyboard, itself, text, access, ending)
}


def main(name: str, urls: str, pictures: str = "") -> None:
    """Make one visit; print what was seen."""
    expect.set_options(timeout=WAIT_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        visitor = Visitor(browser, json.loads(urls), Path(pictures) if pictures else None)
        seen = VISITS[name](visitor)
        browser.close()
    print(json.dumps({**seen, "complaints": visitor.complaints}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
