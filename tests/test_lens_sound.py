"""Sound files become samples at the rate that a speech model wants; what is no sound is refused."""

import math
import wave

import numpy as np
import pytest
import torch

from regard.lens.sound import read_wav, resample


def write(path, samples, rate, width=2, channels=1):
    whole = np.asarray(samples, np.float64)
    data = {
        1: lambda: (whole * 127 + 128).round().astype(np.uint8).tobytes(),
        2: lambda: (whole * 32767).round().astype("<i2").tobytes(),
        3: lambda: b"".join(int(v).to_bytes(3, "little", signed=True) for v in (whole * (2**23 - 1)).round().ravel()),
        4: lambda: (whole * (2**31 - 1)).round().astype("<i4").tobytes(),
    }[width]()
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(data)
    return path


def tone(rate, hertz, seconds=0.5):
    return np.sin(2 * math.pi * hertz * np.arange(int(rate * seconds)) / rate) * 0.5


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_every_pcm_width_is_read(tmp_path, width):
    samples = tone(16000, 440)
    read = read_wav(write(tmp_path / "tone.wav", samples, 16000, width), 16000)
    assert read.dtype == torch.float32
    assert float((read - torch.from_numpy(samples)).abs().max()) < {1: 8e-3, 2: 1e-4, 3: 1e-6, 4: 1e-6}[width]


def test_channels_are_averaged(tmp_path):
    both = np.stack([np.full(100, 0.5), np.full(100, -0.25)], axis=1)
    read = read_wav(write(tmp_path / "two.wav", both, 8000, channels=2), 8000)
    torch.testing.assert_close(read, torch.full((100,), 0.125), atol=1e-4, rtol=0)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000])
def test_resampling_keeps_a_tone(rate):
    got = resample(torch.from_numpy(tone(rate, 440)).float(), rate, 16000)
    expected = torch.from_numpy(tone(16000, 440)).float()
    length = min(len(got), len(expected))
    assert abs(len(got) - len(expected)) <= 1
    inside = slice(200, length - 200)
    assert float((got[inside] - expected[inside]).abs().max()) < 2e-3


def test_resampling_down_removes_what_the_new_rate_cannot_hold():
    got = resample(torch.from_numpy(tone(48000, 15000)).float(), 48000, 16000)
    assert float(got[200:-200].abs().max()) < 5e-3


def test_what_is_no_sound_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"TEXT must be the path of a .wav file for a speech model; got 'none.wav'. Check"
    ):
        read_wav("none.wav", 16000)
    (tmp_path / "words.wav").write_text("words")
    with pytest.raises(
        ValueError, match=r"must be a .wav file of PCM samples; got .*words.wav .* Convert it: ffmpeg -i"
    ):
        read_wav(tmp_path / "words.wav", 16000)
    whole = write(tmp_path / "whole.wav", tone(8000, 440), 8000).read_bytes()
    (tmp_path / "header.wav").write_bytes(whole[:30])
    with pytest.raises(ValueError, match=r"PCM samples; got .*header.wav \(.+\)"):
        read_wav(tmp_path / "header.wav", 16000)
    with pytest.raises(ValueError, match=r"with sound in it; got .*empty.wav, which is empty"):
        read_wav(write(tmp_path / "empty.wav", [], 8000), 16000)
    (tmp_path / "cut.wav").write_bytes(whole[:-1001])
    assert len(read_wav(tmp_path / "cut.wav", 8000)) > 3000  # what is there is heard
