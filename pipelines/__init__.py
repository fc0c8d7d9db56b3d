"""Generators: every family behind the Sampler protocol, by name."""

from typing import Any

from visearch.protocols import Registry

__all__ = ["MODELS", "SAMPLERS", "components"]

SAMPLERS = Registry(
    "sampler",
    {
        "diffusion": "visearch.pipelines.diffusion:DiffusionSampler",
        "gaussian-toy": "visearch.pipelines.toy:GaussianToy",
        "recorded": "visearch.pipelines.recorded:RecordedSampler",
        "token-toy": "visearch.pipelines.toy:TokenToy",
    },
)

MODELS = Registry(
    "model", {"emoji-64": "visearch.pipelines.emoji:load", "emoji-64-v": "visearch.pipelines.emoji:load_v"}
)


def components(pipe: Any) -> dict[str, Any]:
    """A pipeline's parts by name, also those which ``pipe.components`` leaves out since its constructor makes them."""
    return {k: getattr(pipe, k, None) for k in pipe.config if not k.startswith("_")} | pipe.components
