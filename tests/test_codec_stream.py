"""Streams against the whole decode: any chunking, any mixture of streams, stereo, states that travel as bytes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from musicgen.codec_stream import (
    GridBuffer,
    StreamingCodec,
    StreamPiece,
    StreamState,
    decode_audio,
    decode_on_grid,
    split_channels,
)
from musicgen.config import CodecConfig, PadMode
from musicgen.errors import InvalidRequestError
from musicgen.models.encodec import EncodecDecoder

CODEBOOK_SIZE = 32
HOP = 640


def make_decoder(pad_mode: PadMode = "reflect", *, num_residual_layers: int = 1) -> EncodecDecoder:
    """A random codec of MusicGen's form, narrow. Held to transformers in models/test_encodec.py."""
    config = CodecConfig(
        sample_rate=32000, num_codebooks=4, codebook_size=CODEBOOK_SIZE, codebook_dim=8, hidden_size=8, num_filters=2,
        upsampling_ratios=(8, 5, 4, 4), num_residual_layers=num_residual_layers, num_lstm_layers=2, kernel_size=7,
        last_kernel_size=7, residual_kernel_size=3, dilation_growth_rate=3, compress=2, conv_shortcut=False,
        pad_mode=pad_mode,
    )  # fmt: skip
    decoder = EncodecDecoder(config)
    generator = torch.Generator().manual_seed(5)
    for name, tensor in decoder.state_dict().items():
        fan_in = tensor.shape[-2] * tensor.shape[0] if name.startswith(("conv", "res")) and tensor.ndim == 3 else 8
        scale = 0.05 if name.endswith("bias") else 1.5 * fan_in**-0.5
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)
    loudness = decoder.decode_whole(draw_codes(4, 50)[None]).std()
    decoder.conv_out.weight.mul_(0.2 / loudness)
    decoder.conv_out.bias.mul_(0.2 / loudness)
    return decoder


def draw_codes(num_codebooks: int, num_frames: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, CODEBOOK_SIZE, (num_codebooks, num_frames), generator=generator)


DECODERS = {mode: make_decoder(mode) for mode in ("reflect", "constant", "replicate")}
DEEP = make_decoder(num_residual_layers=3)


def cut(codes: Tensor, sizes: list[int]) -> list[Tensor]:
    """Pieces of the given sizes, over and over, until the codes are used up."""
    pieces, start, i = [], 0, 0
    while start < codes.shape[1]:
        pieces.append(codes[:, start : start + sizes[i % len(sizes)]])
        start, i = start + sizes[i % len(sizes)], i + 1
    return pieces or [codes]


def stream(codec: StreamingCodec, pieces: list[Tensor], *, flush: bool = False) -> Tensor:
    state, out = codec.initial_state(), []
    for i, piece in enumerate(pieces):
        samples, state = codec.decode(piece, state, last=i == len(pieces) - 1 and not flush)
        out.append(samples)
    if flush:
        samples, state = codec.decode(pieces[0][:, :0], state, last=True)
        out.append(samples)
    assert state.finished
    assert state.num_samples == sum(s.shape[1] for s in out)
    return torch.cat(out, dim=1)


@pytest.mark.parametrize("mode", DECODERS)
@pytest.mark.parametrize("sizes", [[1], [2, 1], [3], [4], [5], [25], [1, 2, 4, 8, 16, 25]])
@pytest.mark.parametrize("flush", [False, True])
def test_chunks_sum_to_the_whole(mode: PadMode, sizes: list[int], flush: bool) -> None:
    codec = StreamingCodec(DECODERS[mode], 1)
    for num_frames in (1, 2, 3, 4, 5, 6, 31):
        codes = draw_codes(4, num_frames)
        whole = decode_audio(codec.decoder, codes[None], 1)[0]
        assert whole.shape == (1, num_frames * HOP)
        assert whole.std() > 0.01
        streamed = stream(codec, cut(codes, sizes), flush=flush)
        assert streamed.shape == whole.shape
        assert (streamed - whole).abs().max() <= 1e-5


@settings(max_examples=40, deadline=None)
@given(
    num_frames=st.integers(0, 60),
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(any),
    channels=st.sampled_from([1, 2]),
    deep=st.booleans(),
)
def test_any_chunking_sums_to_the_whole(num_frames: int, sizes: list[int], channels: int, deep: bool) -> None:
    codec = StreamingCodec(DEEP if deep else DECODERS["reflect"], channels)
    codes = draw_codes(4 * channels, num_frames, seed=num_frames)
    whole = decode_audio(codec.decoder, codes[None], channels)[0]
    streamed = stream(codec, cut(codes, sizes))
    assert streamed.shape == whole.shape == (channels, num_frames * HOP)
    assert torch.allclose(streamed, whole, rtol=0, atol=1e-5)


def test_pieces_of_a_whole_decode_do_not_show() -> None:
    """A whole decode is itself cut, at 50 frames; one pass over all frames must give the same."""
    decoder = DECODERS["reflect"]
    codes = draw_codes(4, 130)[None]
    at_once, _ = decoder.decode(codes, decoder.initial_state(1), last=True)
    assert (decoder.decode_whole(codes) - at_once).abs().max() <= 1e-5


def test_lookahead_is_four_frames_and_no_more_than_promised() -> None:
    codec = StreamingCodec(DECODERS["reflect"], 1)
    assert codec.lookahead_frames == 4
    state = codec.initial_state()
    for t in range(12):
        _, state = codec.decode(draw_codes(4, 1, seed=t), state, last=False)
        assert state.num_frames == t + 1
        assert (t + 1 - 4) * HOP <= state.num_samples <= t * HOP
        assert state.num_samples >= 0
        assert state.values.shape == codec.initial_state().values.shape


def test_samples_given_out_do_not_depend_on_later_codes() -> None:
    codec = StreamingCodec(DECODERS["reflect"], 1)
    codes = draw_codes(4, 20)
    changed = torch.cat([codes[:, :12], (codes[:, 12:] + 1) % CODEBOOK_SIZE], dim=1)
    whole, other = (decode_audio(codec.decoder, c[None], 1)[0] for c in (codes, changed))
    differs = ((whole - other).abs() > 1e-6)[0].nonzero()[0].item()
    assert (12 - 4) * HOP <= differs < 12 * HOP
    first, _ = codec.decode(codes[:, :12], codec.initial_state(), last=False)
    assert first.shape[1] <= differs


def test_stereo_codebooks_alternate_left_and_right() -> None:
    decoder = DECODERS["constant"]
    codes = draw_codes(8, 9)[None]
    both = decode_audio(decoder, codes, 2)
    assert both.shape == (1, 2, 9 * HOP)
    for channel in (0, 1):
        alone = decoder.decode_whole(codes[:, channel::2])
        assert (both[:, channel] - alone).abs().max() <= 1e-5
    assert not torch.allclose(both[:, 0], both[:, 1], atol=1e-3)
    assert torch.equal(split_channels(codes, 2), torch.cat([codes[:, 0::2], codes[:, 1::2]]))


def test_streams_of_all_ages_and_chunk_sizes_share_a_call() -> None:
    codec = StreamingCodec(DECODERS["reflect"], 2)
    lengths = [1, 3, 7, 20, 20, 33]
    codes = [draw_codes(8, length, seed=i) for i, length in enumerate(lengths)]
    pieces = [cut(c, sizes) for c, sizes in zip(codes, [[1], [1], [2], [5], [5], [3, 7]], strict=True)]
    states, parts = {i: codec.initial_state() for i in range(6)}, {i: [torch.empty(2, 0)] for i in range(6)}
    for turn in range(100):
        # stream i joins at turn i
        active = [i for i in range(6) if turn >= i and not states[i].finished]
        if not active and turn > 6:
            break
        batch = [StreamPiece(pieces[i][turn - i], states[i], last=turn - i == len(pieces[i]) - 1) for i in active]
        for i, (samples, state) in zip(active, codec.decode_batch(batch), strict=True):
            parts[i].append(samples)
            states[i] = state
    for i in range(6):
        whole = decode_audio(codec.decoder, codes[i][None], 2)[0]
        streamed = torch.cat(parts[i], dim=1)
        assert streamed.shape == whole.shape
        assert (streamed - whole).abs().max() <= 1e-5


def test_a_state_travels_as_bytes_of_fixed_size() -> None:
    codec = StreamingCodec(DECODERS["reflect"], 2)
    codes = draw_codes(8, 17)
    whole = decode_audio(codec.decoder, codes[None], 2)[0]
    state, out, sizes = codec.initial_state(), [], set()
    for t in range(17):
        other_replica = StreamingCodec(DECODERS["reflect"], 2)
        data = state.to_bytes()
        sizes.add(len(data))
        before = state.values.clone()
        samples, state = other_replica.decode(codes[:, t : t + 1], StreamState.from_bytes(data), last=t == 16)
        assert torch.equal(StreamState.from_bytes(data).values, before)
        out.append(samples)
    assert len(sizes) == 1
    assert (torch.cat(out, dim=1) - whole).abs().max() <= 1e-5
    restored = StreamState.from_bytes(state.to_bytes())
    assert (restored.num_frames, restored.num_samples, restored.finished) == (17, 17 * HOP, True)


def test_decoding_again_from_a_kept_state_gives_the_same() -> None:
    """A state is a value: a lost reply can be asked for again."""
    codec = StreamingCodec(DECODERS["reflect"], 1)
    _, state = codec.decode(draw_codes(4, 9), codec.initial_state(), last=False)
    first, after = codec.decode(draw_codes(4, 5, seed=1), state, last=False)
    again, after_again = codec.decode(draw_codes(4, 5, seed=1), state, last=False)
    assert torch.equal(first, again)
    assert torch.equal(after.values, after_again.values)


def test_wrong_pieces_are_refused() -> None:
    codec, stereo = (StreamingCodec(DECODERS["reflect"], channels) for channels in (1, 2))
    good = StreamPiece(draw_codes(4, 3), codec.initial_state(), last=False)
    _, finished = codec.decode(draw_codes(4, 1), codec.initial_state(), last=True)
    bad = [draw_codes(3, 3), torch.full((4, 3), CODEBOOK_SIZE), torch.zeros(4, 3)]
    for codes in bad:
        with pytest.raises(InvalidRequestError, match="codes"):
            codec.decode_batch([good, StreamPiece(codes, codec.initial_state(), last=False)])
    for state in (finished, stereo.initial_state(), StreamingCodec(DEEP, 1).initial_state()):
        with pytest.raises(InvalidRequestError, match=r"pieces\[1\]\.state"):
            codec.decode_batch([good, StreamPiece(draw_codes(4, 3), state, last=False)])
    data = codec.initial_state().to_bytes()
    for wrong in (b"", data[:-1], data + b"\0", b"XXXX" + data[4:], data[:4] + b"\x09" + data[5:]):
        with pytest.raises(InvalidRequestError, match="state"):
            StreamState.from_bytes(wrong)
    with pytest.raises(InvalidRequestError, match="multiple of 2"):
        split_channels(torch.zeros(1, 5, 3, dtype=torch.long), 2)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(num_frames=st.integers(1, 170), sizes=st.lists(st.integers(1, 60), min_size=1, max_size=4))
def test_on_the_grid_any_chunking_gives_the_whole_to_the_bit(num_frames: int, sizes: list[int]) -> None:
    codec, codes = StreamingCodec(DECODERS["reflect"], 1), draw_codes(4, num_frames)
    buffer, state, parts = GridBuffer(4, num_frames), codec.initial_state(), []
    for new in cut(codes, sizes):
        buffer.add(new)
        if (piece := buffer.take(state)) is not None:
            samples, state = decode_on_grid(codec, piece)
            parts.append(samples)
    assert state.finished
    assert torch.equal(torch.cat(parts, dim=-1), decode_audio(codec.decoder, codes[None], 1)[0])


def test_off_the_grid_is_refused() -> None:
    codec = StreamingCodec(DECODERS["reflect"], 1)
    piece = StreamPiece(draw_codes(4, 13), codec.initial_state(), last=False)
    with pytest.raises(InvalidRequestError, match="grid"):
        decode_on_grid(codec, piece)
