"""Qwen3-0.6B learns Alpaca with all its weights: one GPU of 16 GB."""

from ._parts import full

config = full("Qwen/Qwen3-0.6B")
