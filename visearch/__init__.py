"""Inference-time search for image and video generators."""

__version__ = "0.1.0"
