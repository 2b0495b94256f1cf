"""The live page's questions: what a cut changes, over the server, and what it refuses."""

import json

import pytest
import torch
from starlette.testclient import TestClient

from regard.lens import Edge, Head, Span, effects
from regard.lens.asking import ASKS, inputs_of
from regard.lens.look import look
from regard.lens.models import load
from regard.lens.payload import first_selection, payload
from regard.lens.server import View, application
from tiny_folders import SENTENCE, make

HOME = "http://127.0.0.1:8765"


@pytest.fixture(scope="module", params=["bert", "llama", "t5"])
def seen(request, tmp_path_factory):
    return look(load(str(make(tmp_path_factory.mktemp("tiny") / request.param, request.param))), SENTENCE)


@pytest.fixture
def client(seen):
    view = View(seen, payload(seen, first_selection(seen, None, None, None), live=True))
    with TestClient(application(view, lambda text: view, 8765, None, ASKS), base_url=HOME) as client:
        yield client


def test_a_cut_is_measured_as_in_python(client, seen):
    kinds = [attention.kind for attention in seen.attentions]
    at = kinds.index("cross") if "cross" in kinds else 0
    groups = [
        [{"type": "edge", "attention": at, "layer": 1, "head": 2, "query": 3, "key": 1}],
        [{"type": "head", "attention": 0, "layer": 0, "head": 1}, {"type": "span", "side": 0, "start": 1, "stop": 3}],
    ]
    answer = client.post("/api/effects", json={"text": SENTENCE, "cuts": groups, "controls": 4, "ablation": "mean"})
    assert answer.status_code == 200, answer.text
    told = answer.json()
    cuts = [[Edge(1, 2, 3, 1, kinds[at])], [Head(0, 1, kinds[0]), Span(1, 3, seen.sides[0].name)]]
    found = effects(
        seen.loaded.model, inputs_of(seen), cuts, controls=4, ablation="mean", tokenizer=seen.loaded.tokenizer
    )
    assert [one["cuts"] for one in told["effects"]] == groups
    assert [one["size"] for one in told["effects"]] == [one.size for one in found.effects]
    assert told["effects"][0]["control"]["count"] == 4
    assert told["task"] == found.task
    assert told["effects"][0]["weight"] == pytest.approx(
        float(seen.recording.weights(1, 2, kind=kinds[at])[3, 1]), abs=1e-6
    )
    assert (told["target"] is None) == (seen.loaded.id == "bert")


EDGE = {"type": "edge", "attention": 0, "layer": 1, "head": 2, "query": 3, "key": 1}


@pytest.mark.parametrize(
    ("asked", "status", "message"),
    [
        ([], 400, "Send a JSON object."),
        ({}, 422, "Cuts must be a list of 1 to 64 lists"),
        ({"cuts": [[]]}, 422, "Each of the cuts must be a list of 1 to 64"),
        ({"cuts": [[EDGE]] * 65}, 422, "Cuts must be a list of 1 to 64 lists"),
        ({"cuts": [[7]]}, 422, 'A cut must be an object with a "type"'),
        ({"cuts": [[{"type": "hammer"}]]}, 422, 'The type of a cut must be "edge", "head" or "span"; got \'hammer\'.'),
        ({"cuts": [[{**EDGE, "layer": 99}]]}, 422, "Layer must be from 0 to "),
        ({"cuts": [[{**EDGE, "head": 4}]]}, 422, "Head must be from 0 to 3; got 4."),
        ({"cuts": [[{**EDGE, "key": 1000}]]}, 422, "Key must be from 0 to "),
        ({"cuts": [[{**EDGE, "key": 1.5}]]}, 422, "Key must be a whole number of 0 or more; got 1.5."),
        ({"cuts": [[{**EDGE, "key": -1}]]}, 422, "Key must be a whole number of 0 or more; got -1."),
        ({"cuts": [[{**EDGE, "query": True}]]}, 422, "Query must be a whole number of 0 or more; got True."),
        ({"cuts": [[{**EDGE, "attention": 9}]]}, 422, "Attention must be from 0 to "),
        ({"cuts": [[{"type": "span", "side": 0, "start": 3, "stop": 2}]]}, 422, "A span must lie within 0 to "),
        ({"cuts": [[{"type": "span", "side": 5, "start": 3, "stop": 2}]]}, 422, "Side must be from 0 to "),
        ({"cuts": [[EDGE]], "ablation": "x" * 9}, 422, 'Ablation must be "zero" or "mean"; got \'xxxxxxxxx\'.'),
        ({"cuts": [[EDGE]], "ablation": 3}, 422, 'Ablation must be "zero" or "mean"'),
        ({"cuts": [[EDGE]], "seed": "a"}, 422, "Seed must be a whole number of 0 or more; got a."),
        ({"cuts": [[EDGE]], "text": "another"}, 409, "Another text is shown by now. Reload the page."),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_refused_and_the_session_goes_on(client, asked, status, message):
    answer = client.post("/api/effects", json=asked)
    assert answer.status_code == status
    assert answer.json()["error"].startswith(message)
    assert client.get("/api/payload").status_code == 200


def test_an_edge_above_the_causal_line_is_refused(client, seen):
    causal = [n for n, attention in enumerate(seen.attentions) if attention.causal]
    if not causal:
        return
    ahead = {**EDGE, "attention": causal[0], "query": 0, "key": 1}
    answer = client.post("/api/effects", json={"cuts": [[ahead]]})
    assert answer.status_code == 422
    assert answer.json()["error"].startswith("The query must see the key; got query 0 and key 1 with weight 0")


def test_another_origin_and_other_bodies_are_refused(client):
    body = json.dumps({"cuts": [[EDGE]]})
    headers = {"content-type": "application/json", "origin": "http://example.org"}
    assert client.post("/api/effects", content=body, headers=headers).status_code == 403
    assert client.post("/api/effects", content=body, headers={"content-type": "text/plain"}).status_code == 415
    assert client.post("/api/effects", content="{", headers={"content-type": "application/json"}).status_code == 400
    assert client.get("/api/effects").status_code == 405


def test_a_speech_model_is_refused(tmp_path):
    import wave

    sound = tmp_path / "tone.wav"
    with wave.open(str(sound), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes((torch.sin(torch.arange(16000) * 0.1) * 9000).to(torch.int16).numpy().tobytes())
    heard = look(load(str(make(tmp_path / "whisper", "whisper"))), str(sound))
    with pytest.raises(ValueError, match="effects: model must read tokens; got whisper, whose input is not kept."):
        inputs_of(heard)
