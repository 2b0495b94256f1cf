"""Tokens become the words that a reader sees, whatever marks the tokenizer leaves; words are found, and summed."""

from itertools import pairwise

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers

from regard.lens.splitting import read_ids, read_text
from regard.lens.tokens import Side, join_pieces
from tiny_folders import SENTENCE, make


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    root, held = tmp_path_factory.mktemp("tiny"), {}

    def one(kind):
        if kind not in held:
            held[kind] = transformers.AutoTokenizer.from_pretrained(make(root / kind, kind))
        return held[kind]

    return one


def words(side):
    return [word.text for word in side.words if not word.special]


@pytest.mark.parametrize("kind", ["bert", "llama", "t5", "whisper"])
def test_a_sentence_comes_back_as_its_words(tokenizers, kind):
    ids, side = read_text(tokenizers(kind), SENTENCE)
    assert len(ids) == len(side.tokens)
    assert words(side) == SENTENCE.split()
    bounds = [word.tokens for word in side.words]
    assert bounds[0][0] == 0
    assert bounds[-1][1] == len(ids)
    assert all(before[1] == after[0] for before, after in pairwise(bounds))
    assert all(side.words[token.word].tokens[0] <= at < side.words[token.word].tokens[1]
               for at, token in enumerate(side.tokens))  # fmt: skip


@pytest.mark.parametrize("kind", ["bert", "llama", "t5", "whisper"])
def test_ids_alone_give_the_same_words(tokenizers, kind):
    ids, side = read_text(tokenizers(kind), SENTENCE)
    again = read_ids(tokenizers(kind), ids)
    expected = [text.lower() for text in words(side)] if kind == "bert" else words(side)
    assert words(again) == expected
    assert [word.tokens for word in again.words] == [word.tokens for word in side.words]


def test_subwords_share_a_word_and_markers_stand_alone(tokenizers):
    _, side = read_text(tokenizers("bert"), "the cat tired")
    assert [token.text for token in side.tokens] == ["[CLS]", "the", "cat", "ti", "red", "[SEP]"]
    assert [token.special for token in side.tokens] == [True, False, False, False, False, True]
    assert [token.word for token in side.tokens] == [0, 1, 2, 3, 3, 4]
    assert side.words[3].text == "tired"


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("bare", [False, True])
def test_a_contraction_is_one_word_and_punctuation_its_own(tokenizers, kind, bare):
    ids, side = read_text(tokenizers(kind), "unbelievable, didn't it?")
    side = read_ids(tokenizers(kind), ids) if bare else side
    assert words(side) == ["unbelievable", ",", "didn't", "it", "?"]
    assert [word.mark for word in side.words if not word.special] == [False, True, False, False, True]


def test_quotes_are_not_contractions(tokenizers):
    _, side = read_text(tokenizers("bert"), "the 'cat' sat")
    assert words(side) == ["the", "'", "cat", "'", "sat"]


def test_bytes_of_one_character_are_one_word(tokenizers):
    ids, side = read_text(tokenizers("llama"), "a 🙂 cat")
    assert len(ids) > 5
    assert words(side) == ["a", "🙂", "cat"]
    assert side.tokens[side.words[1].tokens[1] - 1].text == "·"
    assert words(read_ids(tokenizers("llama"), ids)) == ["a", "🙂", "cat"]


def test_blanks_are_shown(tokenizers):
    _, side = read_text(tokenizers("llama"), "a\n\ncat")
    assert "⏎" in words(side)
    assert words(side)[0] == "a"
    assert words(side)[-1] == "cat"


def test_a_tokenizer_without_pre_tokens_is_split_at_blanks():
    pieces = ["<unk>", "▁", "s", ",", "t", "c", "a"]
    tokenizer = Tokenizer(models.BPE({piece: at for at, piece in enumerate(pieces)}, [], unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    _, side = read_text(fast, "ca sa, ta")
    assert words(side) == ["ca", "sa", ",", "ta"]


def test_an_empty_text_has_no_words(tokenizers):
    ids, side = read_text(tokenizers("llama"), "")
    assert ids == []
    assert side == Side("text", (), ())


def test_a_phrase_is_found_as_words_runs_of_words_or_a_token(tokenizers):
    _, side = read_text(tokenizers("bert"), "The cat saw the tired cat")
    assert side.find("THE") == [side.words[1].tokens, side.words[4].tokens]
    assert side.find("tired cat") == [(side.words[5].tokens[0], side.words[6].tokens[1])]
    tired = side.words[5].tokens
    assert side.find("red") == [(tired[0] + 1, tired[1])]
    assert side.find("dog") == []
    assert side.find("  ") == []


@given(st.lists(st.tuples(st.integers(1, 4), st.booleans()), min_size=1, max_size=6), st.integers(0, 99))
def test_rows_are_means_and_columns_are_sums(sizes, seed):
    pieces = [("x", special, number) for number, (size, special) in enumerate(sizes) for _ in range(size)]
    if any(special and size > 1 for size, special in sizes):
        pieces = [(text, False, number) for text, _, number in pieces]
    side = join_pieces("text", pieces)
    n = len(pieces)
    weights = torch.rand(2, n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    weights /= weights.sum(-1, keepdim=True)
    merged = side.merge_rows(side.merge_columns(weights))
    for row, asking in enumerate(side.words):
        for column, answering in enumerate(side.words):
            expected = weights[:, slice(*asking.tokens), slice(*answering.tokens)].sum(2).mean(1)
            torch.testing.assert_close(merged[:, row, column], expected)
    torch.testing.assert_close(merged.sum(-1), torch.ones(2, len(side.words), dtype=torch.float64))
