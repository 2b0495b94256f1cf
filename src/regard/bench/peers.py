"""What else computes attention on a CPU: PyTorch's own, FlexAttention, ONNX Runtime, OpenVINO; and regard itself.

Enters: a case and its tensors.
Leaves: for each library a call that computes the case, or one sentence that says why it takes no part.
Floor 4: above attention. The libraries load when they are asked for; what they need beforehand (masks, compiling) is
made here and not timed.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from regard.attention import attention, attention_with_stats
from regard.bench.cases import Case, Inputs
from regard.bench.machine import version

Contender = Callable[[], Any]
MOST_MASK = 1 << 30  # bytes of a bool mask that PyTorch is given
STATISTICS = {"top_k": 8, "received": True, "entropy": True}


@dataclass
class Field:
    """Who takes part in a case.

    Args:
        calls: each contender; all return the same.
        absent: why others take no part.
        prepared: seconds that a contender took before its first call: compiling, and making its mask.
    """

    calls: dict[str, Contender] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    prepared: dict[str, float] = field(default_factory=dict)


def contenders(case: Case, given: Inputs, *, held: bool = False, foreign: bool = True) -> Field:
    """Every library that can compute a case.

    Args:
        case: what is computed.
        given: its tensors.
        held: whether this process is held to an instruction set, which binds regard and PyTorch alone.
        foreign: whether to ask others than regard and PyTorch's function at all.
    """
    found = Field()
    found.calls["regard"] = _differentiated(case, given, _regard(case))
    if case.kind == "statistics":
        found.calls["plain"] = lambda: attention(*given.next(), mask=case.regard_mask())
        return found
    size = case.queries * case.seq_len
    if case.mask in ("window", "documents") and size > MOST_MASK:
        found.absent["torch"] = f"its bool mask would take {size / 2**30:.0f} GiB"
    else:
        found.calls["torch"] = _differentiated(case, given, _torch(case))
    if case.kind == "decode":
        found.calls["torch, queries as rows"] = _rows(case, given)
    for name, refusal, make in (
        ("flex", _refuses_flex, _flex),
        ("onnxruntime", _refuses_onnxruntime, _onnxruntime),
        ("openvino", _refuses_openvino, _openvino),
    ):
        why = "" if foreign else "not asked for"
        why = why or ("it cannot be held to an instruction set" if held and name != "flex" else "") or refusal(case)
        if why:
            found.absent[name] = why
            continue
        began = time.perf_counter()
        try:
            found.calls[name] = make(case, given)
        except Exception as failed:  # a peer that breaks on this machine is no reason to measure nothing
            found.absent[name] = f"{type(failed).__name__}: {str(failed).strip().splitlines()[0][:120]}"
        else:
            found.prepared[name] = time.perf_counter() - began
    return found


def _differentiated(case: Case, given: Inputs, function: Callable[..., Any]) -> Contender:
    if case.kind != "forward+backward":
        return lambda: function(*given.next())
    grad = torch.randn(given.sets[0][0].shape, generator=torch.Generator().manual_seed(1)).to(given.sets[0][0].dtype)

    def call() -> tuple[Tensor, ...]:
        tensors = given.next()
        return torch.autograd.grad(function(*tensors), tensors, grad)

    return call


def _regard(case: Case) -> Callable[..., Tensor]:
    mask = case.regard_mask()
    if case.kind == "statistics":
        return lambda q, k, v: attention_with_stats(q, k, v, mask=mask, **STATISTICS).out
    return lambda q, k, v: attention(q, k, v, mask=mask)


def _torch(case: Case) -> Callable[..., Tensor]:
    grouped = case.num_heads != case.num_kv_heads
    if case.mask in ("dense", "causal"):
        causal = case.mask == "causal"
        return lambda q, k, v: sdpa(q, k, v, is_causal=causal, enable_gqa=grouped)
    mask = case.bool_mask()
    return lambda q, k, v: sdpa(q, k, v, attn_mask=mask, enable_gqa=grouped)


def _rows(case: Case, given: Inputs) -> Contender:
    """What a knowing user does with PyTorch: the queries that share keys become rows of one head."""

    def call() -> Tensor:
        q, k, v = given.next()
        rows = q.view(case.batch, case.num_kv_heads, -1, case.head_dim)
        return sdpa(rows, k, v).view(q.shape)

    return call


def _refuses_flex(case: Case) -> str:
    if case.kind == "forward+backward":
        return "FlexAttention refuses inputs that require a gradient on a CPU"
    if case.kind == "decode":
        return "measured on whole sequences only"
    if case.sweep or case.precision != "highest" or case.head_dim != 64 or case.seq_len < 512:
        return "not compiled for this shape, to save its compile time"
    if case.mask == "dense" and case.seq_len > 2048:
        return "measured dense up to 2,048 keys: it takes seconds a call"
    return ""


def _flex(case: Case, given: Inputs) -> Contender:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    reach = case.reach
    rules: dict[str, Callable[..., Any]] = {
        "causal": lambda _b, _h, i, j: i >= j,
        "window": lambda _b, _h, i, j: (i >= j) & (i - j < reach),
        "documents": lambda _b, _h, i, j: i // reach == j // reach,
    }
    seen = rules.get(case.mask)
    n = case.seq_len
    mask = None if seen is None else create_block_mask(seen, None, None, n, n, device="cpu")
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False)

    def call() -> Tensor:
        out = compiled(*given.next(), block_mask=mask)
        assert isinstance(out, Tensor)
        return out

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        call()
    return call


def _refuses_onnxruntime(case: Case) -> str:
    if case.kind != "forward" or case.mask != "dense" or case.dtype != "float32" or case.precision != "highest":
        return "its MultiHeadAttention has neither mask, half types, nor a gradient on a CPU"
    missing = [name for name in ("onnx", "onnxruntime") if version(name) is None]
    return f"{' and '.join(missing)} not installed" if missing else "not swept" if case.sweep else ""


def _onnxruntime(case: Case, given: Inputs) -> Contender:
    onnx, onnxruntime = import_module("onnx"), import_module("onnxruntime")
    helper = onnx.helper
    heads, shape = case.num_heads, [case.batch, case.seq_len, case.num_heads * case.head_dim]
    node = helper.make_node("MultiHeadAttention", ["q", "k", "v"], ["out"], domain="com.microsoft", num_heads=heads)
    described = {
        name: helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name in ("q", "k", "v", "out")
    }
    graph = helper.make_graph([node], "attention", [described[name] for name in "qkv"], [described["out"]])
    operators = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # it would slow down who comes next
    session = onnxruntime.InferenceSession(
        helper.make_model(graph, opset_imports=operators, ir_version=8).SerializeToString(),
        options, providers=["CPUExecutionProvider"],
    )  # fmt: skip
    fed = {
        name: tensor.transpose(1, 2).reshape(shape).numpy() for name, tensor in zip("qkv", given.sets[0], strict=True)
    }

    def call() -> Tensor:
        out = torch.from_numpy(session.run(None, fed)[0])
        return out.view(case.batch, case.seq_len, heads, case.head_dim).transpose(1, 2)

    return call


def _refuses_openvino(case: Case) -> str:
    if case.kind != "forward" or case.mask not in ("dense", "causal") or case.num_heads != case.num_kv_heads:
        return "measured forward, dense and causal"
    if case.dtype == "float16" or case.precision != "highest":
        return "it computes float16 and lower precisions as bfloat16"
    return "openvino not installed" if version("openvino") is None else "not swept" if case.sweep else ""


def _openvino(case: Case, given: Inputs) -> Contender:
    openvino, opset13 = import_module("openvino"), import_module("openvino.opset13")
    half = case.dtype == "bfloat16"
    element = openvino.Type.bf16 if half else openvino.Type.f32
    shape = list(given.sets[0][0].shape)
    q, k, v = (opset13.parameter(shape, element) for _ in range(3))
    out = opset13.scaled_dot_product_attention(q, k, v, causal=case.mask == "causal")
    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": element}
    model = openvino.Model([out], [q, k, v])
    request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
    held = [t.view(torch.int16).numpy().view(np.uint16) if half else t.numpy() for t in given.sets[0]]
    for index, array in enumerate(held):
        tensor = openvino.Tensor(array, shape, element) if half else openvino.Tensor(array, shared_memory=True)
        request.set_input_tensor(index, tensor)

    def call() -> Tensor:
        request.infer()
        data = request.get_output_tensor(0).data
        _ = held  # the request reads them in place
        return torch.from_numpy(data.view(np.int16)).view(torch.bfloat16) if half else torch.from_numpy(data)

    return call
