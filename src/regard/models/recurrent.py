"""The encoder-decoder of 2014: one recurrent network reads, another writes, with or without attention between them.

Enters: source and target token ids, padded on the right, and their lengths.
Leaves: logits; a loss; translations; which source word each target word looked at.
Floor 5. Without attention all that the decoder knows of the source is one vector, whatever its length.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from regard import masks
from regard.additive import additive_attention
from regard.attention import attention
from regard.mask_algebra import Mask
from regard.models.pretrained import as_config
from regard.models.seq2seq import EncoderDecoder
from regard.models.transformer import at_least_float32, check_tokens

CELLS = {"gru": nn.GRU, "lstm": nn.LSTM}
ATTENTIONS = ("none", "bahdanau", "luong")
_NAME = "RecurrentSeq2Seq"

State = Tensor | tuple[Tensor, Tensor]


class RecurrentSeq2Seq(EncoderDecoder):
    """A recurrent encoder-decoder.

    h = biRNN(E_s x); s_i = RNN(s_{i−1}, [E_t y_{i−1}, c_i]); p(y_i) = softmax(W tanh(U [s_i, c_i])), where c_i is

    - none: W_c [→h_n, ←h_1], one vector for the whole sentence (Cho et al. 2014, equations 7 and 8)
    - bahdanau: Σ_j softmax_j(vᵀ tanh(W_a s_{i−1} + U_a h_j)) h_j, found before the step
    - luong: Σ_j softmax_j(s_iᵀ W_a h_j) h_j, found after the step, which then reads E_t y_{i−1} alone

    Args:
        vocab_size: how many source tokens there are.
        target_vocab_size: how many target tokens. Default vocab_size.
        start_token: begins every target. Default 1.
        end_token: ends it. Default 2.
        dim: numbers in one embedding. Default 256.
        hidden: numbers in a state; even. Default 512.
        cell: "gru" or "lstm". Default "gru".
        attention: "none", "bahdanau" or "luong". Default "bahdanau".
        num_layers: layers of both networks. Default 1.
        dropout: in embeddings, between layers and before logits, in training. Default 0.

    Raises:
        ValueError: for a word that is not among those above, or an odd `hidden`.

    Example:
        >>> model = RecurrentSeq2Seq(50, dim=16, hidden=32, attention="luong")
        >>> source, target = torch.randint(3, 50, (2, 9)), torch.randint(3, 50, (2, 7))
        >>> model(source, target, torch.tensor([9, 4])).shape
        torch.Size([2, 7, 50])

    Source: Cho et al. 2014; Sutskever et al. 2014; Bahdanau et al. 2015; Luong et al. 2015, section 3.1 ("general").
    """

    def __init__(
        self,
        vocab_size: int,
        target_vocab_size: int | None = None,
        *,
        start_token: int = 1,
        end_token: int = 2,
        dim: int = 256,
        hidden: int = 512,
        cell: str = "gru",
        attention: str = "bahdanau",
        num_layers: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        for name, word, known in (("cell", cell, CELLS), ("attention", attention, ATTENTIONS)):
            if word not in known:
                raise ValueError(f"{_NAME}: {name} must be one of {', '.join(known)}; got {word!r}. Choose one.")
        if hidden % 2:
            raise ValueError(f"{_NAME}: hidden must be even, half for each direction; got {hidden}. Add one.")
        self.config = as_config({
            "vocab_size": vocab_size, "target_vocab_size": target_vocab_size, "start_token": start_token,
            "end_token": end_token, "dim": dim, "hidden": hidden, "cell": cell, "attention": attention,
            "num_layers": num_layers, "dropout": dropout,
        })  # fmt: skip
        self.vocab_size = vocab_size
        self.target_vocab_size = vocab_size if target_vocab_size is None else target_vocab_size
        self.start_token, self.end_token, self.num_layers, self.kind = start_token, end_token, num_layers, attention
        between = dropout if num_layers > 1 else 0.0
        self.source_embedding = nn.Embedding(vocab_size, dim)
        self.target_embedding = nn.Embedding(self.target_vocab_size, dim)
        self.encoder = CELLS[cell](dim, hidden // 2, num_layers, batch_first=True, dropout=between, bidirectional=True)
        width = dim if attention == "luong" else dim + hidden
        self.decoder = CELLS[cell](width, hidden, num_layers, batch_first=True, dropout=between)
        self.begin = nn.Linear(hidden, hidden)
        if attention == "none":
            self.context = nn.Linear(hidden, hidden)
        else:
            self.query = nn.Linear(hidden, hidden, bias=False)
        if attention == "bahdanau":
            self.key = nn.Linear(hidden, hidden)
            self.score_weight = nn.Parameter(torch.randn(hidden) * hidden**-0.5)
        self.readout = nn.Linear(2 * hidden, dim)
        self.head = nn.Linear(dim, self.target_vocab_size)
        self.drop = nn.Dropout(dropout)

    def forward(
        self, source: Tensor, target: Tensor, source_lengths: Tensor | None = None,
        target_lengths: Tensor | None = None,  # noqa: ARG002
    ) -> Tensor:  # fmt: skip
        """Logits of each target token, given those before it; arguments as in `Seq2Seq.forward`.

        Returns:
            `(batch, seq_len_q, vocab_size)`; past a row's length they mean nothing.
        """
        return self.head(self._written(source, target, source_lengths))

    def loss(
        self, source: Tensor, target: Tensor, source_lengths: Tensor | None = None,
        target_lengths: Tensor | None = None, *, label_smoothing: float = 0.0,
    ) -> Tensor:  # fmt: skip
        """Mean of −log p of each real target token, in nats; arguments as in `Seq2Seq.loss`."""
        hidden = self._written(source, target, source_lengths)
        if target_lengths is not None:
            real = torch.arange(target.shape[1], device=target.device) < target_lengths[:, None]
            hidden, target = hidden[real], target[real]
        logits = at_least_float32(self.head(hidden)).flatten(0, -2)
        return nn.functional.cross_entropy(logits, target.flatten(), label_smoothing=label_smoothing)

    @torch.no_grad()
    def alignment(self, source: Tensor, target: Tensor, source_lengths: Tensor | None = None) -> Tensor:
        """How much each target token looked at each source token: `(batch, seq_len_q, seq_len_kv)`, rows sum to 1.

        Raises:
            ValueError: where the model has no attention.
        """
        if self.kind == "none":
            raise ValueError(
                f"{_NAME}.alignment: attention must be 'bahdanau' or 'luong'; got 'none'. One vector has no alignment."
            )
        memory = self._read(source, source_lengths)
        states = self._states(memory, self.shifted(target))[0]
        queries = states[:, :-1] if self.kind == "bahdanau" else states[:, 1:]
        # the weighted sum of unit vectors is the weights
        units = torch.eye(source.shape[1], dtype=memory.values.dtype, device=source.device)
        return memory.attend(queries, units.expand(len(source), -1, -1))

    def decoding(self, source: Tensor, source_lengths: Tensor | None = None) -> _Decoding:
        """A target about to be written; arguments as in `forward`."""
        return _Decoding(self, self._read(source, source_lengths))

    def _written(self, source: Tensor, target: Tensor, source_lengths: Tensor | None) -> Tensor:
        """What the head reads, `(batch, seq_len_q, dim)`."""
        states, contexts, _ = self._states(self._read(source, source_lengths), self.shifted(target))
        return self._ready(states[:, 1:], contexts)

    def _ready(self, states: Tensor, contexts: Tensor) -> Tensor:
        return self.drop(torch.tanh(self.readout(torch.cat((states, contexts), -1))))

    def _read(self, source: Tensor, lengths: Tensor | None) -> _Memory:
        check_tokens(_NAME, "source", source, self.vocab_size)
        x = self.drop(self.source_embedding(source))
        if lengths is None:
            out, state = self.encoder(x)
        else:
            packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
            out, state = self.encoder(packed)
            out, _ = pad_packed_sequence(out, batch_first=True, total_length=source.shape[1])
        return _Memory(self, out, state, None if lengths is None else masks.padding(lengths))

    def _states(self, memory: _Memory, tokens: Tensor) -> tuple[Tensor, Tensor, State]:
        """s_{−1} … s_{n−1} `(batch, n + 1, hidden)`, c_0 … c_{n−1}, and the last state of all layers."""
        check_tokens(_NAME, "target", tokens, self.target_vocab_size)
        y, state = self.drop(self.target_embedding(tokens)), memory.state
        first = _top(state)[:, None]
        if self.kind != "bahdanau":
            context = memory.vector[:, None].expand(-1, tokens.shape[1], -1)
            out, state = self.decoder(y if self.kind == "luong" else torch.cat((y, context), -1), state)
            return torch.cat((first, out), 1), memory.attend(out) if self.kind == "luong" else context, state
        states, contexts = [first], []
        for step in y.split(1, 1):
            contexts.append(memory.attend(states[-1]))
            out, state = self.decoder(torch.cat((step, contexts[-1]), -1), state)
            states.append(out)
        return torch.cat(states, 1), torch.cat(contexts, 1), state


class _Memory:
    """A source that has been read."""

    def __init__(self, model: RecurrentSeq2Seq, values: Tensor, state: State, mask: Mask | None) -> None:
        self.model, self.values, self.mask = model, values, mask
        last = _both_directions(state[0] if isinstance(state, tuple) else state)  # (layers, batch, hidden)
        begin = torch.tanh(model.begin(last))
        self.state: State = (begin, torch.zeros_like(begin)) if isinstance(state, tuple) else begin
        self.vector = torch.tanh(model.context(last[-1])) if model.kind == "none" else last[-1]
        self.keys = model.key(values) if model.kind == "bahdanau" else values

    def attend(self, states: Tensor, values: Tensor | None = None) -> Tensor:
        """What decoder states `(batch, n, hidden)` look at: `(batch, n, width of values)`."""
        q = self.model.query(states)
        # autocast narrows the query alone: recurrent networks stay as they are
        k, v = self.keys.to(q.dtype), (self.values if values is None else values).to(q.dtype)
        if self.model.kind == "bahdanau":
            return additive_attention(q, k, v, self.model.score_weight.to(q.dtype), mask=self.mask)
        return attention(q[:, None], k[:, None], v[:, None], mask=self.mask, scale=1.0)[:, 0]


class _Decoding:
    def __init__(self, model: RecurrentSeq2Seq, memory: _Memory) -> None:
        self.model, self.memory = model, memory

    def step(self, tokens: Tensor) -> Tensor:
        states, contexts, self.memory.state = self.model._states(self.memory, tokens)
        return self.model.head(self.model._ready(states[:, -1], contexts[:, -1]))

    def select(self, rows: Tensor) -> None:
        memory = self.memory
        memory.values, memory.keys, memory.vector = (
            t.index_select(0, rows) for t in (memory.values, memory.keys, memory.vector)
        )
        if isinstance(memory.state, tuple):
            memory.state = tuple(t.index_select(1, rows) for t in memory.state)  # pyright: ignore
        else:
            memory.state = memory.state.index_select(1, rows)
        if memory.mask is not None:
            memory.mask = masks.padding(memory.mask.lengths[rows])  # pyright: ignore[reportAttributeAccessIssue]


def _both_directions(state: Tensor) -> Tensor:
    """(2 · layers, batch, hidden / 2) → (layers, batch, hidden)."""
    return torch.cat((state[0::2], state[1::2]), -1)


def _top(state: State) -> Tensor:
    return (state[0] if isinstance(state, tuple) else state)[-1]
