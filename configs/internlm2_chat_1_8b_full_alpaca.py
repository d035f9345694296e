"""InternLM2-chat-1.8B learns Alpaca with all its weights: one GPU of 40 GB."""

from ._parts import full

config = full("internlm/internlm2-chat-1_8b")
