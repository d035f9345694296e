"""Pretrained weights -> a learner."""

import logging

# peft imports bitsandbytes wherever it is installed, which then says that kernels of a hub are missing.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
