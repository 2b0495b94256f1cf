"""Points: a digit as a loose set of inked dots; a dot sees its nearest, and how they lie is added to the scores.

Enters: 5,000 handwritten digits of MNIST, 4,000 of them to learn from.
Leaves: the accuracy on the other 1,000, as points that have no order and no grid.
Floor: above the package. `python recipes/points.py`

Source: Zhao et al. 2021 (Point Transformer), section 3; LeCun et al. 1998 (the digits).
"""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from flags import DATA, parser, prepare, run, settings
from torch import Tensor, nn
from training import Metrics, Settings, Trained, train

from regard.models import Classifier
from regard.models.transformer import count_parameters

BATCH, SIDE, INKED = 64, 28, 0.3
WIDTH = 10.0  # of a picture, for the networks: small enough to start from, large enough that neighbours differ
SIZES = {  # the model, its dots and neighbours, and how it is trained
    "short": (
        {"dim": 32, "num_heads": 4, "num_layers": 2, "hidden": 64}, 48, 12,
        Settings(steps=250, lr=4e-3, warmup=30, weight_decay=1e-2, every=250),
    ),
    "full": (
        {"dim": 64, "num_heads": 4, "num_layers": 3, "hidden": 128}, 64, 16,
        Settings(steps=2500, lr=3e-3, warmup=150, weight_decay=5e-2, every=250),
    ),
}  # fmt: skip


class Digits(NamedTuple):
    """Images, from 0 to 1, float32 `(digits, 784)`, and what they show, int64 `(digits,)`."""

    images: Tensor
    classes: Tensor


def read(file: Path, seed: int) -> tuple[Digits, Digits]:
    """4,000 digits to learn from, and 1,000 to be tested on, drawn by the seed."""
    with gzip.open(file, "rt", encoding="ascii") as lines:
        table = np.loadtxt(lines, delimiter=",", dtype=np.float32)
    if table.ndim != 2 or table.shape[1] != SIDE * SIDE + 1:
        raise ValueError(
            f"points: {file.name} must have 784 pixels and a label in a row; got {table.shape}. Refetch it."
        )
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(seed))
    rows = torch.from_numpy(table)[order]
    whole = Digits(rows[:, :-1] / 255, rows[:, -1].long())
    return Digits(*(t[:-1000] for t in whole)), Digits(*(t[-1000:] for t in whole))


def dots(images: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Up to count inked pixels of each image, drawn at random: x, y and ink `(batch, count, 3)`, and how many."""
    inked = images > INKED
    chosen = torch.where(inked, torch.rand_like(images), -1.0).topk(count).indices
    at = torch.stack((chosen % SIDE, chosen // SIDE), -1).float() * (WIDTH / SIDE) - WIDTH / 2
    points = torch.cat((at, images.gather(1, chosen)[..., None]), -1)
    return points, inked.sum(1).clamp(1, count)


def bent(points: Tensor) -> Tensor:
    """Each set turned, sheared, stretched and moved a little, as another hand might have written it."""
    batch = len(points)
    angle, shear = (torch.rand(2, batch) * 2 - 1) * torch.tensor([[0.25], [0.2]])
    stretch, move = 1 + 0.15 * (torch.rand(batch, 2) * 2 - 1), 0.06 * WIDTH * (torch.rand(batch, 1, 2) * 2 - 1)
    cos, sin, one, none = angle.cos(), angle.sin(), torch.ones(batch), torch.zeros(batch)
    turn = torch.stack((cos, -sin, sin, cos), 1).unflatten(1, (2, 2))
    slant = torch.stack((one, shear, none, one), 1).unflatten(1, (2, 2))
    return torch.cat((points[..., :2] @ (turn @ slant * stretch[:, None]) + move, points[..., 2:]), -1)


class Drawn:
    """Batches of dots: each time an image comes up, other pixels of it are drawn, and bent in another way."""

    def __init__(self, digits: Digits, count: int) -> None:
        self.digits, self.count = digits, count

    def order(self, generator: torch.Generator) -> list[list[int]]:
        rows = torch.randperm(len(self.digits.classes), generator=generator)
        return [part.tolist() for part in rows.split(BATCH)]

    def load(self, examples: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        points, lengths = dots(self.digits.images[examples], self.count)
        return bent(points), lengths, self.digits.classes[examples]


def make(size: str) -> Classifier:
    """A domain is an embedding and a mask: dots, each of which sees its nearest, their offsets added to the scores."""
    shape, _, neighbors, _ = SIZES[size]
    options = {"neighbors": neighbors, "num_coordinates": 2, "num_features": 1}
    return Classifier("points", options, 10, pool="mean", positions="none", **shape)


def loss(model: nn.Module, points: Tensor, lengths: Tensor, wanted: Tensor) -> Tensor:
    """−log p of the digit."""
    return nn.functional.cross_entropy(model(points, lengths), wanted, label_smoothing=0.05)


@torch.no_grad()
def accuracy(model: nn.Module, digits: Digits, count: int, draws: int = 1) -> float:
    """Share of digits that are recognised, from the mean of the probabilities over some draws of their dots."""
    model.eval()
    right = 0
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for images, classes in zip(digits.images.split(250), digits.classes.split(250), strict=True):
            sure = torch.stack([model(*dots(images, count)).softmax(-1) for _ in range(draws)]).mean(0)
            right += int((sure.argmax(-1) == classes).sum())
    return right / len(digits.classes)


def main(given: list[str] | None = None) -> Trained:
    """Train, and print the accuracy on the digits held out."""
    flags = parser(__doc__.partition("\n")[0], tuple(SIZES), "full", "runs/points")
    flags.add_argument("--data", type=Path, default=DATA / "mnist5k" / "mnist_5k.csv.gz", help="digits, label last")
    arguments = flags.parse_args(given)
    size = "short" if arguments.short else arguments.size
    _, count, _, default = SIZES[size]
    numbers = settings(arguments, default)
    torch.manual_seed(numbers.seed)
    learned, held_out = read(arguments.data, numbers.seed)
    model = make(size)
    print(f"{len(learned.classes)} digits of up to {count} dots, {count_parameters(model)} parameters")

    def evaluate(model: nn.Module) -> Metrics:  # no "score": the last weights are kept, and nothing is chosen by it
        return {"held out": accuracy(model, held_out, count)}

    trained = train(
        prepare(model, arguments), Drawn(learned, count), loss, numbers, folder=arguments.out,
        resume=arguments.resume, evaluate=evaluate, describe={"size": size},
    )  # fmt: skip
    if trained.finished:
        model.save_pretrained(arguments.out / "model")
        one, eight = (accuracy(model, held_out, count, draws) for draws in (1, 8))
        print(f"test accuracy {one:.3%} from one draw of the dots, {eight:.3%} from eight; {trained.seconds:.0f} s")
    return trained


if __name__ == "__main__":
    run(main)
