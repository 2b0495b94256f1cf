"""Recording a model while it runs.

Enters: a transformers model that `regard.huggingface.prepare` can route, or any torch module.
Leaves: a `Recording`, filled by every attention call inside the `with` block; the forward keeps its bits.
Each call costs one pass for its statistics; keys that a cache hands over again are compared, and kept once.
Floor 5: stands on regard.huggingface.observe and regard.op.statistics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from regard.lens.fingerprint import Weights, model_facts, tokenizer_facts, versions
from regard.lens.growing import GrowingLayer
from regard.lens.numbering import Numbering, Place
from regard.lens.recording import Recording

STATISTICS = ("received", "entropy", "max_score", "top_keys")


@contextmanager
def record(
    model: Any,
    layers: Iterable[int] | None = None,
    dtype: torch.dtype | None = None,
    *,
    statistics: Iterable[str] = STATISTICS,
    top_k: int = 8,
    tokenizer: Any = None,
    texts: Iterable[str] = (),
) -> Iterator[Recording]:
    """Record the attention of a model while the block lasts.

    Args:
        model: any model that transformers routes through its AttentionInterface, whose own choice of attention comes
            back after the block; or any other torch module: its calls of scaled_dot_product_attention and of
            torch.nn.MultiheadAttention are recorded under their modules' names.
        layers: layer numbers to keep. Default all.
        dtype: what q and k are kept in (torch.bfloat16 halves them). Default as they are. lse and statistics stay
            exact, so that tiles from narrower q and k differ by that rounding.
        statistics: which of "received", "entropy", "max_score", "top_keys" to take. Default all.
        top_k: how many of the strongest keys of each query "top_keys" keeps. Default 8.
        tokenizer: named and fingerprinted in the recording, and used to turn token ids into `texts`.
        texts: the texts, where they are known; otherwise the tokenizer, if given, says what they were.

    Returns:
        The recording, complete when the block ends.

    Raises:
        ValueError: the model cannot be routed; a layer that no module has; nothing ran inside the block.

    Example:
        >>> import torch, transformers
        >>> config = transformers.BertConfig(
        ...     vocab_size=9, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8
        ... )
        >>> model = transformers.BertModel(config).eval()
        >>> with record(model) as recording:
        ...     _ = model(torch.tensor([[1, 2, 3]]))
        >>> recording.weights(layer=1, head=0).shape
        torch.Size([3, 3])
    """
    from regard import huggingface

    chosen = tuple(statistics)
    for name in chosen:
        if name not in STATISTICS:
            raise ValueError(
                f"record: statistics must be among {', '.join(STATISTICS)}; got {name!r}. Choose from those."
            )
    recording = Recording(
        model=model_facts(model),
        tokenizer=None if tokenizer is None else tokenizer_facts(tokenizer),
        texts=list(texts),
        versions=versions(),
        fingerprint=Weights(model),
    )
    wanted = None if layers is None else {int(number) for number in layers}
    recorder = _Recorder(model, recording, wanted, dtype, chosen, top_k)
    with routed(model), recorder.passes(), huggingface.observe(recorder.see):
        yield recording
    recorder.finish()
    if tokenizer is not None and not recording.texts:
        sides = recording.token_ids.values()
        recording.texts = [
            tokenizer.decode(row, skip_special_tokens=True) for side in sides for ids in side for row in ids
        ]


@contextmanager
def routed(model: Any) -> Iterator[None]:
    """Route a model's attention through regard for a while; what `prepare` changed comes back."""
    from regard import huggingface

    if _is_plain(model):
        from regard.lens.capture import captured

        with captured(model):
            yield
        return
    found = {}
    queue = [module.config for module in model.modules() if hasattr(module, "config")]
    while queue:
        config = queue.pop()
        if id(config) in found or not hasattr(config, "_attn_implementation_internal"):
            continue
        found[id(config)] = (config, config._attn_implementation_internal)
        queue.extend(own for name in config.sub_configs if (own := getattr(config, name, None)) is not None)
    before = [(module, module.__class__, dict(module.__dict__)) for module in model.modules()]
    swapped: list[tuple[nn.Module, type, dict[str, Any]]] = []
    try:
        huggingface.prepare(model)
        for module, own_class, fields in before:  # families with attention classes of their own are given another
            if module.__class__ is not own_class:
                changed = {name: old for name, old in fields.items() if module.__dict__.get(name) is not old}
                swapped.append((module, own_class, changed))
        del before
        yield
    finally:
        for module, own_class, changed in swapped:
            module.__class__ = own_class
            module.__dict__.update(changed)
        for config, choice in found.values():
            config._attn_implementation_internal = choice


def _is_plain(model: Any) -> bool:
    """Whether this is a torch module that transformers has no hand in."""
    from transformers import PreTrainedModel

    return isinstance(model, nn.Module) and not isinstance(model, PreTrainedModel)


class _Recorder:
    """Turns the calls of one `with` block into layers and steps."""

    def __init__(
        self,
        model: Any,
        recording: Recording,
        wanted: set[int] | None,
        dtype: torch.dtype | None,
        statistics: tuple[str, ...],
        top_k: int,
    ) -> None:
        self.model, self.recording, self.wanted, self.dtype = model, recording, wanted, dtype
        self.statistics, self.top_k = statistics, top_k
        self.numbering = Numbering(model)
        self.encoder = self.numbering.encoder
        self.layers: dict[Place, GrowingLayer] = {}
        self.numbers: set[int] = set()
        self.depth = self.number_of_pass = 0
        self.sequences: dict[tuple[str, int], int] = {}  # (kind, pass) -> sequence
        self.inputs: list[tuple[str, int, Tensor]] = []  # (side, pass, token ids)
        self.biases: dict[int, tuple[Tensor, Tensor]] = {}  # of this pass: (as handed over, as kept)

    @contextmanager
    def passes(self) -> Iterator[None]:
        """Watch where one run through the model begins and ends, and which token ids it was given."""
        watched = {id(module): module for module in (self.model, self.encoder) if isinstance(module, nn.Module)}
        handles: list[Any] = []
        for module in watched.values():
            handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
            handles.append(module.register_forward_hook(self._leave, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def see(self, call: Any) -> None:
        """Keep one routed attention call."""
        known = id(call.module) in self.numbering.names
        if not known or torch._C._current_graph_task_id() != -1:  # another model's, or recomputed by a backward pass
            return
        if not self.depth:
            self._next_pass()
        place = self.numbering.place(call)
        assert place is not None
        sequence = self._sequence(call, place.kind)
        self.numbers.add(place.number)
        if self.wanted is None or place.number in self.wanted:
            layer = self.layers.setdefault(place, GrowingLayer(self.dtype))
            with torch.inference_mode(False), torch.no_grad():  # what is kept shall be usable everywhere
                layer.add(sequence, call, self._keep(call.bias), self._keep(call.diagonal), self._statistics(call))

    def finish(self) -> None:
        """Complete the recording."""
        if not self.numbers:
            raise ValueError(
                "record: the model must run inside the with block; got no attention call. Call the model inside it."
            )
        missing = sorted((self.wanted or set()) - self.numbers)
        if missing:
            raise ValueError(
                f"record: layers must be among those that ran, 0 to {max(self.numbers)}; got {missing[0]}. "
                "Pass layer numbers of this model."
            )
        recording = self.recording
        recording.layers = [grown.layer(*key[:3]) for key, grown in self.layers.items()]
        for side in dict.fromkeys(side for side, _, _ in self.inputs):
            recording.token_ids[side] = self._token_ids(side)
        steps = [step for layer in recording.layers for step in layer.steps]
        if any(step.bias and step.bias.bias is not None and min(step.bias.bias.shape[2:]) > 1 for step in steps):
            recording.notes.append("A dense bias came with the calls: it is kept whole, queries by keys.")

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.depth:
            self._next_pass()
        self.depth += 1
        if self.encoder is None:
            side, name = "text", "input_ids"
        elif module is self.encoder:
            side, name = "source", "input_ids"
        else:
            side, name = "target", "decoder_input_ids"
        ids = kwargs.get(name, args[0] if args and side != "target" else None)
        if isinstance(ids, Tensor) and ids.dim() == 2 and not ids.is_floating_point():
            self.inputs.append((side, self.number_of_pass, ids.detach().to("cpu", torch.int64, copy=True)))

    def _leave(self, *_: Any) -> None:
        self.depth -= 1

    def _next_pass(self) -> None:
        self.number_of_pass += 1
        self.numbering.next_pass()
        self.biases.clear()

    def _sequence(self, call: Any, kind: str) -> int:
        """Which text a call belongs to: one whose keys are just its queries begins a new one."""
        own = "decoder" if kind == "cross" else kind
        held = [sequence for (one, _), sequence in self.sequences.items() if one == own]
        last = max(held, default=-1)
        at = (own, self.number_of_pass)
        if at in self.sequences or kind == "cross":
            return self.sequences.get(at, max(last, 0))
        seq_len_q, seq_len_kv = call.q.shape[2], call.k.shape[2]
        begins = seq_len_q == seq_len_kv or (seq_len_q > 1 and call.query_offset == call.key_offset)
        self.sequences[at] = last + 1 if begins or last < 0 else last
        return self.sequences[at]

    def _token_ids(self, side: str) -> list[Tensor]:
        kinds = {"source": ("encoder",), "target": ("decoder",), "text": ("encoder", "decoder")}[side]
        found: dict[int, list[Tensor]] = {}
        for own, number, ids in self.inputs:
            sequence = next((self.sequences[kind, number] for kind in kinds if (kind, number) in self.sequences), None)
            if own == side and sequence is not None:
                found.setdefault(sequence, []).append(ids)
        return [
            torch.cat(parts, 1) if len({len(part) for part in parts}) == 1 else parts[0] for parts in found.values()
        ]

    def _keep(self, bias: Tensor | None) -> Tensor | None:
        """A copy of a bias, one for all layers of a pass that were handed the same tensor."""
        if bias is None:
            return None
        if id(bias) not in self.biases:
            self.biases[id(bias)] = (bias, bias.clone())
        return self.biases[id(bias)][1]

    def _statistics(self, call: Any) -> dict[str, Tensor]:
        from regard import op

        if not self.statistics:
            return {}
        found = op.statistics(
            call.q,
            call.k,
            call.lse,
            mask=call.mask,
            bias=call.bias,
            diagonal=call.diagonal,
            scale=call.scale,
            softcap=call.softcap,
            query_offset=call.query_offset,
            key_offset=call.key_offset,
            top_k=min(self.top_k, call.k.shape[2]) if "top_keys" in self.statistics else 0,
            received="received" in self.statistics,
            entropy="entropy" in self.statistics,
            max_score="max_score" in self.statistics,
            block=None,
        )
        names = {*self.statistics, *(["top_weights"] if "top_keys" in self.statistics else [])}
        return {name: tensor for name, tensor in found.items() if name in names and tensor is not None}
