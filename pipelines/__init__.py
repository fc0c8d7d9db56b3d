"""Generators: every family behind the Sampler protocol, by name."""

from visearch.protocols import Registry

__all__ = ["MODELS", "SAMPLERS"]

SAMPLERS = Registry(
    "sampler",
    {
        "diffusion": "visearch.pipelines.diffusion:DiffusionSampler",
        "gaussian-toy": "visearch.pipelines.toy:GaussianToy",
        "token-toy": "visearch.pipelines.toy:TokenToy",
    },
)

MODELS = Registry("model", {"emoji-64": "visearch.pipelines.emoji:load"})
