"""Bad input: one clear sentence that says what to do, and the same words every time."""

import math
import re
from pathlib import Path

import pytest
import torch

import regard
from agreement import qkv
from regard import check, masks


def reshaped(**sizes):
    """q, k and v of which some sizes are wrong."""
    q, k, v = qkv()
    shapes = {name: list(t.shape) for name, t in (("q", q), ("k", k), ("v", v))}
    for where, size in sizes.items():
        shapes[where[0]][int(where[1])] = size
    return [torch.zeros(shape) for shape in shapes.values()]


CALLS = {
    "three axes": (
        ValueError,
        lambda: regard.attention(torch.zeros(4, 5, 8), *qkv()[1:]),
        "attention: q must have 4 axes (batch, num_heads, seq_len_q, head_dim); got (4, 5, 8). Reshape it.",
    ),
    "three axes of k": (
        ValueError,
        lambda: regard.attention(qkv()[0], torch.zeros(2, 7, 8), qkv()[2]),
        "attention: k must have 4 axes (batch, num_kv_heads, seq_len_kv, head_dim); got (2, 7, 8). Reshape it.",
    ),
    "batch": (
        ValueError,
        lambda: regard.attention(*reshaped(k0=1)),
        "attention: q, k and v must have one batch; got 2, 1 and 2. Expand the smaller ones.",
    ),
    "kv heads": (
        ValueError,
        lambda: regard.attention(*reshaped(v1=4)),
        "attention: k and v must have one number of heads; got 2 and 4. Give both num_kv_heads.",
    ),
    "no heads": (
        ValueError,
        lambda: regard.attention(*reshaped(k1=0, v1=0)),
        "attention: num_heads must be at least 1; got 4 and 0. Give each a head.",
    ),
    "heads that do not divide": (
        ValueError,
        lambda: regard.attention(*reshaped(q1=3)),
        "attention: num_heads must be a multiple of num_kv_heads; got 3 and 2. Change the number of k/v heads.",
    ),
    "lengths of k and v": (
        ValueError,
        lambda: regard.attention(*reshaped(v2=6)),
        "attention: k and v must have one seq_len_kv; got 7 and 6. Give a value for each key.",
    ),
    "head_dim": (
        ValueError,
        lambda: regard.attention(*reshaped(k3=9)),
        "attention: q and k must have one head_dim; got 8 and 9. Project them alike.",
    ),
    "head_dim of 0": (
        ValueError,
        lambda: regard.attention(*reshaped(q3=0, k3=0)),
        "attention: head_dim and head_dim_v must be at least 1; got 0 and 6. Give each head some numbers.",
    ),
    "head_dim_v of 0": (
        ValueError,
        lambda: regard.attention(*reshaped(v3=0)),
        "attention: head_dim and head_dim_v must be at least 1; got 8 and 0. Give each head some numbers.",
    ),
    "dtypes": (
        TypeError,
        lambda: regard.attention(*qkv()[:2], qkv()[2].half()),
        "attention: q, k and v must have one dtype; got torch.float32, torch.float32 and torch.float16. "
        "Convert them with .to(q.dtype).",
    ),
    "integers": (
        TypeError,
        lambda: regard.attention(*(t.long() for t in qkv())),
        "attention: q, k and v must be float32, bfloat16, float16 or float64; got torch.int64. "
        "Convert them with .float().",
    ),
    "devices": (
        ValueError,
        lambda: regard.attention(*qkv()[:2], qkv()[2].to("meta")),
        "attention: q, k and v must be on one device; got cpu, cpu and meta. Move them with .to(q.device).",
    ),
    "another device": (
        ValueError,
        lambda: regard.attention_weights(*(t.to("meta") for t in qkv()[:2])),
        "attention_weights: some backend must be able to do the call on meta; got 'flex', and it gives no weights; "
        "'sdpa', and it gives no weights. Move q, k and v with .cpu().",
    ),
    "a bias on another device": (
        ValueError,
        lambda: regard.attention(*qkv(), bias=torch.zeros(5, 7, device="meta")),
        "attention: bias must be on q's device, cpu; got meta. Move it with .cpu().",
    ),
    "a mask on another device": (
        ValueError,
        lambda: regard.attention(*qkv(), mask=~masks.from_tensor(torch.ones(5, 7, device="meta") > 0)),
        "attention: mask must be on q's device, cpu; got meta. Move it with .cpu().",
    ),
    "lengths on another device": (
        ValueError,
        lambda: regard.attention(*qkv(), mask=masks.padding(torch.zeros(2, dtype=torch.int64, device="meta"))),
        "attention: padding's lengths must be on q's device, cpu; got meta. Move it with .cpu().",
    ),
    "a list": (
        TypeError,
        lambda: regard.attention([1.0], *qkv()[1:]),
        "attention: q must be a torch tensor or an array that speaks DLPack; got list. "
        "Make it with torch.tensor(...) or numpy.array(...).",
    ),
    "arrays of two libraries": (
        TypeError,
        lambda: regard.attention(qkv()[0].numpy(), *qkv()[1:]),
        "attention: q, k, v must be arrays of one library; got q of numpy, k of torch, v of torch. "
        "Convert them to one.",
    ),
    "an array of words": (
        TypeError,
        lambda: regard.attention(*(t.numpy().astype(str) for t in qkv())),
        "attention: q must hold numbers; got dtype <U32. Convert it to float32.",
    ),
    "a mask that is none": (
        TypeError,
        lambda: regard.attention(*qkv(), mask="causal"),
        "attention: mask must be a mask of regard.masks or a bool tensor; got str. "
        "Make one, as in regard.masks.causal().",
    ),
    "a bool bias": (
        TypeError,
        lambda: regard.attention(*qkv(), bias=torch.ones(5, 7) > 0),
        "attention: bias must be floating point; got torch.bool. Pass it as mask=.",
    ),
    "a mask of another shape": (
        ValueError,
        lambda: regard.attention(*qkv(), mask=torch.ones(3, 7) > 0),
        "attention: mask must be broadcastable to (batch, num_heads, seq_len_q, seq_len_kv) = (2, 4, 5, 7); "
        "got (1, 1, 3, 7). Give each axis its full length or 1.",
    ),
    "a positional mask with unequal lengths": (
        ValueError,
        lambda: regard.attention(*qkv(), mask=masks.causal()),
        "attention: query_offset must be given where a positional mask meets seq_len_q != seq_len_kv; got 5 and 7. "
        "Pass query_offset=2 if the last query stands at the last key, 0 if the first ones meet, or use a KVCache.",
    ),
    "scale as a tensor": (
        TypeError,
        lambda: regard.attention(*qkv(), scale=torch.tensor(1.0)),
        "attention: scale must be a number; got Tensor. Pass float(scale).",
    ),
    "scale of NaN": (
        ValueError,
        lambda: regard.attention(*qkv(), scale=math.nan),
        "attention: scale must be finite; got nan. Leave it out for 1/sqrt(head_dim).",
    ),
    "softcap of 0": (
        ValueError,
        lambda: regard.attention(*qkv(), softcap=0.0),
        "attention: softcap must be above 0 and finite; got 0.0. Use None for no cap.",
    ),
    "dropout of 1": (
        ValueError,
        lambda: regard.attention(*qkv(), dropout=1.0),
        "attention: dropout must be at least 0 and below 1; got 1.0. Use 0.0 for none.",
    ),
    "dropout of NaN": (
        ValueError,
        lambda: regard.attention(*qkv(), dropout=math.nan),
        "attention: dropout must be at least 0 and below 1; got nan. Use 0.0 for none.",
    ),
    "sinks in a list": (
        TypeError,
        lambda: regard.attention(*qkv(), sinks=[0.0] * 4),
        "attention: sinks must be a tensor (num_heads,); got list. Use torch.tensor([...]).",
    ),
    "an offset of another batch": (
        ValueError,
        lambda: regard.attention(*qkv(), query_offset=torch.zeros(3, dtype=torch.int64)),
        "attention: query_offset must be an int or int64 (batch,) = (2,) on the CPU; got torch.int64 (3,) on cpu. "
        "Give one position per batch row.",
    ),
    "an offset of another dtype": (
        ValueError,
        lambda: regard.attention(*qkv(), key_offset=torch.zeros(2, dtype=torch.int32)),
        "attention: key_offset must be an int or int64 (batch,) = (2,) on the CPU; got torch.int32 (2,) on cpu. "
        "Give one position per batch row.",
    ),
    "an offset of 1.5": (
        TypeError,
        lambda: regard.attention(*qkv(), query_offset=1.5),
        "attention: query_offset must be an int or int64 (batch,); got float. Give the first position.",
    ),
    "top_k of -1": (
        ValueError,
        lambda: regard.attention_with_stats(*qkv(), top_k=-1),
        "attention_with_stats: top_k must be an int of at least 0; got -1. Give a whole number.",
    ),
    "block of one size": (
        ValueError,
        lambda: regard.attention_with_stats(*qkv(), block=64),
        "attention_with_stats: block must be (rows, cols); got 64. Give the two sizes, as in block=(64, 64).",
    ),
    "block of 0": (
        ValueError,
        lambda: regard.attention_with_stats(*qkv(), block=(0, 2)),
        "attention_with_stats: block's rows must be an int of at least 1; got 0. Give a whole number.",
    ),
    "an unknown stage": (
        ValueError,
        lambda: regard.attention_weights(*qkv()[:2], stage="raw"),
        "attention_weights: stage must be one of scaled, capped, biased, weights; got 'raw'. "
        "Leave it out for the weights.",
    ),
    "rows with a step": (
        TypeError,
        lambda: regard.attention_weights(*qkv()[:2], rows=slice(0, 4, 2)),
        "attention_weights: rows must be a slice or range of step 1; got slice(0, 4, 2). "
        "Ask for slice(i, i + 1) to see one.",
    ),
    "one row as an int": (
        TypeError,
        lambda: regard.attention_weights(*qkv()[:2], rows=3),
        "attention_weights: rows must be a slice or range of step 1; got 3. Ask for slice(i, i + 1) to see one.",
    ),
    "cols past the end": (
        ValueError,
        lambda: regard.attention_weights(*qkv()[:2], cols=range(5, 8)),
        "attention_weights: cols must lie within 0 and 7; got range(5, 8). Ask for what there is.",
    ),
    "no partials": (
        ValueError,
        lambda: regard.merge_attention([]),
        "merge_attention: partials must be pairs (out, lse), at least one; got 0. Pass a list.",
    ),
    "partials of different queries": (
        ValueError,
        lambda: regard.merge_attention([(torch.zeros(1, 1, n, 2), torch.zeros(1, 1, n)) for n in (2, 3)]),
        "merge_attention: partials must have one shape, but for axes of size 1; got (1, 1, 2, 2) with (1, 1, 2), "
        "(1, 1, 3, 2) with (1, 1, 3). Merge results for the same queries.",
    ),
    "a partial with half an lse": (
        TypeError,
        lambda: regard.merge_attention([(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2).half())]),
        "merge_attention: lse must be float32 or float64, the same in all partials, and out floating point; "
        "got lse torch.float16 and out torch.float32. Use what attention_with_stats returns.",
    ),
    "a partial without an axis": (
        ValueError,
        lambda: regard.merge_attention([(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2))]),
        "merge_attention: out must have one axis more than lse, head_dim_v; got (1, 1, 2) and (1, 1, 2). "
        "Use what attention_with_stats returns.",
    ),
    "a backend that there is not": (
        ValueError,
        lambda: regard.explain(*qkv(), backend="cuda"),
        "explain: backend must be 'native', 'reference', 'flex', 'sdpa' or None; got 'cuda'. "
        "Leave it out for the best.",
    ),
}


@pytest.mark.parametrize("what", CALLS)
def test_bad_input_is_refused_in_one_sentence_with_the_fix(what):
    error, call, message = CALLS[what]
    with pytest.raises(error, match="^" + re.escape(message) + "$"):
        call()


def test_numbers_may_be_ints_and_spans_may_be_empty_or_whole():
    assert check.scale("f", 2, 8) == 2.0
    assert check.softcap("f", 3) == 3.0
    assert check.dropout("f", 0) == 0.0
    assert check.span("f", "rows", slice(None), 5) == range(5)
    assert check.span("f", "rows", slice(-2, None), 5) == range(3, 5)
    assert check.span("f", "rows", range(4, 4), 5) == range(0)
    assert check.span("f", "rows", slice(9, 12), 5) == range(0)


def test_every_message_names_the_argument_says_what_it_got_and_how_to_mend_it():
    for name in ("check", "cache", "call", "masks", "mask_arguments", "mask_shapes", "mask_rules", "biases", "arrays"):
        text = (Path(check.__file__).parent / f"{name}.py").read_text(encoding="utf-8")
        text = re.sub(r'"\s*\n\s*f?"', "", text)  # sentences in one piece
        raised = re.findall(r"raise \w*Error\((.*?)\)(?: from \w+)?\n", text, re.DOTALL)
        assert raised
        for message in raised:
            assert re.search(r"must|not_bool", message), message
            assert re.search(r"; got|has no|not_bool", message), message
