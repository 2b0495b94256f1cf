"""A language model: GPT on Shakespeare by characters, War and Peace by tokens, or a text of your own.

Enters: one UTF-8 text. Leaves: a folder with the model, its vocabulary and scores.json; nats a character on the last
tenth of the text; a sample. The domain is a token embedding; the mask is causal.
Floor: above the package. Run `python recipes/language_model.py`, or `--short` for the form of one minute.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flags
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from training import Batches, Settings, Trained, train
from translate import read_lines

from regard.models import GPT
from regard.models.pretrained import replace

TEXTS = {"shakespeare": "tinyshakespeare/input.txt", "war_and_peace": "war_and_peace/warpeace_input.txt"}


@dataclass(frozen=True)
class Size:
    """A model and its budget."""

    shape: dict[str, Any]
    length: int
    """characters or tokens that it reads at once"""
    batch: int
    settings: Settings
    most: int | None = None
    """tokens of the validation set, where not all are read at each checkpoint"""


_FULL = {"norm": "rms", "activation": "swiglu", "bias": False, "positions": "rotary"}
SIZES = {
    "full": Size(
        {"dim": 256, "num_heads": 4, "num_layers": 6, "hidden": 704, "dropout": 0.2, **_FULL},
        256, 24,
        Settings(5000, lr=2e-3, warmup=200, weight_decay=0.1, betas=(0.9, 0.99), every=250, bf16=True),
    ),
    "short": Size(
        {"dim": 128, "num_heads": 4, "num_layers": 3, "hidden": 352, "dropout": 0.0, **_FULL},
        64, 24,
        Settings(250, lr=4e-3, warmup=30, weight_decay=0.1, betas=(0.9, 0.99), every=125),
        most=20_000,
    ),
}  # fmt: skip


class Characters:
    """A vocabulary of the characters of a text; one that it does not hold is read as the last."""

    def __init__(self, characters: Sequence[str]) -> None:
        self.characters = list(characters)
        self._numbers = {character: number for number, character in enumerate(self.characters)}

    @classmethod
    def of(cls, text: str) -> Characters:
        """Those of a text, in their order in Unicode, and the replacement character."""
        return cls([*sorted(set(text) - {"\ufffd"}), "\ufffd"])

    def __len__(self) -> int:
        return len(self.characters)

    def encode(self, text: str) -> Tensor:
        """int64 `(characters,)`."""
        last = len(self) - 1
        return torch.tensor([self._numbers.get(character, last) for character in text])

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens."""
        return "".join(self.characters[token] for token in tokens)

    def save(self, folder: Path) -> None:
        """Write characters.json."""
        text = json.dumps(self.characters)
        replace(Path(folder) / "characters.json", lambda file: file.write_text(text, encoding="utf-8"))


class Pieces:
    """A vocabulary of byte pairs."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    @classmethod
    def of(cls, text: str, vocab_size: int = 4096) -> Pieces:
        """Learned from a text's lines. Source: Sennrich et al. 2016."""
        tokenizer = Tokenizer(models.BPE())
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(text.split("\n"), trainer)
        return cls(tokenizer)

    def __len__(self) -> int:
        return self.tokenizer.get_vocab_size()

    def encode(self, text: str) -> Tensor:
        """int64 `(tokens,)`."""
        return torch.tensor(self.tokenizer.encode(text).ids, dtype=torch.int64)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens."""
        return self.tokenizer.decode(list(tokens))

    def save(self, folder: Path) -> None:
        """Write tokenizer.json."""
        replace(Path(folder) / "tokenizer.json", lambda file: self.tokenizer.save(str(file)))


class Windows(Batches):
    """Stretches of one long text: an epoch cuts it into windows, from another first token each time."""

    def __init__(self, tokens: Tensor, length: int, batch: int) -> None:
        if len(tokens) < 2 * length + 1:
            raise ValueError(
                f"language_model: the text must have at least {2 * length + 1:,} tokens; got {len(tokens):,}. Read a "
                "longer one."
            )
        self.tokens, self.length, self.batch = tokens, length, batch

    def order(self, generator: torch.Generator) -> list[list[int]]:
        first = int(torch.randint(self.length, (), generator=generator))
        starts = torch.arange(first, len(self.tokens) - self.length, self.length)
        starts = starts[torch.randperm(len(starts), generator=generator)].tolist()
        return [starts[at : at + self.batch] for at in range(0, len(starts), self.batch)]

    def load(self, examples: Sequence[int]) -> tuple[Tensor, ...]:
        return (torch.stack([self.tokens[start : start + self.length + 1] for start in examples]),)


def token_loss(model: nn.Module, tokens: Tensor, length: int) -> float:
    """Mean of −log p over windows that follow one another, in nats a token; each token but the first counts once."""
    device, total = next(model.parameters()).device, 0.0
    whole = (len(tokens) - 1) // length * length
    windows = torch.stack([tokens[at : at + length + 1] for at in range(0, whole, length)])
    for part in windows.split(32):
        total += float(model.loss(part.to(device))) * len(part) * length
    return total / whole


def unigram_loss(train_tokens: Tensor, valid_tokens: Tensor, vocab_size: int) -> float:
    """The baseline: nats a token of one who knows how frequent each token is, and nothing else."""
    counts = 1.0 + torch.bincount(train_tokens, minlength=vocab_size)
    return float(-(counts / counts.sum()).log()[valid_tokens].mean())


def main(arguments: list[str] | None = None) -> Trained | None:
    """Train, keep the best weights, and write a sample."""
    parser = flags.parser(__doc__ or "", tuple(SIZES), "full", "runs/language_model")
    parser.add_argument("--text", default="shakespeare", help=f"{', '.join(TEXTS)}, or the path of a UTF-8 text")
    parser.add_argument("--by", choices=("characters", "tokens"), help="default: tokens for war_and_peace")
    args = parser.parse_args(arguments)
    size = SIZES["short" if args.short else args.size]
    text = "\n".join(read_lines(flags.DATA / TEXTS[args.text] if args.text in TEXTS else Path(args.text)))
    cut = len(text) * 9 // 10  # the first nine tenths are read, the last one is foretold
    by = args.by or ("tokens" if args.text == "war_and_peace" else "characters")
    vocabulary = Characters.of(text[:cut]) if by == "characters" else Pieces.of(text[:cut])
    train_tokens, valid_tokens = vocabulary.encode(text[:cut]), vocabulary.encode(text[cut:])
    settings = flags.settings(args, size.settings)
    torch.manual_seed(settings.seed)
    model = flags.prepare(GPT(len(vocabulary), **size.shape), args)
    batches = Windows(train_tokens, size.length, size.batch)
    print(
        f"{len(train_tokens):,} tokens to read, {len(valid_tokens):,} to foretell; {len(vocabulary):,} in the "
        f"vocabulary; {sum(p.numel() for p in model.parameters()):,} numbers; {settings.steps:,} steps of "
        f"{size.batch * size.length:,} tokens"
    )

    def evaluate(trained: nn.Module) -> dict[str, float]:
        found = token_loss(trained, valid_tokens[: size.most], size.length)
        return {"val_loss": found, "score": -found}

    trained = train(
        model, batches, lambda m, tokens: m.loss(tokens), settings, folder=args.out, resume=args.resume,
        evaluate=evaluate, describe={"vocabulary": len(vocabulary), "shape": size.shape, "text": len(text)},
    )  # fmt: skip
    if trained.finished:
        assert isinstance(model, GPT)
        model.eval()
        with torch.no_grad():
            loss = token_loss(model, valid_tokens, size.length)
        characters = len(text) - cut
        sample = model.generate(
            vocabulary.encode("\n")[None], max_new_tokens=size.length - 1, temperature=0.8,
            generator=torch.Generator().manual_seed(settings.seed),
        ).tokens[0].tolist()  # fmt: skip
        scores = {
            "val_loss": loss, "unigram": unigram_loss(train_tokens, valid_tokens, len(vocabulary)),
            "nats_per_character": loss * len(valid_tokens) / characters, "best_step": trained.best["step"],
            "seconds": round(trained.seconds), "seed": settings.seed, "steps": settings.steps,
            "sample": vocabulary.decode(sample),
        }  # fmt: skip
        folder = args.out / "model"
        model.save_pretrained(folder)
        vocabulary.save(folder)
        words = json.dumps(scores, indent=1, ensure_ascii=False) + "\n"
        replace(folder / "scores.json", lambda file: file.write_text(words, encoding="utf-8"))
        print(words)
    return trained


if __name__ == "__main__":
    flags.run(main)
