"""How the models of one machine share its GPUs: each part finds its place, in whatever order Ray looks for one."""

from __future__ import annotations

import math
from typing import Any

import pytest
from musicgen_serving.gpus import with_gpus
from musicgen_serving.settings import ServeSettings, load_settings

from musicgen.errors import InvalidRequestError

EPS = 1e-9


def service(num_models: int, num_replicas: int = 1, **model: Any) -> ServeSettings:
    replicas = {"max_replicas": num_replicas}
    return ServeSettings(
        models=[{"name": f"m{i}", "language_model": replicas, "codec": replicas, **model} for i in range(num_models)]
    )


def placed(requests: list[float], gpus: list[float]) -> list[int]:
    """Where each request goes, best fit, as Ray does it; `gpus` is what is free, and updated."""
    places = []
    for request in requests:
        fitting = [i for i, free in enumerate(gpus) if free >= request - EPS]
        assert fitting, f"no place for {request} in {gpus}"
        place = min(fitting, key=lambda i: gpus[i])
        gpus[place] -= request
        places.append(place)
    return places


@pytest.mark.parametrize("num_gpus", [1, 2, 3, 8])
@pytest.mark.parametrize(("num_models", "num_replicas"), [(1, 1), (2, 1), (3, 1), (1, 4), (5, 3)])
@pytest.mark.parametrize("others_first", [False, True])
def test_all_parts_fit_in_any_order_and_language_models_are_spread(
    num_gpus: int, num_models: int, num_replicas: int, others_first: bool
) -> None:
    models = with_gpus(service(num_models, num_replicas), num_gpus).models
    engines = [model.language_model.num_gpus for model in models for _ in range(num_replicas)]
    others = [model.codec.num_gpus for model in models for _ in range(num_replicas)]
    others += [model.text_encoder.num_gpus for model in models]
    assert all(share > 0 for share in engines + others)
    free = [1.0] * num_gpus
    for group in (others, engines) if others_first else (engines, others):
        places = placed(group, free)
        if group is engines:
            assert max(places.count(i) for i in range(num_gpus)) <= math.ceil(len(engines) / num_gpus)


@pytest.mark.parametrize(
    ("settings", "num_gpus"),
    [
        (service(2), 0),
        (service(2, device="cpu"), 4),
        (service(2, text_encoder={"num_gpus": 0.1}), 4),
    ],
    ids=["no GPU", "other device", "booked by the settings"],
)
def test_other_settings_stay_as_they_are(settings: ServeSettings, num_gpus: int) -> None:
    assert with_gpus(settings, num_gpus) == settings


def test_only_models_that_may_use_gpus_book_them() -> None:
    both = ServeSettings(models=[{"name": "a", "device": "cpu"}, {"name": "b", "device": "cuda"}])
    first, second = with_gpus(both, 1).models
    assert (first.language_model.num_gpus, second.language_model.num_gpus) == (0, 0.6666)


def test_a_part_without_a_gpu_runs_on_the_cpu() -> None:
    (model,) = ServeSettings(models=[{"device": "cuda", "language_model": {"num_gpus": 1}}]).models
    assert (model.device_of(model.language_model), model.device_of(model.codec)) == ("cuda", "cpu")


def test_a_numbered_gpu_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match=r"models.0.device.*CUDA_VISIBLE_DEVICES"):
        load_settings({"models": [{"device": "cuda:1"}]})
