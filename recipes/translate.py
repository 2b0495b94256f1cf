"""Translation: one Transformer from English to French and German, on Multi30k or on parallel files of your own.

Enters: lines of text and their translations. Leaves: a folder with model.safetensors (half precision), config.json,
tokenizer.json and scores.json; BLEU on the test set. The domain is two token embeddings; the mask is causal.
Floor: above the package. Run `python recipes/translate.py`, or `--short` for the form of one minute.

One model serves every target language: the first source token names it, as in Johnson et al. 2017.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flags
import torch
from checkpoints import average, load_weights, snapshots
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from training import Batches, Metrics, Settings, Trained, train

from regard.models import Seq2Seq
from regard.models.pretrained import replace

PAD, START, END = 0, 1, 2
LONGEST = 256  # tokens of a sentence
Pair = tuple[str, str, str]  # source, target, language of the target


@dataclass(frozen=True)
class Size:
    """A model and its budget."""

    shape: dict[str, Any]
    vocab_size: int
    batch: int
    epochs: float
    settings: Settings
    most_pairs: int | None = None
    """of each language, from the beginning of the files"""
    test_lines: int | None = None


SIZES = {
    "full": Size(
        {"dim": 256, "num_heads": 4, "num_layers": 3, "hidden": 512, "dropout": 0.3, "activation": "relu"},
        7000, 128, 40.0,
        Settings(0, lr=2e-3, warmup=1500, schedule="cosine", every=450, keep=5, bf16=True, betas=(0.9, 0.98)),
    ),
    "tiny": Size(
        {"dim": 128, "num_heads": 4, "num_layers": 4, "hidden": 256, "dropout": 0.3, "activation": "relu"},
        7000, 128, 60.0,
        Settings(0, lr=3e-3, warmup=1500, schedule="cosine", every=450, keep=5, bf16=True, betas=(0.9, 0.98)),
    ),
    "short": Size(
        {"dim": 128, "num_heads": 4, "num_layers": 2, "hidden": 256, "dropout": 0.1, "activation": "relu"},
        3000, 64, 1.0,
        Settings(150, lr=3e-3, warmup=40, schedule="cosine", every=75, keep=2),
        most_pairs=8000, test_lines=100,
    ),
}  # fmt: skip


# ---- text ----


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file, without white space at their ends.

    Raises:
        ValueError: where it is empty or of another encoding; OSError where it is not there.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as other:
        raise ValueError(
            f"translate: {path} must be UTF-8; got byte {other.object[other.start]:#04x} at {other.start:,}. Convert "
            "it, as with iconv -f latin1 -t utf-8."
        ) from other
    # a text's own line separators (U+2028 and others) are no ends of lines: the other file would not have them
    lines = [line.strip() for line in text.replace("\r\n", "\n").removesuffix("\n").split("\n")]
    if not any(lines):
        raise ValueError(f"translate: {path} must hold lines of text; got none. Is it the right file?")
    return lines


def read_pairs(source: Path, target: Path, language: str) -> list[Pair]:
    """Lines and their translations; lines that are blank on both sides are left out.

    Raises:
        ValueError: where the files have other numbers of lines, or a line has no partner.
    """
    one, other = read_lines(source), read_lines(target)
    if len(one) != len(other):
        raise ValueError(
            f"translate: {source} and {target} must have the same number of lines; got {len(one):,} and "
            f"{len(other):,}. Line n of one must be the translation of line n of the other."
        )
    for number, (s, t) in enumerate(zip(one, other, strict=True), 1):
        if bool(s) != bool(t):
            raise ValueError(
                f"translate: line {number:,} must have a text in {source} and in {target}; got it blank in "
                f"{target if s else source}. Fill it, or take it out of both."
            )
    return [(s, t, language) for s, t in zip(one, other, strict=True) if s]


def make_tokenizer(pairs: Iterable[Pair], vocab_size: int, languages: Sequence[str]) -> Tokenizer:
    """Byte pairs of all languages together; no text is unknown to it. Source: Sennrich et al. 2016."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<start>", "<end>", *(f"<{language}>" for language in languages)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = list(dict.fromkeys(text for source, target, _ in pairs for text in (source, target)))
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tag(tokenizer: Tokenizer, language: str) -> int:
    """The token that asks for a language."""
    number = tokenizer.token_to_id(f"<{language}>")
    if number is None:
        raise ValueError(
            f"translate: language must be one that the model was trained for; got {language!r}. See tokenizer.json."
        )
    return number


class Sentences(Batches):
    """Pairs of sentences as padded tokens and lengths, in batches of so many pairs."""

    def __init__(self, pairs: Sequence[Pair], tokenizer: Tokenizer, batch: int) -> None:
        self.batch = batch
        sources = tokenizer.encode_batch([source for source, _, _ in pairs])
        targets = tokenizer.encode_batch([target for _, target, _ in pairs])
        self.pairs = [
            (torch.tensor([tag(tokenizer, language), *s.ids, END]), torch.tensor([*t.ids, END]))
            for s, t, (_, _, language) in zip(sources, targets, pairs, strict=True)
            if max(len(s.ids), len(t.ids)) + 2 <= LONGEST
        ]
        self.left_out = len(pairs) - len(self.pairs)
        if not self.pairs:
            raise ValueError(
                f"translate: at least one pair must have at most {LONGEST} tokens a side; got none of {len(pairs):,}."
                " Split the lines into sentences."
            )

    def order(self, generator: torch.Generator) -> list[list[int]]:
        rows = torch.randperm(len(self.pairs), generator=generator).tolist()
        return [rows[at : at + self.batch] for at in range(0, len(rows), self.batch)]

    def load(self, examples: Sequence[int]) -> tuple[Tensor, ...]:
        sources, targets = zip(*(self.pairs[number] for number in examples), strict=True)
        return padded(sources)[0], padded(targets)[0], padded(sources)[1], padded(targets)[1]

    @property
    def tokens(self) -> int:
        """Of both sides together."""
        return sum(len(source) + len(target) for source, target in self.pairs)


def padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows as one tensor, and their lengths."""
    return pad_sequence(list(rows), batch_first=True, padding_value=PAD), torch.tensor([len(row) for row in rows])


# ---- the model ----


def smoothed(model: nn.Module, source: Tensor, target: Tensor, sources: Tensor, targets: Tensor) -> Tensor:
    """The loss of training: label smoothing 0.1. Source: Szegedy et al. 2016, section 7."""
    return model.loss(source, target, sources, targets, label_smoothing=0.1)


@torch.no_grad()
def token_loss(model: nn.Module, sentences: Sentences) -> float:
    """Mean of −log p of each target token, in nats."""
    device = next(model.parameters()).device
    total = count = 0.0
    for at in range(0, len(sentences.pairs), 128):
        tensors = sentences.load(range(at, min(at + 128, len(sentences.pairs))))
        tokens = float(tensors[3].sum())
        total += float(model.loss(*(t.to(device) for t in tensors))) * tokens
        count += tokens
    return total / count


def unigram_loss(train_set: Sentences, valid_set: Sentences, vocab_size: int) -> float:
    """The baseline: nats a token of one who knows how frequent each target token is, and nothing else."""
    counts = torch.ones(vocab_size)
    counts += torch.bincount(torch.cat([target for _, target in train_set.pairs]), minlength=vocab_size)
    wanted = torch.cat([target for _, target in valid_set.pairs])
    return float(-(counts / counts.sum()).log()[wanted].mean())


@torch.no_grad()
def translate(
    model: Seq2Seq, tokenizer: Tokenizer, texts: Sequence[str], language: str, *, num_beams: int = 5, batch: int = 64,
    length_penalty: float = 1.0,
) -> list[str]:  # fmt: skip
    """Translations of texts, by beams; batches hold texts of similar length."""
    asked = tag(tokenizer, language)
    rows = [torch.tensor([asked, *e.ids[: LONGEST - 2], END]) for e in tokenizer.encode_batch(list(texts))]
    order = sorted(range(len(rows)), key=lambda number: -len(rows[number]))
    device, out = next(model.parameters()).device, [""] * len(rows)
    for at in range(0, len(order), batch):
        chosen = order[at : at + batch]
        source, lengths = padded([rows[number] for number in chosen])
        beams = model.beam_search(
            source.to(device), lengths.to(device), num_beams=num_beams, max_new_tokens=2 * source.shape[1] + 10,
            length_penalty=length_penalty,
        )  # fmt: skip
        best = beams.tokens[:, 0].tolist()
        decoded = tokenizer.decode_batch(best, skip_special_tokens=True)
        for number, text in zip(chosen, decoded, strict=True):
            out[number] = text.strip()
    return out


def split_words(text: str) -> str:
    """Lower-cased words and signs apart, an elided article with its apostrophe: near what papers call tokenised."""
    return " ".join(re.findall(r"\w+['’]|\w+|[^\w\s]", text.lower()))


def bleu(written: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """sacreBLEU of the texts as they are, and of lower-cased tokens. Source: Post 2018."""
    from sacrebleu import corpus_bleu

    tokens = [[split_words(text) for text in texts] for texts in (written, references)]
    return {
        "bleu": corpus_bleu(list(written), [list(references)]).score,
        "lower_cased_tokenised": corpus_bleu(tokens[0], [tokens[1]], tokenize="none", force=True).score,
    }


def write_lines(path: Path, lines: Sequence[str]) -> None:
    """A UTF-8 file, whole or not at all."""
    replace(path, lambda file: file.write_text("\n".join(lines) + "\n", encoding="utf-8"))


def save(folder: Path, model: Seq2Seq, tokenizer: Tokenizer, scores: dict[str, Any]) -> None:
    """The model in half precision, its tokenizer and its scores."""
    model.save_pretrained(folder, dtype=torch.float16)
    replace(folder / "tokenizer.json", lambda file: tokenizer.save(str(file)))
    text = json.dumps(scores, indent=1, ensure_ascii=False) + "\n"
    replace(folder / "scores.json", lambda file: file.write_text(text, encoding="utf-8"))


def load(folder: Path) -> tuple[Seq2Seq, Tokenizer]:
    """What `save` wrote.

    Raises:
        ValueError: where the vocabulary does not fit the model, or a file is cut.
    """
    model = Seq2Seq.from_pretrained(folder)
    try:
        tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    except Exception as broken:  # the tokenizers package raises nothing narrower
        raise ValueError(
            f"translate: {folder}/tokenizer.json must be a tokenizer; got {broken}. Copy it again."
        ) from broken
    if tokenizer.get_vocab_size() != model.vocab_size:
        raise ValueError(
            f"translate: the vocabulary must have the model's {model.vocab_size:,} tokens; got "
            f"{tokenizer.get_vocab_size():,}. Use the tokenizer.json that was saved with the model."
        )
    return model, tokenizer


# ---- the run ----


def main(arguments: list[str] | None = None) -> Trained | None:
    """Train, average, translate the test set, and say how well."""
    parser = flags.parser(__doc__ or "", tuple(SIZES), "full", "runs/translate")
    parser.add_argument("--to", nargs="+", default=["fr", "de"], metavar="LANGUAGE", help="target languages")
    parser.add_argument(
        "--data", type=Path, default=flags.DATA / "multi30k",
        help="folder with train, val and test_2016_flickr as .en and one file for each language",
    )  # fmt: skip
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="translate its lines (-: standard input); no training"
    )
    parser.add_argument("--beams", type=int, default=5)
    args = parser.parse_args(arguments)
    if args.text is not None:
        model, tokenizer = load(args.out / "model")
        lines = sys.stdin.read().splitlines() if str(args.text) == "-" else read_lines(args.text)
        print("\n".join(translate(model, tokenizer, lines, args.to[0], num_beams=args.beams)))
        return None
    size = SIZES["short" if args.short else args.size]
    sets = {
        part: [
            pair
            for language in args.to
            for pair in read_pairs(args.data / f"{part}.en", args.data / f"{part}.{language}", language)[
                : size.most_pairs
            ]
        ]
        for part in ("train", "val")
    }
    tokenizer = make_tokenizer(sets["train"], size.vocab_size, args.to)
    vocab_size = tokenizer.get_vocab_size()
    train_set, valid_set = (Sentences(sets[part], tokenizer, size.batch) for part in ("train", "val"))
    steps = size.settings.steps or round(size.epochs * len(train_set.pairs) / size.batch)
    settings = flags.settings(args, Settings(**{**vars(size.settings), "steps": steps}))
    torch.manual_seed(settings.seed)
    model = flags.prepare(Seq2Seq(vocab_size, start_token=START, end_token=END, **size.shape), args)
    print(
        f"{len(train_set.pairs):,} pairs of {train_set.tokens:,} tokens, {train_set.left_out} left out; {vocab_size:,} "
        f"in the vocabulary; {sum(p.numel() for p in model.parameters()):,} numbers; {settings.steps:,} steps"
    )
    trained = train(
        model, train_set, smoothed, settings, folder=args.out, resume=args.resume,
        evaluate=lambda m: _metrics(m, valid_set),
        describe={"vocabulary": vocab_size, "shape": size.shape, "to": args.to, "pairs": len(train_set.pairs)},
    )  # fmt: skip
    if trained.finished:
        assert isinstance(model, Seq2Seq)
        _choose(model, average(snapshots(args.out)), valid_set)
        scores = {
            "seconds": round(trained.seconds), "seed": settings.seed, "steps": settings.steps,
            "unigram": unigram_loss(train_set, valid_set, vocab_size), "val_loss": token_loss(model, valid_set),
        }  # fmt: skip
        save(args.out / "model", model, tokenizer, scores)
        if args.lora is None:
            model, _ = load(args.out / "model")  # what is scored is what was saved
        scores["test"] = _test(model.eval(), tokenizer, args, size)
        save(args.out / "model", model, tokenizer, scores)
        print(json.dumps(scores, indent=1))
    return trained


def _metrics(model: nn.Module, valid_set: Sentences) -> Metrics:
    return {"val_loss": token_loss(model, valid_set)}


def _choose(model: Seq2Seq, mean: dict[str, Tensor], valid_set: Sentences) -> None:
    """The mean of the last checkpoints, where it is better on the validation set than the last."""
    model.eval()
    last, before = {name: t.clone() for name, t in model.state_dict().items()}, token_loss(model, valid_set)
    load_weights(model, mean, "translate")
    after = token_loss(model, valid_set)
    print(f"validation loss of the last weights {before:.4f}, of the mean {after:.4f}")
    if after > before:
        model.load_state_dict(last)


def _test(model: Seq2Seq, tokenizer: Tokenizer, args: Any, size: Size) -> dict[str, Any]:
    found = {}
    for language in args.to:
        part = args.data / "test_2016_flickr"
        pairs = read_pairs(part.with_suffix(".en"), part.with_suffix(f".{language}"), language)[: size.test_lines]
        began = time.monotonic()
        written = translate(model, tokenizer, [source for source, _, _ in pairs], language, num_beams=args.beams)
        seconds = time.monotonic() - began
        found[language] = {
            **bleu(written, [target for _, target, _ in pairs]), "sentences": len(pairs),
            "sentences_per_second": round(len(pairs) / seconds, 1), "first": written[:3],
        }  # fmt: skip
        write_lines(args.out / f"test.{language}", written)
    return found


if __name__ == "__main__":
    flags.run(main)
