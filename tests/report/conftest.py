"""A real browser, and a page opened in it. Nothing may be fetched, and the console stays empty."""

import os
import shutil

import pytest

from ckptconv.report.html import render

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ARGUMENTS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync"]  # fmt: skip


@pytest.fixture(scope="session")
def browser():
    if CHROMIUM is None:
        reason = "no chromium is installed; scripts/system_packages.sh as root installs Debian's"
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield started
        started.close()


@pytest.fixture
def show(browser, tmp_path):
    """Opens a page; afterwards, nothing must have been fetched, and the console must be empty."""
    heard, fetched, opened = [], [], []

    def open_page(page, **options):
        path = tmp_path / "page.html"
        path.write_text(render(page), encoding="utf-8")
        context = browser.new_context(**{"viewport": {"width": 1300, "height": 800}, **options})
        tab = context.new_page()
        tab.set_default_timeout(10_000)
        opened.append(context)
        tab.on("console", lambda message: heard.append(message.text))
        tab.on("pageerror", lambda error: heard.append(str(error)))
        tab.on("request", lambda request: fetched.append(request.url))
        tab.goto(path.as_uri())
        return tab

    yield open_page
    for context in opened:
        context.close()
    assert heard == []
    assert [url for url in fetched if not url.startswith("data:")] == [(tmp_path / "page.html").as_uri()] * len(opened)
