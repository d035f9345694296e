"""The attention by itself: each way that it takes against attention by its definition."""

from __future__ import annotations

import inspect
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.attention.varlen as varlen
from model_rig import CPU, folder_of, gradients, learner_of, oracle, row, worst

from finetuner.model import attention
from finetuner.model import documents_apart as module
from finetuner.model.documents_apart import Documents, Unserved, by_document, by_kernel, documents_apart

LENGTHS = (6, 4, 4, 4, 1, 5, 5)


def drawn(heads=4, groups=2, size=8, value=8, lengths=LENGTHS, dtype=torch.float32):
    """Query, key and value of a row."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((heads, size), (groups, size), (groups, value))
    return [torch.randn(1, h, sum(lengths), d, generator=generator, dtype=dtype).requires_grad_() for h, d in shapes]


def definition(query_THD, key_TGD, value_TGE, borders, scale, window_size):
    """Attention of each head in each document: scores, mask, softmax, sum."""
    parts, times = [], query_THD.shape[1] // key_TGD.shape[1]
    left, right = window_size
    assert right == 0, "no token sees a later one"
    for begin, end in pairwise(borders):
        back_LL = torch.arange(end - begin)[:, None] - torch.arange(end - begin)[None, :]
        seen_LL = (back_LL >= 0) & (back_LL <= (left if left >= 0 else end))
        heads = []
        for head in range(query_THD.shape[1]):
            query_LD, key_LD, value_LE = (
                x[begin:end, number].float()
                for x, number in ((query_THD, head), (key_TGD, head // times), (value_TGE, head // times))
            )
            scores_LL = (query_LD @ key_LD.t() * scale).masked_fill(~seen_LL, -torch.inf)
            heads.append(scores_LL.softmax(-1) @ value_LE)
        parts.append(torch.stack(heads, 1))
    return torch.cat(parts).to(query_THD.dtype)


def by_definition(query, key, value, lengths, window, scaling):
    """The oracle of the whole: (1, T, H, E)."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    sizes = (-1 if window is None else window - 1, 0)
    given = (x[0].transpose(0, 1) for x in (query, key, value))
    return definition(*given, borders_of(lengths), scale, sizes)[None]


def borders_of(lengths):
    ends = [0]
    for length in lengths:
        ends.append(ends[-1] + length)
    return ends


def kernel(*, grouped, calls):
    """torch's varlen kernel as it stands in 2.13, or, without grouped heads, in 2.11; refuses what that one refuses."""

    def work(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size):
        assert cu_seq_q is cu_seq_k
        assert cu_seq_q.dtype == torch.int32
        borders = cu_seq_q.tolist()
        assert borders[0] == 0
        assert borders[-1] == len(query) == len(key) == len(value)
        assert max_q == max_k == max(end - begin for begin, end in pairwise(borders))
        assert query.dtype == key.dtype == value.dtype
        assert query.shape[-1] == key.shape[-1] == value.shape[-1] <= 256
        assert query.shape[-1] % 8 == 0
        assert all(x.stride(-1) == 1 for x in (query, key, value))
        calls.append(cu_seq_q)
        return definition(query, key, value, borders, query.shape[-1] ** -0.5 if scale is None else scale, window_size)

    if not grouped:

        def varlen_attn(
            query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
        ):
            assert query.shape[1] == key.shape[1]
            return work(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)
    else:

        def varlen_attn(
            query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
            enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
        ):  # fmt: skip
            if not enable_gqa and query.shape[1] != key.shape[1]:
                raise ValueError("Expect query and key/value to have the same number of heads")
            return work(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)

    return varlen_attn


@pytest.fixture(params=[True, False], ids=["2.13", "2.11"])
def calls(request, monkeypatch):
    """Borders that the kernel was given, one a call; each of torch's two kernels in turn."""
    given = []
    monkeypatch.setattr(varlen, "varlen_attn", kernel(grouped=request.param, calls=given))
    module.varlen_parameters.cache_clear()
    yield given
    module.varlen_parameters.cache_clear()


def test_the_stand_in_has_the_kernels_parameters():
    theirs = inspect.signature(varlen.varlen_attn).parameters
    grouped = "enable_gqa" in theirs
    assert set(inspect.signature(kernel(grouped=grouped, calls=[])).parameters) <= set(theirs)


def same(one, other, row_of):
    """Values and gradients, of two ways over rows of their own."""
    results = []
    for way, tensors in zip((one, other), row_of):
        out = way(*tensors)
        (out * torch.linspace(-1, 2, out.numel()).view_as(out)).sum().backward()
        results.append([out, *(x.grad for x in tensors)])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


SHAPES = {"plain": (4, 4, 8, 8), "grouped": (4, 2, 8, 8), "one group": (4, 1, 8, 8), "odd": (4, 2, 12, 12),
          "latent": (4, 4, 12, 8)}  # fmt: skip


@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize("window", [None, 1, 3, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_is_given_what_makes_it_exact(shape, window, scaling, calls):
    borders = attention.borders_of(LENGTHS, CPU)
    same(
        lambda q, k, v: by_kernel(q, k, v, borders, max(LENGTHS), window, scaling),
        lambda q, k, v: by_definition(q, k, v, LENGTHS, window, scaling),
        (drawn(*SHAPES[shape]), drawn(*SHAPES[shape])),
    )
    assert len(calls) == 1


@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize("window", [None, 1, 3, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_one_sdpa_for_documents_of_a_length_is_exact(shape, window, scaling, monkeypatch):
    monkeypatch.setattr(module, "PIECE", 2)
    same(
        lambda q, k, v: by_document(q, k, v, LENGTHS, window, scaling, 0.0),
        lambda q, k, v: by_definition(q, k, v, LENGTHS, window, scaling),
        (drawn(*SHAPES[shape]), drawn(*SHAPES[shape])),
    )


@pytest.mark.parametrize("all_heads", [False, True])
def test_heads_repeated_for_a_gpu_are_exact(all_heads, monkeypatch):
    monkeypatch.setattr(module, "needs_all_heads", lambda *_: all_heads)
    same(
        lambda q, k, v: by_document(q, k, v, LENGTHS, None, None, 0.0),
        lambda q, k, v: by_definition(q, k, v, LENGTHS, None, None),
        (drawn(), drawn()),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_documents_of_one_length_share_a_call_and_change_no_bit(dtype, monkeypatch):
    real, shapes = module.sdpa, []
    monkeypatch.setattr(module, "sdpa", lambda q, *rest: shapes.append(tuple(q.shape)) or real(q, *rest))
    lengths = (40, 16, 16, 16, 3, 3, 40)
    together = drawn(lengths=lengths, dtype=dtype)
    out = by_document(*together, lengths, None, None, 0.0)
    whole = [(1, 40), (3, 16), (2, 3), (1, 40)] if dtype == torch.float32 else [(7, 64)]  # see `sizes.py`
    assert [(shape[0], shape[2]) for shape in shapes] == whole
    alone = drawn(lengths=lengths, dtype=dtype)
    parts = [by_document(*part, (length,), None, None, 0.0) for length, part in zip(lengths, split(alone, lengths))]
    for result in (out, torch.cat(parts, 1)):
        (result * torch.linspace(-1, 2, result.numel()).view_as(result)).sum().backward()
    assert torch.equal(out, torch.cat(parts, 1))
    assert all(torch.equal(one.grad, other.grad) for one, other in zip(together, alone))


def split(tensors, lengths):
    return zip(*(torch.split(x, list(lengths), 2) for x in tensors))


def test_a_window_over_a_long_document_makes_no_mask_of_its_square(monkeypatch):
    real, masks = module.sdpa, []
    monkeypatch.setattr(module, "sdpa", lambda q, k, v, mask, *rest: masks.append(mask) or real(q, k, v, mask, *rest))
    lengths = (1000, 20)
    same(
        lambda q, k, v: by_document(q, k, v, lengths, 50, None, 0.0),
        lambda q, k, v: by_definition(q, k, v, lengths, 50, None),
        (drawn(2, 1, lengths=lengths), drawn(2, 1, lengths=lengths)),
    )
    assert masks[-1] is None, "a document within the window needs none"
    assert all(mask.dtype == torch.bool and mask.numel() <= 256 * (256 + 50) for mask in masks[:-1])
    assert len(masks) == 5


def ask(tensors, documents, **options):
    layer = SimpleNamespace(is_causal=True)
    return documents_apart(layer, *tensors, None, documents=documents, **options)[0]


def with_borders(lengths):
    return Documents(lengths, max(lengths), attention.borders_of(lengths, CPU))


HALF = {"dtype": torch.bfloat16}


def test_the_kernel_is_taken_in_half_precision_where_it_is_of_use(calls):
    """Borders are there on a GPU only; each case says how often the kernel is called."""
    several, one = with_borders(LENGTHS), with_borders((29,))
    ask(drawn(**HALF), several)
    assert len(calls) == 1
    ask(drawn(**HALF), one, sliding_window=4)
    assert len(calls) == 2
    for tensors, documents, options in (
        (drawn(**HALF), one, {}),
        (drawn(**HALF), one, {"sliding_window": 29}),
        (drawn(), several, {}),
        (drawn(**HALF), several, {"dropout": 0.1}),
        (drawn(size=264, value=264, **HALF), several, {}),
        (drawn(**HALF), Documents(LENGTHS, max(LENGTHS)), {}),
    ):
        ask(tensors, documents, **options)
    assert len(calls) == 2


def test_under_autocast_float32_queries_reach_the_kernel_in_half_precision(calls):
    """As they come of float32 norms, rotary tables or residuals; a value is bfloat16 already."""
    query, key, value = drawn()
    with torch.autocast("cpu", torch.bfloat16):
        out = ask((query, key, value.bfloat16()), with_borders(LENGTHS))
    assert len(calls) == 1
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"softcap": 30.0}, "softcap"),
        ({"s_aux": torch.ones(4)}, "s_aux"),
        ({"position_bias": torch.ones(4)}, "position_bias"),
        ({"is_causal": False}, "later tokens"),
    ],
)
def test_what_it_is_not_is_told(options, why):
    with pytest.raises(Unserved, match=why):
        ask(drawn(), with_borders(LENGTHS), **options)


def test_a_mask_or_no_documents_are_told():
    tensors = drawn()
    with pytest.raises(Unserved, match="mask"):
        documents_apart(SimpleNamespace(is_causal=True), *tensors, torch.ones(29, 29), documents=with_borders(LENGTHS))
    with pytest.raises(Unserved, match="no documents"):
        documents_apart(SimpleNamespace(is_causal=True), *tensors, None)
    with pytest.raises(Unserved, match="later tokens"):
        documents_apart(SimpleNamespace(is_causal=False), *tensors, None, documents=with_borders(LENGTHS))


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3"])
def test_a_model_learns_through_the_kernel_with_borders_made_once_a_row(kind, tmp_path, monkeypatch, calls):
    """As on a GPU, in full training: float32 weights under autocast."""
    folder, batch = folder_of(kind, tmp_path), row((7, 9, 9, 1, 5))
    real = attention.arguments

    def as_on_a_gpu(name, lengths, device):
        return real(name, lengths, device) | {"documents": with_borders(lengths)}

    monkeypatch.setattr(attention, "arguments", as_on_a_gpu)
    learner = learner_of(folder, dtype="bfloat16", checkpointing=True)
    calls.clear()
    loss, grads = gradients(learner, batch)
    assert len(calls) == 4, "two layers, each made twice"
    assert all(borders is calls[0] for borders in calls)
    true_loss, true_grads = oracle(folder, batch)
    assert loss == pytest.approx(true_loss, rel=2e-3)
    assert worst(grads, true_grads) < 0.1
    blind = varlen.varlen_attn
    monkeypatch.setattr(
        varlen, "varlen_attn", lambda *given, **options: blind(*given, **options | {"window_size": (0, 0)})
    )
    mutant = gradients(learner_of(folder, dtype="bfloat16"), batch)[1]
    assert worst(mutant, true_grads) > 0.1, "the mutant, whose tokens see themselves alone, is seen"


def test_borders_are_the_sums_of_the_lengths():
    borders = attention.borders_of((3, 2), CPU)
    assert borders.tolist() == [0, 3, 5]
    assert borders.dtype == torch.int32
    given = attention.arguments("finetuner", (3, 2), CPU)["documents"]
    assert (given.lengths, given.longest, given.borders) == ((3, 2), 3, None)
    assert attention.arguments("sdpa", (3, 2), CPU) == {}
