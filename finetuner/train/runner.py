"""A config becomes a trained model: the stages of a run in their order, each known wrong as early as it can be.

    folder, lock -> finished already? -> device, batch arithmetic -> tokenizer, template -> data -> plan of the steps
    -> does the checkpoint fit? -> weights, adapters -> engine -> the loop with its listeners

Data is read, checked and counted before the model's weights are loaded.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from finetuner.config.data import Data, Dialogues, Mix
from finetuner.config.load import Loaded
from finetuner.config.model import Fresh
from finetuner.config.write import to_json
from finetuner.data.feed import Feed, validation_batches
from finetuner.data.packs import pack_samples
from finetuner.data.report import write_report
from finetuner.data.samples import Samples, prepare
from finetuner.data.steps import Plan, accumulation
from finetuner.engine.build import build_engine
from finetuner.engine.checkpoint import check_place
from finetuner.engine.engine import Engine
from finetuner.errors import ConfigError, Problem, UsageError
from finetuner.model.build import build, checked_tokenizer
from finetuner.model.folder import model_folder
from finetuner.model.identity import base_identity
from finetuner.model.joint import tell_joined_prompt
from finetuner.model.tokenizer import add_tokens, encoder_spec
from finetuner.runtime import dist
from finetuner.runtime.commit import sweep
from finetuner.runtime.lock import lock
from finetuner.runtime.log import drop, keep, say
from finetuner.runtime.ranks import is_main, rank, world
from finetuner.runtime.seed import seed_all
from finetuner.train import record, trackers
from finetuner.train.ask import ask_all
from finetuner.train.broken import describe_broken
from finetuner.train.evaluate import validation_loss
from finetuner.train.loop import train as loop
from finetuner.train.metrics import Metrics
from finetuner.train.milestones import Milestones, Standing
from finetuner.train.progress import Counting
from finetuner.train.resume import Resume, find, set_aside
from finetuner.train.stop import Halt


def train(loaded: Loaded, *, folder: str | None = None, resume: str = "auto") -> int:
    """Performs the run, or goes on with it; gives the exit code: 0, or 130 or 143 after a signal."""
    home = Path(folder or loaded.run.folder or Path("work_dirs") / loaded.name)
    device = dist.choose_device(loaded.run.engine.device)
    check_compute(loaded.run.model.dtype, device)
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
            return perform(loaded, home, found, device)
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
    run = loaded.run
    tokenizer = checked_tokenizer(run.model, run.data.length, dialogues=has_dialogues(run.data))
    add_tokens(tokenizer, run.model.new_tokens)
    samples, held = data_of(loaded, tokenizer)
    if has_dialogues(run.data):
        tell_joined_prompt(tokenizer)
    packs = pack_samples(samples, seed=run.seed)
    plan = Plan(packs, run.batch.total, run.until, run.seed)
    identity = identity_of(samples)
    base = None if isinstance(run.model.path, Fresh) else base_identity(model_folder(run.model))
    if found is not None:
        record.check_same(home, loaded, identity, base)
        if found.step >= plan.steps:
            say(f"already finished: {found.path} is the last of {plan.steps} steps; nothing to do")
            return 0
    start = found.step if found else 0
    if is_main():
        record.begin(home, loaded, identity, base, world=world())
        write_report(samples.report, home)
    dist.barrier()
    run_id = record.run_id(home)
    assert run_id is not None, "the main rank has written it"
    say(f"{len(samples)} samples in {len(packs)} rows of up to {samples.length} tokens, {packs.report.fill:.1%} full")
    say(f"{plan.steps} steps, {plan.steps_per_epoch} an epoch" + (f"; going on after step {start}" if start else ""))

    seed_all(run.seed)
    built = build(run.model, device, dialogues=has_dialogues(run.data))
    say("; ".join(f"{part}: {kind}" for part, kind in built.learner.dtype_table()))
    trains = built.learner.what_trains()
    say(f"{trains.trained:,} of {trains.all:,} parameters train")
    engine = build_engine(run, built.learner, device)
    if found:
        engine.load(found.path / "state")
    feed = Feed(samples, plan, rank(), world(), run.batch.per_device)
    return steps(
        loaded, home, engine, feed, held, built.tokenizer, run_id, base, start, found.standing if found else Standing()
    )


def steps(
    loaded: Loaded,
    home: Path,
    engine: Engine,
    feed: Feed,
    held: Samples | None,
    tokenizer: Any,
    run_id: str,
    base: str | None,
    start: int,
    standing: Standing,
) -> int:
    """The loop with its listeners; gives the exit code."""
    run = loaded.run
    halt = Halt(home, run.max_runtime)
    tracked = trackers.start(run, home, to_json(run)) if is_main() else ()
    metrics = Metrics(run, home, start=start, feed=feed, trackers=tracked)
    ask = functools.partial(ask_all, run.ask, engine.learner, tokenizer, folder=home) if run.ask else None
    milestones = Milestones(
        run, home, engine, metrics, identity=run_id, base=base, steps=feed.steps, standing=standing, halt=halt,
        validate=validation(engine, held, run.seed) if held is not None else None, ask=ask,
    )  # fmt: skip
    broken = functools.partial(describe_broken, home, tokenizer)
    try:
        with halt.listening():
            if ask and start == 0 and run.ask and run.ask.every is None:
                ask(0)
            loop(engine, feed, run.schedule, (metrics, milestones), start=start, seed=run.seed, broken=broken)
    finally:
        metrics.close()
    if halt.exit_code is None:
        say(f"done: {home / 'last'}")
    return halt.exit_code or 0


def validation(engine: Engine, held: Samples, seed: int) -> Callable[[], float]:
    """What measures the loss on the samples that are held out."""
    packs = pack_samples(held, seed=seed)
    return lambda: validation_loss(engine.learner, validation_batches(held, packs, rank(), world()))


def data_of(loaded: Loaded, tokenizer: Any) -> tuple[Samples, Samples | None]:
    """What is learned from, and what is held out for validation."""
    run = loaded.run
    spec = encoder_spec(tokenizer)
    with contextlib.closing(Counting()) as counting:
        given = functools.partial(
            prepare, spec=spec, cache=cache_folder(), seed=run.seed, progress=counting if is_main() else None
        )
        samples = given(run.data)
        if run.eval is None:
            return samples, None
        if run.eval.fraction is not None:
            return samples.hold_out(run.eval.fraction, run.seed)
        assert run.eval.data is not None
        return samples, given(run.eval.data)


def has_dialogues(data: Data) -> bool:
    """Whether any part needs a chat template."""
    parts = [part for part, _ in data.parts] if isinstance(data, Mix) else [data]
    return any(isinstance(part, Dialogues) for part in parts)


def identity_of(samples: Samples) -> str:
    """What tells these samples from any others: the checksums of the encoded data sets, and which of it is learned."""
    parts = samples.report.get("parts", [samples.report])
    digest = hashlib.sha256("+".join(sha for part in parts for sha in part["samples_sha256"]).encode())
    for bounds in (samples.starts, samples.stops):
        digest.update(bounds.tobytes())
    return digest.hexdigest()


def cache_folder() -> Path:
    """Where encoded samples are kept for all runs of this user."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "finetuner" / "samples"


def only_run_in(home: Path) -> contextlib.AbstractContextManager[None]:
    """Holds the lock of a run's folder, on the main rank; a second run in it is refused."""
    place = home.resolve()  # one lock, by whatever name or link the folder is given
    return lock(place.parent / f".{place.name}.lock", wait=False) if is_main() else contextlib.nullcontext()
