"""Images: squares of a picture are the tokens, all of which see one another, and one more reads off what it shows.

Enters: Fashion-MNIST as its four files, or its 10,000 test pictures alone, of which 1,500 are then held out.
Leaves: the accuracy on the pictures held out.
Floor: above the package. `python recipes/images.py --folder FOLDER`

Source: Dosovitskiy et al. 2021 (ViT); Xiao et al. 2017 (the pictures).
"""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from flags import DATA, parser, prepare, run, settings
from torch import Tensor, nn
from training import Metrics, Plain, Settings, Trained, train

from regard.models import ViT
from regard.models.transformer import count_parameters

BATCH, SIDE, HELD_OUT = 128, 28, 1500
SIZES = {  # the side of a square, the model, and how it is trained
    "short": (
        7, {"dim": 48, "num_heads": 4, "num_layers": 2, "hidden": 96},
        Settings(steps=500, lr=3e-3, warmup=50, weight_decay=5e-2, every=500),
    ),
    "full": (
        4, {"dim": 128, "num_heads": 4, "num_layers": 6, "hidden": 256, "dropout": 0.1},
        Settings(steps=14_000, lr=1e-3, warmup=500, weight_decay=5e-2, every=1000, bf16=True),
    ),
}  # fmt: skip


class Pictures(NamedTuple):
    """Float32 `(pictures, 1, 28, 28)`, 0 in the mean and 1 in deviation, and what they show, int64 `(pictures,)`."""

    images: Tensor
    classes: Tensor


def idx(file: Path, axes: int) -> np.ndarray:
    """An array of bytes, as the files of MNIST hold it: a number that says so, the length of each axis, the bytes."""
    with gzip.open(file, "rb") as opened:
        head = opened.read(4 + 4 * axes)
        shape = tuple(int(n) for n in np.frombuffer(head[4:], ">u4"))
        held = opened.read(int(np.prod(shape, dtype=np.int64)) + 1) if head[:4] == bytes((0, 0, 8, axes)) else b""
    if len(shape) != axes or len(held) != np.prod(shape, dtype=np.int64) or not held:
        raise ValueError(
            f"images: {file.name} must hold {axes} axes of bytes; got {shape}, {len(held)}. Fetch it again."
        )
    return np.frombuffer(held, np.uint8).reshape(shape)


def read(folder: Path, seed: int) -> tuple[Pictures, Pictures]:
    """Pictures to learn from and pictures held out: the published parts, or the test part cut in two by the seed."""

    def part(name: str) -> Pictures:
        images = idx(folder / f"{name}-images-idx3-ubyte.gz", 3)
        classes = idx(folder / f"{name}-labels-idx1-ubyte.gz", 1)
        if images.shape != (len(classes), SIDE, SIDE):
            raise ValueError(f"images: {name} must be {len(classes)} of 28 x 28; got {images.shape}. Fetch it again.")
        scaled = (torch.from_numpy(images.astype(np.float32))[:, None] / 255 - 0.286) / 0.353
        return Pictures(scaled, torch.from_numpy(classes.astype(np.int64)))

    whole = part("t10k")
    if (folder / "train-images-idx3-ubyte.gz").exists():
        return part("train"), whole
    order = torch.randperm(len(whole.classes), generator=torch.Generator().manual_seed(seed))
    return Pictures(*(t[order[HELD_OUT:]] for t in whole)), Pictures(*(t[order[:HELD_OUT]] for t in whole))


def varied(images: Tensor) -> Tensor:
    """Half of them mirrored, each moved by up to two pixels."""
    images = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(-1), images)
    rows, columns = torch.randint(5, (2, len(images), 1))
    padded = nn.functional.pad(images[:, 0], (2, 2, 2, 2), value=float(images.min()))
    at, along = torch.arange(len(images))[:, None, None], torch.arange(SIDE)
    return padded[at, (rows + along)[:, :, None], (columns + along)[:, None, :]][:, None]


def loss(model: nn.Module, images: Tensor, wanted: Tensor) -> Tensor:
    """−log p of what is shown."""
    return nn.functional.cross_entropy(model(varied(images)), wanted, label_smoothing=0.1)


@torch.no_grad()
def accuracy(model: nn.Module, pictures: Pictures) -> float:
    """Share of pictures that are recognised."""
    model.eval()
    parts = zip(pictures.images.split(250), pictures.classes.split(250), strict=True)
    right = sum(int((model(images).argmax(-1) == classes).sum()) for images, classes in parts)
    return right / len(pictures.classes)


def make(size: str) -> ViT:
    """A domain is an embedding and a mask: squares of pixels, and no mask at all."""
    patch, shape, _ = SIZES[size]
    return ViT(SIDE, patch, 10, channels=1, **shape)


def main(given: list[str] | None = None) -> Trained:
    """Train, and print the accuracy on the pictures held out."""
    flags = parser(__doc__.partition("\n")[0], tuple(SIZES), "full", "runs/images")
    flags.add_argument("--folder", type=Path, default=DATA / "fashion_mnist_t10k", help="where the IDX files are")
    arguments = flags.parse_args(given)
    size = "short" if arguments.short else arguments.size
    numbers = settings(arguments, SIZES[size][2])
    torch.manual_seed(numbers.seed)
    learned, held_out = read(arguments.folder, numbers.seed)
    model = make(size)
    print(f"{len(learned.classes)} pictures to learn from, {count_parameters(model)} parameters")

    def evaluate(model: nn.Module) -> Metrics:  # no "score": the last weights are kept, and nothing is chosen by it
        return {"held out": accuracy(model, held_out)}

    trained = train(
        prepare(model, arguments), Plain(*learned, batch=BATCH), loss, numbers, folder=arguments.out,
        resume=arguments.resume, evaluate=evaluate, describe={"size": size},
    )  # fmt: skip
    if trained.finished:
        model.save_pretrained(arguments.out / "model")
        print(f"test accuracy {accuracy(model, held_out):.3%} of {len(held_out.classes)}; {trained.seconds:.0f} s")
    return trained


if __name__ == "__main__":
    run(main)
