"""The live page: it fetches its numbers, runs a new sentence, says what failed, and saves what is seen."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from page_fixture import DTYPES, PAGE, decoder_recording, encoder_recording, merged

pytest_plugins = ["page_browser"]
pytestmark = pytest.mark.browser

IT, CAT = 8, 2


class Server:
    """A stand-in for the live server: the page, a payload, blobs, and answers to new texts."""

    def __init__(self, payload, blobs):
        self.payload, self.blobs = {**payload, "live": True}, blobs
        self.answers, self.asked, self.wait = [], [], threading.Event()
        self.wait.set()
        self.broken = False
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def reply(self, status, body, kind="application/json", **headers):
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self):
                if self.path == "/":
                    return self.reply(200, (PAGE / "index.html").read_bytes(), "text/html; charset=utf-8")
                if self.path == "/api/payload":
                    if outer.broken:
                        return self.reply(500, b'{"error": "The model is gone."}')
                    return self.reply(200, json.dumps(outer.payload).encode())
                blob = outer.blobs.get(self.path.removeprefix("/api/blob/"))
                if blob is None:
                    return self.reply(404, b'{"error": "no such numbers"}')
                shape = ",".join(map(str, blob.shape))
                return self.reply(
                    200, blob.tobytes(), "application/octet-stream", X_Shape=shape, X_Dtype=DTYPES[blob.dtype.str]
                )

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                text = json.loads(body)["text"] if self.path == "/api/run" else body
                outer.asked.append(text)
                outer.wait.wait(20)
                status, answer, blobs = outer.answers.pop(0)
                if blobs is not None:
                    outer.blobs = blobs
                self.reply(status, json.dumps(answer).encode())

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self.http.server_port}/"

    def close(self):
        self.wait.set()
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def server():
    one = Server(*encoder_recording(IT))
    yield one
    one.close()


def forget_expected(open_page, part):
    """Chromium itself complains about answers of 4xx and 5xx; those a test asks for are no trouble."""
    open_page.troubles[:] = [trouble for trouble in open_page.troubles if part not in trouble]


def widths(page):
    return page.locator("path[data-from]").evaluate_all(
        "paths => paths.map(p => [+p.dataset.from, +p.dataset.to, parseFloat(p.getAttribute('stroke-width'))])"
    )


def test_a_live_page_fetches_its_numbers(open_page, server):
    page = open_page(address=server.address)
    page.locator("path[data-from]").first.wait_for(state="attached")
    assert max(widths(page), key=lambda line: line[2])[:2] == [IT, CAT]
    page.get_by_role("button", name=re.compile("^how .* came about$")).click()
    page.get_by_text(re.compile("softmax → ")).wait_for()
    forget_expected(open_page, "404")


def test_enter_runs_the_new_sentence_and_shows_progress(open_page, server):
    page = open_page(address=server.address)
    page.locator("button.word").first.wait_for()
    payload, blobs = decoder_recording()
    server.answers.append((200, {**payload, "live": True}, blobs))
    server.wait.clear()
    field = page.get_by_label("text", exact=True)
    field.fill("One day a small fox")
    field.press("Enter")
    page.get_by_text("Reading the sentence with all-MiniLM-L6-v2").wait_for()
    server.wait.set()
    page.get_by_role("button", name="fox", exact=True).first.wait_for()
    assert server.asked == ["One day a small fox"]
    assert page.locator("button.head").count() == 36
    page.get_by_role("button", name="fox", exact=True).first.click()
    page.locator("path[data-from]").first.wait_for(state="attached")


@pytest.mark.parametrize(
    ("status", "sentence", "title"),
    [
        (422, "The text has 900 tokens; all-MiniLM-L6-v2 reads at most 512. Shorten it.", "Too long."),
        (500, "The model failed: out of memory.", "The model could not read this."),
    ],
)
def test_a_refused_sentence_is_said_and_the_old_one_stays(open_page, server, status, sentence, title):
    page = open_page(address=server.address)
    page.locator("button.word").first.wait_for()
    server.answers.append((status, {"error": sentence}, None))
    field = page.get_by_label("text", exact=True)
    field.fill("something")
    field.press("Enter")
    alert = page.get_by_role("alert")
    alert.wait_for()
    assert title in alert.inner_text() and sentence in alert.inner_text()
    assert page.get_by_role("button", name="cat", exact=True).count() == 1
    assert field.input_value() == "something"
    forget_expected(open_page, str(status))


def test_an_empty_sentence_never_reaches_the_model(open_page, server):
    page = open_page(address=server.address)
    field = page.get_by_label("text", exact=True)
    field.fill("   ")
    field.press("Enter")
    page.get_by_text("Type a sentence").wait_for()
    assert server.asked == []


def test_a_server_that_stopped_is_named(open_page, server):
    page = open_page(address=server.address)
    page.locator("button.word").first.wait_for()
    server.close()
    field = page.get_by_label("text", exact=True)
    field.press("Enter")
    page.get_by_text("The server is not running any more").wait_for()
    forget_expected(open_page, "ERR_CONNECTION")


def test_a_page_without_its_recording_says_what_to_do(open_page, server):
    server.broken = True
    page = open_page(address=server.address)
    page.get_by_text("The model is gone.").wait_for()
    assert "start it again with regard look" in page.get_by_role("alert").inner_text()
    forget_expected(open_page, "500")


def saved_as(page, kind):
    page.get_by_role("button", name="save this view").click()
    with page.expect_download() as download:
        page.get_by_role("button", name=re.compile(f"^{kind}")).click()
    return download.value


def test_a_live_view_saves_as_a_page_that_opens_without_network(open_page, server, tmp_path):
    page = open_page(address=server.address)
    page.get_by_role("button", name="layer 3 head 1", exact=True).first.click()
    page.get_by_role("button", name="it", exact=True).click()
    page.locator("path[data-from]").first.wait_for(state="attached")
    download = saved_as(page, "HTML")
    download.save_as(tmp_path / "saved.html")
    assert download.suggested_filename == "regard-layer3-head1.html"
    again = open_page((tmp_path / "saved.html").read_text(encoding="utf-8"))
    again.locator("path[data-from]").first.wait_for(state="attached")
    assert again.locator('button.word[aria-pressed="true"]').get_attribute("aria-label") == "it"
    row = merged(*encoder_recording(), 0, 3, 1)[IT]
    assert max(widths(again), key=lambda line: line[2])[1] == int(np.argmax(row))
    once_more = saved_as(again, "HTML")
    once_more.save_as(tmp_path / "twice.html")
    assert '"view":"#l=3&h=1&w=0.8&pins=0.8"' in (tmp_path / "twice.html").read_text(encoding="utf-8")


def test_svg_png_and_json_are_this_view(open_page, server, tmp_path):
    page = open_page(address=server.address)
    page.locator("path[data-from]").first.wait_for(state="attached")
    saved_as(page, "SVG").save_as(tmp_path / "a.svg")
    svg = (tmp_path / "a.svg").read_text(encoding="utf-8")
    drawn = [
        [float(v) for v in found]
        for found in re.findall(r'stroke-width="([\d.]+)"[^>]*data-from="8" data-to="(\d+)"', svg)
    ]
    assert sorted((to, width) for width, to in drawn) == sorted((to, width) for _, to, width in widths(page))
    saved_as(page, "PNG").save_as(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    saved_as(page, "JSON").save_as(tmp_path / "a.json")
    view = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert view["format"] == "regard-view/1"
    np.testing.assert_allclose(view["heads"][0]["weights"], merged(*encoder_recording(), 0, 5, 11), atol=1e-6)
    assert view["heads"][0]["links"][0]["links"][0]["text"] == "cat"
