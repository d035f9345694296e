"""One rank of several that train by DeepSpeed what `shards.py` describes: python zero_ranks.py FOLDER JOB...

A job is CASE/STAGE and what differs: full/2, tied/3/offload, full/1/free (no clipping), full/2/0-7::at7 (a span of
steps, where from, where to), answers/3, spoiled/2.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import shards

NOW: list = []
"""The engine's noun and whether to clip, for `made`."""


def made(folder: Path, engine, case: str):
    """(engine, feed) of a case on this rank, by the engine of the job."""
    import torch

    from finetuner.engine.build import build_engine, shards_for
    from finetuner.model.build import build
    from finetuner.runtime.seed import seed_all

    noun, clips = NOW
    run = shards.run_of(folder, noun, case)
    if not clips:
        run = dataclasses.replace(run, optim=dataclasses.replace(run.optim, clip=None))
    seed_all(0)
    device = torch.device("cpu")
    learner = build(run.model, device, dialogues=True, shards=shards_for(run, device)).learner
    return build_engine(run, learner, device), shards.feed_of(folder, case)


def trained(folder: Path, case: str, **span):
    """As `shards.trained`, the shapes of the groups being those of whole parameters."""
    from finetuner.model.shards import shape_of

    shards.made = made
    result, engine = shards.trained(folder, None, case, **span)
    result["groups"] = [
        (g.rate, g.decay, [(name, list(shape_of(parameter))) for name, parameter in g.named]) for g in engine.groups
    ]
    return result, engine


def spoiled(folder: Path) -> dict:
    """A third step whose gradient is infinite on one rank: what is said, and whether a weight changed."""
    import torch

    from finetuner import Constant
    from finetuner.errors import TrainingStopped
    from finetuner.runtime.ranks import rank
    from finetuner.train import loop

    engine, feed = made(folder, None, "full")
    real, kept, count = engine._engine.backward, {}, 0

    def backward(loss):
        nonlocal count
        count += 1
        if count > 8:
            if not kept:
                kept.update({name: tensor.clone() for name, tensor in engine.state().masters.items()})
            loss = loss * (float("inf") if rank() == 1 else 1.0)
        return real(loss)

    engine._engine.backward = backward
    try:
        loop.train(engine, feed, Constant(), (lambda done: bool(done.read()) and False,), start=0, seed=0,
                   broken=shards.broken)  # fmt: skip
        said = "nothing"
    except TrainingStopped as error:
        said = str(error)
    same = all(torch.equal(kept[name], tensor) for name, tensor in engine.state().masters.items())
    return {"said": said, "same": same}


def job(folder: Path, name: str) -> None:
    """Does a job; what it came to goes into `folder`."""
    from safetensors.torch import save_file

    from finetuner import ZeRO
    from finetuner.engine.state import write_state
    from finetuner.runtime.ranks import rank, world

    case, stage, *how = name.split("/")
    NOW[:] = [ZeRO(int(stage), offload="cpu" if "offload" in how else None), "free" not in how]
    place = folder / f"zero-{name.replace('/', '-').replace(':', '_')}-of-{world()}"
    shards.made = made
    if case in ("answers", "spoiled"):
        result = spoiled(folder) if case == "spoiled" else shards.answers(folder)
        place.with_name(f"{place.name}-{rank()}.json").write_text(json.dumps(result))
        return
    span = next((part for part in how if ":" in part), f"0-{shards.STEPS}::").split(":")
    start, stop = map(int, span[0].split("-"))
    result, engine = trained(folder, case, start=start, stop=stop, load=folder / span[1] if span[1] else None)
    weights, state = engine.weights(), engine.state()
    assert bool(weights) == (rank() == 0)
    if span[2] and state.parts:
        write_state(folder / span[2], state, *((rank(), world()) if int(stage) else (0, 1)))
    if rank() == 0:
        save_file({name: tensor.clone() for name, tensor in weights.items()}, place.with_suffix(".safetensors"))
        place.with_suffix(".json").write_text(json.dumps(result))


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
    said = [process.communicate(timeout=400)[0] for process in started]
    assert all(process.returncode == 0 for process in started), "\n".join(text[-4000:] for text in said)


if __name__ == "__main__":
    import torch

    from finetuner.runtime import dist

    dist.start(torch.device("cpu"))
    for name in sys.argv[2:]:
        job(Path(sys.argv[1]), name)
    dist.end()
