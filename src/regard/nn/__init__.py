"""Layers on regard's attention: torch modules whose masks, biases and positions are objects that compose.

Enters: embeddings (batch, seq_len, dim).
Leaves: `MultiHeadAttention` and torch's `MultiheadAttention` on it, positions, blocks and stacks, text generation.
Floor 5: above the public functions, below models.
"""

from regard.nn.attention import MultiHeadAttention
from regard.nn.beam import beam_search
from regard.nn.block import Block, Decoder, Encoder, SwiGLU
from regard.nn.generate import generate
from regard.nn.multihead import MultiheadAttention
from regard.nn.packing import Packing
from regard.nn.positions import Alibi, Learned, RelativePosition, Sinusoidal
from regard.nn.rotary import Rotary
from regard.observe import observe

__all__ = [
    "MultiHeadAttention",
    "MultiheadAttention",
    "Rotary",
    "Sinusoidal",
    "Learned",
    "RelativePosition",
    "Alibi",
    "SwiGLU",
    "Block",
    "Encoder",
    "Decoder",
    "Packing",
    "generate",
    "beam_search",
    "observe",
]
