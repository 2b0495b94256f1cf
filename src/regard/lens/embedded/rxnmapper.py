r"""RXNMapper: an ALBERT of chemical reactions, 12 layers (one set of weights) x 8 heads, width 256 (MIT).

Enters: the package's folder. Leaves: a transformers folder with safetensors and a tokenizer of SMILES, one regular
expression. Layer 10 head 5 links an atom of the product to the reactant atom that it came from.
Source: Schwaller et al. 2021, Extraction of organic chemistry grammar from unsupervised learning of chemical reactions.
Floor 6. transformers and torch load when it converts.
"""

from __future__ import annotations

from pathlib import Path

from regard.lens.embedded.package import Package, Progress

PACKAGE = Package(
    name="rxnmapper",
    version="0.4.3",
    wheel="rxnmapper-0.4.3-py3-none-any.whl",
    wheel_size=3_007_424,
    sha256="27876a4286881aafd286fd6f24a6a56a4ca6ba22d68e035a0ea120106c541ba5",
    prefix="rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k",
    files={"config.json": 1_219, "pytorch_model.bin": 3_212_952, "vocab.txt": 3_525},
)
# One sign of SMILES: an atom in brackets, a two-letter element, the arrow, a ring number past 9, else a character.
SIGN = r"\[[^\]]*\]|Cl|Br|>>|%[0-9]{2}|."


def convert(source: Path, out: Path, progress: Progress) -> None:
    """Write the weights as safetensors. The package's file is a pickle: read as bare tensors, nothing in it can run."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import AutoConfig, PreTrainedTokenizerFast

    progress("reading RXNMapper", 0.0)
    weights = torch.load(source / "pytorch_model.bin", map_location="cpu", weights_only=True)
    # The decoder's matrix and bias are the embedding and predictions.bias under a second name.
    once = {name: tensor.contiguous() for name, tensor in weights.items() if ".decoder." not in name}
    save_file(once, out / "model.safetensors", {"format": "pt"})
    AutoConfig.from_pretrained(source, local_files_only=True).save_pretrained(out)
    progress("writing RXNMapper's tokenizer", 0.7)
    signs = (source / "vocab.txt").read_text(encoding="utf-8").split()
    numbers = {sign: number for number, sign in enumerate(signs)}
    smiles = Tokenizer(models.WordLevel(numbers, unk_token="[UNK]"))
    smiles.pre_tokenizer = pre_tokenizers.Split(Regex(SIGN), behavior="isolated")
    smiles.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", numbers["[CLS]"]), ("[SEP]", numbers["[SEP]"])]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=smiles,
        model_max_length=512,
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        mask_token="[MASK]",
    ).save_pretrained(out)
