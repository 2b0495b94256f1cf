"""The live page's server: what it answers, whom it answers, and how it stops."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from starlette.testclient import TestClient

import regard
from regard.lens.look import look
from regard.lens.models import load
from regard.lens.payload import first_selection, payload
from regard.lens.server import HEADERS, LARGEST_BODY, View, application, bind
from tiny_folders import SENTENCE, make

pytest_plugins = ["page_browser"]
PORT = 8765
HOME = f"http://127.0.0.1:{PORT}"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load(str(make(tmp_path_factory.mktemp("tiny") / "bert", "bert")))


def view_of(loaded, text):
    seen = look(loaded, text)
    return View(seen, payload(seen, first_selection(seen, None, None, None), live=True))


@pytest.fixture
def client(loaded):
    app = application(view_of(loaded, SENTENCE), lambda text: view_of(loaded, text), PORT)
    with TestClient(app, base_url=HOME) as client:
        yield client


def test_the_page_its_payload_and_its_numbers_are_served(client, loaded):
    page = client.get("/")
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert 'id="regard-payload">null</script>' in page.text
    told = client.get("/api/payload").json()
    assert told["live"] is True
    assert told["text"] == SENTENCE
    weights = client.get("/api/blob/weights/0/2")
    assert weights.headers["x-shape"] == "4,13,13"
    assert weights.headers["x-dtype"] == "f32"
    expected = view_of(loaded, SENTENCE).look.recording.weights(2).numpy()
    assert np.array_equal(np.frombuffer(weights.content, "<f4").reshape(4, 13, 13), expected)
    assert client.get("/api/blob/thumbs/0").headers["x-dtype"] == "u8"
    for answer in (page, weights):
        for name, value in HEADERS.items():
            assert answer.headers[name] == value


@pytest.mark.parametrize(
    "path", ["/api/blob/weights/0/9", "/api/blob/..%2f..%2fetc%2fpasswd", "/api/blob/", "/etc", "/api/run/x"]
)
def test_what_is_not_there_is_not_found(client, path):
    answer = client.get(path)
    assert answer.status_code == 404


def test_another_text_is_run(client):
    answer = client.post("/api/run", json={"text": "it was a cat"})
    assert answer.status_code == 200
    assert answer.json()["text"] == "it was a cat"
    assert client.get("/api/payload").json() == answer.json()
    assert client.get("/api/blob/weights/0/0").headers["x-shape"] == "4,6,6"


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b'{"text": "  "}', 422, "Text must have a word in it; got an empty one. Pass a sentence."),
        (b'{"text": "' + b"cat " * 30 + b'"}', 422, "Text must be at most 24 tokens for bert; got 32. Make it "
         "shorter."),
        (b"{", 400, 'Send {"text": "a sentence"}.'),
        (b"\xff", 400, 'Send {"text": "a sentence"}.'),
        (b"[" * 100_000, 400, 'Send {"text": "a sentence"}.'),
        (b'{"text": 7}', 400, 'Send {"text": "a sentence"}.'),
        (b'["text"]', 400, 'Send {"text": "a sentence"}.'),
        (b'{"text": "' + b"a" * LARGEST_BODY + b'"}', 413, f"The text is longer than {LARGEST_BODY:,} bytes. Send a "
         "shorter one."),
    ],
)  # fmt: skip
def test_a_text_that_cannot_be_run_changes_nothing(client, body, status, message):
    before = client.get("/api/payload").json()
    answer = client.post("/api/run", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == status
    assert answer.json() == {"error": message}
    assert client.get("/api/payload").json() == before


def test_a_model_that_fails_is_reported_and_the_server_goes_on(loaded):
    def fail(_text):
        raise RuntimeError("out of luck")

    with TestClient(application(view_of(loaded, SENTENCE), fail, PORT), base_url=HOME) as client:
        answer = client.post("/api/run", json={"text": "cat"})
        assert answer.status_code == 500
        assert answer.json() == {"error": "The model failed: RuntimeError: out of luck"}
        assert client.get("/api/payload").status_code == 200


def test_tiles_and_rows_of_a_map_are_served_and_what_there_is_not_is_refused(client, loaded):
    expected = view_of(loaded, SENTENCE).look.recording.weights(2, head=1).numpy()
    tile = client.get("/api/blob/tile/0/2/1/max/0/0/0")
    assert (tile.headers["x-shape"], tile.headers["x-dtype"], tile.headers["x-share"]) == ("13,13", "f32", "1.0000")
    assert np.array_equal(np.frombuffer(tile.content, "<f4").reshape(13, 13), expected)
    row = client.get("/api/blob/row/0/2/1/4/5")
    assert np.array_equal(np.frombuffer(row.content, "<f4"), expected[4])
    for path, message in [
        ("tile/0/2/1/max/7/0/0", "Level must be from 0 to 0; got 7. Choose one of those."),
        ("tile/0/2/9/max/0/0/0", "Head must be from 0 to 3; got 9. Choose one of those."),
        ("tile/0/2/1/max/0/5/0", "Row of tiles must be from 0 to 0; got 5. Choose one of those."),
        ("row/0/2/1/4/900", "Row must be a range of at most 256 tokens below 13; got 4 to 900. Ask for less."),
    ]:
        refused = client.get(f"/api/blob/{path}")
        assert refused.status_code == 400
        assert refused.json() == {"error": message}
    assert client.get("/api/payload").status_code == 200


def test_a_thousand_tiles_at_once_are_refused_and_the_session_goes_on(loaded, monkeypatch):
    waiting, held = threading.Event(), threading.Semaphore(0)

    def slow(_self, _key):
        held.release()
        waiting.wait(20)

    monkeypatch.setattr("regard.lens.maps.Maps.answer", slow)
    app = application(view_of(loaded, SENTENCE), lambda text: view_of(loaded, text), PORT)
    with TestClient(app, base_url=HOME) as client:
        answers = []
        ask = lambda: answers.append(client.get("/api/blob/tile/0/0/0/max/0/0/0").status_code)  # noqa: E731
        threads = [threading.Thread(target=ask) for _ in range(24)]
        for thread in threads:
            thread.start()
        for _ in threads:
            assert held.acquire(timeout=20)
        refused = client.get("/api/blob/tile/0/0/0/max/0/0/0")
        assert refused.status_code == 429
        assert refused.json() == {"error": "More than 24 requests at once. Ask again when some are answered."}
        waiting.set()
        for thread in threads:
            thread.join()
        assert answers == [404] * 24
        assert client.get("/api/blob/weights/0/0").status_code == 200


def test_a_page_whose_text_was_replaced_is_told_to_reload(client):
    serial = client.get("/api/payload").json()["serial"]
    assert client.get(f"/api/blob/weights/0/0?serial={serial}").status_code == 200
    assert client.post("/api/run", json={"text": "it was a cat"}).json()["serial"] == serial + 1
    stale = client.get(f"/api/blob/weights/0/0?serial={serial}")
    assert stale.status_code == 409
    assert stale.json() == {"error": "Another text was opened on this server since. Reload the page."}


def test_another_text_of_a_recording_is_turned_to(loaded):
    texts = [SENTENCE, "it was a cat"]

    def turn(index):
        if not 0 <= index < 2:
            raise ValueError(f"look: window must be from 0 to 1; got {index}. Choose one of those.")
        return view_of(loaded, texts[index])

    app = application(view_of(loaded, SENTENCE), lambda text: view_of(loaded, text), PORT, turn=turn)
    with TestClient(app, base_url=HOME) as client:
        assert client.post("/api/window", json={"index": 1}).json()["text"] == "it was a cat"
        refused = client.post("/api/window", json={"index": 7})
        assert refused.status_code == 422
        assert refused.json() == {"error": "Window must be from 0 to 1; got 7. Choose one of those."}
        assert client.post("/api/window", json={"index": True}).status_code == 400
        assert client.get("/api/payload").json()["text"] == "it was a cat"


def test_a_server_of_one_text_turns_to_no_other(client):
    assert client.post("/api/window", json={"index": 0}).json() == {
        "error": "There is one text here. Open a recording of several."
    }


def test_a_question_about_the_text_is_answered_or_refused_in_a_sentence(loaded, client):
    assert client.post("/api/effects", json={"cuts": []}).status_code == 404
    asked = []

    def ask(look, given):
        if given["head"] > 3:
            raise ValueError("effects: head must be from 0 to 3; got 9. Choose one of those.")
        asked.append((look.text, given))
        return {"measure": "KL divergence, nats"}

    view = view_of(loaded, SENTENCE)
    with TestClient(application(view, lambda _text: view, PORT, None, {"effects": ask}), base_url=HOME) as other:
        assert other.get("/api/payload").json()["asks"] == ["effects"]
        assert other.post("/api/effects", json={"head": 2}).json() == {"measure": "KL divergence, nats"}
        assert asked == [(SENTENCE, {"head": 2})]
        refused = other.post("/api/effects", json={"head": 9})
        assert refused.status_code == 422
        assert refused.json() == {"error": "Head must be from 0 to 3; got 9. Choose one of those."}
        assert other.post("/api/effects", json={"head": 2, "text": "it was a dog"}).status_code == 409


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "example.org"},
        {"host": f"example.org:{PORT}"},
        {"host": "127.0.0.1:1"},
        {"host": "127.0.0.1"},
        {"host": f"127.0.0.1:{PORT}.example.org"},
        {"origin": "http://example.org"},
        {"origin": "null"},
        {"origin": f"https://127.0.0.1:{PORT}"},
        {"origin": f"http://127.0.0.1:{PORT + 1}"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
@pytest.mark.parametrize("path", ["/", "/api/payload", "/api/blob/thumbs/0", "/api/run"])
def test_other_sites_and_other_names_are_refused(client, headers, path):
    answer = (
        client.post(path, json={"text": "cat"}, headers=headers) if "run" in path else client.get(path, headers=headers)
    )
    assert answer.status_code == 403
    assert answer.json() == {"error": f"Open http://127.0.0.1:{PORT}/ on this machine."}
    assert client.get("/api/payload").json()["text"] == SENTENCE


@pytest.mark.parametrize("origin", [f"http://127.0.0.1:{PORT}", f"http://localhost:{PORT}"])
def test_the_page_itself_is_answered(client, origin):
    headers = {"origin": origin, "sec-fetch-site": "same-origin", "host": origin.removeprefix("http://")}
    assert client.post("/api/run", json={"text": "it was a cat"}, headers=headers).status_code == 200


def test_a_form_of_another_site_cannot_post(client):
    answer = client.post("/api/run", content=b'{"text": "cat"}', headers={"content-type": "text/plain"})
    assert answer.status_code == 415
    assert client.get("/api/run").status_code == 405


def test_a_port_in_use_is_refused_and_the_default_moves_on():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        with pytest.raises(ValueError, match=rf"--port must be free; got {taken}, which another program uses. Choose"):
            bind(taken)
    for wrong in (0, -1, 65536):
        with pytest.raises(ValueError, match=rf"--port must be from 1 to 65535; got {wrong}. Choose another"):
            bind(wrong)
    first, second = bind(None), bind(None)
    try:
        assert first.getsockname()[0] == second.getsockname()[0] == "127.0.0.1"
        assert first.getsockname()[1] != second.getsockname()[1]
    finally:
        first.close()
        second.close()


def test_the_command_serves_and_ctrl_c_ends_it_cleanly(loaded, tmp_path):
    folder = make(tmp_path / "bert", "bert")
    with bind(None) as free:
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(Path(regard.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "regard.cli",
        "look",
        SENTENCE,
        "--model",
        str(folder),
        "--port",
        str(port),
        "--no-browser",
    ]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        try:
            answer = wait_for(port, run)
            assert answer["text"] == SENTENCE
            with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as held:
                held.request("GET", "/")  # a connection that stays open
                assert held.getresponse().read().startswith(b"<!doctype html>")
                run.send_signal(signal.SIGINT)
                out, err = run.communicate(timeout=30)
        finally:
            run.kill()
    assert run.returncode == 0
    assert f"http://127.0.0.1:{port}/" in out
    assert err == ""


def wait_for(port, run):
    for _ in range(600):
        assert run.poll() is None, run.stderr.read()
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        try:
            connection.request("GET", "/api/payload")
            return json.loads(connection.getresponse().read())
        except OSError:
            time.sleep(0.1)
        finally:
            connection.close()
    raise AssertionError("the server did not answer")


@pytest.fixture
def running(tmp_path):
    """A function that serves a look at a tiny model in a thread; the address."""
    from regard.lens.server import serve

    opened = []

    def start(kind, text, target=None):
        model = load(str(make(tmp_path / kind, kind)))
        seen = look(model, text, target)
        view = View(seen, payload(seen, first_selection(seen, None, None, None), live=True))
        listening = bind(None)
        ready = threading.Event()
        arguments = (listening, view, lambda new: view_of(model, new), lambda _address: ready.set())
        thread = threading.Thread(target=serve, args=arguments, daemon=True)
        thread.start()
        assert ready.wait(30)
        opened.append(thread)
        return f"http://127.0.0.1:{listening.getsockname()[1]}/"

    return start


@pytest.mark.browser
def test_the_real_page_runs_on_the_real_server(open_page, running, tmp_path):
    page = open_page(address=running("bert", SENTENCE))
    page.get_by_role("button", name="tired", exact=True).click()
    page.locator("path[data-from][data-to]").first.wait_for(state="attached")
    assert "= 100 %" in page.get_by_role("region", name="inspector").inner_text()
    page.get_by_role("textbox").first.fill("a cat and a dog")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="dog", exact=True).click()
    assert page.get_by_role("button", name="tired", exact=True).count() == 0
    page.get_by_role("textbox").first.fill("cat " * 40)
    page.keyboard.press("Enter")
    page.get_by_text("at most 24 tokens").first.wait_for()
    open_page.troubles[:] = [trouble for trouble in open_page.troubles if "422" not in trouble]


@pytest.mark.browser
def test_cross_attention_is_one_switch_from_self_attention(open_page, running):
    page = open_page(address=running("t5", SENTENCE, "it was a cat"))
    page.get_by_role("button", name="tired", exact=True).wait_for()
    assert page.get_by_role("button", name="was", exact=True).count() == 2  # in the source and in the target
    chosen = page.get_by_text("cross-attention")
    assert chosen.count() >= 1
