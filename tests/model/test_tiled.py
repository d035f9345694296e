"""An MLP in tiles is the same MLP to rounding, in all gradients, beside whatever else is chosen; and is smaller."""

from __future__ import annotations

import pytest
import rig
import torch
from model_rig import CPU, folder_of, gradients, learner_of, oracle, row, worst
from torch.nn.parallel import DistributedDataParallel

from finetuner.config.model import NF4, CausalLM, LoRA
from finetuner.errors import ModelError
from finetuner.model import tiled
from finetuner.model.build import build, checked_tokenizer

BATCH = row((9, 12, 6, 10))
METHODS = {
    "full": {},
    "lora": {"adapter": LoRA(rank=4)},
    "dora": {"adapter": LoRA(rank=4, dora=True)},
    "qlora": {"adapter": LoRA(rank=4), "quant": NF4()},
    "mlp alone": {"adapter": LoRA(rank=4, targets=("gate_proj", "down_proj"))},
    "attention alone": {"adapter": LoRA(rank=4, targets=("q_proj",))},
    "frozen": {"freeze": ("*embed*", "*self_attn*", "*layers.0.*")},
    "noise": {"neftune": 5.0},
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return rig.tiny_llama(tmp_path_factory.mktemp("tiled"), hidden_size=64)


def distance(got, wanted):
    over = sum(float((got[name] - wanted[name]).square().sum()) for name in wanted) ** 0.5
    return over / sum(float(value.square().sum()) for value in wanted.values()) ** 0.5


def learned(folder, batch=BATCH, **fields):
    torch.manual_seed(1)
    learner = learner_of(folder, **fields)
    with torch.no_grad():
        for name, parameter in learner.trainable():
            if "lora_B" in name:  # otherwise lora_A would have no gradient
                parameter.normal_(std=0.1)
    torch.manual_seed(2)
    return gradients(learner, batch)


@pytest.mark.parametrize("checkpointing", [0, 1, True])
@pytest.mark.parametrize("method", METHODS)
def test_tiles_change_nothing_but_rounding(llama, method, checkpointing):
    loss, grads = learned(llama, **METHODS[method])
    for tokens in (1, 8, 1000):
        other, tile_grads = learned(llama, tiled_mlp=tokens, checkpointing=checkpointing, **METHODS[method])
        assert other == pytest.approx(loss, rel=1e-6)
        assert distance(tile_grads, grads) <= 1e-6
        assert worst(tile_grads, grads) <= 1e-5


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi3"])
def test_tiles_learn_what_plain_transformers_learns(family, tmp_path):
    folder = folder_of(family, tmp_path)
    loss, grads = gradients(learner_of(folder, tiled_mlp=8), BATCH)
    true_loss, true_grads = oracle(folder, BATCH)
    assert loss == pytest.approx(true_loss, rel=1e-5)
    assert worst(grads, true_grads) <= 1e-5


@pytest.mark.parametrize("method", ["full", "lora", "noise"])
def test_half_precision_in_tiles_is_as_near_to_the_truth(llama, method):
    _, truth = learned(llama, **METHODS[method])
    _, whole = learned(llama, dtype="bfloat16", **METHODS[method])
    _, tiles = learned(llama, dtype="bfloat16", tiled_mlp=4, checkpointing=1, **METHODS[method])
    assert worst(tiles, truth) <= 1.3 * worst(whole, truth)
    assert worst(tiles, truth) > 1e-4, "it did compute in bfloat16"


def test_dropout_in_a_tile_is_the_same_in_both_passes(llama, monkeypatch):
    """Against a difference quotient: along a direction, of the loss with the generator set back."""
    torch.manual_seed(1)
    learner = learner_of(llama, tiled_mlp=4, adapter=LoRA(rank=4, dropout=0.5, targets=("down_proj",)))
    learner.double()

    def loss():
        torch.manual_seed(3)
        return learner(BATCH)

    def error():
        learner.zero_grad()
        loss().backward()
        slope = sum(float((p.grad * ways[name]).sum()) for name, p in learner.trainable())
        step = 1e-3
        values = []
        for sign in (1, -2):
            with torch.no_grad():
                for name, parameter in learner.trainable():
                    parameter.add_(ways[name], alpha=sign * step)
            values.append(loss().item())
        with torch.no_grad():
            for name, parameter in learner.trainable():
                parameter.add_(ways[name], alpha=step)
        return abs((values[0] - values[1]) / (2 * step) - slope) / abs(slope)

    ways = {name: torch.randn_like(p) for name, p in learner.trainable()}
    with torch.no_grad():
        for _, parameter in learner.trainable():
            parameter.normal_(std=0.1)
    assert error() < 1e-2
    monkeypatch.setattr(tiled.torch, "set_rng_state", lambda state: None)
    assert error() > 1e-2


def test_no_inner_value_exists_for_the_whole_row(llama, monkeypatch):
    """The largest tensor that the MLP's own parts take or give, in both passes."""
    seen = []
    learner = learner_of(llama, tiled_mlp=8, checkpointing=False)
    for layer in learner.causal.model.layers:
        for part in (layer.mlp.gate_proj, layer.mlp.down_proj):
            part.register_forward_hook(lambda part, given, got: seen.append(max(given[0].shape[1], got.shape[1])))
            part.register_full_backward_hook(lambda part, given, got: seen.append(got[0].shape[1]))
    learner(BATCH).backward()
    assert max(seen) == 8
    assert len(seen) == 2 * 2 * 5 * 3, "layers, parts, tiles; forward, again, backward"


def test_a_gradient_reaches_each_weight_once(llama):
    """As data parallel needs it: it counts the parameters whose gradient is there."""
    learner = learner_of(llama, tiled_mlp=4)
    reached = []
    for name, parameter in learner.trainable():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: reached.append(name))
    learner(BATCH).backward()
    assert sorted(reached) == sorted(name for name, _ in learner.trainable())


@pytest.mark.parametrize("fields", [{}, {"adapter": LoRA(rank=4)}, {"dtype": "bfloat16"}], ids=str)
def test_data_parallel_gives_the_same_gradients(llama, fields, tmp_path):
    fields = {"tiled_mlp": 4, "checkpointing": 1, **fields}
    plain, spread = (learner_of(llama, **fields) for _ in range(2))
    spread.load_state_dict(plain.state_dict())
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        parallel = DistributedDataParallel(spread, gradient_as_bucket_view=True)
        for batch in (BATCH, row((20, 3))):
            plain(batch).backward()
        with parallel.no_sync():
            parallel(BATCH).backward()
        parallel(row((20, 3))).backward()
        own = dict(spread.trainable())
        assert all(torch.equal(p.grad, own[name].grad) for name, p in plain.trainable())
    finally:
        torch.distributed.destroy_process_group()


def test_answers_and_evaluations_take_tiles_too(llama):
    whole, tiles = learner_of(llama), learner_of(llama, tiled_mlp=4)
    with torch.no_grad(), whole.evaluating(), tiles.evaluating():
        assert tiles(BATCH).item() == pytest.approx(whole(BATCH).item(), rel=1e-6)
    answers = []
    for learner in (whole, tiles):
        with learner.answering() as model:
            answers.append(model.generate(torch.arange(3, 12)[None], max_new_tokens=4, do_sample=False))
    assert torch.equal(*answers)


def test_what_is_saved_knows_nothing_of_tiles(llama, tmp_path):
    one, other = learner_of(llama), learner_of(llama, tiled_mlp=4)
    assert one.state_dict().keys() == other.state_dict().keys()
    one.save(tmp_path / "one")
    other.save(tmp_path / "other")
    files = sorted(file.name for file in (tmp_path / "one").iterdir())
    assert files == sorted(file.name for file in (tmp_path / "other").iterdir())
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes() for name in files)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "opt"])
def test_other_kinds_of_layers_are_refused_before_a_weight_is_read(kind, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    rig.tokenizer(tmp_path)
    values = {
        "vocab_size": len(AutoTokenizer.from_pretrained(tmp_path)), "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
    }  # fmt: skip
    more = {"mixtral": {"num_local_experts": 2}, "qwen3_moe": {"num_experts": 2, "moe_intermediate_size": 16},
            "opt": {"word_embed_proj_dim": 32}}[kind]  # fmt: skip
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **values, **more)).save_pretrained(tmp_path)
    source = CausalLM(str(tmp_path), tiled_mlp=8)
    for read in (lambda: checked_tokenizer(source, 8, dialogues=True), lambda: build(source, CPU, dialogues=True)):
        with pytest.raises(ModelError, match="E-TILED") as caught:
            read()
        assert ("mixture of experts" in str(caught.value)) == (kind != "opt")


def test_an_mlp_whose_tokens_see_each_other_is_refused(llama, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaMLP

    real = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: real(self, x + x.roll(1, -2)))
    with pytest.raises(ModelError, match="see each other"):
        learner_of(llama, tiled_mlp=8)


@pytest.mark.parametrize("mutant", ["a tile lost", "weights of the last tile only"])
def test_the_law_notices(llama, mutant, monkeypatch):
    _, grads = learned(llama)
    if mutant == "a tile lost":
        monkeypatch.setattr(tiled, "tiles_of", lambda length, tokens: (slice(0, min(length, tokens)),))
        monkeypatch.setattr(tiled, "check_apart", lambda learner, mlp: None)
    else:
        real = tiled.gradients

        def last_only(ctx, tile, grad, sums):
            for total in sums:
                total.zero_()
            return real(ctx, tile, grad, sums)

        monkeypatch.setattr(tiled, "gradients", last_only)
    assert not worst(learned(llama, tiled_mlp=8)[1], grads) <= 1e-2  # what no tile writes may be no number
