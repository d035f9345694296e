"""The dial: no number of checkpointed layers changes a bit, each saves memory, "auto" takes the fewest that fit."""

from __future__ import annotations

import functools
import itertools

import pytest
import rig
import torch
from model_rig import CPU, folder_of, gradients, learner_of, row
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from finetuner.config.model import NF4, CausalLM, LoRA
from finetuner.errors import ConfigError, ModelError
from finetuner.model import checkpointing, layers, probe, room
from finetuner.model.build import build, checked_tokenizer

LAYERS = 4
METHODS = {
    "full": {},
    "lora": {"adapter": LoRA(rank=4)},
    "qlora": {"adapter": LoRA(rank=4), "quant": NF4()},
    "dropout": {"adapter": LoRA(rank=4, dropout=0.2), "neftune": 5.0},
    "bfloat16": {"dtype": "bfloat16"},
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return rig.tiny_llama(tmp_path_factory.mktemp("dial"), hidden_size=64, num_hidden_layers=LAYERS)


def learned(folder, count, **fields):
    """Loss, gradients, and the generator's state afterwards."""
    torch.manual_seed(1)
    learner = learner_of(folder, checkpointing=count, **fields)
    torch.manual_seed(2)
    return *gradients(learner, row((9, 5))), torch.get_rng_state()


def kept(learner, batch):
    """The oracle: bytes of all storages that a forward pass saves, weights left out."""
    storages = {}
    known = {p.untyped_storage().data_ptr() for p in learner.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        learner(batch)
    return sum(storage.nbytes() for address, storage in storages.items() if address not in known)


@pytest.mark.parametrize("method", METHODS)
def test_no_number_of_layers_changes_a_bit(llama, method):
    loss, grads, state = learned(llama, False, **METHODS[method])
    for count in (0, 1, 3, LAYERS, True):
        other_loss, other_grads, other_state = learned(llama, count, **METHODS[method])
        assert loss == other_loss
        assert all(torch.equal(grads[name], other_grads[name]) for name in grads)
        assert torch.equal(state, other_state)


def test_the_law_notices_other_noise_in_the_second_pass(llama, monkeypatch):
    monkeypatch.setattr(checkpointing, "checkpoint", functools.partial(checkpoint, preserve_rng_state=False))
    _, grads, _ = learned(llama, False, **METHODS["dropout"])
    _, other_grads, _ = learned(llama, 3, **METHODS["dropout"])
    assert not all(torch.equal(grads[name], other_grads[name]) for name in grads)


@pytest.mark.parametrize("method", ["full", "lora", "bfloat16"])
def test_each_layer_more_keeps_less(llama, method):
    batch = row((60, 50))
    sizes = [kept(learner_of(llama, checkpointing=k, **METHODS[method]), batch) for k in range(LAYERS + 1)]
    assert all(more > less for more, less in itertools.pairwise(sizes))
    assert sizes[-1] < 0.5 * sizes[0]
    assert sizes[-1] == kept(learner_of(llama, checkpointing=True, **METHODS[method]), batch)
    assert sizes[0] == kept(learner_of(llama, checkpointing=False, **METHODS[method]), batch)


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {}),
        ("llama", {"adapter": LoRA(rank=4, dropout=0.1), "dtype": "bfloat16"}),
        ("llama", {"attention": "eager"}),
        ("llama", {"attention": "sdpa"}),
        ("llama", {"tiled_mlp": 32}),
        ("gemma2", {}),
        ("qwen3", {}),
    ],
    ids=str,
)
def test_the_probe_foretells_what_a_long_row_keeps(family, fields, tmp_path):
    learner = learner_of(folder_of(family, tmp_path), **fields)
    stack, batch = layers.decoder_layers(learner.causal), row((256, 320, 256, 192))
    foretold = probe.probe(learner, stack, 1024)
    with probe.switched(stack, checkpointed=False):
        plain = kept(learner, batch)
    with probe.switched(stack, checkpointed=True):
        checkpointed = kept(learner, batch)
    trained = sum(p.numel() for layer in stack for p in layer.parameters() if p.requires_grad)
    casts = 2 * trained if "dtype" in fields else 0
    wanted = sum(layer.plain - layer.checkpointed for layer in foretold)
    assert wanted == pytest.approx(plain - checkpointed - casts, rel=0.03)  # the shared rotary tables are left out
    assert all(layer.checkpointed == 1024 * 32 * (2 if casts else 4) for layer in foretold)


def test_the_foretelling_notices_a_probe_without_squares(monkeypatch, tmp_path):
    monkeypatch.setattr(probe, "grown", lambda short, middle, long, times: round((middle - short) * times))
    with pytest.raises(AssertionError):
        test_the_probe_foretells_what_a_long_row_keeps("llama", {"attention": "eager"}, tmp_path)


def automatic(folder, free, monkeypatch, **fields):
    """Layers that "auto" checkpoints with so much free memory, beyond what is to come."""
    monkeypatch.setattr(checkpointing, "free_bytes", lambda device: free)
    fields = {"dtype": "float32"} | fields
    learner = build(CausalLM(str(folder), **fields), CPU, dialogues=True, tokens=2048).learner
    flags = [layer.gradient_checkpointing for layer in layers.decoder_layers(learner.causal)]
    assert flags == sorted(flags, reverse=True), "the first ones"
    return sum(flags), learner


def test_auto_takes_the_fewest_that_fit_and_says_so(llama, monkeypatch, capsys):
    _, learner = automatic(llama, 1 << 40, monkeypatch)
    sizes = probe.probe(learner, layers.decoder_layers(learner.causal), 2048)
    head, after = checkpointing.head_bytes(learner, 2048), checkpointing.to_come(learner)
    for wanted in range(LAYERS + 1):
        enough = round((room.held(sizes, wanted, head) + after) / room.SHARE) + 2
        capsys.readouterr()
        assert automatic(llama, enough, monkeypatch)[0] == wanted
        line = capsys.readouterr().err
        assert f"checkpointing {wanted} of {LAYERS} layers: " in line
        assert f"{checkpointing.size(room.held(sizes, 0, head))} of activations a row without it" in line
        assert f"{checkpointing.size(enough)} free" in line
        assert "may not fit" not in line
    assert automatic(llama, 1, monkeypatch)[0] == LAYERS
    assert "may not fit" in capsys.readouterr().err


def test_auto_without_a_row_or_a_known_memory_checkpoints_all(llama, monkeypatch, capsys):
    assert all(x.gradient_checkpointing for x in layers.decoder_layers(learner_of(llama).causal))
    assert automatic(llama, None, monkeypatch)[0] == LAYERS
    assert "does not tell its free memory" in capsys.readouterr().err


def test_the_tightest_rank_decides_for_all(llama, monkeypatch):
    told = []
    monkeypatch.setattr(checkpointing.dist, "largest", lambda value: told.append(value) or max(value, -1.0))
    assert automatic(llama, 1 << 40, monkeypatch)[0] == LAYERS
    assert told[0] == -float(1 << 40)
    monkeypatch.setattr(checkpointing.dist, "largest", lambda value: value if value < 0 else 3.0)
    assert automatic(llama, 1 << 40, monkeypatch)[0] == 3


def test_choosing_leaves_no_trace(llama, monkeypatch):
    """Neither in the generators, which the run's noise comes from, nor in the model."""
    _, learner = automatic(llama, 1 << 40, monkeypatch, adapter=LoRA(rank=4, dropout=0.2), neftune=5.0)
    source = CausalLM(str(llama), adapter=LoRA(rank=4, dropout=0.2), neftune=5.0)
    before, modes = torch.get_rng_state(), {name: part.training for name, part in learner.named_modules()}
    checkpointing.set_checkpointing(learner, source, 2048)
    assert torch.equal(before, torch.get_rng_state())
    assert modes == {name: part.training for name, part in learner.named_modules()}
    assert all(parameter.grad is None for parameter in learner.parameters())
    assert not any(part._forward_pre_hooks for part in layers.decoder_layers(learner.causal))


def test_more_layers_than_there_are_are_refused_before_a_weight_is_read(llama, monkeypatch):
    for read in (
        lambda: checked_tokenizer(CausalLM(str(llama), checkpointing=5), 8, dialogues=True),
        lambda: learner_of(llama, checkpointing=5),
    ):
        with pytest.raises(ModelError, match="E-CHECKPOINTING") as caught:
            read()
        assert "0 to 4" in str(caught.value)
        assert "model.checkpointing=4" in str(caught.value)


def test_layers_that_cannot_be_switched_singly_are_all_or_none(llama, monkeypatch, capsys):
    plain = learned(llama, False)
    monkeypatch.setattr(checkpointing, "decoder_layers", lambda model: [])
    for choice in (True, "auto"):
        loss, grads, _ = learned(llama, choice)
        assert loss == plain[0]
        assert all(torch.equal(grads[name], plain[1][name]) for name in grads)
    assert "cannot be switched one by one" in capsys.readouterr().err
    with pytest.raises(ModelError, match="True or False"):
        learner_of(llama, checkpointing=2)
    learner = learner_of(llama)
    monkeypatch.setattr(type(learner.causal), "supports_gradient_checkpointing", False)
    with pytest.raises(ModelError, match=r"model\.checkpointing=False"):
        learner_of(llama, checkpointing=True)
    learner_of(llama)
    assert "cannot recompute activations" in capsys.readouterr().err


def test_offloading_on_a_cpu_is_refused_before_anything_is_read():
    with pytest.raises(ConfigError, match="E-OFFLOAD"):
        build(CausalLM("/nowhere", offload=True), CPU, dialogues=True)
