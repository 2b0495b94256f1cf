"""The training loop of every recipe: one step, its schedule, its progress, and checkpoints that go on exactly.

Enters: a model, examples in batches, a loss, and the numbers of the run (`Settings`).
Leaves: a trained model, a log of every step, and checkpoints: weights and optimiser as safetensors, the rest as JSON.
Floor: above the package; recipes stand on it. It runs on what accelerate finds: a CPU, a GPU, or many by `torchrun`.

A run that was killed goes on with the same numbers: the order of the data is a function of seed and epoch, the schedule
is a function of the step, and the states of optimiser and random generator are kept bit by bit. A file is written
beside and put in place whole, so that the newest checkpoint is always a good one.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from checkpoints import Checkpoint, Checkpoints, load_optimizer, load_weights
from torch import Tensor, nn

Metrics = dict[str, float]
UNSEEN = ("minutes", "keep")  # settings that do not touch the numbers


@dataclass(frozen=True)
class Settings:
    """The numbers of a run."""

    steps: int
    """optimiser steps in all"""
    lr: float = 1e-3
    """the highest learning rate"""
    warmup: int = 100
    """steps in which the rate rises to it"""
    schedule: str = "cosine"
    """what follows: "cosine" to a tenth, "inverse_sqrt", or "constant\""""
    weight_decay: float = 0.0
    """of matrices, as AdamW has it"""
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0
    """longest gradient"""
    accumulate: int = 1
    """batches whose gradients make one step"""
    bf16: bool = False
    """whether matrix products are taken in bfloat16"""
    seed: int = 0
    every: int = 200
    """steps between checkpoints; the model is evaluated at each"""
    keep: int = 1
    """how many weights of earlier checkpoints to keep, for `average`"""
    minutes: float | None = None
    """stop after so long with a checkpoint, to go on another time"""


class Batches(Protocol):
    """The examples of a recipe."""

    def order(self, generator: torch.Generator) -> Sequence[Sequence[int]]:
        """The batches of one epoch, as numbers of examples, in an order that the generator alone decides."""
        ...

    def load(self, examples: Sequence[int]) -> tuple[Tensor, ...]:
        """The tensors of one batch."""
        ...


class Plain:
    """Examples as the rows of tensors, in batches of one size."""

    def __init__(self, *tensors: Tensor, batch: int) -> None:
        if not tensors or any(len(t) != len(tensors[0]) for t in tensors) or not len(tensors[0]):
            raise ValueError(
                f"Plain: tensors must have the same number of rows, at least one; got {[len(t) for t in tensors]}. "
                "Pass one row for each example."
            )
        self.tensors, self.batch = tensors, batch

    def order(self, generator: torch.Generator) -> list[list[int]]:
        rows = torch.randperm(len(self.tensors[0]), generator=generator).tolist()
        return [rows[at : at + self.batch] for at in range(0, len(rows), self.batch)]

    def load(self, examples: Sequence[int]) -> tuple[Tensor, ...]:
        index = torch.as_tensor(examples)
        return tuple(t[index] for t in self.tensors)


@dataclass
class Trained:
    """How a run ended."""

    step: int
    losses: list[float]
    """of each step that this process took"""
    metrics: Metrics
    """of the last evaluation"""
    best: Metrics
    """of the evaluation with the highest "score", {} where evaluations give none"""
    seconds: float
    """of training and evaluating, earlier processes included"""
    finished: bool
    """False where Ctrl-C or `minutes` stopped it"""


class NotFinite(ValueError):
    """A loss or a gradient that is no number. What was saved before is untouched."""


def rate(step: int, settings: Settings) -> float:
    """Learning rate of a step, counted from 0.

    lr · min(1, (step + 1) / warmup), then lr · (0.1 + 0.45 (1 + cos π t)) with t from 0 to 1, or lr · √(warmup / step).
    """
    warmup = max(settings.warmup, 1)
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    if settings.schedule == "inverse_sqrt":
        return settings.lr * math.sqrt(warmup / (step + 1))
    if settings.schedule == "cosine":
        t = min((step + 1 - warmup) / max(settings.steps - warmup, 1), 1.0)
        return settings.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * t)))
    if settings.schedule == "constant":
        return settings.lr
    raise ValueError(
        f"train: schedule must be cosine, inverse_sqrt or constant; got {settings.schedule!r}. Choose one."
    )


def train(
    model: nn.Module,
    batches: Batches,
    loss: Callable[..., Tensor],
    settings: Settings,
    *,
    folder: Path | None = None,
    resume: bool = False,
    evaluate: Callable[[nn.Module], Metrics] | None = None,
    describe: Mapping[str, Any] | None = None,
) -> Trained:
    """Train a model in place.

    Args:
        model: any module; only parameters that want gradients are trained.
        batches: the examples.
        loss: `loss(model, *tensors)` of one batch, a scalar.
        settings: the numbers of the run.
        folder: for checkpoints and log.jsonl. Default None: neither.
        resume: go on from the newest checkpoint there. Default False: the folder must hold none.
        evaluate: metrics of the model. Where they have a "score", higher being better, the weights of the best
            evaluation come back at the end. Default None.
        describe: what a checkpoint shall belong to, as sizes and vocabulary; compared on resuming. Default {}.

    Returns:
        Trained.

    Raises:
        NotFinite: where a loss or gradient is no number; says at which step, in which batch and module.
        ValueError, OSError: for a checkpoint that is cut, of another run, or that could not be written.
    """
    accelerator = _accelerator(settings)
    torch.manual_seed(settings.seed + 7919 * accelerator.process_index)
    optimizer = _optimizer(model, settings)
    objective = accelerator.prepare_model(_Objective(model, loss))
    identity = {
        "settings": {k: v for k, v in asdict(settings).items() if k not in UNSEEN},
        "processes": accelerator.num_processes,
        "describe": dict(describe or {}),
    }
    store = None if folder is None else Checkpoints(folder, settings.keep, accelerator.is_main_process)
    state = _State()
    if store is not None:
        found = store.newest(json.loads(json.dumps(identity)), resume)
        if found is not None:
            state = _restore(found, model, optimizer, accelerator)
        store.open_log(state.step)
    already = state.seconds
    began, losses, metrics = time.monotonic() - already, [], {}
    run = _Run(accelerator, objective, optimizer, batches, settings, store)
    with _stopping() as stop, _progress(settings.steps, state.step, accelerator.is_main_process) as show:
        work = _steps(batches, settings, accelerator, state)
        stopped = False
        while state.step < settings.steps and not stopped:
            state.epoch, state.at, examples = next(work)
            late = settings.minutes is not None and time.monotonic() - began >= 60 * settings.minutes + already
            value, norm, stopped = run.step(state, examples, stop() or late)
            state.step += 1
            state.seconds = time.monotonic() - began
            losses.append(value)
            show(state, value, metrics)
            if store is not None:
                store.log({"step": state.step, "loss": value, "norm": norm, "seconds": round(state.seconds, 3)})
            due = state.step == settings.steps or state.step % settings.every == 0
            if due and evaluate is not None:
                metrics = _evaluated(model, evaluate, state, store)
                state.seconds = time.monotonic() - began
            if store is not None and (due or stopped):
                run.save(model, state, identity)
    if state.step >= settings.steps and state.best_weights is not None:
        model.load_state_dict(state.best_weights)
    return Trained(state.step, losses, metrics, state.best, state.seconds, state.step >= settings.steps)


@dataclass
class _State:
    """Where a run is."""

    step: int = 0
    epoch: int = 0
    at: int = 0
    """the next batch of the epoch"""
    seconds: float = 0.0
    best: Metrics = None
    best_weights: dict[str, Tensor] | None = None

    def __post_init__(self) -> None:
        self.best = self.best or {}


class _Objective(nn.Module):
    """A loss as a forward pass: what distributed training and autocast can wrap."""

    def __init__(self, model: nn.Module, loss: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.loss(self.model, *tensors)


class _Run:
    def __init__(self, accelerator, objective, optimizer, batches, settings, store) -> None:
        self.accelerator, self.objective, self.optimizer = accelerator, objective, optimizer
        self.batches, self.settings, self.store = batches, settings, store
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def step(self, state: _State, work: Sequence[Sequence[int]], stop: bool) -> tuple[float, float, bool]:
        """One step of the optimiser; the mean loss of all processes, the gradient's length, whether one shall stop."""
        accelerator, settings = self.accelerator, self.settings
        self.objective.train()
        for group in self.optimizer.param_groups:
            group["lr"] = rate(state.step, settings)
        total = torch.zeros((), device=accelerator.device)
        for number, examples in enumerate(work):
            tensors = tuple(t.to(accelerator.device) for t in self.batches.load(examples))
            last = number + 1 == len(work)
            with nullcontext() if last else accelerator.no_sync(self.objective):
                loss = self.objective(*tensors) / len(work)
                accelerator.backward(loss)
            total += loss.detach().float()
        both = torch.stack((total, total.new_tensor(float(stop))))
        value, stopped = accelerator.reduce(both, "mean").tolist()
        if not math.isfinite(value):
            raise self._not_finite("loss", value, state, work, self._first_module(tensors))
        norm = float(nn.utils.clip_grad_norm_(self.parameters, settings.clip))
        if not math.isfinite(norm):
            raise self._not_finite("gradient", norm, state, work, self._first_gradient())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return value, norm, stopped > 0

    def save(self, model: nn.Module, state: _State, identity: Mapping[str, Any]) -> None:
        """Write a checkpoint, from the main process, with the generator states of all."""
        accelerator = self.accelerator
        own = torch.random.get_rng_state()[None].to(accelerator.device)
        generators = {"cpu": accelerator.gather(own).cpu()}
        if accelerator.device.type == "cuda":
            own = torch.cuda.get_rng_state(accelerator.device)[None].to(accelerator.device)
            generators["cuda"] = accelerator.gather(own).cpu()
        place = {"step": state.step, "epoch": state.epoch, "at": state.at, "seconds": state.seconds, "best": state.best}
        if accelerator.is_main_process:
            self.store.save(Checkpoint(model.state_dict(), self.optimizer.state_dict(), generators, place), identity)
        accelerator.wait_for_everyone()

    def _not_finite(
        self, what: str, value: float, state: _State, work: Sequence[Sequence[int]], where: str
    ) -> NotFinite:
        last = None if self.store is None else self.store.last()
        kept = "No checkpoint was written yet" if last is None else f"The last good checkpoint is {last}"
        return NotFinite(
            f"train: {what} must be finite; got {value} at step {state.step + 1}, epoch {state.epoch}, examples "
            f"{[list(examples)[:8] for examples in work]}, first in {where}. {kept}. Lower the rate, or look at these "
            "examples."
        )

    def _first_module(self, tensors: Sequence[Tensor]) -> str:
        """The first parameter or module whose numbers are not finite, from a forward pass that watches all."""
        for name, parameter in self.objective.named_parameters():
            if not bool(parameter.isfinite().all()):
                return f"parameter {_plain(name)}"
        seen: list[str] = []

        def watch(name: str) -> Callable[..., None]:
            def hook(_module: nn.Module, _args: Any, out: Any) -> None:
                if isinstance(out, Tensor) and out.is_floating_point() and not bool(out.isfinite().all()):
                    seen.append(name)

            return hook

        hooks = [module.register_forward_hook(watch(name)) for name, module in self.objective.named_modules() if name]
        try:
            with torch.no_grad():
                self.objective(*tensors)
        finally:
            for hook in hooks:
                hook.remove()
        return f"module {_plain(seen[0])}" if seen else "the loss itself"

    def _first_gradient(self) -> str:
        for name, parameter in self.objective.named_parameters():
            if parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
                return f"the gradient of {_plain(name)}"
        return "the sum of the gradients"


def _plain(name: str) -> str:
    return name.removeprefix("module.").removeprefix("model.") or "the model"


def _accelerator(settings: Settings) -> Accelerator:
    # accelerate keeps one state for the whole process; a second run may want another precision
    AcceleratorState._reset_state()
    GradientState._reset_state()
    # without a word it takes several processes on CPUs for so many runs of their own
    cpu = not torch.accelerator.is_available()
    return Accelerator(cpu=cpu, mixed_precision="bf16" if settings.bf16 else "no")


def _optimizer(model: nn.Module, settings: Settings) -> torch.optim.AdamW:
    wanted = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in wanted if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in wanted if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=1e-9, fused=True)


def _restore(found: Checkpoint, model: nn.Module, optimizer: Any, accelerator: Accelerator) -> _State:
    load_weights(model, found.weights, "train")
    load_optimizer(optimizer, found.optimizer)
    torch.random.set_rng_state(found.generators["cpu"][accelerator.process_index])
    if accelerator.device.type == "cuda":
        torch.cuda.set_rng_state(found.generators["cuda"][accelerator.process_index], accelerator.device)
    return _State(**found.place, best_weights=found.best_weights)


def _evaluated(model: nn.Module, evaluate: Callable[[nn.Module], Metrics], state: _State, store: Any) -> Metrics:
    """Metrics, without a trace in the random numbers; the best weights are kept."""
    model.eval()
    with torch.no_grad(), torch.random.fork_rng():
        metrics = evaluate(model)
    score = metrics.get("score")
    if score is not None and score > state.best.get("score", -math.inf):
        state.best = {**metrics, "step": state.step}
        state.best_weights = {name: t.detach().clone() for name, t in model.state_dict().items()}
        if store is not None:
            store.save_best(state.best_weights)
    if store is not None:
        store.log({"step": state.step, **metrics})
    return metrics


def _steps(
    batches: Batches, settings: Settings, accelerator: Accelerator, state: _State
) -> Iterator[tuple[int, int, Sequence[Sequence[int]]]]:
    """For each step its epoch, the batch that follows it, and the batches of this process."""
    processes, own = accelerator.num_processes, accelerator.process_index
    each = settings.accumulate * processes
    epoch, at = state.epoch, state.at
    while True:
        generator = torch.Generator().manual_seed(1_000_003 * settings.seed + epoch)
        order = batches.order(generator)
        if len(order) < each:
            raise ValueError(
                f"train: an epoch must have a batch for each of {processes} processes and {settings.accumulate} "
                f"accumulated; got {len(order)} batches. Use smaller batches."
            )
        while at + each <= len(order):
            work = order[at + own : at + each : processes]
            at += each
            yield epoch, at, work
        epoch, at = epoch + 1, 0


@contextmanager
def _stopping() -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C (or SIGTERM) asks to stop after the step; the second stops at once."""
    asked = False
    before: dict[int, Any] = {}

    def handle(number: int, _frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, handle)
    except ValueError:
        pass  # not the main thread: Python lets no other handle signals
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _progress(steps: int, step: int, shown: bool) -> Iterator[Callable[[_State, float, Metrics], None]]:
    """A bar on standard error; where that is no terminal, a line every half a minute."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (
        BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    told = time.monotonic()
    with Progress(*columns, console=console, disable=not (shown and console.is_terminal)) as bars:
        task = bars.add_task("", total=steps, completed=step)

        def show(state: _State, loss: float, metrics: Metrics) -> None:
            nonlocal told
            words = " ".join(f"{name} {value:.4g}" for name, value in {"loss": loss, **metrics}.items())
            bars.update(task, completed=state.step, description=words)
            if shown and not console.is_terminal and time.monotonic() - told > 30:
                told = time.monotonic()
                console.print(f"step {state.step}/{steps} {words} {state.seconds:.0f} s", highlight=False)

        yield show
