"""Models: one Transformer, and for each domain an embedding, a mask and a thin head.

Enters: tokens, pixels, audio, graphs, points, table rows.
Leaves: logits, losses, generated text; folders that `from_pretrained` opens; the same models of transformers.
Floor 5: above the layers. Models know nothing of the lens.
"""

from regard.models.bert import BERT
from regard.models.classifier import Classifier, ViT
from regard.models.convert import from_huggingface, to_huggingface
from regard.models.embeddings import Columns, Frames, Nodes, Patches, Points
from regard.models.gpt import GPT
from regard.models.recurrent import RecurrentSeq2Seq
from regard.models.seq2seq import Seq2Seq
from regard.models.transformer import Transformer

__all__ = [
    "BERT",
    "GPT",
    "Classifier",
    "Columns",
    "Frames",
    "Nodes",
    "Patches",
    "Points",
    "RecurrentSeq2Seq",
    "Seq2Seq",
    "Transformer",
    "ViT",
    "from_huggingface",
    "to_huggingface",
]
