"""Audio files: reading, checks, levels, every format with its metadata, stems, pictures."""

from __future__ import annotations

import io
import logging
import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from musicgen import audio, plots, stems
from musicgen.errors import InvalidRequestError, MissingDependencyError
from musicgen.inputs import checked_prompt
from musicgen.plots import log_mel, plot_audio
from musicgen.waveform import StreamResampler, resampled_len
from musicgen.weights import open_checkpoint

FORMATS = ("wav", "flac", "mp3", "ogg", "opus")


def sine(seconds: float, sample_rate: int = 32000, frequency_hz: float = 440.0, level: float = 0.5) -> Tensor:
    return (level * torch.sin(2 * math.pi * frequency_hz * torch.arange(int(seconds * sample_rate)) / sample_rate))[
        None
    ]


def peak_frequency_hz(wav: Tensor, sample_rate: int) -> float:
    spectrum = torch.fft.rfft(wav.mean(0) * torch.hann_window(wav.shape[1])).abs()
    return float(spectrum.argmax()) * sample_rate / wav.shape[1]


# Reading


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("as_bytes", [False, True])
def test_every_format_is_read_back(tmp_path: Path, format: str, as_bytes: bool) -> None:
    stereo = torch.cat([sine(1.0), sine(1.0, frequency_hz=660.0, level=0.25)])
    path = audio.audio_write(tmp_path / "a", stereo, 32000, format, strategy="clip")
    assert path == tmp_path / f"a.{format}"
    wav, rate = audio.load_audio(path.read_bytes() if as_bytes else path)
    assert rate == (48000 if format == "opus" else 32000)
    assert wav.dtype == torch.float32
    assert wav.shape[0] == 2
    assert abs(wav.shape[1] / rate - 1.0) < 0.1
    assert peak_frequency_hz(wav[:1], rate) == pytest.approx(440, abs=3)
    assert peak_frequency_hz(wav[1:], rate) == pytest.approx(660, abs=3)
    if format in ("wav", "flac"):
        assert (wav - stereo).abs().max() <= 1.5 / 32768


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.wav").write_text("not audio")
    (tmp_path / "none.wav").write_bytes(b"")
    soundfile.write(tmp_path / "empty.wav", torch.zeros(0, 1).numpy(), 32000)
    soundfile.write(tmp_path / "nan.wav", torch.full((10, 1), math.nan).numpy(), 32000, subtype="FLOAT")
    soundfile.write(tmp_path / "long.wav", torch.zeros(32001, 1).numpy(), 32000)
    soundfile.write(tmp_path / "many.wav", torch.zeros(10, 9).numpy(), 32000)
    soundfile.write(tmp_path / "slow.wav", torch.zeros(10, 1).numpy(), 10)
    for name, reason in (
        ("missing.wav", "does not exist"), ("text.wav", "readable"), ("none.wav", "readable"), ("", "does not exist"),
        ("empty.wav", "one sample"), ("nan.wav", "finite"), ("long.wav", "at most 1 s"), ("many.wav", "8 channels"),
        ("slow.wav", "rate"),
    ):  # fmt: skip
        with pytest.raises(InvalidRequestError, match=reason):
            audio.load_audio(tmp_path / name, max_duration_s=1.0)
    with pytest.raises(InvalidRequestError, match="readable"):
        audio.load_audio(b"RIFF....")
    with pytest.raises(InvalidRequestError, match="a path, got None"):
        audio.load_audio(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("suffix", ["mp3", "raw"])
def test_files_are_known_by_their_content(tmp_path: Path, suffix: str, capfd: pytest.CaptureFixture[str]) -> None:
    """By its suffix, a text would go to the mp3 decoder, which prints to the process's standard error."""
    (tmp_path / f"text.{suffix}").write_text("not audio\n" * 1000)
    with pytest.raises(InvalidRequestError, match="readable"):
        audio.load_audio(tmp_path / f"text.{suffix}")
    soundfile.write(tmp_path / "wav.wav", torch.zeros(10, 1).numpy(), 32000)
    assert audio.load_audio((tmp_path / "wav.wav").rename(tmp_path / f"wav.{suffix}"))[0].shape == (1, 10)
    assert capfd.readouterr() == ("", "")


def test_a_recording_is_refused_for_the_memory_that_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds alone bound nothing: this one is short, and would be five million samples."""
    content = io.BytesIO()
    soundfile.write(content, torch.zeros(655_350, 8, dtype=torch.int16).numpy(), 655_350, format="FLAC")
    monkeypatch.setattr(audio, "_read", lambda _: pytest.fail("expected no decoding, got some"))
    with pytest.raises(InvalidRequestError, match="samples of all channels"):
        audio.load_audio(content.getvalue(), max_duration_s=1.5)


@pytest.mark.parametrize("num_frames", [1, audio._BLOCK_FRAMES, 2 * audio._BLOCK_FRAMES + 7])
def test_reading_in_blocks_changes_nothing(num_frames: int) -> None:
    samples = torch.rand(num_frames, 2, generator=torch.Generator().manual_seed(1)) - 0.5
    content = io.BytesIO()
    soundfile.write(content, samples.numpy(), 32000, format="WAV", subtype="FLOAT")
    wav, _ = audio.load_audio(content.getvalue())
    assert torch.equal(wav, samples.T)


@pytest.mark.parametrize(
    ("wav", "reason"),
    [(None, "a tensor"), ([0.0], "a tensor"), (torch.zeros(0), "one sample"), (torch.zeros(1, 0), "one sample"),
     (torch.zeros(32000, 2), "transpose"), (torch.zeros(1, 1, 5), "shape"), (torch.tensor(1.0), "shape"),
     (np.zeros(5, dtype=">f4"), "float"), (np.zeros((5, 5, 5)), "shape"), ("a.wav", "load_audio"),
     (torch.zeros(5, dtype=torch.int64), "float"), (torch.zeros(5, dtype=torch.complex64), "float"),
     (torch.tensor([0.0, math.nan]), "finite"), (torch.tensor([0.0, -math.inf]), "finite")],
)  # fmt: skip
def test_bad_waveforms_are_refused(wav: object, reason: str) -> None:
    with pytest.raises(InvalidRequestError, match=reason) as caught:
        audio.validate_waveform(wav, "melody_wavs")
    assert caught.value.param == "melody_wavs"


def test_good_waveforms_become_float_channels() -> None:
    assert audio.validate_waveform(torch.ones(7)).shape == (1, 7)
    assert audio.validate_waveform(torch.ones(2, 7, dtype=torch.float64)).dtype == torch.float32
    pcm = torch.tensor([[-32768, 0, 16384]], dtype=torch.int16)
    assert audio.validate_waveform(pcm).tolist() == [[-1.0, 0.0, 0.5]]
    array = pcm.numpy().copy()
    array.setflags(write=False)
    for given in (array, array[:, ::-1][:, ::-1], np.asfortranarray(array), array[0]):
        assert audio.validate_waveform(given).tolist() == [[-1.0, 0.0, 0.5]]
    shared = np.zeros((1, 3), dtype=np.float32)
    assert audio.validate_waveform(shared).data_ptr() == shared.ctypes.data


# Rates and channels


@pytest.mark.parametrize(("from_rate", "to_rate"), [(44100, 32000), (32000, 48000), (8000, 32000), (44101, 32000)])
def test_resampling_keeps_pitch_length_and_level(from_rate: int, to_rate: int) -> None:
    wav = sine(2.0, from_rate, 1000.0)
    out = audio.resample(wav, from_rate, to_rate)
    assert abs(out.shape[1] - 2 * to_rate) <= 1
    expected = sine(2.0, to_rate, 1000.0)
    n = min(out.shape[1], expected.shape[1])
    assert (out - expected[:, :n] if out.shape[1] == n else out[:, :n] - expected)[:, 500 : n - 500].abs().max() < 1e-2


def test_a_resampled_prompt_is_no_frame_longer_than_audiocrafts() -> None:
    """julius rounds the length down: 883 · 32000 / 44100 = 640.7 samples are one frame."""
    config = open_checkpoint("demo").config
    prompt = checked_prompt(torch.zeros(1, 883), 44100, config, 1.0)
    assert prompt.shape == (1, config.codec.hop_length) == (1, 640)
    for num_samples, expected in ((882, 640), (884, 641), (1, 0)):
        assert audio.convert_audio(torch.zeros(2, num_samples), 44100, 32000, 1).shape == (1, expected)


def test_resampling_refuses_impossible_rates() -> None:
    for rate in (0, -1, 44100.0, True, 10**9):
        with pytest.raises(InvalidRequestError, match="rate"):
            audio.resample(sine(0.1), rate, 32000)  # type: ignore[arg-type]


@pytest.mark.parametrize("step", [1, 7, 999, 40_000])
@pytest.mark.parametrize("rates", [(32000, 48000), (44100, 32000), (48000, 16000), (44101, 32000), (32000, 32000)])
def test_resampling_in_parts_is_resampling(rates: tuple[int, int], step: int) -> None:
    for num_samples in (1, 30, 2500 if step == 1 else 40_001):
        wav = torch.randn(2, num_samples, generator=torch.Generator().manual_seed(0))
        whole = audio.resample(wav, *rates)
        resampler = StreamResampler(*rates)
        parts = [resampler.resample(part) for part in torch.split(wav, step, dim=-1)]
        ours = torch.cat([*parts, resampler.finish()], dim=-1)
        assert ours.shape[-1] == resampled_len(num_samples, *rates) == whole.shape[-1]
        assert torch.allclose(ours, whole, rtol=0, atol=2e-6)


def test_a_resampler_keeps_no_more_than_its_filter_reaches() -> None:
    resampler = StreamResampler(32000, 48000)
    num_made = 0
    for num_given in range(100, 40_001, 100):
        num_made += resampler.resample(torch.zeros(1, 100)).shape[-1]
        assert resampled_len(num_given, 32000, 48000) - num_made <= 42, "less than a millisecond is held back"
        assert resampler._kept is not None
        assert resampler._kept.shape[-1] <= 54


def test_channels() -> None:
    left, right = torch.ones(1, 4), torch.full((1, 4), 3.0)
    stereo = torch.cat([left, right])
    assert torch.equal(audio.to_mono(stereo), torch.full((1, 4), 2.0))
    assert torch.equal(audio.convert_channels(stereo[None], 1)[0], torch.full((1, 4), 2.0))
    assert torch.equal(audio.convert_channels(left, 2), torch.ones(2, 4))
    assert torch.equal(audio.convert_channels(torch.cat([stereo, stereo]), 2), stereo)
    with pytest.raises(InvalidRequestError):
        audio.convert_channels(stereo, 3)
    assert audio.convert_audio(stereo.repeat(1, 800), 32000, 16000, 1).shape == (1, 1600)


# Levels


def test_loudness_meter_reads_the_standards_tone() -> None:
    """ITU-R BS.1770-4: a 997 Hz sine at full scale in one channel reads −3.01 LKFS."""
    assert audio.measure_loudness(sine(3.0, 48000, 997.0, level=1.0), 48000) == pytest.approx(-3.01, abs=0.01)
    assert audio.measure_loudness(torch.zeros(1, 48000), 48000) is None
    assert audio.measure_loudness(sine(0.3), 32000) is None


@pytest.mark.parametrize("headroom_db", [14.0, 23.0])
@pytest.mark.parametrize("level", [0.01, 0.9])
def test_loudness_strategy_reaches_its_target(headroom_db: float, level: float) -> None:
    wav = torch.cat([sine(3.0, level=level), sine(3.0, frequency_hz=300.0, level=level)])
    out = audio.normalize_audio(wav, strategy="loudness", loudness_headroom_db=headroom_db, sample_rate=32000)
    assert audio.measure_loudness(out, 32000) == pytest.approx(-headroom_db, abs=0.1)


def test_peak_clip_and_rms_strategies() -> None:
    wav = sine(1.0, level=0.5)
    assert audio.normalize_audio(wav).abs().max() == pytest.approx(10 ** (-1 / 20), rel=1e-5)
    assert audio.normalize_audio(wav, peak_clip_headroom_db=6).abs().max() == pytest.approx(10 ** (-6 / 20), rel=1e-5)
    loud = 4 * wav
    clipped = audio.normalize_audio(loud, strategy="clip")
    assert clipped.abs().max() == pytest.approx(10 ** (-1 / 20), rel=1e-5)
    quiet = loud.abs() < 0.5
    assert torch.equal(clipped[quiet], loud[quiet])
    for headroom_db in (18, 24):
        out = audio.normalize_audio(wav, strategy="rms", rms_headroom_db=headroom_db)
        assert out.square().mean().sqrt() == pytest.approx(10 ** (-headroom_db / 20), rel=1e-4)


@pytest.mark.parametrize("strategy", ["peak", "rms"])
def test_without_normalisation_only_what_is_too_loud_changes(strategy: audio.Strategy) -> None:
    quiet = sine(1.0, level=0.01)
    assert torch.equal(audio.normalize_audio(quiet, normalize=False, strategy=strategy), quiet)
    loud = audio.normalize_audio(200 * quiet, normalize=False, strategy=strategy)
    assert torch.allclose(loud, audio.normalize_audio(200 * quiet, strategy=strategy))


@pytest.mark.parametrize("strategy", audio.STRATEGIES)
def test_silence_stays_silence(strategy: audio.Strategy) -> None:
    assert torch.equal(
        audio.normalize_audio(torch.zeros(1, 32000), strategy=strategy, sample_rate=32000), torch.zeros(1, 32000)
    )


def test_too_quiet_or_too_short_for_the_meter_keeps_its_level(caplog: pytest.LogCaptureFixture) -> None:
    quiet, short = sine(1.0, level=0.002), sine(0.2)
    assert torch.equal(audio.normalize_audio(quiet, strategy="loudness", sample_rate=32000), quiet)
    assert not caplog.records
    assert torch.equal(audio.normalize_audio(short, strategy="loudness", sample_rate=32000), short)
    assert "too short" in caplog.text


def test_clipping_is_reported_and_the_compressor_avoids_it(caplog: pytest.LogCaptureFixture) -> None:
    wav = 0.001 * torch.randn(1, 96000, generator=torch.Generator().manual_seed(0))
    wav[0, ::9600] = 0.9  # clicks that a loud target pushes over the edge
    options = {"strategy": "loudness", "loudness_headroom_db": 6, "sample_rate": 32000, "stem_name": "piece"}
    out = audio.normalize_audio(wav, **options)  # type: ignore[arg-type]
    assert out.abs().max() == 1.0
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert "piece" in caplog.text
    assert "clipped" in caplog.text
    caplog.clear()
    audio.normalize_audio(wav, log_clipping=False, **options)  # type: ignore[arg-type]
    bent = audio.normalize_audio(wav, loudness_compressor=True, **options)  # type: ignore[arg-type]
    gain = out[0, 1] / wav[0, 1]
    assert torch.allclose(bent, torch.tanh(gain * wav), atol=1e-5)
    assert not caplog.records


def test_wrong_levels_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="strategy"):
        audio.normalize_audio(sine(1.0), strategy="loud")  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="sample_rate"):
        audio.normalize_audio(sine(1.0), strategy="loudness")


# Writing


@pytest.mark.parametrize("format", FORMATS)
def test_files_say_that_a_machine_made_them(tmp_path: Path, format: str) -> None:
    metadata = audio.generation_metadata("melody", 2**63 - 1, license="CC-BY-NC-4.0", prompt="café — rock\nand\0roll")
    path = audio.audio_write(tmp_path / "a", sine(1.0), 32000, format, metadata={**metadata, "title": "One"})
    with soundfile.SoundFile(path) as file:
        tags = file.copy_metadata()
    assert tags["comment"].startswith("Machine-made music; model: melody; seed: 9223372036854775807; ")
    assert "CC-BY-NC-4.0" in tags["comment"]
    accents = "cafe  rock" if format == "mp3" else "café — rock"
    assert tags["comment"].endswith(f"prompt: {accents} and roll")
    assert tags["title"] == "One"
    if format != "mp3":  # where the encoder names itself instead
        assert tags["software"].startswith("musicgen-serve")


def test_the_default_metadata_says_it_too_and_none_can_be_asked_for(tmp_path: Path) -> None:
    for metadata, expected in ((None, "Machine-made music"), ({}, None)):
        path = audio.audio_write(tmp_path / "a", sine(1.0), 32000, metadata=metadata)
        with soundfile.SoundFile(path) as file:
            assert file.copy_metadata().get("comment") == expected
    with pytest.raises(InvalidRequestError, match="metadata"):
        audio.audio_write(tmp_path / "b", sine(1.0), 32000, metadata={"speed": "fast"})
    assert not (tmp_path / "b.wav").exists()


def test_names_and_folders(tmp_path: Path) -> None:
    assert audio.audio_write(tmp_path / "new/er/v1.0", sine(0.5), 32000).name == "v1.0.wav"
    assert audio.audio_write(tmp_path / "new/a.WAV", sine(0.5), 32000).name == "a.WAV"
    assert audio.audio_write(tmp_path / "new/a.wav", sine(0.5).numpy(), 32000, "mp3").name == "a.wav.mp3"
    bare = audio.audio_write(str(tmp_path / "bare"), sine(0.5)[0], 32000, "flac", add_suffix=False)
    assert bare == tmp_path / "bare"
    assert audio.load_audio(bare)[1] == 32000
    with pytest.raises(InvalidRequestError, match="writable path"):
        audio.audio_write(tmp_path / "absent/a", sine(0.5), 32000, make_parent_dir=False)
    for stem in (None, 3, "a\0b"):
        with pytest.raises(InvalidRequestError, match="stem_name: expected a path"):
            audio.audio_write(stem, sine(0.5), 32000)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="writable path"):
        audio.audio_write(bare / "a", sine(0.5), 32000)
    for wav in (torch.tensor([math.nan]), torch.zeros(1, 0)):
        with pytest.raises(InvalidRequestError):
            audio.audio_write(tmp_path / "bad", wav, 32000)
    for options in ({"format": "aac"}, {"strategy": "x"}, {"sample_rate": 3}):
        with pytest.raises(InvalidRequestError, match=next(iter(options))):
            audio.audio_write(tmp_path / "bad", sine(0.5), **{"sample_rate": 32000, **options})  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="channels"):
        audio.audio_write(tmp_path / "bad", torch.zeros(3, 100), 32000, "mp3")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bare", "new"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = audio.audio_write(tmp_path / "a", sine(0.5), 32000)
    before = path.read_bytes()

    def fail(self: Path, data: bytes) -> int:
        os.close(os.open(self, os.O_CREAT | os.O_WRONLY))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(InvalidRequestError, match="No space left"):
        audio.audio_write(tmp_path / "a", sine(0.7), 32000)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.wav"]


def test_bit_rates_change_the_size() -> None:
    noise = 0.3 * torch.randn(2, 96000, generator=torch.Generator().manual_seed(0))
    sizes = [len(audio.encode_audio(noise, 32000, "mp3", mp3_rate=rate)) for rate in (320, 128, 64)]
    for size, rate in zip(sizes, (320, 128, 64), strict=True):
        assert size == pytest.approx(rate * 1000 / 8 * 3, rel=0.1)
    assert len(audio.encode_audio(noise, 32000, "mp3", mp3_rate=8)) == pytest.approx(32 * 1000 / 8 * 3, rel=0.1)
    for format, option in (("mp3", "mp3_rate"), ("ogg", "ogg_rate")):
        for rate in (-1, 0, "64"):
            with pytest.raises(InvalidRequestError, match=option):
                audio.encode_audio(noise, 32000, format, **{option: rate})  # type: ignore[arg-type]
    ogg = [len(audio.encode_audio(noise, 32000, "ogg", ogg_rate=rate)) for rate in (320, 64)]
    assert ogg[0] > 1.5 * ogg[1]


def test_rates_that_a_format_lacks_are_resampled() -> None:
    for format, rate, expected in (("opus", 32000, 48000), ("mp3", 96000, 48000), ("mp3", 40000, 44100)):
        content = audio.encode_audio(sine(1.0, rate), rate, format)
        wav, got = audio.load_audio(content)
        assert got == expected
        assert peak_frequency_hz(wav, got) == pytest.approx(440, abs=3)


def test_a_long_piece_is_written_as_ogg() -> None:
    content = audio.encode_audio(sine(120.0), 32000, "ogg")
    assert soundfile.info(io.BytesIO(content)).duration == pytest.approx(120, abs=0.1)


# Stems


class FakeSeparator:
    """Each stem is the mix times its own factor, so that a wrong stem shows."""

    sources = ("drums", "bass", "other", "vocals")
    samplerate = 44100

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def separate(self, mix: Tensor) -> Tensor:
        self.shapes.append(tuple(mix.shape))
        return torch.stack([mix * factor for factor in (100.0, 10.0, 1.0, 0.5)])


@pytest.mark.parametrize("channels", [1, 2, 4])
@pytest.mark.parametrize("rate", [32000, 48000])
def test_stems_are_vocals_plus_other_at_the_models_rate(channels: int, rate: int) -> None:
    separator = FakeSeparator()
    wav = sine(1.0, rate, level=0.2).expand(channels, -1)
    out = stems.MelodyStems(32000, separator)(wav, rate)
    assert separator.shapes == [(2, 44100)]
    assert abs(out.shape[1] - 32000) <= 1
    assert out.shape[0] == 1
    expected = 1.5 * sine(1.0, 32000, level=0.2)
    assert (out[:, :32000] - expected)[:, 500:-500].abs().max() < 5e-3


def test_stems_need_the_right_separator_and_audio() -> None:
    wrong = FakeSeparator()
    wrong.sources = ("drums", "bass", "other", "noise")
    with pytest.raises(InvalidRequestError, match="vocals"):
        stems.MelodyStems(32000, wrong)(sine(0.1), 32000)
    with pytest.raises(InvalidRequestError, match="melody"):
        stems.MelodyStems(32000, FakeSeparator())(torch.zeros(0), 32000)


def test_stems_without_demucs_name_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("demucs", "demucs.apply", "demucs.pretrained"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'musicgen-serve\[stems\]'"):
        stems.MelodyStems(32000)(sine(0.1), 32000)


# Pictures


@pytest.mark.parametrize("seconds", [0.01, 3.0])
def test_a_picture_is_drawn_without_touching_the_backend(tmp_path: Path, seconds: float) -> None:
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    path = plot_audio(torch.cat([sine(seconds), -sine(seconds)]), 32000, tmp_path / "a.png", title=r"$\frac$ rock")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 5000
    assert dict(mpl.rcParams) == before


def test_a_title_in_any_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plot_audio(sine(0.2), 32000, tmp_path / "any.png", title="音楽 \N{GUITAR}\ncafé")  # matplotlib would warn
    monkeypatch.setattr(plots, "_FONTS", ("DejaVu Sans",))
    assert plots._drawable("音楽 \N{GUITAR}\ncafé") == ("?? ? café", ["DejaVu Sans"])


def test_the_spectrogram_shows_the_pitch() -> None:
    for frequency_hz in (220.0, 1000.0, 5000.0):
        mels = log_mel(sine(1.0, frequency_hz=frequency_hz), 32000)
        assert mels.shape[0] == 96
        assert -80 <= mels.min() <= mels.max() == pytest.approx(0, abs=1e-3)
        band = int(mels[:, mels.shape[1] // 2].argmax())
        mel = 2595 * math.log10(1 + frequency_hz / 700)
        assert band + 1 == pytest.approx(mel / (2595 * math.log10(1 + 16000 / 700)) * 97, abs=1)


def test_wav_and_flac_hold_the_same_nearest_16_bits() -> None:
    wav = torch.rand(2, 5000, generator=torch.Generator().manual_seed(0)) * 2.2 - 1.1
    wanted = (wav.double().clamp(-1, 1) * 32768).round().clamp(-32768, 32767).short()
    for name in ("wav", "flac"):
        samples, _ = soundfile.read(io.BytesIO(audio.encode_audio(wav, 32000, name)), dtype="int16", always_2d=True)
        assert torch.equal(torch.from_numpy(samples.T.copy()), wanted)
