"""Attribution graphs of Heredity, for ``graphs.py``."""

from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from heredity.circuits.attribution_graph import attribution_graph, sources_at
from heredity.interp.dictionaries.formats import load_dictionary
from heredity.interp.load import load as load_model

_models: dict[str, Any] = {}


def versions() -> dict[str, str]:
    return {"heredity": version("heredity")}


def load(model: str, transcoders: str) -> tuple[Any, Any]:
    if model not in _models:
        _models[model] = load_model(model)
    return _models[model], load_dictionary(transcoders)


def graph(loaded: tuple[Any, Any], asked: dict[str, Any]) -> Any:
    model, parts = loaded
    budget = {"budget": asked["budget"]} if "budget" in asked else {}
    found = attribution_graph(model, parts, asked["ids"], max_latents=asked["nodes"], constant_positions=1, **budget)
    return found, loaded, asked


def arrays(made: Any) -> dict[str, Tensor]:
    found, (model, parts), asked = made
    with torch.no_grad():
        active = sources_at(model, parts, asked["ids"], constant_positions=1).latents
    return {
        "latents": found.latents,
        "active": active,
        "weights": found.weights,
        "logits": torch.tensor(found.logit_tokens),
    }


def facts(made: Any) -> dict[str, float]:
    return {"residual": float(made[0].residuals().max())}
