"""Qwen2.5-0.5B-Instruct learns Alpaca with all its weights: one GPU of 16 GB."""

from ._parts import full

config = full("Qwen/Qwen2.5-0.5B-Instruct")
