"""How the parts of a service share the GPUs of one machine.

A replica sees the GPUs that it books from Ray, and none if it books none (see `app.actor_options`). On a cluster the
settings say what each part books; on a single machine it is computed here. Fractions only decide which parts share a
GPU: they limit neither memory nor computation.
"""

from __future__ import annotations

import math

from musicgen_serving.settings import ModelSettings, ReplicaSettings, ServeSettings

RESOLUTION = 10_000
"""Ray's fractions are multiples of 1 / RESOLUTION."""


def with_gpus(settings: ServeSettings, num_gpus: int) -> ServeSettings:
    """The settings with `num_gpus` GPUs of one machine shared between language models, codecs and text encoders.

    Language models are spread evenly: with n of them on the fullest GPU, each books 1 / (n + ½). So n + 1 never fit on
    one, and the other parts share what n leave over, so that all fit in whatever order Ray places them. Settings that
    book GPUs already are returned as they are, and so are models for another device.
    """
    models = [model for model in settings.models if _may_use_gpus(model)]
    if num_gpus == 0 or not models or any(_books(model) for model in settings.models):
        return settings
    per_gpu = math.ceil(sum(model.language_model.max_replicas for model in models) / num_gpus)
    num_others = sum(model.codec.max_replicas + model.text_encoder.max_replicas for model in models)
    language_model = _rounded(1 / (per_gpu + 0.5))
    other = _rounded((1 - per_gpu * language_model) / num_others)
    shared = {
        model.name: model.model_copy(
            update={
                "language_model": _booking(model.language_model, language_model),
                "codec": _booking(model.codec, other),
                "text_encoder": _booking(model.text_encoder, other),
            }
        )
        for model in models
    }
    return settings.model_copy(update={"models": [shared.get(model.name, model) for model in settings.models]})


def _may_use_gpus(model: ModelSettings) -> bool:
    return model.device in (None, "cuda")


def _books(model: ModelSettings) -> bool:
    return any(part.num_gpus for part in (model.language_model, model.codec, model.text_encoder))


def _booking(part: ReplicaSettings, num_gpus: float) -> ReplicaSettings:
    return part.model_copy(update={"num_gpus": num_gpus})


def _rounded(share: float) -> float:
    return math.floor(share * RESOLUTION) / RESOLUTION
