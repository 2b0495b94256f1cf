"""Tables: each column is a token, every column sees every other, and one more token reads off the answer.

Enters: the Adult census (30,162 people; who earns over 50,000 dollars a year?), or a CSV file of that form.
Leaves: the area under the ROC curve on people held out, beside that of gradient-boosted trees on the same split.
Floor: above the package. `python recipes/table.py` (needs the extra `recipes`, for scikit-learn)

Source: Gorishniy et al. 2021 (FT-Transformer), section 3.3; Kohavi 1996 (the data).
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from flags import DATA, parser, prepare, run, settings
from torch import Tensor, nn
from training import Metrics, Plain, Settings, Trained, train

from regard.models import Classifier
from regard.models.transformer import count_parameters, start

BATCH, BINS = 256, 128
SIZES = {  # the model, and how it is trained
    "short": (
        {"dim": 32, "num_heads": 4, "num_layers": 2, "hidden": 64},
        Settings(steps=300, lr=3e-3, warmup=30, weight_decay=1e-2, every=100),
    ),
    "full": (
        {"dim": 32, "num_heads": 4, "num_layers": 3, "hidden": 64, "dropout": 0.1},
        Settings(steps=900, lr=2e-3, warmup=50, weight_decay=1e-2, every=75),
    ),
}


class Rows(NamedTuple):
    """Some people: their numbers, categories, and whether they earn over 50,000 dollars."""

    numeric: Tensor
    """float32 `(rows, numeric columns)`."""
    categorical: Tensor
    """int64 `(rows, other columns)`."""
    wanted: Tensor
    """int64 `(rows,)`, 0 or 1."""


class Table(NamedTuple):
    """A table in three parts, drawn by the seed."""

    train: Rows
    validation: Rows
    test: Rows
    categories: list[int]
    """how many there are in each column of categories, an unknown one included"""


def read(file: Path, seed: int) -> Table:
    """A CSV file with a header, whose last column is the answer: 64 % to learn from, 16 % to stop by, 20 % as test.

    Numbers become their rank among those to learn from, as a normal variable, and once more a category, the 64th of
    them into which they fall: as trees do, a vector can then treat the rich apart from the rest. Categories are
    counted from 1 among those to learn from; 0 is one that was not there.
    """
    with file.open(encoding="utf-8", newline="") as lines:
        header, *rows = list(csv.reader(lines)) or [[]]
    if not rows or any(len(row) != len(header) for row in rows):
        raise ValueError(
            f"table: {file.name} must have a header, and rows of as many fields; got {len(header)} fields and "
            f"{len(rows)} rows, of {sorted({len(row) for row in rows})}. Fetch it again."
        )
    columns = [np.array(column) for column in zip(*rows, strict=True)]
    order = np.random.default_rng(seed).permutation(len(rows))
    first, second = int(0.64 * len(rows)), int(0.8 * len(rows))
    learned = order[:first]
    numeric, categorical, categories, binned, bins = [], [], [], [], []
    for column in columns[:-1]:
        try:
            numbers = column.astype(np.float64)
        except ValueError:
            known = np.unique(column[learned])
            at = np.searchsorted(known, column).clip(max=len(known) - 1)
            categorical.append(np.where(known[at] == column, at + 1, 0))
            categories.append(len(known) + 1)
        else:
            numeric.append(ranked(numbers, learned))
            edges = np.unique(np.quantile(np.unique(numbers[learned]), np.arange(1, BINS) / BINS, method="nearest"))
            binned.append(np.searchsorted(edges, numbers))
            bins.append(len(edges) + 1)
    wanted = (columns[-1] == np.unique(columns[-1])[-1]).astype(np.int64)
    whole = (np.stack(numeric, 1).astype(np.float32), np.stack(categorical + binned, 1).astype(np.int64), wanted)
    parts = [Rows(*(torch.from_numpy(t[own]) for t in whole)) for own in np.split(order, (first, second))]
    return Table(*parts, categories + bins)


def ranked(column: np.ndarray, learned: np.ndarray) -> np.ndarray:
    """The quantile of each number among the learned ones, as a standard normal variable; equal numbers stay equal."""
    known = np.sort(column[learned])
    middle = (np.searchsorted(known, column, "left") + np.searchsorted(known, column, "right")) / 2
    quantile = (middle / len(known)).clip(1e-3, 1 - 1e-3)
    return torch.special.ndtri(torch.from_numpy(quantile)).numpy()


def make(table: Table, size: str) -> Classifier:
    """A domain is an embedding and a mask: columns as tokens, and no mask at all."""
    columns = {"num_numeric": table.train.numeric.shape[1], "categories": table.categories}
    model = Classifier("columns", columns, 2, positions="none", **SIZES[size][0])
    start(model.transformer, model.transformer.num_layers)
    return model


def loss(model: nn.Module, numeric: Tensor, categorical: Tensor, wanted: Tensor) -> Tensor:
    """−log p of the answer."""
    return nn.functional.cross_entropy(model(numeric, categorical), wanted)


@torch.no_grad()
def area(model: nn.Module, rows: Rows) -> float:
    """Area under the ROC curve: how often one who earns more than 50,000 dollars is ranked above one who does not."""
    from sklearn.metrics import roc_auc_score

    model.eval()
    parts = zip(rows.numeric.split(1024), rows.categorical.split(1024), strict=True)
    scores = torch.cat([model(*part).float() @ torch.tensor([-1.0, 1.0]) for part in parts])
    return float(roc_auc_score(rows.wanted.numpy(), scores.numpy()))


def trees(table: Table) -> float:
    """The same of scikit-learn's gradient-boosted trees, who learn from the validation rows too."""
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.metrics import roc_auc_score

    num_numeric = table.train.numeric.shape[1]

    def flat(rows: Rows) -> np.ndarray:  # without the categories made of numbers: trees cut those by themselves
        return np.concatenate((rows.numeric.numpy(), rows.categorical[:, :-num_numeric].numpy()), 1)

    both = np.concatenate((flat(table.train), flat(table.validation)))
    wanted = np.concatenate((table.train.wanted.numpy(), table.validation.wanted.numpy()))
    kinds = np.arange(both.shape[1]) >= num_numeric
    boosted = HistGradientBoostingClassifier(categorical_features=kinds, random_state=0).fit(both, wanted)
    return float(roc_auc_score(table.test.wanted.numpy(), boosted.predict_proba(flat(table.test))[:, 1]))


def main(given: list[str] | None = None) -> Trained:
    """Train, and print both areas."""
    flags = parser(__doc__.partition("\n")[0], tuple(SIZES), "full", "runs/table")
    flags.add_argument("--data", type=Path, default=DATA / "adult" / "adult.data", help="a CSV file, answer last")
    arguments = flags.parse_args(given)
    size = "short" if arguments.short else arguments.size
    numbers = settings(arguments, SIZES[size][1])
    torch.manual_seed(numbers.seed)
    table = read(arguments.data, numbers.seed)
    model = make(table, size)
    print(f"{len(table.train.wanted)} rows to learn from, {count_parameters(model)} parameters")

    def evaluate(model: nn.Module) -> Metrics:
        return {"score": area(model, table.validation)}

    trained = train(
        prepare(model, arguments), Plain(*table.train, batch=BATCH), loss, numbers, folder=arguments.out,
        resume=arguments.resume, evaluate=evaluate, describe={"size": size, "categories": table.categories},
    )  # fmt: skip
    if trained.finished:
        model.save_pretrained(arguments.out / "model")
        own, theirs = area(model, table.test), trees(table)
        print(f"test AUC {own:.4f}; gradient-boosted trees {theirs:.4f}; {trained.seconds:.0f} s")
    return trained


if __name__ == "__main__":
    run(main)
