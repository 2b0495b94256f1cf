"""Two looks side by side: words are aligned in order, weights are each look's own, and what does not fit is refused."""

import pytest
import torch

from regard.lens.compare import Comparing, aligned, compared
from regard.lens.links import word_weights
from regard.lens.look import look
from regard.lens.models import load
from tiny_folders import SENTENCE, make

OTHER = "The dog sat on the mat because it was tired"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    return {kind: load(str(make(root / kind, kind))) for kind in ("bert", "llama", "t5")}


@pytest.mark.parametrize("kinds", [("bert", "bert"), ("bert", "llama")])
def test_words_of_both_are_aligned_and_weights_are_each_looks_own(loaded, kinds):
    first, second = look(loaded[kinds[0]], SENTENCE), look(loaded[kinds[1]], OTHER)
    told = compared(first, second, 0, 1, 2)
    words = [[word.text for word in one.sides[0].words] for one in (first, second)]
    pairs = aligned(*words)
    assert [word.lower() for word in told["words"]] == [words[1][at].lower() for _, at in pairs]
    assert "cat" in told["only_first"]
    assert "dog" in told["only_second"]
    for name, one, own in (("first", first, 0), ("second", second, 1)):
        at = torch.tensor([pair[own] for pair in pairs])
        assert torch.equal(torch.tensor(told[name]), word_weights(one, 0, 1, 2)[at][:, at])


def test_the_server_answers_with_its_own_model_or_with_another(loaded):
    shown = look(loaded["bert"], SENTENCE)
    asked = {"other": OTHER, "attention": 0, "layer": 1, "head": 0}
    assert Comparing()(shown, asked)["model"] == shown.loaded.name
    against = Comparing(loaded["llama"])
    assert against(shown, {**asked, "other": SENTENCE})["model"] == loaded["llama"].name
    assert against(shown, asked)["text"] == OTHER


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"other": "dog"}, r"compare: texts must have two words in common, in order; got \d"),
        ({"other": 7}, "compare: other must be a text; got something else. Send a sentence."),
        ({"layer": 9}, "compare: layer must be one that bert has; got 9. Choose another."),
        ({"head": True}, "compare: head must be one that bert has; got True. Choose another."),
        ({"attention": -1}, "compare: attention must be one that bert has; got -1. Choose another."),
        ({"other": " "}, "look: text must have a word in it"),
    ],
)
def test_what_cannot_be_compared_is_refused(loaded, asked, message):
    shown = look(loaded["llama" if asked.get("other") == "dog" else "bert"], SENTENCE)
    with pytest.raises(ValueError, match=message):
        Comparing()(shown, {"other": OTHER, "attention": 0, "layer": 0, "head": 0, **asked})


def test_cross_attention_is_refused(loaded):
    shown = look(loaded["t5"], SENTENCE, "it was a cat")
    with pytest.raises(ValueError, match="compare: attention must go from a text to itself; got cross-attention."):
        compared(shown, shown, 2, 0, 0)
