"""A GPU without bfloat16 is told of; it is never imitated, nor switched, in silence."""

import pytest
import torch

from finetuner.errors import ConfigError
from finetuner.train.runner import check_compute

TAKEN = [(True, "bfloat16", "cuda"), (False, "float32", "cuda"), (False, "bfloat16", "cpu")]


@pytest.mark.parametrize(("native", "dtype", "device"), TAKEN)
def test_what_the_device_computes_in_is_taken(monkeypatch, native, dtype, device):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native or including_emulation)
    check_compute(dtype, torch.device(device))


def test_bfloat16_by_imitation_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an older GPU")
    with pytest.raises(ConfigError, match=r"E-DEVICE-DTYPE(.|\n)*an older GPU"):
        check_compute("bfloat16", torch.device("cuda"))
