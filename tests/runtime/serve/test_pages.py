"""The pages in headless Chromium: light and dark, a telephone's width, no console errors, a chat typed and answered."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import chromium
import pytest
from servers import Running, fake_llm, get, post, run_app


@pytest.fixture(scope="module")
def browser() -> Iterator[chromium.Browser]:
    if chromium.PROGRAM is None:
        pytest.skip("there is no chromium; apt-get install chromium")
    with chromium.Browser() as opened:
        yield opened


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1200, 380])
def test_the_status_page(fake: Running, browser: chromium.Browser, tmp_path: Path, dark: bool, width: int) -> None:
    fake.wait_ready()
    post(f"{fake.url}/v1/completions", {"prompt": "abc", "max_tokens": 5})
    browser.show(f"{fake.url}/", dark=dark, width=width)
    browser.wait("document.getElementById('state')?.textContent === 'ready'")
    assert browser.run("document.getElementById('model').textContent") == "fake"
    assert "time to first token" in browser.wait("document.getElementById('latencies').textContent")
    assert browser.run("document.querySelectorAll('.card b').length") >= 7
    assert browser.run("document.documentElement.scrollWidth <= innerWidth"), "the page is wider than the window"
    ground = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, ground[4:-1].split(","))) < 200) == dark, ground
    browser.picture(tmp_path / "status.png")
    assert browser.errors == []


def test_a_chat_is_typed_and_answered(fake: Running, browser: chromium.Browser, tmp_path: Path) -> None:
    fake.wait_ready()
    browser.show(f"{fake.url}/playground", dark=True, width=380)
    browser.wait("document.getElementById('model')?.textContent === 'fake'")
    browser.run("document.getElementById('max_tokens').value = 20; document.getElementById('question').focus()")
    browser.type("good day")
    browser.wait(
        "document.querySelectorAll('.message.assistant').length === 1 && !document.getElementById('send').hidden"
    )
    said = browser.run("[...document.querySelectorAll('.message')].map((m) => m.textContent)")
    assert said == ["good day", "<user> good day\n<ass"]
    assert "20 tokens" in browser.run("document.getElementById('state').textContent")
    browser.picture(tmp_path / "playground.png")
    browser.type("ZZZZ")  # a slow answer is stopped
    browser.wait("document.querySelectorAll('.message').length === 4")
    browser.run("document.getElementById('stop').click()")
    browser.wait("!document.getElementById('send').hidden")
    assert browser.errors == []


def test_a_key_is_asked_for_and_an_error_is_shown(browser: chromium.Browser) -> None:
    with run_app({"fake": fake_llm()}, api_key=("secret",)) as closed:
        browser.show(f"{closed.url}/", dark=False, width=1200)
        browser.wait("/API key/.test(document.getElementById('state')?.textContent)")
        assert browser.run("document.getElementById('access').open")
        browser.run("key.value = 'secret'; key.dispatchEvent(new Event('change'))")
        browser.wait("document.getElementById('state').textContent === 'ready'")
        assert all("401" in error for error in browser.errors)
        browser.errors.clear()


def test_pages_are_served_without_a_browser_too(fake: Running) -> None:
    for path, mark in (("/", "Playground"), ("/playground", "question"), ("/static/page.js", "statusPage")):
        status, text = get(fake.url + path)
        assert status == 200 and mark in text
    fake.wait_ready()
    status, told = get(f"{fake.url}/status")
    assert status == 200 and told["state"] == "ready" and told["startup_s"]
