"""A browser for the page's tests.

In: Chromium (REGARD_CHROMIUM, or on PATH), Playwright. Out: `open_page`, which opens HTML from disk with the network
off, and fails the test if the page raises, complains on the console, or asks the network for anything.
Floor: tests only.
"""

import os
import shutil

import pytest

ARGUMENTS = ["--headless", "--no-sandbox", "--use-angle=swiftshader", "--disable-background-networking"]


@pytest.fixture(scope="session")
def chromium():
    """A running headless Chromium."""
    names = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable"]
    path = os.environ.get("REGARD_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if path is None:
        if os.environ.get("REGARD_REQUIRE_BROWSER"):
            pytest.fail("Chromium must be there: REGARD_REQUIRE_BROWSER is set.")
        pytest.skip("needs tool: chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs tool: playwright")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium, tmp_path):
    """A function that opens a page: HTML text, written to disk and opened with the network off, or an address."""
    contexts, troubles = [], []

    def opened(html=None, *, address=None, view="", width=1280, height=800, theme="light", motion="no-preference"):
        context = chromium.new_context(
            viewport={"width": width, "height": height},
            color_scheme=theme,
            reduced_motion=motion,
            offline=address is None,
            accept_downloads=True,
        )
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: troubles.append(f"error: {error}"))
        page.on(
            "console",
            lambda said: troubles.append(f"{said.type}: {said.text}") if said.type in ("error", "warning") else None,
        )
        if address is None:
            file = tmp_path / f"page{len(contexts)}.html"
            file.write_text(html, encoding="utf-8")
            address = file.as_uri()
            allowed = ("file:", "data:", "blob:")
        else:
            allowed = (address, "data:", "blob:")
        page.on(
            "request", lambda asked: None if asked.url.startswith(allowed) else troubles.append(f"network: {asked.url}")
        )
        page.goto(address + view)
        return page

    opened.troubles = troubles
    yield opened
    for context in contexts:
        context.close()
    assert troubles == []
