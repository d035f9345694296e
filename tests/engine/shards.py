"""Trains a tiny model by one engine and writes down what it came to; as a program, one rank of several.

python shards.py FOLDER CASE...      RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT as torchrun sets them
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parents[1]
sys.path[:0] = [str(HERE), str(HERE.parent)]

STEPS = 20
CASES = {
    "full": {},
    "tied": {"tied": True, "batch": 1},
    "packed": {"pack": True, "length": 128, "batch": 3},
    "lora": {"adapter": True, "checkpointing": True},
    "kept": {"reshard": False, "tied": True, "checkpointing": True},
    "bf16": {"dtype": "bfloat16", "adapter": True, "checkpointing": True},
    "frozen": {"freeze": ("model.embed_tokens*", "model.layers.0.*")},
}
"""By name what differs from float32, untied, one row a micro-batch, eight a step."""


def make(folder: Path) -> Path:
    """Models and rows whose answers are of very different lengths: the ranks learn unequal numbers of tokens."""
    import rig

    words = ["one", "two", "three", "five", "eight", "thirteen"]
    for name, tied in (("untied", False), ("tied", True)):
        rig.tiny_llama(folder / name, tie_word_embeddings=tied, vocab_size=421)
    with (folder / "rows.jsonl").open("w") as file:
        for number in range(24):
            said = " ".join(words[(number + k) % 6] for k in range(1 + (number * number) % 23))
            turns = [{"role": "user", "content": f"say {number}"}, {"role": "assistant", "content": said}]
            file.write(json.dumps({"messages": turns}) + "\n")
    return folder


def run_of(folder: Path, engine, case: str):
    """The Run of a case."""
    from finetuner import FSDP, AdamW, BatchSize, CausalLM, Dialogues, Json, LoRA, Run, Steps

    how = CASES[case]
    model = CausalLM(
        str(folder / ("tied" if how.get("tied") else "untied")), dtype=how.get("dtype", "float32"),
        checkpointing=how.get("checkpointing", False), freeze=how.get("freeze", ()),
        adapter=LoRA(rank=4, alpha=8) if how.get("adapter") else None,
    )  # fmt: skip
    data = Dialogues(Json(str(folder / "rows.jsonl")), length=how.get("length", 256), pack=how.get("pack", False))
    return Run(
        model=model, data=data, optim=AdamW(lr=3e-3, weight_decay=0.1, clip=0.5, rates={"*layers.1*": 1e-3}),
        batch=BatchSize(total=how.get("batch", 8)), until=Steps(STEPS),
        engine=FSDP(reshard=how.get("reshard", True)) if engine == "fsdp" else engine,
    )  # fmt: skip


def feed_of(folder: Path, case: str):
    """What this rank learns from."""
    from finetuner.data.feed import Feed
    from finetuner.data.packs import pack_samples
    from finetuner.data.samples import prepare
    from finetuner.data.steps import Plan
    from finetuner.model.tokenizer import encoder_spec, load_tokenizer
    from finetuner.runtime.ranks import rank, world

    run = run_of(folder, plain(), case)
    spec = encoder_spec(load_tokenizer(run.model))
    samples = prepare(run.data, spec, cache=folder / f"cache-{rank()}", workers=0)
    return Feed(samples, Plan(pack_samples(samples, seed=0), run.batch.total, run.until, 0), rank(), world(), 1)


def made(folder: Path, engine, case: str):
    """(engine, feed) of a case on this rank."""
    import torch

    from finetuner.engine.build import build_engine
    from finetuner.model.build import build
    from finetuner.runtime.seed import seed_all

    run = run_of(folder, engine, case)
    seed_all(0)
    learner = build(run.model, torch.device("cpu"), dialogues=True).learner
    return build_engine(run, learner, torch.device("cpu")), feed_of(folder, case)


def trained(folder: Path, engine, case: str, *, start: int = 0, stop: int = STEPS, load: Path | None = None):
    """What steps start..stop came to: figures, weights, state; the engine too."""
    from finetuner import Cosine
    from finetuner.train import loop

    engine, feed = made(folder, engine, case)
    if load is not None:
        engine.load(load)
    told = []

    def listen(step):
        figures = step.read()
        told.append((step.number, figures.loss, figures.norm))
        return step.number == stop

    loop.train(engine, feed, Cosine(), (listen,), start=start, seed=0, broken=broken)
    groups = [(g.rate, g.decay, [(name, list(p.shape)) for name, p in g.named]) for g in engine.groups]
    return {"told": told, "groups": groups}, engine


def broken(step, batches, value, what):
    from finetuner.errors import Problem

    return Problem("E-TRAIN-NONFINITE", f"step {step}: {what}")


def spoiled(folder: Path) -> dict:
    """A step after which one rank's gradient has a NaN in it: what is said, and whether a weight changed."""
    import torch

    from finetuner.errors import TrainingStopped
    from finetuner.runtime.ranks import rank

    engine, feed = made(folder, "fsdp", "full")
    real, kept = engine.step, {}

    def step(number, factor, loss):
        if number == 2:
            kept.update({piece.name: piece.own.detach().clone() for piece in engine._pieces})
            poison()
        return real(number, factor, loss)

    def poison():
        if rank() == 1:
            engine._pieces[3].whole.grad.to_local().view(-1)[0] = float("nan")

    def suspects():
        poison()
        return type(engine).suspects(engine)

    engine.step, engine.suspects = step, suspects
    from finetuner import Constant
    from finetuner.train import loop

    try:
        loop.train(
            engine, feed, Constant(), (lambda done: bool(done.read()) and False,), start=0, seed=0, broken=broken
        )
        said = "nothing"
    except TrainingStopped as error:
        said = str(error)
    same = all(torch.equal(kept[piece.name], piece.own) for piece in engine._pieces)
    return {"said": said, "same": same, "name": engine._pieces[3].name}


def answers(folder: Path) -> dict:
    """Greedy answers of all ranks before the first step and after one, and the validation loss."""
    import torch

    from finetuner.generate.answer import answer
    from finetuner.generate.stops import stop_ids
    from finetuner.runtime.ranks import world
    from finetuner.train.evaluate import validation_loss

    engine, feed = made(folder, "fsdp" if world() > 1 else plain(), "tied")
    learner, told = engine.learner, []
    for step in range(2):
        stops = stop_ids(learner.tokenizer, learner.model.generation_config)
        with learner.whole():
            given = answer(
                learner.model, learner.tokenizer, [{"role": "user", "content": "say 3"}],
                max_tokens=6, stops=stops, compute=learner.compute,
            )  # fmt: skip
        told += [given.text, validation_loss(learner, feed.batches(1))]
        loss = torch.zeros((), dtype=torch.float64)
        for batch in feed.batches(step):
            loss += engine.accumulate(batch, feed.learned(step), last=True)
        engine.step(step, 1.0, loss)
    return {"told": told}


def mean(folder: Path) -> dict:
    """The first norm where FSDP's mean over the ranks is left in."""
    import torch
    from torch.distributed.fsdp import FSDPModule

    real = FSDPModule.set_gradient_divide_factor
    FSDPModule.set_gradient_divide_factor = lambda self, factor: real(self, 2.0)
    engine, feed = made(folder, "fsdp", "full")
    FSDPModule.set_gradient_divide_factor = real
    for batch in feed.batches(0):
        engine.accumulate(batch, feed.learned(0), last=True)
    return {"norm": float(engine.step(0, 1.0, torch.zeros((), dtype=torch.float64)))}


def thread(folder: Path) -> dict:
    """Whether the main thread was the one that asked a sharded model for its tensors, each time that one did."""
    import threading

    from finetuner.runtime.ranks import rank

    engine, _ = made(folder, "fsdp", "full")
    values, asked = engine.weights(), []
    embedding = engine.learner.causal.get_input_embeddings()
    embedding.register_state_dict_pre_hook(
        lambda *_: asked.append(threading.current_thread() is threading.main_thread())
    )
    if rank() == 0:
        save = engine.learner.saver(values)
        writer = threading.Thread(target=save, args=(folder / "written",))
        writer.start()
        writer.join()
        assert (folder / "written" / "model.safetensors").exists()
    return {"asked": asked}


def plain():
    from finetuner import Torch

    return Torch()


def ranks(folder: Path, world: int, *jobs: str) -> None:
    """Runs `jobs` on `world` processes and waits for them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
    started = []
    for number in range(world):
        env = {**os.environ, **own, "RANK": str(number), "LOCAL_RANK": str(number)}
        command = [sys.executable, __file__, str(folder), *jobs]
        started.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    said = [process.communicate(timeout=240)[0] for process in started]
    assert all(process.returncode == 0 for process in started), "\n".join(said)


def job(folder: Path, name: str) -> None:
    """CASE, or CASE:START-STOP:FROM:TO:ENGINE, or spoiled, or answers; results go into `folder`."""
    from safetensors.torch import save_file

    from finetuner.engine.state import write_state
    from finetuner.runtime.ranks import rank, world

    place = folder / f"{name.replace(':', '_').replace('/', '_')}-of-{world()}"
    if name in (alone := {job.__name__: job for job in (spoiled, answers, mean, thread)}):
        result = alone[name](folder)
        place.with_name(f"{place.name}-{rank()}.json").write_text(json.dumps(result))
        return
    case, span, source, target, kind = [*name.split(":"), "", "", "", ""][:5]
    start, stop = map(int, (span or f"0-{STEPS}").split("-"))
    result, engine = trained(
        folder, plain() if kind == "torch" else "fsdp", case, start=start, stop=stop,
        load=folder / source if source else None,
    )  # fmt: skip
    weights = engine.weights()
    assert bool(weights) == (rank() == 0)
    if target and (state := engine.state()).parts:
        write_state(folder / target, state, rank(), world())
    if rank() == 0:
        save_file({name: tensor.clone() for name, tensor in weights.items()}, place.with_suffix(".safetensors"))
        place.with_suffix(".json").write_text(json.dumps(result))


if __name__ == "__main__":
    import torch

    from finetuner.runtime import dist

    dist.start(torch.device("cpu"))
    for name in sys.argv[2:]:
        job(Path(sys.argv[1]), name)
    dist.end()
