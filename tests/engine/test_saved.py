"""Whatever ranks wrote a state, any ranks read it: each element comes back by name, bit for bit, or none does."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from finetuner.engine import restore, saved, state
from finetuner.engine.restore import load_state
from finetuner.engine.saved import open_state
from finetuner.engine.state import State, entry, write_state
from finetuner.errors import CheckpointError

SHAPES = {"a.weight": (5, 4), "a.bias": (7,), "norm": (1,), "b.weight": (2, 3, 2), "last": (11,)}
MOMENTS = ("exp_avg", "exp_avg_sq")


def whole(shapes=SHAPES, seed=0):
    """Masters and moments of one moment of training, whole."""
    generator = torch.Generator().manual_seed(seed)
    masters = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    moments = {
        f"{key}/{name}": torch.randn(shape, generator=generator) for name, shape in shapes.items() for key in MOMENTS
    }
    return masters, moments


def part(masters, moments, bounds, step=3.0):
    """The state of a rank that holds start..stop of the whole, counted through all parameters one after the other."""
    start, stop = bounds
    begin, own, parts, parameters, held = 0, {}, {}, {}, {}
    for name, tensor in masters.items():
        low, high = max(start, begin) - begin, min(stop, begin + tensor.numel()) - begin
        begin += tensor.numel()
        if low >= high:
            continue
        is_whole = high - low == tensor.numel()
        cut = lambda t, low=low, high=high, w=is_whole: t if w else t.flatten()[low:high]  # noqa: E731
        parts[name], own[name] = (low, high), cut(tensor)
        parameters[name] = entry(tensor.shape, [*MOMENTS, "step"])
        held |= {f"{key}/{name}": cut(moments[f"{key}/{name}"]) for key in MOMENTS}
        held[f"step/{name}"] = torch.tensor(step)
    return State("AdamW", parameters, held, own, parts)


def split(total, cuts):
    """Bounds of the ranks: 0..c0, c0..c1, ..., some of them maybe empty."""
    edges = [0, *sorted(cuts), total]
    return list(itertools.pairwise(edges))


def write(folder, bounds, *, steps=None, seed=0, shapes=SHAPES):
    shutil.rmtree(folder, ignore_errors=True)
    masters, moments = whole(shapes, seed)
    for rank, own in enumerate(bounds):
        step = 3.0 if steps is None else steps[rank]
        write_state(folder, part(masters, moments, own, step), rank, len(bounds), numbers={"seed": seed})
    return masters, moments


TOTAL = sum(math.prod(shape) for shape in SHAPES.values())
SPLITS = {1: [], 2: [23], 3: [1, 33], 5: [3, 20, 21, 40]}


def reads_whole(folder, masters, moments):
    """Whether each range of each parameter, whole and cut at each place, is what was written."""
    opened = open_state(folder)
    for name, tensor in masters.items():
        size = tensor.numel()
        for low, high in [(0, size)] + [(a, b) for a in range(size) for b in (a + 1, size) if a < b]:
            if not torch.equal(opened.master(name, low, high), tensor.flatten()[low:high]):
                return False
            for key in MOMENTS:
                wanted = moments[f"{key}/{name}"].flatten()[low:high]
                if not torch.equal(opened.moment(key, name, low, high), wanted):
                    return False
    return all(opened.single("step", name) == 3.0 for name in masters)


@pytest.mark.parametrize("world", SPLITS)
def test_what_ranks_wrote_is_read_in_any_ranges(world, tmp_path):
    masters, moments = write(tmp_path / "state", split(TOTAL, SPLITS[world]))
    assert reads_whole(tmp_path / "state", masters, moments)
    assert open_state(tmp_path / "state").numbers == {"seed": 0}


def test_one_rank_writes_the_names_and_the_text_of_a_run_in_one_process(tmp_path):
    write(tmp_path / "state", [(0, TOTAL)])
    assert {path.name for path in (tmp_path / "state").iterdir()} == {
        "masters.safetensors", "optimizer.safetensors", "state.json"}  # fmt: skip
    assert set(json.loads((tmp_path / "state" / "state.json").read_text())) == {"numbers", "optimizer", "parameters"}


shapes = st.lists(st.lists(st.integers(1, 4), min_size=0, max_size=3), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(shapes=shapes, data=st.data())
def test_any_split_is_put_together_to_the_bit_and_split_again(shapes, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("split") / "state"
    named = {f"p{number}": tuple(shape) for number, shape in enumerate(shapes)}
    total = sum(math.prod(shape) for shape in named.values())
    cuts = data.draw(st.lists(st.integers(0, total), max_size=4))
    masters, moments = write(folder, split(total, cuts), shapes=named)
    opened = open_state(folder)
    edges = data.draw(st.lists(st.integers(0, total), max_size=4))
    for bounds in split(total, edges):
        for name, (low, high) in part(masters, moments, bounds).parts.items():
            assert torch.equal(opened.master(name, low, high), masters[name].flatten()[low:high])
            for key in MOMENTS:
                wanted = moments[f"{key}/{name}"].flatten()[low:high]
                assert torch.equal(opened.moment(key, name, low, high), wanted)


def optimizer(shapes=SHAPES):
    named = [(name, torch.nn.Parameter(torch.zeros(shape))) for name, shape in shapes.items()]
    return torch.optim.AdamW([{"params": named[:2]}, {"params": named[2:]}], lr=0.1)


def test_plain_torch_goes_on_from_what_ranks_wrote(tmp_path):
    masters, moments = write(tmp_path / "state", split(TOTAL, SPLITS[5]))
    target = optimizer()
    loaded = load_state(tmp_path / "state", target)
    assert all(torch.equal(loaded[name], value) for name, value in masters.items())
    for name, parameter, _ in state.named_parameters(target):
        held = target.state[parameter]
        assert all(torch.equal(held[key], moments[f"{key}/{name}"]) for key in MOMENTS)
        assert held["step"] == 3.0


def test_only_the_asked_for_elements_are_read(tmp_path, monkeypatch):
    write(tmp_path / "state", [(0, 64)], shapes={"w": (16, 4)})
    seen = []
    monkeypatch.setattr(saved, "check_sound", lambda _, tensors: seen.extend(t.numel() for t in tensors.values()))
    opened = open_state(tmp_path / "state")
    assert not seen
    opened.master("w", 5, 11)
    assert seen == [6]


OFF_BY_ONE = {
    "the part begins one later": lambda self, name, start, stop, right: right(self, name, start + 1, stop + 1),
    "rows are cut from the wrong place": lambda self, name, start, stop, right: right(self, name, 0, stop - start),
}


@pytest.mark.parametrize("mutant", OFF_BY_ONE)
def test_the_law_sees_a_reader_that_is_off(mutant, tmp_path, monkeypatch):
    masters, moments = write(tmp_path / "state", split(TOTAL, SPLITS[3]), shapes=SHAPES)
    right = saved.Tensors.elements
    wrong = OFF_BY_ONE[mutant]
    monkeypatch.setattr(saved, "check_sound", lambda *_: None)
    monkeypatch.setattr(saved.Tensors, "elements", lambda self, name, a, b: wrong(self, name, a, b, right))
    with contextlib.suppress(RuntimeError):  # pieces of other lengths than the places they are for
        assert not reads_whole(tmp_path / "state", masters, moments)


def describe(folder, rank, change):
    path = folder / f"state-{rank}-of-3.json"
    body = json.loads(path.read_text())
    change(body)
    path.write_text(json.dumps(body))


def rewrite(folder, file, change):
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file)


def shrunk(folder):
    """Rank 1 lost the last element of what it held, and says so."""
    describe(folder, 1, lambda body: body["parts"].update({"a.weight": [1, 19]}))
    for file, names in (("masters", [""]), ("optimizer", ["exp_avg/", "exp_avg_sq/"])):
        cut = lambda t, keys=names: t.update({f"{k}a.weight": t[f"{k}a.weight"][:-1].clone() for k in keys})  # noqa: E731
        rewrite(folder, f"{file}-1-of-3.safetensors", cut)


BROKEN = {
    "a shard is missing": (lambda f: (f / "masters-1-of-3.safetensors").unlink(), "E-STATE-FILE", "masters-1-of-3"),
    "a rank's files are missing": (lambda f: [p.unlink() for p in f.glob("*-2-of-3*")], "E-STATE-FILE", "state-2-of-3"),
    "a shard is torn": (
        lambda f: (f / "optimizer-0-of-3.safetensors").write_bytes(b"PK"), "E-STATE-FILE", "optimizer-0-of-3"),
    "elements are in no file": (shrunk, "E-STATE-PARTS", "a.weight"),
    "a rank says that it holds more": (
        lambda f: describe(f, 1, lambda b: b["parts"].update({"a.weight": [0, 20]})), "E-STATE-SHAPE", "a.weight"),
    "a range is not one": (lambda f: describe(f, 1, lambda b: b["parts"].update({"a.weight": 5})),
        "E-STATE-FILE", "state-1-of-3"),
    "a rank lost a parameter": (
        lambda f: describe(f, 1, lambda b: b["parts"].pop("a.bias")), "E-STATE-NAMES", "a.bias"),
    "a shape differs": (lambda f: describe(f, 1, lambda b: b["parameters"]["a.weight"].update(shape=[20])),
        "E-STATE-MIXED", "a.weight"),
    "another optimizer's shard": (
        lambda f: describe(f, 2, lambda b: b.update(optimizer="SGD")), "E-STATE-MIXED", "SGD"),
    "other numbers": (lambda f: describe(f, 2, lambda b: b.update(numbers={})), "E-STATE-MIXED", "numbers"),
    "two numbers of ranks": (
        lambda f: shutil.copy(f / "state-0-of-3.json", f / "state-0-of-2.json"), "E-STATE-MIXED", "2 ranks"),
    "a shard is not finite": (
        lambda f: rewrite(f, "masters-1-of-3.safetensors", lambda t: t["a.bias"].fill_(torch.nan)),
        "E-STATE-NONFINITE", "a.bias"),
    "a shard is empty": (
        lambda f: rewrite(f, "masters-1-of-3.safetensors", lambda t: t.update({"a.bias": torch.ones(0)})),
        "E-STATE-EMPTY", "a.bias"),
    "an unknown tensor": (lambda f: rewrite(f, "optimizer-1-of-3.safetensors", lambda t: t.update(x=torch.ones(1))),
        "E-STATE-NAMES", "unexpected x"),
}  # fmt: skip


@pytest.mark.parametrize("how", BROKEN)
def test_what_does_not_hold_together_is_refused_by_name(how, tmp_path):
    change, code, names = BROKEN[how]
    folder = tmp_path / "state"
    write(folder, split(TOTAL, SPLITS[3]))
    change(folder)
    with pytest.raises(CheckpointError) as caught:
        load_state(folder, optimizer())
    assert code in str(caught.value)
    assert names in str(caught.value)


def test_a_shard_of_another_step_is_refused(tmp_path):
    write(tmp_path / "state", split(TOTAL, SPLITS[2]), steps=[3.0, 4.0])
    with pytest.raises(CheckpointError, match="E-STATE-MIXED"):
        load_state(tmp_path / "state", optimizer())


def test_the_mixed_step_check_is_not_vacuous(tmp_path, monkeypatch):
    write(tmp_path / "state", split(TOTAL, SPLITS[2]), steps=[3.0, 4.0])
    monkeypatch.setattr(saved.Saved, "single", lambda self, key, name: torch.tensor(3.0))
    load_state(tmp_path / "state", optimizer())


@pytest.mark.parametrize(("change", "code"), [({"a.bias": (8,)}, "E-STATE-SHAPE"), ({"x": (1,)}, "E-STATE-NAMES")])
def test_another_model_is_refused(change, code, tmp_path):
    write(tmp_path / "state", split(TOTAL, SPLITS[2]))
    with pytest.raises(CheckpointError, match=code):
        restore.load_state(tmp_path / "state", optimizer({**SHAPES, **change}))


def test_a_part_that_is_not_what_it_says_is_never_written(tmp_path):
    masters, moments = whole()
    own = part(masters, moments, (0, 23))
    own.parts["a.bias"] = (0, 4)
    with pytest.raises(AssertionError):
        write_state(tmp_path / "state", own, 0, 2)
