"""Graphs: papers that cite one another; a paper's words are its embedding, and the citations are its mask.

Enters: Cora or Citeseer (Planetoid's files, with their standard split).
Leaves: the test accuracy of a graph attention network, for each seed and on average.
Floor: above the package. `python recipes/graph.py --data cora --seeds 10`

Source: Veličković et al. 2018, sections 2.1 and 3.3; Yang et al. 2016 (the split).
"""

from __future__ import annotations

import argparse
import io
import pickle
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from flags import DATA, run
from scipy import sparse
from scipy.sparse.csgraph import reverse_cuthill_mckee
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, dropout, elu, embedding_bag

from regard import attention, masks
from regard.mask_algebra import Mask

DROPPED = 0.6  # of words, features and attention weights alike
LR, WEIGHT_DECAY, PATIENCE = 0.005, 5e-4, 100


class Graph(NamedTuple):
    """Papers, the words in them, and who cites whom."""

    words: Tensor
    """int64, the words of all papers, paper by paper."""
    amounts: Tensor
    """float32, likewise; a paper's amounts sum to 1."""
    starts: Tensor
    """int64 `(num_nodes,)`, where each paper's words begin; a few of Citeseer's have none."""
    num_words: int
    edges: Tensor
    """int64 `(2, num_edges)`, both directions of each citation, and each paper to itself."""
    classes: Tensor
    """int64 `(num_nodes,)`."""
    train: Tensor
    """int64: 20 papers of each class to learn from,"""
    validation: Tensor
    """500 to stop by,"""
    test: Tensor
    """1,000 to be tested on; all others lend their words and citations."""


class ArraysOnly(pickle.Unpickler):
    """Reads the published files, and makes nothing but arrays, sparse matrices and lists of neighbours of them."""

    ALLOWED: ClassVar = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("numpy.core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,
        ("scipy.sparse.csr", "csr_matrix"): sparse.csr_matrix,
        ("collections", "defaultdict"): defaultdict,
        ("__builtin__", "list"): list,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise ValueError(f"graph: a file must hold arrays alone; got {module}.{name}. Fetch it again.")
        return self.ALLOWED[module, name]


def read(name: str, folder: Path = DATA / "planetoid") -> Graph:
    """A graph and its standard split, with papers renumbered so that those who cite one another stand together.

    What is asked of the graph does not depend on the numbers, but the kernel skips every tile without an edge: on
    Cora a step takes a third of the time.
    """

    def opened(part: str) -> Any:
        return ArraysOnly(io.BytesIO((folder / f"ind.{name}.{part}").read_bytes()), encoding="latin1").load()

    test = np.loadtxt(folder / f"ind.{name}.test.index", dtype=np.int64)
    rest, tested, rest_labels, tested_labels = (opened(part) for part in ("allx", "tx", "ally", "ty"))
    num_nodes, num_classes = int(test.max()) + 1, rest_labels.shape[1]
    words = sparse.lil_array((num_nodes, rest.shape[1]), dtype=np.float32)
    labels = np.zeros((num_nodes, num_classes))
    words[: rest.shape[0]], labels[: rest.shape[0]] = rest, rest_labels
    words[test], labels[test] = tested, tested_labels  # in the file's own order
    pairs = np.array([(one, other) for one, others in opened("graph").items() for other in (one, *others)]).T
    links = sparse.coo_array((np.ones(pairs.shape[1]), tuple(pairs)), (num_nodes, num_nodes)).tocsr()
    links = links + links.T + sparse.eye_array(num_nodes)

    order = reverse_cuthill_mckee(links.tocsr(), symmetric_mode=True)  # new number -> old
    number = torch.from_numpy(np.argsort(order))  # old -> new
    words = words.tocsr()[order]
    totals = np.maximum(words.sum(1), 1)
    trained = len(opened("y"))
    return Graph(
        words=torch.from_numpy(words.indices.astype(np.int64)),
        amounts=torch.from_numpy((words.data / np.repeat(totals, np.diff(words.indptr))).astype(np.float32)),
        starts=torch.from_numpy(words.indptr[:-1].astype(np.int64)),
        num_words=words.shape[1],
        edges=number[torch.from_numpy(np.stack(links.nonzero()).astype(np.int64))],
        classes=torch.from_numpy(labels.argmax(1)[order]),
        train=number[:trained],
        validation=number[trained : trained + 500],
        test=number[torch.from_numpy(test)],
    )


class GraphAttention(nn.Module):
    """Each node gathers what its neighbours offer, in proportion to exp of their scores, once for each head.

    out_i = Σ_j softmax_j(a_h · h_j) h_j over the neighbours j of i

    This is the published layer but for the LeakyReLU around a_h · h_j + b_h · h_i, without which the second term, the
    same for all neighbours, cancels. Brody et al. 2022 show that either ranks neighbours alike, whoever asks.

    Args:
        num_heads: how many weightings.
        head_dim: numbers of a node that each weighs.
    """

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.score = nn.Parameter(nn.init.xavier_uniform_(torch.empty(num_heads, head_dim)))
        self.bias = nn.Parameter(torch.zeros(num_heads * head_dim))

    def forward(self, h: Tensor, mask: Mask) -> Tensor:
        """h `(num_nodes, num_heads · head_dim)`, likewise back."""
        rate = DROPPED if self.training else 0.0
        v = h.unflatten(1, self.score.shape).transpose(0, 1)[None]  # (1, num_heads, num_nodes, head_dim)
        k = v @ self.score[:, :, None]
        out = attention(torch.ones_like(k), k, dropout(v, rate), mask=mask, scale=1.0, dropout=rate)
        return out[0].transpose(0, 1).flatten(1) + self.bias


class GAT(nn.Module):
    """A domain is an embedding and a mask: the sum of a paper's words, and edges; then attention twice.

    Args:
        num_words: how many words there are.
        num_classes: how many kinds of papers.
        num_heads: of the hidden layer. Default 8.
        head_dim: of the hidden layer. Default 8.
    """

    def __init__(self, num_words: int, num_classes: int, *, num_heads: int = 8, head_dim: int = 8) -> None:
        super().__init__()
        dim = num_heads * head_dim
        self.words = nn.Parameter(nn.init.xavier_uniform_(torch.empty(num_words, dim)))
        self.hidden = GraphAttention(num_heads, head_dim)
        self.classes = nn.Parameter(nn.init.xavier_uniform_(torch.empty(dim, num_classes)))
        self.last = GraphAttention(1, num_classes)

    def forward(self, graph: Graph) -> Tensor:
        """Logits `(num_nodes, num_classes)`."""
        rate, mask = DROPPED if self.training else 0.0, masks.edges(graph.edges)
        amounts = dropout(graph.amounts, rate)
        x = embedding_bag(graph.words, self.words, graph.starts, mode="sum", per_sample_weights=amounts)
        x = elu(self.hidden(x, mask))
        return self.last(dropout(x, rate) @ self.classes, mask)


class Fitted(NamedTuple):
    """How a run ended."""

    epochs: int
    validation: float
    """accuracy"""
    test: float
    """accuracy, taken once, of the weights that were best in validation"""


def fit(graph: Graph, seed: int, max_epochs: int) -> Fitted:
    """Train on the whole graph at once, until neither loss nor accuracy in validation has gained for 100 epochs."""
    torch.manual_seed(seed)
    model = GAT(graph.num_words, int(graph.classes.max()) + 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    least, most, kept, gained, epoch = float("inf"), 0.0, model.state_dict(), 0, 0
    while epoch < max_epochs and epoch - gained < PATIENCE:
        epoch += 1
        model.train()
        optimizer.zero_grad()
        cross_entropy(model(graph)[graph.train], graph.classes[graph.train]).backward()
        optimizer.step()
        loss, right = measured(model, graph, graph.validation)
        if loss <= least or right >= most:
            gained = epoch
            if loss <= least and right >= most:
                kept = {name: t.clone() for name, t in model.state_dict().items()}
            least, most = min(loss, least), max(right, most)
    model.load_state_dict(kept)
    return Fitted(epoch, measured(model, graph, graph.validation)[1], measured(model, graph, graph.test)[1])


@torch.no_grad()
def measured(model: nn.Module, graph: Graph, nodes: Tensor) -> tuple[float, float]:
    """Loss and accuracy on some papers."""
    logits, classes = model.eval()(graph)[nodes], graph.classes[nodes]
    return float(cross_entropy(logits, classes)), float((logits.argmax(1) == classes).float().mean())


def main(given: list[str] | None = None) -> None:
    """Train with each seed; print each accuracy, and their mean and deviation."""
    flags = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    flags.add_argument("--data", choices=("cora", "citeseer"), default="cora")
    flags.add_argument("--folder", type=Path, default=DATA / "planetoid", help="where Planetoid's files are")
    flags.add_argument("--seeds", type=int, default=10, help="how many runs, from seed 0 (default 10)")
    flags.add_argument("--short", action="store_true", help="one run of at most 150 epochs")
    arguments = flags.parse_args(given)
    graph, found = read(arguments.data, arguments.folder), []
    for seed in range(1 if arguments.short else max(arguments.seeds, 1)):
        began = time.monotonic()
        fitted = fit(graph, seed, 150 if arguments.short else 2000)
        found.append(100 * fitted.test)
        print(
            f"{arguments.data} seed {seed}: test {fitted.test:.1%}, validation {fitted.validation:.1%}, "
            f"{fitted.epochs} epochs, {time.monotonic() - began:.0f} s", flush=True,
        )  # fmt: skip
    print(f"{arguments.data}: test {statistics.mean(found):.1f} ± {statistics.pstdev(found):.1f} % over {len(found)}")


if __name__ == "__main__":
    run(main)
