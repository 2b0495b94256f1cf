"""The flags that every recipe shares, and how a recipe says what went wrong.

Enters: a command line. Leaves: `Settings` for `training.train`; a model with LoRA where asked; exit statuses.
Floor: above the package; recipes stand on it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from training import Settings, Trained

from regard.nn import Decoder, Encoder

DATA = Path(os.environ.get("REGARD_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")


def parser(words: str, sizes: tuple[str, ...], size: str, out: str) -> argparse.ArgumentParser:
    """A parser with the flags of every recipe.

    Args:
        words: what the recipe is for.
        sizes: names for --size.
        size: its default.
        out: the default folder of --out.
    """
    made = argparse.ArgumentParser(description=words, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    made.add_argument("--size", choices=sizes, default=size, help="of model and budget")
    made.add_argument("--short", action="store_true", help="the form of one minute: --size short")
    made.add_argument("--out", type=Path, default=Path(out), help="folder for checkpoints, log and model")
    made.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--steps", type=int, help="steps in all, in place of the size's")
    made.add_argument("--lr", type=float, help="highest learning rate, in place of the size's")
    made.add_argument("--minutes", type=float, help="stop after so long with a checkpoint, to --resume another time")
    made.add_argument("--accumulate", type=int, default=1, help="batches whose gradients make one step")
    made.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=None, help="products in bfloat16")
    made.add_argument("--checkpointing", action="store_true", help="compute blocks twice instead of keeping them")
    made.add_argument("--lora", type=int, metavar="RANK", help="train only adapters of this rank (needs peft)")
    made.add_argument("--threads", type=int, help="of PyTorch, for the whole run")
    return made


def settings(arguments: argparse.Namespace, default: Settings) -> Settings:
    """A size's settings with what the command line says instead."""
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    said = {"seed": arguments.seed, "minutes": arguments.minutes, "accumulate": arguments.accumulate}
    for name in ("steps", "lr", "bf16"):
        if getattr(arguments, name) is not None:
            said[name] = getattr(arguments, name)
    for name in ("steps", "accumulate"):
        if said.get(name, 1) < 1:
            raise ValueError(f"train: {name} must be at least 1; got {said[name]}. Change --{name}.")
    return replace(default, **said)


def prepare(model: nn.Module, arguments: argparse.Namespace) -> nn.Module:
    """A model with gradient checkpointing and LoRA where the flags ask for them, changed in place."""
    if arguments.checkpointing:
        for part in model.modules():
            if isinstance(part, (Encoder, Decoder)):
                part.checkpoint = True
    return model if arguments.lora is None else add_lora(model, arguments.lora)


def add_lora(model: nn.Module, rank: int) -> nn.Module:
    """Freeze a model and give its linear maps a trained update of low rank, W + B A, in place.

    Those of the feed-forward networks and of attention's output: the projections onto queries, keys and values are one
    parameter of `MultiHeadAttention`, as in torch, and no module that peft can put something beside.

    Source: Hu et al. 2022.
    """
    from peft import LoraConfig, inject_adapter_in_model

    names = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    return inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names), model)


def run(main: Callable[[list[str] | None], Trained | None]) -> None:
    """Call a recipe: a refusal is one sentence and status 1, Ctrl-C is status 130."""
    try:
        trained = main(None)
    except (ImportError, OSError, ValueError) as refused:
        sys.exit(f"error: {refused}")
    except KeyboardInterrupt:
        sys.exit(130)
    if trained is not None and not trained.finished:
        print(f"stopped at step {trained.step}; --resume goes on", file=sys.stderr)
        sys.exit(130)
