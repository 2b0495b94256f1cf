"""What the page is given: links, found heads, payload and blobs say what the recording says, and files are whole."""

import base64
import gzip
import json

import numpy as np
import pytest
import torch

from regard.lens import export, links
from regard.lens.look import look
from regard.lens.measures import measures, names
from regard.lens.models import load
from regard.lens.payload import blob, first_selection, payload, saved
from tiny_folders import SENTENCE, make


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """A function from a kind to a look at the sentence; T5's target is given."""
    root, held = tmp_path_factory.mktemp("tiny"), {}

    def one(kind):
        if kind not in held:
            target = "it was a cat" if kind == "t5" else None
            held[kind] = look(load(str(make(root / kind, kind))), SENTENCE, target)
        return held[kind]

    return one


def dense_words(view, index, layer):
    """Word weights (num_heads, query words, key words) in float64, from the whole map."""
    attention = view.attentions[index]
    queries, keys = view.sides[attention.query_side], view.sides[attention.key_side]
    weights = view.recording.weights(layer, kind=attention.kind).double()
    rows = torch.stack([weights[:, slice(*word.tokens)].mean(1) for word in queries.words], 1)
    return torch.stack([rows[..., slice(*word.tokens)].sum(-1) for word in keys.words], -1)


@pytest.mark.parametrize("kind", ["bert", "llama", "t5"])
@pytest.mark.parametrize("at_once", [256, 3])
def test_the_strongest_links_are_the_largest_word_weights(seen, kind, at_once, monkeypatch):
    monkeypatch.setattr(links, "ROWS_AT_ONCE", at_once)
    view = seen(kind)
    for index, attention in enumerate(view.attentions):
        queries, keys = view.sides[attention.query_side].words, view.sides[attention.key_side].words
        whole = torch.stack([dense_words(view, index, number) for number in attention.numbers])
        best = whole.amax((0, 1))
        for row, asking in enumerate(queries):
            for column, answering in enumerate(keys):
                own = attention.query_side == attention.key_side and row == column
                first = attention.causal and column == 0
                if asking.special or answering.special or own or first:
                    best[row, column] = 0
        found, sinks = links.strongest(view, index, 6)
        expected = best.flatten().topk(6).values.tolist()
        assert [link.weight for link in found] == pytest.approx(expected, abs=1e-5)
        for link in found:
            number = attention.numbers.index(link.layer)
            assert float(whole[number, link.head, link.query, link.key]) == pytest.approx(link.weight, abs=1e-5)
        shares = whole.mean((0, 1, 2))
        for sink in sinks:
            assert float(shares[sink.word]) == pytest.approx(sink.share, abs=1e-5)
        if kind == "bert":
            assert {(keys[sink.word].text, sink.role) for sink in sinks} == {("[CLS]", "marker"), ("[SEP]", "marker")}


def test_links_can_be_asked_of_one_head_and_of_words_apart(seen):
    view = seen("bert")
    only, _ = links.strongest(view, 0, 5, layer=1, head=2)
    assert {(link.layer, link.head) for link in only} == {(1, 2)}
    apart, _ = links.strongest(view, 0, 5, apart_by=4)
    assert all(abs(link.query - link.key) >= 4 for link in apart)


def test_find_ranks_every_head(seen):
    view = seen("bert")
    found = links.find(view, 0, "tired", "cat")
    assert len(found) == 12
    assert [one.weight for one in found] == sorted((one.weight for one in found), reverse=True)
    words = view.sides[0].words
    visible = [at for at, word in enumerate(words) if not word.special]
    query, key = ([word.text for word in words].index(text) for text in ("tired", "cat"))
    for one in found:
        row = dense_words(view, 0, one.layer)[one.head, query]
        assert one.weight == pytest.approx(float(row[key]), abs=1e-5)
        assert one.rank == 1 + sum(float(row[at]) > float(row[key]) + 1e-9 for at in visible)
        assert (one.of, one.query, one.key) == (10, query, key)


def test_find_takes_the_best_of_several_places(seen):
    view = seen("bert")
    words = [word.text.lower() for word in view.sides[0].words]
    both = links.find(view, 0, "sat", "the")[0]
    places = [at for at, word in enumerate(words) if word == "the"]
    assert len(places) == 2
    row = dense_words(view, 0, both.layer)[both.head, words.index("sat")]
    assert both.weight == pytest.approx(max(float(row[at]) for at in places), abs=1e-5)


def test_a_word_that_is_missing_or_unseen_is_refused(seen):
    with pytest.raises(ValueError, match=r'both words must be in the text; got "dog". Choose from: The, cat, sat, on,'):
        links.find(seen("bert"), 0, "it", "dog")
    with pytest.raises(ValueError, match=r"the second word must come before the first .* Turn them round."):
        links.find(seen("llama"), 0, "cat", "it")
    with pytest.raises(ValueError, match='both words must be in the source text; got "dog"'):
        links.find(seen("t5"), 2, "it", "dog")
    with pytest.raises(ValueError, match='both words must be in the target text; got "tired"'):
        links.find(seen("t5"), 2, "tired", "it")
    visible = links.find(seen("llama"), 0, "it", "cat")
    assert {one.of for one in visible} == {8}


@pytest.mark.parametrize("kind", ["bert", "llama", "t5"])
def test_the_payload_describes_the_recording(seen, kind):
    view = seen(kind)
    page = payload(view, first_selection(view, None, None, None))
    json.dumps(page, allow_nan=False)
    assert page["format"] == "regard-page/1"
    assert page["text"] == SENTENCE
    assert page["model"]["name"] == kind
    assert [side["name"] for side in page["sides"]] == (["source", "target"] if kind == "t5" else ["text"])
    for side in page["sides"]:
        for token in side["tokens"]:
            assert (token["word"] is None) == token["special"]
        assert [word["tokens"][0] for word in side["words"]][1:] == [word["tokens"][1] for word in side["words"]][:-1]
    labels = {"t5": ["encoder self-attention", "decoder self-attention", "cross-attention"]}.get(
        kind, ["self-attention"]
    )
    assert [attention["label"] for attention in page["attentions"]] == labels
    assert [attention["causal"] for attention in page["attentions"]] == {
        "bert": [False], "llama": [True], "t5": [False, True, False],
    }[kind]  # fmt: skip
    assert page["selection"]["attention"] == (2 if kind == "t5" else 0)
    assert page["attentions"][0]["has_bias"] == (kind == "t5")
    assert page["attentions"][0]["num_kv_heads"] == (2 if kind == "llama" else 4)


@pytest.mark.parametrize("kind", ["bert", "llama", "t5"])
def test_blobs_are_the_numbers_of_the_recording(seen, kind):
    view = seen(kind)
    for index, attention in enumerate(view.attentions):
        for layer in attention.layers:
            step = layer.steps[0]
            weights = blob(view, f"weights/{index}/{layer.number}")
            expected = view.recording.weights(layer)
            assert weights.shape == list(expected.shape)
            assert np.array_equal(np.frombuffer(weights.bytes(), "<f4").reshape(weights.shape), expected.numpy())
            q, k = (blob(view, f"{name}/{index}/{layer.number}").numbers for name in ("q", "k"))
            assert torch.equal(q, step.q[0])
            assert torch.equal(k, step.k[0])
            assert torch.equal(blob(view, f"norms/{index}/{layer.number}").numbers, step.value_norms[0])
            assert torch.equal(blob(view, f"lse/{index}/{layer.number}").numbers, step.lse[0])
            scores = blob(view, f"scores/{index}/{layer.number}/3/2").numbers
            assert scores.shape == (4, step.seq_len_kv)
            torch.testing.assert_close(scores[2].softmax(0), scores[3])
            assert torch.equal(scores[3], expected[3, 2])
        thumbs = blob(view, f"thumbs/{index}")
        assert thumbs.dtype == "u8"
        every = torch.stack([view.recording.weights(layer) for layer in attention.layers])
        if max(every.shape[2:]) <= 24:  # short texts: a cell a weight
            assert thumbs.shape == list(every.shape)
            assert int((thumbs.numbers.int() - (every * 255).round().int()).abs().max()) <= 1


@pytest.mark.parametrize(
    "key",
    ["weights/0/9", "weights/3/0", "weights/0", "weights/0/0/1/1", "thumbs/0/1", "thumbs/7", "scores/0/0/4/0",
     "scores/0/0/0/99", "scores/0/0", "v/0/0", "", "weights/0/-1", "weights/0/1/../2", "weights/99999999999/0"],
)  # fmt: skip
def test_keys_of_nothing_give_nothing(seen, key):
    assert blob(seen("bert"), key) is None


@pytest.mark.parametrize("kind", ["bert", "llama", "t5"])
def test_measures_of_every_head_are_the_plain_means(seen, kind):
    view = seen(kind)
    for index, attention in enumerate(view.attentions):
        found = measures(view, index).double()
        assert found.shape == (len(names(view, index)), len(attention.layers), attention.num_heads)
        for row, layer in enumerate(attention.layers):
            weights = view.recording.weights(layer).double()
            n, m = weights.shape[1:]
            far = (torch.arange(n)[:, None] - torch.arange(m)).abs()
            plain = {
                "entropy": -(weights * weights.clamp(min=1e-300).log()).sum(-1).mean(-1),
                "first": weights[:, 1:, 0].mean(-1),
            }
            if attention.query_side == attention.key_side:
                diagonal = lambda at: weights.diagonal(at, 1, 2).mean(-1)  # noqa: E731, B023
                plain |= {"previous": diagonal(-1), "next": diagonal(1), "same": diagonal(0)}
                plain["distance"] = (weights * far).sum(-1).mean(-1)
            assert set(plain) == set(names(view, index))
            for at, name in enumerate(names(view, index)):
                torch.testing.assert_close(found[at, row], plain[name], atol=1e-6, rtol=1e-5)


def test_thumbs_of_a_longer_text_are_block_maxima(tmp_path):
    text = " ".join([SENTENCE] * 6)
    view = look(load(str(make(tmp_path / "llama", "llama"))), text)
    thumbs = blob(view, "thumbs/0")
    length = len(view.sides[0].tokens)
    size = -(-length // 24)
    cells = -(-length // size)
    assert length > 48
    assert thumbs.shape == [2, 4, cells, cells]
    weights = torch.stack([view.recording.weights(number) for number in range(2)])
    padded = torch.nn.functional.pad(weights, (0, cells * size - length, 0, cells * size - length))
    largest = padded.unflatten(3, (cells, size)).unflatten(2, (cells, size)).amax((3, 5))
    assert int((thumbs.numbers.int() - (largest * 255).round().int()).abs().max()) <= 1


def test_what_is_opened_first_is_what_was_asked_for(seen):
    view = seen("bert")
    found = links.find(view, 0, "it", "cat")
    chosen = first_selection(view, None, None, found)
    assert (chosen.layer, chosen.head, chosen.word, chosen.target) == (found[0].layer, found[0].head, 8, 2)
    second = first_selection(view, 2, 1, found)
    assert (second.layer, second.head, second.word, second.target) == (2, 1, 8, 2)
    plain = first_selection(view, 1, None, None)
    assert plain.layer == 1
    assert abs(plain.word - plain.target) >= 2
    with pytest.raises(ValueError, match=r"--layer must be from 0 to 2 for bert; got 3. Choose one of those."):
        first_selection(view, 3, None, None)
    with pytest.raises(ValueError, match=r"--head must be from 0 to 3 for bert; got -1. Choose one of those."):
        first_selection(view, None, -1, None)


def unpacked(one):
    data = gzip.decompress(base64.b64decode(one["data"]))
    return np.frombuffer(data, {"f32": "<f4", "u8": "u1"}[one["dtype"]]).reshape(one["shape"])


def test_a_saved_page_carries_its_numbers(seen):
    view = seen("t5")
    start = first_selection(view, None, None, None)
    page = saved(payload(view, start, live=True), view)
    assert page["live"] is False
    of_layers = ("weights", "q", "k", "norms", "lse")
    keys = {f"{name}/{index}/{layer}" for name in of_layers for index in range(3) for layer in range(2)}
    keys |= {f"{name}/{index}" for name in ("thumbs", "measures") for index in range(3)}
    word = view.sides[1].words[start.word]
    keys |= {f"values/{start.attention}/{start.layer}/{start.head}/{token}" for token in range(*word.tokens)}
    assert set(page["blobs"]) == keys
    assert np.array_equal(unpacked(page["blobs"]["weights/2/1"]), view.recording.weights(1, kind="cross").numpy())


def test_a_page_that_would_grow_too_large_says_what_it_leaves_out(seen, monkeypatch):
    view = seen("bert")
    monkeypatch.setattr("regard.lens.payload.LARGEST_PAGE", 2 * 4 * 4 * 13 * 13)
    page = saved(payload(view, first_selection(view, 2, 0, None)), view)
    assert {key for key in page["blobs"] if key.startswith("weights")} == {"weights/0/2", "weights/0/1"}
    assert page["notes"][-1].startswith("To keep this file small it does not hold self-attention of layers 0:")


def test_a_page_cannot_break_out_of_its_script(tmp_path, seen):
    text = "</script><script>alert(1)</script> \u2028 <!-- cat"
    html = export.page_html({"text": text})
    assert "<script>alert(1)" not in html
    assert export.script_json({"text": text}) in html
    assert json.loads(export.script_json({"text": text})) == {"text": text}
    assert export.SLOT in export.page_html()


@pytest.mark.parametrize("kind", ["bert", "llama", "t5"])
@pytest.mark.parametrize("ending", ["html", "svg", "png", "json"])
def test_every_format_is_written(seen, tmp_path, kind, ending):
    view = seen(kind)
    page = payload(view, first_selection(view, None, None, None))
    path = tmp_path / f"page.{ending}"
    export.write(path, view, page)
    content = path.read_bytes()
    assert [one.name for one in tmp_path.iterdir()] == [path.name]
    assert path.stat().st_mode & 0o444
    if ending == "html":
        start = content.index(b'id="regard-payload">') + len(b'id="regard-payload">')
        held = json.loads(content[start : content.index(b"</script>", start)])
        assert held["blobs"]
        assert b"http://" not in content.replace(b"http://www.w3.org", b"").replace(b"http://127.0.0.1", b"")
    elif ending == "svg":
        assert content.startswith(b"<svg")
        for word in ("tired", "because"):
            assert word.encode() in content
    elif ending == "png":
        assert content.startswith(b"\x89PNG\r\n")
        assert len(content) > 20_000
    else:
        held = json.loads(content)
        assert held["format"] == "regard-view/1"
        weights = np.array(held["heads"][0]["weights"])
        np.testing.assert_allclose(weights.sum(1), 1, atol=1e-5)
        asked = held["heads"][0]["links"][0]
        assert asked["links"][0]["weight"] == pytest.approx(max(weights[asked["index"]]), rel=1e-6)
        assert held["queries"][asked["index"]] == asked["word"]


def test_a_picture_in_a_world_without_fonts_is_refused(seen, tmp_path, monkeypatch):
    import resvg_py

    original = resvg_py.svg_to_bytes
    monkeypatch.setattr(resvg_py, "svg_to_bytes", lambda **named: original(**{**named, "skip_system_fonts": True}))
    view = seen("bert")
    page = payload(view, first_selection(view, None, None, None))
    with pytest.raises(ValueError, match=r"--save to .png must find a font on this machine; got none. Install one"):
        export.write(tmp_path / "page.png", view, page)
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_leaves_the_older_file(seen, tmp_path, monkeypatch):
    view = seen("bert")
    page = payload(view, first_selection(view, None, None, None))
    path = tmp_path / "page.json"
    path.write_text("older")

    def fail(_descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr("regard.lens.export.os.fsync", fail)
    with pytest.raises(OSError, match="no space"):
        export.write(path, view, page)
    assert path.read_text() == "older"
    assert [one.name for one in tmp_path.iterdir()] == ["page.json"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("page.gif", r"--save must end in .html, .svg, .png, .json, .parquet or .session; got page.gif. Choose"),
        ("page", r"--save must end in .html, .svg, .png, .json, .parquet or .session; got page. Choose"),
        ("none/page.html", r"--save must lie in a directory that exists; got .*none/page.html. Make"),
        ("folder.html", r"--save must be a file; got the directory .*folder.html. Add a name."),
    ],
)
def test_places_that_cannot_be_written_are_refused(tmp_path, name, message):
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(ValueError, match=message):
        export.check_target(tmp_path / name)


@pytest.mark.parametrize(
    ("kind", "text", "target", "message"),
    [
        ("bert", "  ", None, "text must have a word in it; got an empty one. Pass a sentence."),
        ("bert", "cat " * 23, None, r"text must be at most 24 tokens for bert; got 25. Make it shorter."),
        ("bert", "cat", "dog", r"--target must go with a model that reads one text and writes another; got bert."),
        ("t5", "cat", " ", "--target must have a word in it; got an empty one"),
        (
            "whisper",
            "The cat",
            None,
            r"TEXT must be the path of a .wav file for whisper, which hears speech; got 'The cat'",
        ),
        ("whisper", "none.wav", None, r"the path of a .wav file for a speech model; got 'none.wav'. Check the path."),
    ],
)
def test_texts_that_cannot_be_read_are_refused(seen, tmp_path, kind, text, target, message):
    loaded = load(str(make(tmp_path / kind, kind)))
    with pytest.raises(ValueError, match=message):
        look(loaded, text, target)


def test_a_text_too_long_for_whole_maps_is_shown_by_rows_and_tiles(seen, monkeypatch):
    monkeypatch.setattr("regard.lens.look.LARGEST_MAP", 4 * 4 * 9 * 9)
    view = look(seen("llama").loaded, SENTENCE)
    page = payload(view, first_selection(view, None, None, None))
    assert view.long(0)
    assert page["attentions"][0]["long"] is True
    assert page["selection"]["word"] is None
    assert blob(view, "weights/0/0") is None
    assert blob(view, "q/0/0") is None
    assert blob(view, "scores/0/0/1/5").shape == [4, len(view.sides[0].tokens)]
    held = saved(page, view)["blobs"]
    assert [key for key in held if key.startswith("tile/")] == ["tile/0/1/0/max/0/0/0"]
    weights = view.recording.weights(1, head=0).numpy()
    assert np.array_equal(unpacked(held["tile/0/1/0/max/0/0/0"]), weights)


def test_a_long_text_travels_packed(seen, monkeypatch):
    monkeypatch.setattr("regard.lens.payload.MANY", 4)
    view = seen("bert")
    packed = payload(view, first_selection(view, None, None, None))["sides"][0]["packed"]
    numbers = {
        name: np.frombuffer(base64.b64decode(packed[name]), "<i4").tolist() for name in ("tokens", "words", "starts")
    }
    side = view.sides[0]
    assert [packed["texts"][at] for at in numbers["tokens"]] == [token.text for token in side.tokens]
    assert [packed["texts"][at] for at in numbers["words"]] == [word.text for word in side.words]
    assert numbers["starts"] == [word.tokens[0] for word in side.words]
    assert packed["special"] == [at for at, word in enumerate(side.words) if word.special]


def test_sound_is_shown_as_times_and_its_silence_as_one_word(tmp_path):
    import wave

    loaded = load(str(make(tmp_path / "whisper", "whisper")))
    with wave.open(str(tmp_path / "tone.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes((np.sin(np.arange(4000) / 3) * 9000).astype("<i2").tobytes())
    view = look(loaded, str(tmp_path / "tone.wav"), "it was a cat")
    source, target = view.sides
    assert len(source.tokens) == 100
    assert [word.text for word in source.words] == ["0.0 s", "0.1 s", "0.2 s", "0.3 s", "0.4 s", "silence"]
    assert source.words[-1].special
    assert [word.text for word in target.words] == [
        "<|startoftranscript|>",
        "<|notimestamps|>",
        "it",
        "was",
        "a",
        "cat",
    ]
    assert view.attentions[view.front].kind == "cross"
    assert blob(view, "weights/2/0").shape == [4, len(target.tokens), 100]
    with wave.open(str(tmp_path / "long.wav"), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", "none"))
        file.writeframes(bytes(2 * 8000 * 3))
    with pytest.raises(ValueError, match=r"sound must last at most 2 seconds for whisper; got 3.0. Cut it shorter."):
        look(loaded, str(tmp_path / "long.wav"))


def test_a_model_writes_its_own_target_greedily(seen, tmp_path):
    loaded = load(str(make(tmp_path / "t5", "t5")))
    view = look(loaded, "the cat sat")
    ids = loaded.tokenizer("the cat sat", return_tensors="pt").input_ids
    with torch.no_grad():
        out = loaded.model.generate(ids, max_new_tokens=48, do_sample=False, num_beams=1)[0].tolist()
    expected = out[: out.index(1, 1)] if 1 in out[1:] else out
    assert view.recording.token_ids["target"][0][0].tolist() == expected
