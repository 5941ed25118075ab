"""`MusicGen`: audiocraft's API, extended with seeds, multiple samples, streaming and argument validation.

Orchestrates a call: validate, condition, generate codes, decode. Independent of kernels and file formats.
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from musicgen.aio import iterate_in_threads
from musicgen.arguments import checked_bool, checked_int, checked_path, shown
from musicgen.codec_stream import GridBuffer, StreamingCodec, decode_audio, decode_on_grid
from musicgen.conditioning import Melody, condition
from musicgen.config import EngineConfig, WeightDtype
from musicgen.engine.memory import max_row_len
from musicgen.engine.packing import KINDS, pack_decoder
from musicgen.errors import InvalidRequestError, WeightsError
from musicgen.generation import plan_windows
from musicgen.inputs import (
    Waveforms,
    as_list,
    checked_descriptions,
    checked_melodies,
    checked_prompt,
    checked_weights,
    resolve_seeds,
)
from musicgen.local_engine import LocalEngine
from musicgen.model import Model
from musicgen.progress import Progress, ProgressCallback
from musicgen.types import AudioChunk, ChunkPolicy, CodesRequest, GenerationParams, SamplingParams
from musicgen.waveform import Waveform
from musicgen.weights import load_model, packed


@dataclass(frozen=True, slots=True, eq=False)
class _Item:
    """Inputs of one piece."""

    description: str | None
    melody: Melody | None = None
    prompt_codes: Tensor | None = None
    """`[K, P]`"""


class MusicGen:
    """Music generation from text and melodies. Thread-safe. As a context manager, it closes itself.

    Args:
        model: a loaded model; see `get_pretrained`.
        engine: engine configuration: weight type, memory, batch sizes.
        release_weights: free the model's own layers once the engine has packed them.
    """

    def __init__(self, model: Model, engine: EngineConfig | None = None, *, release_weights: bool = False) -> None:
        self.model = model
        self._engine = LocalEngine(model, engine or EngineConfig(), release=release_weights)
        self._params = GenerationParams()
        self._progress_callback: ProgressCallback | None = None

    @staticmethod
    def get_pretrained(
        name: str | os.PathLike[str] = "facebook/musicgen-melody",
        device: str | torch.device | None = None,
        weights: WeightDtype | None = None,
        *,
        engine: EngineConfig | None = None,
    ) -> MusicGen:
        """Load a model.

        Args:
            name: short name, Hugging Face repository id or local folder; see `weights.load_model`.
            device: default: the GPU if available, else the CPU.
            weights: float32 (default on the CPU), bfloat16 (default on a GPU), int8 or int4.
            engine: engine configuration; `weights` takes precedence over it.
        Raises:
            InvalidRequestError, WeightsError: see `load_model`.
        """
        wanted = None if weights is None else checked_weights(weights)
        model = load_model(name, device)
        if model.packed is not None and wanted is not None and KINDS[wanted] != model.packed.heads.kind:
            raise InvalidRequestError(
                f"{model.packed.heads.kind}, as packed in '{os.fspath(name)}'",
                wanted,
                "load the original",
                param="weights",
            )
        config = engine or EngineConfig()
        return MusicGen(model, replace(config, weights=wanted or config.weights), release_weights=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"MusicGen(name={self.name!r}, device='{self.device}', weights={self._engine.weights!r})"

    def start(self, progress: bool = False) -> None:
        """Start the engine now (pack the weights, allocate memory) rather than in the first call."""
        num_layers = self.model.config.decoder.num_layers
        with Progress(num_layers, progress, None, unit="layer") as report:
            self._engine.start(lambda _done, _total: report.advance(1))

    def save_packed(self, folder: str | Path, weights: WeightDtype, progress: bool = False) -> Path:
        """Write a self-contained checkpoint with the matrices packed as `weights`; load it by the folder's path.

        To be called before the first piece is generated and before `start`: the engine frees the original weights as
        it packs its own.

        Raises:
            InvalidRequestError: unknown weight type, or not a path.
            WeightsError: this model was loaded packed, or its original weights have been freed.
        """
        lm, target = self.model.lm, Path(checked_path(folder, param="folder"))
        if any(parameter.is_meta for parameter in lm.decoder.parameters()):
            got, hint = "freed ones", "load the model again and save it before the first generate() or start()"
            if self.model.packed is not None:
                got, hint = "packed ones", "load the original checkpoint instead"
            raise WeightsError(f"{self.name}: expected the original weights, got {got}; {hint}")
        with Progress(lm.config.decoder.num_layers, progress, None, unit="layer") as report:
            packed_weights = pack_decoder(
                lm.decoder,
                checked_weights(weights),
                max_row_len(lm.config),
                on_layer=lambda _done, _total: report.advance(1),
            )
        packed.save(self.model, packed_weights, target)
        return target

    def close(self) -> None:
        """Shut down the engine and cancel calls in progress."""
        self._engine.close()

    @property
    def name(self) -> str:
        return self.model.config.name

    @property
    def device(self) -> torch.device:
        return self.model.lm.device

    @property
    def frame_rate(self) -> float:
        """Code frames per second."""
        return self.model.config.frame_rate_hz

    @property
    def sample_rate(self) -> int:
        """Sample rate of the generated audio in Hz."""
        return self.model.config.sample_rate

    @property
    def audio_channels(self) -> int:
        return self.model.config.audio_channels

    @property
    def max_duration(self) -> float:
        """Length of the model's window in seconds; longer pieces are generated in overlapping windows."""
        return self.model.config.max_duration_s

    @property
    def duration(self) -> float:
        """Length of generated pieces in seconds."""
        return self._params.duration_s

    @property
    def generation_params(self) -> GenerationParams:
        """The parameters of calls that are not given their own; immutable, see `dataclasses.replace`."""
        return self._params

    def set_generation_params(
        self,
        use_sampling: bool = True,
        top_k: int = 250,
        top_p: float = 0.0,
        temperature: float = 1.0,
        duration: float = 30.0,
        cfg_coef: float = 3.0,
        cfg_coef_beta: float | None = None,
        two_step_cfg: bool = False,
        extend_stride: float = 18,
    ) -> None:
        """Set the parameters of subsequent calls, of all threads; `params` of the calls themselves overrides them.

        Args:
            use_sampling: False: greedy decoding.
            top_k: sample from the k most likely codes (ties included); 0: all.
            top_p: if > 0, nucleus (top-p) sampling; overrides `top_k`.
            temperature: sampling temperature; 0 is greedy.
            duration: seconds, including an audio prompt.
            cfg_coef: classifier-free guidance scale; 1 turns guidance off.
            cfg_coef_beta: double guidance: scale of the text relative to the melody (melody models).
            two_step_cfg: ignored; accepted for compatibility.
            extend_stride: seconds between window starts in pieces longer than `max_duration`; at least one frame.
        Raises:
            InvalidRequestError: a value is out of range; no parameter is changed.
        """
        sampling = SamplingParams(
            greedy=not checked_bool(use_sampling, param="use_sampling"),
            top_k=top_k,
            top_p=top_p,
            temperature=temperature,
            guidance_scale=cfg_coef,
            melody_guidance=cfg_coef_beta,
        )
        self._params = self._checked_params(GenerationParams(sampling, duration, extend_stride))

    def _checked_params(self, params: GenerationParams | None) -> GenerationParams:
        """The parameters of one call: those given to it, or else the current ones.

        Raises:
            InvalidRequestError: this model cannot generate with them.
        """
        if params is None:
            return self._params
        if not isinstance(params, GenerationParams):
            raise InvalidRequestError("GenerationParams or None", shown(params), param="params")
        config, beta = self.model.config, params.sampling.melody_guidance
        if beta is not None and self.model.chroma is None:
            raise InvalidRequestError(
                f"no double guidance for model {self.name!r}, which does not support melodies",
                repr(beta),
                "omit it, or choose a melody model",
                param="cfg_coef_beta",
            )
        one_frame = f"at least one frame ({1 / self.frame_rate:g} s)"
        stride_s, duration_s = params.extend_stride_s, params.duration_s
        if stride_s >= self.max_duration or config.num_frames(stride_s) < 1:
            expected = f"{one_frame} and less than {self.max_duration:g} s"
            raise InvalidRequestError(expected, repr(stride_s), param="extend_stride")
        if config.num_frames(duration_s) < 1:
            raise InvalidRequestError(one_frame, repr(duration_s), param="duration")
        return params

    def set_custom_progress_callback(self, progress_callback: ProgressCallback | None = None) -> None:
        """Report progress to `progress_callback(generated, total)`, in frames, instead of a progress bar."""
        self._progress_callback = progress_callback

    def generate(
        self,
        descriptions: Sequence[str | None],
        progress: bool = False,
        return_tokens: bool = False,
        *,
        seed: int | Sequence[int] | None = None,
        num_samples: int = 1,
        params: GenerationParams | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Generate from text.

        Args:
            descriptions: text prompts, one per piece; None for no prompt.
            progress: show a progress bar.
            return_tokens: also return the codes.
            seed: an integer: piece i (counting samples) uses seed + i; a list: one per piece; None: random, drawn from
                torch's generator. A piece depends only on its own seed, not on the rest of the batch.
            num_samples: pieces per description, consecutive in the result.
            params: the parameters of this call; default: `generation_params`.
        Returns:
            `[B, C, N]` samples, which may slightly exceed [-1, 1]; with `return_tokens` also `[B, K, T]` codes.
        Raises:
            InvalidRequestError: invalid arguments; raised before any work is done.
        """
        items = [_Item(text) for text in checked_descriptions(descriptions)]
        return self._generate(items, progress, return_tokens, seed, num_samples, self._checked_params(params))

    def generate_unconditional(
        self,
        num_samples: int,
        progress: bool = False,
        return_tokens: bool = False,
        *,
        seed: int | Sequence[int] | None = None,
        params: GenerationParams | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Generate `num_samples` unconditional pieces; otherwise like `generate`."""
        return self._generate([_Item(None)], progress, return_tokens, seed, num_samples, self._checked_params(params))

    def generate_with_chroma(
        self,
        descriptions: Sequence[str | None],
        melody_wavs: Waveforms,
        melody_sample_rate: int,
        progress: bool = False,
        return_tokens: bool = False,
        *,
        seed: int | Sequence[int] | None = None,
        num_samples: int = 1,
        params: GenerationParams | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Generate from text and melodies; otherwise like `generate`.

        Args:
            melody_wavs: `[B, C, N]`, `[C, N]` for a single melody, or a list of `[C, N]` or None.
            melody_sample_rate: sample rate of all melodies in Hz.
        """
        texts = checked_descriptions(descriptions)
        melodies = checked_melodies(melody_wavs, melody_sample_rate, len(texts))
        items = [_Item(text, melody) for text, melody in zip(texts, melodies, strict=True)]
        return self._generate(items, progress, return_tokens, seed, num_samples, self._checked_params(params))

    def generate_continuation(
        self,
        prompt: Waveforms,
        prompt_sample_rate: int,
        descriptions: Sequence[str | None] | None = None,
        progress: bool = False,
        return_tokens: bool = False,
        *,
        melody_wavs: Waveforms | None = None,
        melody_sample_rate: int | None = None,
        seed: int | Sequence[int] | None = None,
        num_samples: int = 1,
        params: GenerationParams | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Continue recordings, each independently; otherwise like `generate`.

        Args:
            prompt: `[B, C, N]`, `[C, N]` for a single prompt, or a list of `[C, N]` of any lengths.
            prompt_sample_rate: sample rate of all prompts in Hz.
            descriptions: one per prompt, or None for no text.
            melody_wavs: melodies to condition on as well, as in `generate_with_chroma`.
            melody_sample_rate: sample rate of the melodies in Hz.
        """
        chosen = self._checked_params(params)
        wavs = as_list(prompt, "prompt")
        texts = [None] * len(wavs) if descriptions is None else checked_descriptions(descriptions)
        if len(texts) != len(wavs):
            raise InvalidRequestError(
                f"as many descriptions as prompts ({len(wavs)})", f"{len(texts)}", param="descriptions"
            )
        melodies: list[Melody | None] = [None] * len(wavs)
        if melody_wavs is not None:
            melodies = checked_melodies(melody_wavs, melody_sample_rate, len(wavs))
        self._check_melodies_fit(melodies)
        checked = [checked_prompt(wav, prompt_sample_rate, self.model.config, chosen.duration_s) for wav in wavs]
        codes = [self.model.codec_encoder.encode(wav) for wav in checked]
        items = [_Item(*item) for item in zip(texts, melodies, codes, strict=True)]
        return self._generate(items, progress, return_tokens, seed, num_samples, chosen)

    def stream(
        self,
        description: str | None = None,
        *,
        melody_wav: Waveform | None = None,
        melody_sample_rate: int | None = None,
        prompt: Waveform | None = None,
        prompt_sample_rate: int | None = None,
        seed: int | None = None,
        chunks: ChunkPolicy | None = None,
        params: GenerationParams | None = None,
    ) -> Generator[AudioChunk, None, None]:
        """Generate one piece and yield its audio as it is generated: a small first chunk, then larger ones.

        The concatenated chunks equal the result of `generate`, `generate_with_chroma` or `generate_continuation` for
        the same arguments. Leaving the loop early cancels the rest.

        Args:
            melody_wav, prompt: `[C, N]`.
            chunks: chunk sizes, subject to the codec's grid (`codec_stream.GRID`).
            params: as in `generate`.
        Raises:
            InvalidRequestError: raised by the call itself (not by the iterator), before any work is done.
        """
        chosen = self._checked_params(params)
        policy = ChunkPolicy() if chunks is None else chunks
        if not isinstance(policy, ChunkPolicy):
            raise InvalidRequestError("a musicgen.types.ChunkPolicy or None", shown(chunks), param="chunks")
        (text,) = checked_descriptions([description])
        melody = None
        if melody_wav is not None:
            (melody,) = checked_melodies([melody_wav], melody_sample_rate, 1)
        self._check_melodies_fit([melody])
        (value,) = resolve_seeds(seed, 1)
        codes = None
        if prompt is not None:
            codes = self.model.codec_encoder.encode(
                checked_prompt(prompt, prompt_sample_rate, self.model.config, chosen.duration_s)
            )
        request = self._request(_Item(text, melody, codes), chosen).with_seed(value)
        return self._stream(request, policy)

    def astream(
        self,
        description: str | None = None,
        *,
        melody_wav: Waveform | None = None,
        melody_sample_rate: int | None = None,
        prompt: Waveform | None = None,
        prompt_sample_rate: int | None = None,
        seed: int | None = None,
        chunks: ChunkPolicy | None = None,
        params: GenerationParams | None = None,
    ) -> AsyncGenerator[AudioChunk, None]:
        """`stream` for asyncio: the event loop is never blocked. Errors are raised by the first iteration."""
        return iterate_in_threads(
            lambda: self.stream(
                description,
                melody_wav=melody_wav,
                melody_sample_rate=melody_sample_rate,
                prompt=prompt,
                prompt_sample_rate=prompt_sample_rate,
                seed=seed,
                chunks=chunks,
                params=params,
            )
        )

    def _stream(self, request: CodesRequest, chunks: ChunkPolicy) -> Generator[AudioChunk, None, None]:
        codec = StreamingCodec(self.model.codec, self.audio_channels)
        state = codec.initial_state()
        buffer = GridBuffer(self.model.config.decoder.num_codebooks, request.num_frames)
        for codes in self._engine.stream(request, chunks):
            buffer.add(codes)
            if (piece := buffer.take(state)) is None:
                continue
            offset = state.num_samples
            samples, state = decode_on_grid(codec, piece)
            if samples.shape[-1]:
                yield AudioChunk(samples.cpu(), offset, self.sample_rate)

    def _check_melodies_fit(self, melodies: Sequence[Melody | None]) -> None:
        if self.model.chroma is None and any(melody is not None for melody in melodies):
            raise InvalidRequestError(
                f"no melody for model {self.name!r}", "", "choose a melody model", param="melody_wavs"
            )

    def _generate(
        self,
        items: Sequence[_Item],
        progress: bool,
        return_tokens: bool,
        seed: int | Sequence[int] | None,
        num_samples: int,
        params: GenerationParams,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Generate the codes of all pieces as one batch of requests, then decode them one by one."""
        num_samples = checked_int(num_samples, "an integer ≥ 1", param="num_samples", low=1)
        self._check_melodies_fit([item.melody for item in items])
        seeds = resolve_seeds(seed, len(items) * num_samples)
        prepared = [self._request(item, params) for item in items]
        repeated = [request for request in prepared for _ in range(num_samples)]
        requests = [request.with_seed(value) for request, value in zip(repeated, seeds, strict=True)]
        num_new = sum(request.num_frames - request.num_known_frames for request in requests)
        with Progress(num_new, progress, self._progress_callback) as report:
            codes = self._engine.generate(requests, report.advance if report.is_shown else None)
        tokens = torch.stack(codes)
        wav = decode_audio(self.model.codec, tokens, self.audio_channels)
        return (wav, tokens.long()) if return_tokens else wav

    def _request(self, item: _Item, params: GenerationParams) -> CodesRequest:
        config = self.model.config
        num_prompt_frames = 0 if item.prompt_codes is None else item.prompt_codes.shape[-1]
        windows = plan_windows(
            config.num_frames(params.duration_s),
            num_prompt_frames,
            config.num_frames(config.max_duration_s),
            config.num_frames(params.extend_stride_s),
        )
        conditioned = condition(self.model, item.description, item.melody, windows)
        return CodesRequest(conditioned, params.sampling, item.prompt_codes)
