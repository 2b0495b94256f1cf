"""PyTorch's scaled_dot_product_attention on our kernels, in code that stays as it is.

Enters: nothing; while it is on, every CPU call of scaled_dot_product_attention in the process, from Python, TorchScript
or compiled code, in any thread.
Leaves: what PyTorch would have given, forward and backward; what regard does not take goes to PyTorch, counted with the
reason. The calls are met inside PyTorch's dispatcher, so that it does not matter how the function was imported.
Floor 4: beside attention, above the operator.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from torch.autograd import forward_ad

from regard import check, gradient, op
from regard.mask_algebra import Mask
from regard.masks import causal, from_tensor
from regard.positions import Frame

_SDPA = torch.ops.aten.scaled_dot_product_attention.default
_FUSED = "aten::_scaled_dot_product_flash_attention_for_cpu"  # what compiled programs call
_FUSED_BACKWARD = "aten::_scaled_dot_product_flash_attention_for_cpu_backward"
_FLASH = 1  # torch.nn.attention.SDPBackend.FLASH_ATTENTION
_TOP_LEFT = causal()
_TRACED = "a trace or a mode watched (torch.compile, torch.export, torch.func); compiled programs count when they run"


@dataclass(frozen=True)
class Report:
    """Where the calls went; print it for a table.

    Args:
        on_regard: calls that ran on regard's kernels; their backward passes are not counted again.
        on_pytorch: reasons, and how many calls went to PyTorch for each.
    """

    on_regard: int
    on_pytorch: dict[str, int]

    def __str__(self) -> str:
        lines = [f"on regard   {self.on_regard:,}", f"on PyTorch  {sum(self.on_pytorch.values()):,}"]
        return "\n".join(lines + [f"  {count:,}: {why}" for why, count in sorted(self.on_pytorch.items())])


@dataclass(eq=False)
class Acceleration:
    """Switches regard under PyTorch on and off; made by `accelerate`. It may be started more than once, and nested."""

    _depth: int = 0
    _on_regard: int = 0
    _on_pytorch: Counter[str] = field(default_factory=Counter)

    def start(self) -> Self:
        """From now on, until `stop`, for the whole process."""
        _switch.on(self)
        return self

    def stop(self) -> None:
        """Back to PyTorch, once for each `start`.

        Raises:
            RuntimeError: where it was not started.
        """
        _switch.off(self)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def report(self) -> Report:
        """How many calls ran on regard so far, and how many on PyTorch and why."""
        with _switch.lock:
            return Report(self._on_regard, dict(self._on_pytorch))


def accelerate() -> Acceleration:
    """Run every CPU call of PyTorch's scaled_dot_product_attention on regard, unchanged, forward and backward.

    out = softmax(scale · q kᵀ + mask) · v, by PyTorch's conventions: causal from the top left, a bool mask True =
    attend, a float mask added, rows without keys 0.

    As a context manager for a block of code, or for good: `regard.accelerate().start()`. Either way it holds for the
    whole process, all threads: hence for torch.nn.MultiheadAttention, TransformerEncoder, timm, diffusers, and for
    programs of torch.compile, as they run. A float mask of nothing but 0 and −inf is taken as the bool mask that it
    is, so that what it excludes is skipped.

    To PyTorch go, and are counted: other dtypes, tensor subclasses, is_causal together with a mask, leading axes that
    broadcast, shapes that PyTorch refuses, forward-mode derivatives, torch.func, traces, and whatever runs under
    `torch.nn.attention.sdpa_kernel` without its flash kernel. Calls on other devices or on nested tensors, and
    MultiheadAttention with need_weights=True, never come by here, and are not counted.

    What differs: dropout draws other numbers from the same generator; roundings; a gradient may be differentiated once
    more (gradient penalties, Hessian-vector products), which PyTorch's own CPU kernel refuses. While it is on, the fast
    path of torch.nn.TransformerEncoder and MultiheadAttention (torch.backends.mha) is off, so that padded rows hold
    numbers as they do in training, where the fast path writes 0.
    Afterwards a call of scaled_dot_product_attention still passes through Python once, some 5 µs, for PyTorch cannot
    take a kernel back safely while other threads run.

    Returns:
        Acceleration: a context manager with `start()`, `stop()` and `report()`.

    Example:
        >>> from torch.nn.functional import scaled_dot_product_attention
        >>> q = k = v = torch.ones(1, 8, 128, 64)
        >>> with accelerate() as accelerated:
        ...     out = scaled_dot_product_attention(q, k, v, is_causal=True)
        >>> print(accelerated.report())
        on regard   1
        on PyTorch  0

    Source: the conventions of torch.nn.functional.scaled_dot_product_attention, PyTorch 2.13.
    """
    return Acceleration()


class _Switch:
    """Which accelerations are on; the kernels are handed to PyTorch once, and stay."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.active: tuple[Acceleration, ...] = ()
        self.library: torch.library.Library | None = None
        self.originals: dict[str, Any] = {}
        self.fast_path = True
        self.local = threading.local()

    def on(self, acceleration: Acceleration) -> None:
        with self.lock:
            self._register()
            acceleration._depth += 1
            if acceleration._depth > 1:
                return
            if not self.active:
                self.fast_path = torch.backends.mha.get_fastpath_enabled()
                torch.backends.mha.set_fastpath_enabled(False)
            self.active = (*self.active, acceleration)

    def off(self, acceleration: Acceleration) -> None:
        with self.lock:
            if not acceleration._depth:
                raise RuntimeError("accelerate: stop must follow start; got no start. Call start() first.")
            acceleration._depth -= 1
            if acceleration._depth:
                return
            self.active = tuple(one for one in self.active if one is not acceleration)
            if not self.active:
                torch.backends.mha.set_fastpath_enabled(self.fast_path)

    def count(self, why: str | None) -> None:
        """One more call, on regard where there is no reason why not."""
        self.local.counted = True
        with self.lock:
            for one in self.active:
                if why is None:
                    one._on_regard += 1
                else:
                    one._on_pytorch[why] += 1

    def _register(self) -> None:
        if self.library is not None:
            return
        library = torch.library.Library("aten", "IMPL")
        for key in ("CPU", "AutogradCPU"):
            library.impl("scaled_dot_product_attention", _sdpa, key)
        if hasattr(torch.library, "get_kernel"):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")
                for name, own in ((_FUSED, _fused), (_FUSED_BACKWARD, _fused_backward)):
                    self.originals[name] = torch.library.get_kernel(name, "CPU")
                    library.impl(name.removeprefix("aten::"), own, "CPU")
        self.library = library


_switch = _Switch()


# ---- scaled_dot_product_attention ----


def _sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if not _switch.active:
        return _SDPA.decompose(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    why = _watched((query, key, value, attn_mask)) or _unfit(query, key, value, attn_mask, dropout_p, is_causal, scale)
    found = None
    if why is None:
        found = layout(query, key, value, attn_mask, enable_gqa)
        if found is None:
            why = "shapes that PyTorch itself must judge"
    if found is None:
        _switch.local.counted = False
        out = _SDPA.decompose(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        if not _switch.local.counted:  # else it has come by again, as the fused kernel
            _switch.count(why)
        return out
    q, k, v, given, lead = found
    # PyTorch's fused kernel lays the result out as q, its other one row by row.
    choice = torch._fused_sdp_choice(  # pyright: ignore[reportPrivateImportUsage]
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    fused = lead is None and choice == _FLASH
    mask, bias = mask_and_bias(given) if given is not None else (_TOP_LEFT if is_causal else None, None)
    scale = 1.0 / math.sqrt(q.shape[3]) if scale is None else scale
    wanted = _wants_gradient(query, key, value, *(() if bias is None else (bias,)))
    if dropout_p or wanted:
        out, _ = op.attend(
            q, k, v, mask=mask, bias=bias, diagonal=None, sinks=None, scale=scale, softcap=None, dropout=dropout_p,
            query_offset=0, key_offset=0,
        )  # fmt: skip
        if lead is None:
            laid = torch.empty_like(query) if fused else None
            if laid is None:
                out = out.contiguous()
            elif laid.stride() != out.stride():
                out = laid.copy_(out)
    else:
        laid = torch.empty_like(query) if fused else q.new_empty(*q.shape[:3], v.shape[3])
        out, _ = op._forward(
            q, k, v, bias, None, None, mask, _frame(q, k), scale, 0.0, 0.0, 0, (laid, _laid_lse(q))
        )  # fmt: skip
    _switch.count(None)
    return out if lead is None else out.reshape(*lead, *out.shape[-2:])


def _laid_lse(q: Tensor) -> Tensor:
    """Room for lse, laid out as PyTorch's fused kernel does."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=wide).transpose(1, 2)


def _wants_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _watched(tensors: Sequence[Tensor | None]) -> str | None:
    """Why a call is not to be taken because of who looks on; None where nobody does."""
    if _tracing():
        return _TRACED
    if any(t is not None and type(t) not in (Tensor, torch.nn.Parameter, torch.nn.Buffer) for t in tensors):
        return "a subclass of torch.Tensor"
    held = [t for t in tensors if t is not None]
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in held):
        return "forward-mode derivatives"
    return None


def _tracing() -> bool:
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.maybe_current_level() is not None  # pyright: ignore[reportAttributeAccessIssue]
        or torch._C._is_tracing()
    )


def _unfit(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, is_causal: bool,
    scale: float | None,
) -> str | None:  # fmt: skip
    """Why regard does not take a call; None where it does, if the shapes fit."""
    if not (query.is_cpu and key.is_cpu and value.is_cpu and (attn_mask is None or attn_mask.is_cpu)):
        return "tensors on another device"
    if query.dtype not in check.DTYPES or not query.dtype == key.dtype == value.dtype:
        return f"dtype {query.dtype}" if query.dtype == key.dtype == value.dtype else "q, k and v of several dtypes"
    if is_causal and attn_mask is not None:
        return "is_causal together with attn_mask"
    if not 0.0 <= dropout_p < 1.0:
        return "dropout_p outside 0 to 1"
    if scale is not None and not math.isfinite(scale):
        return "scale of NaN or inf"
    if attn_mask is not None and attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
        return f"attn_mask of dtype {attn_mask.dtype}"
    if attn_mask is not None and attn_mask.dtype == torch.float32 and query.dtype == torch.float64:
        return "attn_mask of dtype torch.float32 with q of torch.float64"
    if not torch._C._get_flash_sdp_enabled():
        return "sdpa_kernel names another kernel than flash"
    return None


def layout(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, tuple[int, ...] | None] | None:
    """q, k, v and mask with 4 axes, and the leading axes of the result where they are not (batch, num_heads).

    None where the shapes do not fit each other.
    """
    dims = query.dim()
    if dims < 2 or not dims == key.dim() == value.dim():
        return None
    if query.shape[-1] != key.shape[-1] or key.shape[-2] != value.shape[-2] or not query.shape[-1] * value.shape[-1]:
        return None
    lead = tuple(query.shape[:-2])
    if not (lead == tuple(key.shape[:-2]) == tuple(value.shape[:-2])):
        grouped = dims == 4 and enable_gqa and key.shape[1] == value.shape[1] and key.shape[1] > 0
        if not grouped or query.shape[1] % key.shape[1] or not query.shape[0] == key.shape[0] == value.shape[0]:
            return None
    whole = (*lead, query.shape[-2], key.shape[-2])
    if attn_mask is not None:
        if not 2 <= attn_mask.dim() <= dims:
            return None
        if any(own not in (1, full) for own, full in zip(reversed(attn_mask.shape), reversed(whole), strict=False)):
            return None
    if dims == 4:
        return query, key, value, None if attn_mask is None else attn_mask[(None,) * (4 - attn_mask.dim())], None
    if attn_mask is not None:  # its leading axes become one, of length 1 where all of them are
        own = (1,) * (dims - attn_mask.dim()) + tuple(attn_mask.shape)
        if any(size > 1 for size in own[:-2]):
            attn_mask = attn_mask.expand(*lead, *own[-2:]).reshape(-1, 1, *own[-2:])
        else:
            attn_mask = attn_mask.reshape(1, 1, *own[-2:])
    rows = math.prod(lead)
    q, k, v = (t.reshape(rows, 1, *t.shape[-2:]) for t in (query, key, value))
    return q, k, v, attn_mask, lead


def mask_and_bias(given: Tensor) -> tuple[Mask | None, Tensor | None]:
    """PyTorch's mask of 4 axes as a mask, or as a bias; axes along which it is the same are taken once."""
    for axis in range(4):
        if given.shape[axis] > 1 and given.stride(axis) == 0:
            given = given.narrow(axis, 0, 1)
    if given.dtype != torch.bool:
        if given.requires_grad and torch.is_grad_enabled():
            return None, given
        allowed = given == 0.0
        if not bool(allowed.logical_or(given == -math.inf).all()):
            return None, given.detach()
        given = allowed
    if bool(given.all()):
        return None, None
    for axis in (1, 0):
        first = given.narrow(axis, 0, 1) if given.shape[axis] > 1 else given
        if first is not given and torch.equal(given, first.expand_as(given)):
            given = first
    return from_tensor(given), None


# ---- the fused kernel, which compiled programs call ----


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    why = _unfit_fused(query, key, value, dropout_p, is_causal, attn_mask, scale) if _switch.active else "off"
    if why is not None:
        if _switch.active:
            _switch.count(why)
        return _original(_FUSED, query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)
    mask, bias = _fused_mask(attn_mask, is_causal)
    out, lse = op._forward(
        query, key, value, bias, None, None, mask, _frame(query, key),
        1.0 / math.sqrt(query.shape[3]) if scale is None else scale, 0.0, 0.0, 0,
        (torch.empty_like(query), _laid_lse(query)),
    )  # fmt: skip
    _switch.count(None)
    return out, lse


def _fused_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    why = _unfit_fused(query, key, value, dropout_p, is_causal, attn_mask, scale) if _switch.active else "off"
    if why is not None:
        return _original(
            _FUSED_BACKWARD, grad_out, query, key, value, out, logsumexp, dropout_p, is_causal, attn_mask=attn_mask,
            scale=scale,
        )  # fmt: skip
    mask, bias = _fused_mask(attn_mask, is_causal)
    found = gradient.gradients(
        grad_out, torch.zeros_like(logsumexp), query, key, value, out, logsumexp, bias=bias, diagonal=None, sinks=None,
        mask=mask, frame=_frame(query, key), scale=1.0 / math.sqrt(query.shape[3]) if scale is None else scale,
        softcap=0.0, dropout=0.0, seed=0, wanted=(True, True, True, False, False, False),
    )  # fmt: skip
    assert found.q is not None and found.k is not None and found.v is not None
    q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (found.q, found.k, found.v))
    return q, k, v  # laid out as PyTorch does: compiled programs hold it to that


def _unfit_fused(
    query: Tensor, key: Tensor, value: Tensor, dropout_p: float, is_causal: bool, attn_mask: Tensor | None,
    scale: float | None,
) -> str | None:  # fmt: skip
    if dropout_p:
        return "dropout_p in PyTorch's fused kernel"
    if layout(query, key, value, attn_mask, True) is None or query.dim() != 4:
        return "shapes that PyTorch itself must judge"
    return _unfit(query, key, value, attn_mask, 0.0, is_causal, scale)


def _fused_mask(attn_mask: Tensor | None, is_causal: bool) -> tuple[Mask | None, Tensor | None]:
    if attn_mask is None:
        return _TOP_LEFT if is_causal else None, None
    return mask_and_bias(attn_mask[(None,) * (4 - attn_mask.dim())])


def _original(name: str, *inputs: Any, **terms: Any) -> Any:
    return _switch.originals[name].call_boxed(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *inputs, **terms)


def _frame(q: Tensor, k: Tensor) -> Frame:
    return Frame(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
