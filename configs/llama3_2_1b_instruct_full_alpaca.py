"""Llama-3.2-1B-Instruct learns Alpaca with all its weights: one GPU of 40 GB."""

from ._parts import full

config = full("meta-llama/Llama-3.2-1B-Instruct")
