"""Secrets are masked, ordinary names are not."""

from __future__ import annotations

import pytest

from finetuner.config.mask import HIDDEN, is_secret_name, mask, mask_source, mask_text


@pytest.mark.parametrize(
    "name",
    [
        "token",
        "HF_TOKEN",
        "hub_token",
        "api_key",
        "key",
        "client_secret",
        "password",
        "db_passwd",
        "credentials",
        "auth",
    ],
)
def test_secret_names(name: str) -> None:
    assert is_secret_name(name)
    assert mask({name: "x"}) == {name: HIDDEN}
    assert "xyzzy" not in mask_source(f'{name} = "xyzzy"\nlogin({name}=\'xyzzy\')\nd = {{"{name}": "xyzzy"}}')


@pytest.mark.parametrize(
    "name",
    ["pad_token", "eos_token", "cls_token", "num_tokens", "tokenizer", "new_tokens", "image_token", "monkey", "author",
     "keys", "tokenizer_path", "sort_key", "start_header_token"],
)  # fmt: skip
def test_ordinary_names(name: str) -> None:
    assert not is_secret_name(name)
    assert mask({name: "x"}) == {name: "x"}
    assert mask_source(f'{name} = "x"') == f'{name} = "x"'


@pytest.mark.parametrize(
    "text", ["hf_" + "aB3" * 10, "sk-" + "aB3" * 10, "sk-proj-" + "aB3" * 10, "https://me:pass@host/x", "wandb-value-1"]
)
def test_texts_that_are_secrets(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "wandb-value-1")
    assert text not in mask_text(f"before {text} behind")


@pytest.mark.parametrize("text", ["hf_internal_testing/tiny", "sk-learn", "https://host/x", "internlm/internlm2_5-7b"])
def test_texts_that_are_not(text: str) -> None:
    assert mask_text(text) == text
