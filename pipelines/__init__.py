"""Generators: every family behind the Sampler protocol."""
