"""transformers models on regard: importing this registers the attention and the mask implementation "regard".

Enters: any model loaded with `attn_implementation="regard"`, or given to `prepare`.
Leaves: the same logits, every attention call computed by `regard.attention`; a `Call` each for who observes.
Floor 5: the one door between regard and transformers, above the public functions.
"""

from transformers import AttentionInterface, AttentionMaskInterface

from regard.huggingface.cache import Cache
from regard.huggingface.families import guard, prepare
from regard.huggingface.routed_mask import regard_mask
from regard.huggingface.routing import regard_attention
from regard.observe import Call, intervene, observe

__all__ = ["Cache", "Call", "intervene", "observe", "prepare"]

AttentionInterface.register("regard", regard_attention)
AttentionMaskInterface.register("regard", regard_mask)
guard()
