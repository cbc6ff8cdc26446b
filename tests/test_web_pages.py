"""The pages' files: what is served, how, and that nothing else can be."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from html.parser import HTMLParser
from pathlib import Path
from random import Random

import httpx
import pytest
from starlette.requests import Request

from node.web.app import build_app
from node.web.errors import NotFound
from node.web.pages import CONTENT_POLICY, STATIC, TYPES, Pages, read_files
from p2p.reach import Verdict
from tests.fake_front import FakeFront
from tests.test_house import FILE_LINES_MAX

FILES = sorted(path.name for path in STATIC.iterdir())
TEXT_BYTES_MAX = 110_000  # of all together: a page opens at once, on a telephone too


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=build_app(FakeFront(), Random(7)), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8765") as client:
        yield client


@pytest.mark.parametrize("path", ["/", "/chat", *(f"/static/{name}" for name in FILES)])
async def test_a_file_is_served_with_its_type_and_kept_by_its_digest(http: httpx.AsyncClient, path: str) -> None:
    response = await http.get(path)
    suffix = Path(path).suffix or ".html"
    assert response.status_code == 200
    assert response.headers["content-type"] == TYPES[suffix]
    assert response.headers["content-security-policy"] == CONTENT_POLICY
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-content-type-options"] == "nosniff"
    tag = response.headers["etag"]
    again = await http.get(path, headers={"if-none-match": f'"old", W/{tag}'})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    assert (await http.get(path, headers={"if-none-match": '"old"'})).status_code == 200
    head = await http.head(path)
    assert (head.status_code, head.headers["etag"]) == (200, tag)
    assert (await http.post(path, json={})).status_code == 405


@pytest.mark.parametrize(
    "name",
    [
        "../app.py",
        "..%2fapp.py",
        "%2e%2e/app.py",
        "%2e%2e%2f%2e%2e%2frun.py",
        "..%5capp.py",
        "/etc/passwd",
        "%2fetc%2fpasswd",
        "dashboard.html%00.js",
        "dashboard.html/",
        ".",
        "",
        "nothing.js",
    ],
)
async def test_nothing_else_can_be_had(http: httpx.AsyncClient, name: str) -> None:
    response = await http.get(f"http://127.0.0.1:8765/static/{name}")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "not_found"
    assert "import" not in response.text


@pytest.mark.parametrize("name", ["../pages.py", "..\\pages.py", "/etc/passwd", "../../../pyproject.toml", ""])
async def test_a_name_is_looked_up_and_never_joined_to_a_path(name: str) -> None:
    """Were the route to let a slash through: the table has no such name."""
    request = Request({"type": "http", "headers": [], "path_params": {"name": name}})
    with pytest.raises(NotFound):
        await Pages(read_files(STATIC)).file(request)


def test_only_files_of_known_types_are_read(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("<p>")
    (tmp_path / "secret.key").write_text("no")
    (tmp_path / "folder.js").mkdir()
    assert list(read_files(tmp_path)) == ["page.html"]
    assert {Path(name).suffix for name in FILES} <= set(TYPES), "a file that nobody can get"


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.faults: list[str] = []
        self.files: list[str] = []
        self._script = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.faults += [name for name in named if name.startswith("on") or name == "style"]
        self.faults += ["style"] if tag == "style" else []
        self._script = tag == "script"
        for name in ("src", "href"):
            if (value := named.get(name)) is not None and not value.startswith("#"):
                self.files.append(value)

    def handle_data(self, data: str) -> None:
        if self._script and data.strip():
            self.faults.append("inline script")

    def handle_endtag(self, tag: str) -> None:
        self._script = False


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".html")])
async def test_a_page_has_nothing_inline_and_all_that_it_names_is_there(http: httpx.AsyncClient, name: str) -> None:
    page = Page()
    page.feed((STATIC / name).read_text())
    assert page.faults == []
    for file in page.files:
        assert file.startswith("/"), f"{file} is of another host"
        if not file.startswith("/metrics"):
            assert (await http.get(file)).status_code == 200, file


@pytest.mark.parametrize("name", FILES)
def test_no_other_host_no_text_as_html_and_every_import_is_there(name: str) -> None:
    text = (STATIC / name).read_text()
    assert len(text.splitlines()) <= FILE_LINES_MAX
    assert set(re.findall(r"(?:https?:)?//[a-z0-9.-]+\.[a-z]+[^\s\"']*", text)) <= {"http://www.w3.org/2000/svg"}
    for word in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "new Function",
        "localStorage",
    ):
        assert word not in text
    for module in re.findall(r'from "(.+?)"', text):
        assert module.startswith("./")
        assert module.removeprefix("./") in FILES


def test_the_pages_are_light() -> None:
    assert sum((STATIC / name).stat().st_size for name in FILES) <= TEXT_BYTES_MAX


def test_every_verdict_on_reach_has_its_words() -> None:
    told = (STATIC / "panels.js").read_text().split("const REACH = {")[1].split("};")[0]
    assert set(re.findall(r"^  (\w+):", told, re.MULTILINE)) == set(Verdict)
