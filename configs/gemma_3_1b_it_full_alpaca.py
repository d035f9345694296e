"""Gemma-3-1B-it learns Alpaca with all its weights: one GPU of 24 GB."""

from ._parts import full

config = full("google/gemma-3-1b-it")
