"""Mathformer: four Llama decoders of 1 layer x 2 heads, width 8, that add, subtract, multiply and divide digits (MIT).

Enters: the package's four folders. Leaves: `add`, `sub`, `mul`, `div`, each a transformers folder with a tokenizer of
characters. They are small enough to print every number. No start token goes in front: with one, the answers are wrong.
Floor 6. transformers loads when it converts.
"""

from __future__ import annotations

import json
from pathlib import Path

from regard.lens.embedded.package import Package, Progress
from regard.lens.embedded.quiet import quiet

PARTS = ("add", "sub", "mul", "div")
SIZES = {"generation_config.json": 225, "model.safetensors": 7_072, "vocab.json": 330}
PACKAGE = Package(
    name="mathformer",
    version="2.0.0",
    wheel="mathformer-2.0.0-py3-none-any.whl",
    wheel_size=123_860,
    sha256="2b707dc5f9f260848c28046bda8b079008e65c5f11ec67f331e903ca5ce22932",
    prefix="mathformer",
    files={
        f"{part}former/{name}": size
        for part in PARTS
        for name, size in {**SIZES, "config.json": 765 if part == "div" else 767}.items()
    },
)


def convert(source: Path, out: Path, progress: Progress) -> None:
    """Save each model anew, with a tokenizer that makes one token of each character."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    for index, part in enumerate(PARTS):
        progress(f"reading Mathformer's {part}", index / len(PARTS))
        folder = source / f"{part}former"
        with quiet():
            AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).save_pretrained(out / part)
        numbers = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        characters = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
        characters.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
        characters.decoder = decoders.Fuse()
        PreTrainedTokenizerFast(
            tokenizer_object=characters,
            model_max_length=64,
            unk_token="<unk>",
            bos_token="<s>",
            eos_token="</s>",
            pad_token="<pad>",
        ).save_pretrained(out / part)
