"""Operators of torch.library: a kernel, what a trace takes it for, and its gradient.

Enters: a name, a schema, and functions over the operator's inputs.
Leaves: `torch.ops.regard.<name>`, for autograd, `torch.compile`, `torch.export` and FakeTensor.
Floor 1: knows torch alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

# What every mask is to an operator: the program that `Mask.encode` writes.
MASK = "str mask_ops, SymInt[] mask_ints, Tensor[] mask_tensors"


class Saved(NamedTuple):
    """What an operator's gradient has to go by.

    Args:
        inputs: as the operator took them.
        outputs: what it gave; empty unless they were asked for.
        needs: for each input, whether its gradient is wanted.
    """

    inputs: tuple[Any, ...]
    outputs: tuple[Tensor, ...]
    needs: tuple[Any, ...]


Gradient = Callable[..., Sequence[Tensor | None]]


def operator(
    name: str,
    schema: str,
    kernel: Callable[..., Any],
    *,
    fake: Callable[..., Any],
    gradient: Gradient,
    with_outputs: bool = False,
    zeros: bool = True,
) -> None:
    """Registers an operator on the CPU.

    Args:
        name: it becomes `torch.ops.regard.<name>`.
        schema: its inputs and outputs, as in "(Tensor q, float scale) -> Tensor".
        kernel: the operator itself.
        fake: the same inputs, to outputs of the right sizes and strides.
        gradient: `Saved` and the upstream gradients of the outputs, to gradients of the first inputs; those of the rest
            are None.
        with_outputs: whether `gradient` reads the outputs. Default False.
        zeros: whether an upstream gradient that there is not arrives as zeros, rather than as None. Default True.
    """
    op = torch.library.custom_op(f"regard::{name}", kernel, mutates_args=(), device_types="cpu", schema=schema)
    op.register_fake(fake)

    # torch hands over a context that no public type describes.
    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        outputs = () if not with_outputs else (output,) if isinstance(output, Tensor) else tuple(output)
        tensors = [t for t in inputs if isinstance(t, Tensor)]
        listed = [t for one in inputs if _is_tensors(one) for t in one]
        ctx.save_for_backward(*outputs, *tensors, *listed)
        ctx.others = [None if isinstance(one, Tensor) else len(one) if _is_tensors(one) else one for one in inputs]
        ctx.kinds = ["tensor" if isinstance(one, Tensor) else "list" if _is_tensors(one) else "" for one in inputs]
        ctx.num_outputs = len(outputs)
        ctx.set_materialize_grads(zeros)

    def backward(ctx: Any, *upstream: Any) -> tuple[Any, ...]:
        held = ctx.saved_tensors
        outputs, tensors = held[: ctx.num_outputs], iter(held[ctx.num_outputs :])
        inputs = [next(tensors) if kind == "tensor" else one for kind, one in zip(ctx.kinds, ctx.others, strict=True)]
        for n, kind in enumerate(ctx.kinds):
            if kind == "list":
                inputs[n] = [next(tensors) for _ in range(inputs[n])]
        found = gradient(Saved(tuple(inputs), outputs, tuple(ctx.needs_input_grad)), *upstream)
        return (*found, *(_nothing(one) for one in inputs[len(found) :]))

    op.register_autograd(backward, setup_context=setup)


def none_further(function: str, order: str, fix: str) -> Gradient:
    """The gradient of an operator that has none: it says so."""

    def refuse(_saved: Saved, *_upstream: Any) -> NoReturn:
        raise NotImplementedError(f"{function}: derivatives must be {order}; got one more. {fix}")

    return refuse


def _is_tensors(one: Any) -> bool:
    return isinstance(one, (list, tuple)) and len(one) > 0 and all(isinstance(t, Tensor) for t in one)


def _nothing(one: Any) -> Any:
    """No gradient, in the shape that torch asks for: a list of tensors, or an empty list, has a list of its own."""
    if isinstance(one, (list, tuple)) and (not one or isinstance(one[0], Tensor)):
        return [None] * len(one)
    return None
