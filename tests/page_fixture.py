"""Recordings for the page's tests: a small one made of random numbers, exact by its own arithmetic.

In: a text, sizes, a seed. Out: (payload, blobs) as `regard-page/1` says, and HTML or JSON forms of them.
Floor: tests only; needs numpy and the built page.
"""

import base64
import functools
import gzip
import itertools
import json
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "src" / "regard" / "lens" / "page"
WEB = ROOT / "web"
SENTENCE = "The cat sat on the mat because it was tired"


def side(name, pieces, special=("[CLS]", "[SEP]", "</s>")):
    """One side of a payload from words; a word given as a list is a word of several subwords."""
    tokens, words = [], []
    for word in pieces:
        parts = word if isinstance(word, list) else [word]
        first = len(tokens)
        for part in parts:
            is_special = part in special
            tokens.append({"text": part, "special": is_special, "word": None if is_special else len(words)})
        words.append({"text": "".join(parts), "tokens": [first, len(tokens)], "special": parts[0] in special})
    return {"name": name, "tokens": tokens, "words": words}


def attention_blobs(
    index, *, queries, keys, layers, num_heads, num_kv_heads, head_dim, causal, seed, plant=None, bias=False, sink=False
):
    """Blobs of one attention: q, k drawn at random, weights by softmax in float64, `plant` a strong link.

    plant: (layer, head, query, key, logit) adds to one score by moving k along q.
    """
    rng = np.random.default_rng(seed)
    scale = 1 / np.sqrt(head_dim)
    group = num_heads // num_kv_heads
    blobs = {}
    thumbs = []
    for layer in range(layers):
        q = rng.normal(size=(num_heads, queries, head_dim)) * 1.6
        k = rng.normal(size=(num_kv_heads, keys, head_dim)) * 1.2
        k[:, -1 if not causal else 0] *= 0.3
        for at_layer, head, row, col, logit in plant or []:
            if at_layer == layer:
                direction = q[head, row]
                k[head // group, col] += direction * (logit / (scale * direction @ direction))
        scores = np.einsum("hqd,hkd->hqk", q, np.repeat(k, group, axis=0)) * scale
        if bias:
            distance = np.arange(keys)[None, :] - np.arange(queries)[:, None]
            scores = scores - 0.2 * np.abs(distance) * (1 + np.arange(num_heads))[:, None, None] / num_heads
        if causal:
            scores = np.where(np.tril(np.ones((queries, keys), bool)), scores, -np.inf)
        top = scores.max(-1, keepdims=True)
        total = np.exp(scores - top).sum(-1, keepdims=True) + (np.exp(0.5 - top) if sink else 0)
        lse = (top + np.log(total))[..., 0]
        weights = np.exp(scores - lse[..., None])
        norms = rng.uniform(0.5, 3, size=(num_kv_heads, keys))
        blobs[f"weights/{index}/{layer}"] = weights.astype("<f4")
        blobs[f"q/{index}/{layer}"] = q.astype("<f4")
        blobs[f"k/{index}/{layer}"] = k.astype("<f4")
        blobs[f"lse/{index}/{layer}"] = lse.astype("<f4")
        blobs[f"norms/{index}/{layer}"] = norms.astype("<f4")
        thumbs.append([block_max(one, min(24, max(queries, keys))) for one in weights])
    every = np.stack([blobs[f"weights/{index}/{layer}"] for layer in range(layers)]).astype(np.float64)
    blobs[f"measures/{index}"] = plain_measures(every).astype("<f4")
    blobs[f"thumbs/{index}"] = np.round(255 * np.array(thumbs)).astype("u1")
    return blobs


MEASURES = ("entropy", "distance", "previous", "next", "first", "same")


def plain_measures(weights):
    """What each head does, (measures, layers, heads), from (layers, heads, queries, keys)."""
    queries, keys = weights.shape[-2:]
    far = np.abs(np.arange(queries)[:, None] - np.arange(keys)[None])
    entropy = -(weights * np.log(np.maximum(weights, 1e-300))).sum(-1).mean(-1)
    diagonal = lambda at: weights.diagonal(at, -2, -1).mean(-1)  # noqa: E731
    first = weights[..., 1:, 0].mean(-1)
    return np.stack([entropy, (weights * far).sum(-1).mean(-1), diagonal(-1), diagonal(1), first, diagonal(0)])


def block_max(weights, size):
    """Largest weight of each block of a size × size grid, as a head's small picture."""
    rows = np.linspace(0, weights.shape[0], size + 1).astype(int)
    cols = np.linspace(0, weights.shape[1], size + 1).astype(int)
    blocks = [
        [weights[a : max(b, a + 1), c : max(d, c + 1)] for c, d in itertools.pairwise(cols)]
        for a, b in itertools.pairwise(rows)
    ]
    return np.array([[block.max() if block.size else 0.0 for block in row] for row in blocks])


def attention_entry(**changes):
    """The payload's line about one attention."""
    entry = {
        "kind": "encoder",
        "label": "self-attention",
        "causal": False,
        "query_side": 0,
        "key_side": 0,
        "num_heads": 12,
        "num_kv_heads": 12,
        "layers": [0, 1, 2, 3, 4, 5],
        "scale": 1 / np.sqrt(32),
        "softcap": None,
        "has_bias": False,
        "has_sink": False,
        "head_dim": 32,
        "measures": list(MEASURES),
    }
    return {**entry, **changes}


def payload_of(sides, attentions, *, text, name, selection, num_layers, num_heads, num_kv_heads, notes=(), found=None):
    return {
        "format": "regard-page/1",
        "version": "0.1.0",
        "model": {
            "id": name,
            "name": name,
            "num_layers": num_layers,
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
        },
        "live": False,
        "text": text,
        "notes": list(notes),
        "sides": sides,
        "attentions": attentions,
        "selection": selection,
        "found": found,
    }


@functools.cache
def encoder_recording(word=None):
    """An encoder of 6 × 12 heads that reads SENTENCE; layer 5 head 11 links "it" to "cat"."""
    pieces = ["[CLS]", *SENTENCE.split(), "[SEP]"]
    pieces[-2] = ["tir", "ed"]
    one = side("text", pieces)
    count = len(one["tokens"])
    plant = [(5, 11, 8, 2, 5.2), (3, 1, 8, 2, 4.0), (4, 3, 8, 2, 3.4)]
    blobs = attention_blobs(
        0,
        queries=count,
        keys=count,
        layers=6,
        num_heads=12,
        num_kv_heads=12,
        head_dim=32,
        causal=False,
        seed=3,
        plant=plant,
    )
    selection = {"attention": 0, "layer": 5, "head": 11, "word": word, "target": None}
    payload = payload_of(
        [one],
        [attention_entry()],
        text=SENTENCE,
        name="all-MiniLM-L6-v2",
        selection=selection,
        num_layers=6,
        num_heads=12,
        num_kv_heads=12,
    )
    return payload, blobs


@functools.cache
def decoder_recording(count=40, layers=4):
    """A causal decoder of 9 heads in 3 key groups; learned sinks; a bias by distance."""
    words = ("One day a small fox went over the long hill and found there a quiet river that nobody knew").split()
    one = side("text", [words[i % len(words)] for i in range(count)])
    blobs = attention_blobs(
        0,
        queries=count,
        keys=count,
        layers=layers,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        causal=True,
        seed=5,
        bias=True,
        sink=True,
    )
    entry = attention_entry(
        kind="decoder",
        causal=True,
        num_heads=9,
        num_kv_heads=3,
        layers=list(range(layers)),
        scale=1 / 8,
        head_dim=64,
        has_bias=True,
        has_sink=True,
    )
    selection = {"attention": 0, "layer": 2, "head": 4, "word": None, "target": None}
    text = " ".join(word["text"] for word in one["words"])
    payload = payload_of(
        [one],
        [entry],
        text=text,
        name="SmolLM2-135M",
        selection=selection,
        num_layers=layers,
        num_heads=9,
        num_kv_heads=3,
    )
    return payload, blobs


@functools.cache
def translation_recording():
    """An encoder-decoder: self-attention on both sides, and cross-attention from target to source."""
    source = side("source", ["A", "little", "girl", "climbing", "into", "a", "wooden", "play", ["house", "."], "</s>"])
    target = side(
        "target",
        ["Ein", "kleines", "Mädchen", "klettert", "in", "ein", ["Spiel", "haus"], "aus", ["Holz", "."], "</s>"],
    )
    sizes = [len(source["tokens"]), len(target["tokens"])]
    shape = {"layers": 3, "num_heads": 8, "num_kv_heads": 8, "head_dim": 16}
    blobs = {}
    blobs |= attention_blobs(0, queries=sizes[0], keys=sizes[0], causal=False, seed=1, **shape)
    blobs |= attention_blobs(1, queries=sizes[1], keys=sizes[1], causal=True, seed=2, **shape)
    plant = [(1, 2, 2, 2, 5.5), (1, 2, 3, 3, 6.0), (1, 2, 6, 7, 4.5), (1, 2, 9, 6, 5.0)]
    blobs |= attention_blobs(2, queries=sizes[1], keys=sizes[0], causal=False, seed=4, plant=plant, **shape)
    common = {"num_heads": 8, "num_kv_heads": 8, "layers": [0, 1, 2], "scale": 0.25, "head_dim": 16}
    attentions = [
        attention_entry(kind="encoder", label="encoder self-attention", **common),
        attention_entry(
            kind="decoder", label="decoder self-attention", query_side=1, key_side=1, causal=True, **common
        ),
        attention_entry(kind="cross", label="cross-attention", query_side=1, key_side=0, **common),
    ]
    selection = {"attention": 2, "layer": 1, "head": 2, "word": None, "target": None}
    text = "A little girl climbing into a wooden playhouse."
    payload = payload_of(
        [source, target],
        attentions,
        text=text,
        name="tiny-marian",
        selection=selection,
        num_layers=3,
        num_heads=8,
        num_kv_heads=8,
    )
    return payload, blobs


DTYPES = {"<f4": "f32", "|u1": "u8", "<f2": "f16"}


def blob_entry(array, *, zipped):
    """A blob as the page's JSON holds it (zipped) or as `regardDraw` takes it (raw)."""
    raw = np.ascontiguousarray(array).tobytes()
    data = base64.b64encode(gzip.compress(raw, mtime=0) if zipped else raw).decode()
    return {"shape": list(array.shape), "dtype": DTYPES[array.dtype.str], "data": data}


def saved_html(payload, blobs):
    """The built page with this recording inside, as `--save out.html` writes it."""
    full = {**payload, "live": False, "blobs": {key: blob_entry(array, zipped=True) for key, array in blobs.items()}}
    text = json.dumps(full).replace("<", "\\u003c")
    page = (PAGE / "index.html").read_text(encoding="utf-8")
    slot = '<script type="application/json" id="regard-payload">null</script>'
    assert page.count(slot) == 1
    return page.replace(slot, slot.replace("null", text))


def page_script():
    """The page's own code, as it stands in the built page."""
    html = (PAGE / "index.html").read_text(encoding="utf-8")
    return html.partition('<script id="regard-script">')[2].partition("</script>")[0]


def draw_arguments(payload, blobs, **options):
    """The three strings that `regardDraw` takes."""
    raw = {key: blob_entry(array, zipped=False) for key, array in blobs.items()}
    return json.dumps(payload), json.dumps(raw), json.dumps(options)


def merged(payload, blobs, attention, layer, head):
    """Word weights by the rule, written plainly: mean over a word's rows, sum over a word's columns."""
    entry = payload["attentions"][attention]
    weights = blobs[f"weights/{attention}/{layer}"][head].astype(np.float64)
    rows = payload["sides"][entry["query_side"]]["words"]
    cols = payload["sides"][entry["key_side"]]["words"]
    out = np.zeros((len(rows), len(cols)))
    for i, row in enumerate(rows):
        for j, col in enumerate(cols):
            out[i, j] = weights[slice(*row["tokens"]), slice(*col["tokens"])].sum(1).mean()
    return out
