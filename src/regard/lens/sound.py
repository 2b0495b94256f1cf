"""Sound from a .wav file, as a speech model wants it.

Enters: a path and a sampling rate.
Leaves: float32 samples in [-1, 1], one channel (the mean of all), at that rate.
PCM of 8 to 32 bits; other encodings are refused with the fix.
Floor 5: the standard library's wave, numpy and torch."""

from __future__ import annotations

import math
import wave
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def read_wav(path: str | Path, rate: int) -> Tensor:
    """Read a .wav file.

    Args:
        path: the file.
        rate: samples a second that are wanted.

    Returns:
        float32 (samples,).

    Raises:
        ValueError: no file, not PCM, or no sound in it.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(
            f"look: TEXT must be the path of a .wav file for a speech model; got {str(path)!r}. Check the path."
        )
    try:
        with wave.open(str(path), "rb") as file:
            channels, width, own = file.getnchannels(), file.getsampwidth(), file.getframerate()
            data = file.readframes(file.getnframes())
    except (wave.Error, EOFError, RuntimeError) as broken:
        raise ValueError(
            f"look: TEXT must be a .wav file of PCM samples; got {path} ({str(broken) or 'cut short'}). "
            f"Convert it: ffmpeg -i {path.name} -ac 1 -ar {rate} -c:a pcm_s16le sound.wav"
        ) from None
    whole = len(data) // (channels * width) * channels * width
    samples = _numbers(data[:whole], width).reshape(-1, channels).mean(1)
    if not len(samples) or own < 1:
        raise ValueError(
            f"look: TEXT must be a .wav file with sound in it; got {path}, which is empty. Record it again."
        )
    return resample(torch.from_numpy(samples.astype(np.float32)), own, rate)


def resample(samples: Tensor, rate: int, wanted: int) -> Tensor:
    """Change the sampling rate by a windowed sinc, cut off below both rates' halves.

    y(t) = sum_n x(n) c sinc(c (t - n)) w(t - n), with w a Hann window of 16 zero crossings.

    Args:
        samples: float32 (n,).
        rate: samples a second now.
        wanted: samples a second wanted.

    Returns:
        float32 (ceil(n wanted / rate),).

    Example:
        >>> resample(torch.ones(80), 8000, 16000)[80].round(decimals=2)
        tensor(1.)

    Source: J. O. Smith, "Digital Audio Resampling", the windowed-sinc interpolation formula.
    """
    if rate == wanted:
        return samples
    divisor = math.gcd(rate, wanted)
    up, down = wanted // divisor, rate // divisor
    cut = 0.95 * min(1.0, up / down)
    reach = math.ceil(8 / cut)
    phase = torch.arange(up, dtype=torch.float64)[:, None] * down / up
    start = phase.floor()
    at = start - phase + torch.arange(-reach, reach + 1, dtype=torch.float64)[None]
    window = torch.where(at.abs() < reach, torch.cos(math.pi * at / (2 * reach)) ** 2, 0.0)
    filters = cut * torch.sinc(cut * at) * window
    filters /= filters.sum(1, keepdim=True)
    length = math.ceil(len(samples) * up / down)
    blocks = math.ceil(length / up)
    padded = torch.nn.functional.pad(samples.double(), (reach, reach + blocks * down + 1))
    out = torch.empty(blocks, up, dtype=torch.float64)
    for one in range(up):
        first = int(start[one])
        windows = padded[first:].unfold(0, 2 * reach + 1, down)[:blocks]
        out[:, one] = windows @ filters[one]
    return out.reshape(-1)[:length].float()


def _numbers(data: bytes, width: int) -> np.ndarray:
    """PCM bytes as numbers in [-1, 1]."""
    if width == 1:
        return (np.frombuffer(data, np.uint8).astype(np.float64) - 128) / 128
    if width == 3:
        triples = np.frombuffer(data, np.uint8).reshape(-1, 3).astype(np.int32)
        whole = triples[:, 0] << 8 | triples[:, 1] << 16 | triples[:, 2] << 24
        return whole.astype(np.float64) / 2**31
    kind = {2: "<i2", 4: "<i4"}[width]
    return np.frombuffer(data, kind).astype(np.float64) / 2 ** (8 * width - 1)
