"""A config becomes a trained model: the stages of a run in their order, each known wrong as early as it can be.

    folder, lock -> finished already? -> device, batch arithmetic -> tokenizer, template -> data -> plan of the steps
    -> does the checkpoint fit? -> weights, adapters -> engine -> the loop with its listeners

Data is read, checked and counted before the model's weights are loaded.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable
from pathlib import Path

import torch

from finetuner.config.load import Loaded
from finetuner.config.write import to_json
from finetuner.data.ahead import Ahead
from finetuner.data.feed import Feed, validation_batches
from finetuner.data.packs import pack_samples
from finetuner.data.report import write_report
from finetuner.data.samples import Samples
from finetuner.data.steps import accumulation
from finetuner.engine.build import check_engine
from finetuner.engine.checkpoint import check_place
from finetuner.engine.engine import Engine
from finetuner.engine.optim import check_optimizer
from finetuner.engine.speed import speed_of
from finetuner.errors import ConfigError, Problem, UsageError
from finetuner.model.build import check_device
from finetuner.model.work import work_of
from finetuner.runtime import allocator, dist, watchdog
from finetuner.runtime.commit import sweep
from finetuner.runtime.lock import lock
from finetuner.runtime.log import drop, keep, say, tracing
from finetuner.runtime.ranks import is_main, rank, world
from finetuner.train import record, trackers
from finetuner.train.ask import ask_all
from finetuner.train.broken import describe_broken
from finetuner.train.checkpoints import Checkpoints
from finetuner.train.evaluate import validation_loss
from finetuner.train.loop import train as loop
from finetuner.train.metrics import Metrics
from finetuner.train.milestones import Milestones, Standing
from finetuner.train.ready import Clock, Material, engine_of, gather
from finetuner.train.resume import Resume, find, set_aside
from finetuner.train.stop import Halt
from finetuner.train.use import Use


def train(loaded: Loaded, *, folder: str | None = None, resume: str = "auto", hang_limit: float | None = None) -> int:
    """Performs the run, or goes on with it; gives the exit code: 0, or 130 or 143 after a signal."""
    home = Path(folder or loaded.run.folder or Path("work_dirs") / loaded.name)
    device = dist.choose_device(loaded.run.engine.device)
    check_compute(loaded.run.model.dtype, device)
    check_device(loaded.run.model, device, loaded.run.data.length * loaded.run.batch.per_device)
    check_optimizer(loaded.run.optim, device)
    check_engine(loaded.run, device)
    accumulation(loaded.run.batch, world())
    dist.start(device)
    check_same_config(loaded)
    trackers.check(loaded.run)
    check_home(home)
    with only_run_in(home):
        if is_main():
            if resume == "never":
                set_aside(home)
            sweep(home)
            check_place(home, "last")
            check_place(home, "best")
        dist.barrier()
        found = find(home, resume) if resume != "never" else None
        if found and found.standing.finished and not record.changes(home, loaded):
            say(f"already finished at step {found.step}: {found.path}; nothing to do")
            return 0
        handler = keep(home / "logs")
        try:
            limit = watchdog.LIMIT if hang_limit is None else hang_limit
            with tracing(handler) as file, watchdog.watched(file, limit):
                allocator.settle(device.type)
                code = perform(loaded, home, found, device)
            dist.barrier()  # rank 0 holds the store: it leaves when none needs it any more
            return code
        finally:
            drop(handler)


def check_compute(dtype: str, device: torch.device) -> None:
    """Refuses a GPU that would only imitate what is to be computed in.

    Raises:
        ConfigError: E-DEVICE-DTYPE.
    """
    if device.type == "cuda" and dtype == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        what, found = "this GPU does not compute in bfloat16", torch.cuda.get_device_name(device)
        raise ConfigError(Problem("E-DEVICE-DTYPE", what, "model.dtype", found, "'float32'", "model.dtype=float32"))


def check_home(home: Path) -> None:
    """Refuses a place that cannot be a run's folder.

    Raises:
        UsageError: E-FOLDER-FILE.
    """
    if home.exists() and not home.is_dir():
        what, remedy = "the run's folder is a file", "give another folder: --folder DIR"
        raise UsageError(Problem("E-FOLDER-FILE", what, str(home), "a file", "a folder, or nothing", remedy))
    if not home.resolve().name:
        what, remedy = "the run's folder is the root of the file system", "give a folder: --folder DIR"
        raise UsageError(Problem("E-FOLDER-FILE", what, str(home), "/", "a folder in it", remedy))


def check_same_config(loaded: Loaded) -> None:
    """Refuses ranks that were started with different configs.

    Raises:
        ConfigError: E-RANKS-CONFIG.
    """
    if not dist.same_everywhere(json.dumps(to_json(loaded.run), sort_keys=True)):
        what, remedy = "the ranks have different configs", "start each with the same file and the same overrides"
        raise ConfigError(Problem("E-RANKS-CONFIG", what, str(loaded.path), f"rank {rank()}'s differs", remedy=remedy))


def perform(loaded: Loaded, home: Path, found: Resume | None, device: torch.device) -> int:
    """The run's stages, from the data to the last step."""
    run, clock = loaded.run, Clock()
    with watchdog.phase("the data"):
        material = gather(run)
    plan = material.plan
    if found is not None:
        record.check_same(home, loaded, material.identity, material.base)
        if found.step >= plan.steps:
            say(f"already finished: {found.path} is the last of {plan.steps} steps; nothing to do")
            return 0
    if is_main():
        record.begin(home, loaded, material.identity, material.base, world=world())
        write_report(material.samples.report, home)
    dist.barrier()
    packs, length = plan.packs, material.samples.length
    say(f"{len(material.samples)} samples in {len(packs)} rows of up to {length} tokens, {packs.report.fill:.1%} full")
    going_on = f"; going on after step {found.step}" if found else ""
    say(f"{plan.steps} steps, {plan.steps_per_epoch} an epoch{going_on}")
    clock.ends("data")
    with watchdog.phase("the model"):
        engine = engine_of(run, device)
        if found:
            engine.load(found.path / "state")
    clock.ends("model")
    return steps(loaded, home, engine, material, found, clock)


def steps(loaded: Loaded, home: Path, engine: Engine, material: Material, found: Resume | None, clock: Clock) -> int:
    """The loop with its listeners; gives the exit code."""
    run, learner, plan = loaded.run, engine.learner, material.plan
    start, identity = found.step if found else 0, record.run_id(home)
    assert identity is not None, "the main rank has written it"
    halt = Halt(home, run.max_runtime)
    use = Use(work_of(learner.model, learner.causal), speed_of(learner.device, learner.compute))
    tracked = trackers.start(run, home, to_json(run)) if is_main() else ()
    metrics = Metrics(
        run, home, start=start, steps=plan.steps, steps_per_epoch=plan.steps_per_epoch, use=use, trackers=tracked
    )
    ask = functools.partial(ask_all, run.ask, learner, learner.tokenizer, folder=home) if run.ask else None
    checkpoints = Checkpoints(run, home, engine, identity=identity, base=material.base)
    milestones = Milestones(
        run, checkpoints, metrics, steps=plan.steps, standing=found.standing if found else Standing(), halt=halt,
        validate=validation(engine, material.held, run.seed) if material.held is not None else None, ask=ask,
    )  # fmt: skip
    broken = functools.partial(describe_broken, home, learner.tokenizer)
    feed = Feed(material.samples, plan, rank(), world(), run.batch.per_device)
    try:
        with halt.listening(), checkpoints, Ahead(feed, pinned=learner.device.type == "cuda") as ahead:
            if ask and start == 0 and run.ask and run.ask.every is None:
                ask(0)
            use.begin()
            with watchdog.phase("the first step"):
                heard = (watchdog.stepped, metrics, milestones)
                loop(engine, ahead, run.schedule, heard, start=start, seed=run.seed, broken=broken)
    finally:
        metrics.close()
    clock.ends("training")
    if is_main():
        record.end(home, {"from_step": start, "seconds_by_stage": clock.seconds, **use.whole()})
    say(f"{use}")
    if halt.exit_code is None:
        say(f"done: {home / 'last'}")
    return halt.exit_code or 0


def validation(engine: Engine, held: Samples, seed: int) -> Callable[[], float]:
    """What measures the loss on the samples that are held out."""
    packs = pack_samples(held, seed=seed)
    return lambda: validation_loss(engine.learner, validation_batches(held, packs, rank(), world()))


def only_run_in(home: Path) -> contextlib.AbstractContextManager[None]:
    """Holds the lock of a run's folder, on the main rank; a second run in it is refused."""
    place = home.resolve()  # one lock, by whatever name or link the folder is given
    return lock(place.parent / f".{place.name}.lock", wait=False) if is_main() else contextlib.nullcontext()
