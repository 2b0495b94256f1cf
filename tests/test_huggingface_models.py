"""Real pretrained models give eager's logits under regard."""

import os
from pathlib import Path

import pytest
import torch
import transformers

import regard.huggingface
from regard.lens import embedded
from regard.lens.embedded.package import PackageUnavailable
from test_huggingface_families import PIECES, assert_equal, logits, logits_in_pieces

CACHE = os.environ.get("REGARD_CACHE") or str(Path(__file__).resolve().parents[1] / ".cache")
REACTION = "CC(=O)OC(C)=O.OC(=O)c1ccccc1O>>CC(=O)Oc1ccccc1C(=O)O"
TEXTS = {
    "minilm": ["The cat sat on the mat because it was tired", "The bank by the river was steep"],
    "smollm2": ["The cat sat on the mat because it was tired", "The capital of France is"],
    "rxnmapper": [REACTION, "CCO>>CC=O"],
    "mathformer": ["3+4=", "9+"],
}
CALLS = {"minilm": 6, "smollm2": 30, "rxnmapper": 12, "mathformer": 1}

pytestmark = pytest.mark.models


def opened(name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[transformers.PreTrainedModel, dict[str, torch.Tensor]]:
    monkeypatch.setenv("REGARD_CACHE", CACHE)
    try:
        folder = embedded.folder(name)
    except PackageUnavailable as error:
        pytest.skip(f"needs tool: package {embedded.FAMILIES[name].package.requirement} ({error})")
    config = transformers.AutoConfig.from_pretrained(folder)
    kind = getattr(transformers, config.architectures[0])
    model = kind.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    side = "left" if "Causal" in config.architectures[0] else "right"
    batch = tokenizer(TEXTS[name], padding=True, padding_side=side, return_tensors="pt")
    return model, {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TEXTS)
def test_real_model_gives_eagers_logits_on_a_padded_batch(name, monkeypatch):
    model, batch = opened(name, monkeypatch)
    eager = logits(model, batch)
    regard.huggingface.prepare(model)
    seen: list[regard.huggingface.Call] = []
    with regard.huggingface.observe(seen.append):
        assert_equal(logits(model, batch), eager)
    assert len(seen) == CALLS[name]


@pytest.mark.filterwarnings("ignore")
def test_smollm2_gives_eagers_logits_with_a_cache_filled_in_pieces(monkeypatch):
    model, batch = opened("smollm2", monkeypatch)
    assert batch["input_ids"].shape[1] == 10
    batch = {name: torch.cat([given, given[:, -2:]], dim=1) for name, given in batch.items()}  # as long as the pieces
    assert batch["input_ids"].shape[1] == PIECES[-1][1]
    eager = logits_in_pieces(model, batch)
    whole = logits(model, batch)
    regard.huggingface.prepare(model)
    assert_equal(logits_in_pieces(model, batch), eager)
    assert_equal(logits(model, batch), whole)
