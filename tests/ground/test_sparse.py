"Sparse codes against their dense equivalents."

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_lab.ground import kernels
from sae_lab.ground.errors import InputError, ShapeError
from sae_lab.ground.sparse import (
    Codes,
    batch_topk_encode,
    decode,
    preacts,
    revive,
    select_batch_topk,
    select_threshold,
    select_topk,
    topk_dead,
    topk_encode,
)

quick = settings(max_examples=60, deadline=None)


def scores(n, m, seed, kind="normal"):
    g = torch.Generator().manual_seed(seed)
    if kind == "ties":
        return torch.randint(-3, 4, (n, m), generator=g).float()
    if kind == "negative":
        return -torch.rand(n, m, generator=g) - 0.1
    if kind == "sparse":
        return torch.randn(n, m, generator=g) * (torch.rand(n, m, generator=g) < 0.05)
    return torch.randn(n, m, generator=g)


shapes = {
    "n": st.integers(0, 7),
    "m": st.integers(1, 700),
    "seed": st.integers(0, 10**6),
    "kind": st.sampled_from(["normal", "ties", "negative", "sparse"]),
}


def random_codes(n, m, seed, layout, dtype=torch.float32):
    z = scores(n, m, seed, "sparse").to(dtype)
    if layout == "csr":
        return Codes.from_dense(z), z
    k = min(m, 5)
    values, indices = z.abs().topk(k, dim=1)
    values = z.gather(1, indices)
    return Codes(values, indices, m), torch.zeros_like(z).scatter(1, indices, values)


layouts = st.sampled_from(["csr", "fixed"])


@quick
@given(**shapes, share=st.floats(0.001, 1.0))
def test_topk_keeps_the_k_largest(n, m, seed, kind, share):
    pre, k = scores(n, m, seed, kind), max(1, round(share * m))
    codes = select_topk(pre, k)
    assert codes.values.shape == (n, k)
    assert torch.equal(codes.values.sort(1).values, pre.topk(k, 1).values.relu().sort(1).values)
    stored = codes.indices.long().sort(1).values
    assert (stored.diff(dim=1) > 0).all()
    assert torch.equal(codes.values, pre.gather(1, codes.indices.long()).relu())


@quick
@given(**shapes, share=st.floats(0.0001, 1.0))
def test_batch_topk_keeps_the_largest_of_the_batch(n, m, seed, kind, share):
    pre, k = scores(n, m, seed, kind), max(share * m, 1e-3)
    codes = select_batch_topk(pre, k)
    best = pre.flatten().sort(descending=True).values[: round(k * n)]
    best = best[best > 0]
    assert torch.equal(codes.values.sort(descending=True).values, best)
    rows, latents, values = codes.flat()
    assert torch.equal(pre[rows, latents], values)
    assert (rows.diff() >= 0).all() and len(set((rows * m + latents).tolist())) == len(best)


@quick
@given(**shapes, floor=st.floats(-1, 2))
def test_threshold_is_elementwise(n, m, seed, kind, floor):
    pre = scores(n, m, seed, kind)
    dense = select_threshold(pre, floor).dense()
    assert torch.equal(dense, pre * (pre > floor))
    each = torch.linspace(-1, 2, m)
    assert torch.equal(select_threshold(pre, each).dense(), pre * (pre > each))


@quick
@given(n=st.integers(0, 6), m=st.integers(1, 80), seed=st.integers(0, 10**6), layout=layouts)
def test_statistics_equal_dense(n, m, seed, layout):
    codes, z = random_codes(n, m, seed, layout)
    assert codes.shape == (n, m) and torch.equal(codes.dense(), z)
    assert torch.equal(codes.counts(), (z != 0).sum(0))
    assert torch.equal(codes.l0(), (z != 0).sum(1).float())
    torch.testing.assert_close(codes.sums(), z.sum(0))
    highest = torch.where(z != 0, z, -torch.inf).amax(0) if n else torch.full((m,), -torch.inf)
    assert torch.equal(codes.maxima(), torch.where(highest.isinf(), 0.0, highest))
    csr = codes.csr()
    assert torch.equal(csr.dense(), z) and (csr.values != 0).all()
    order = csr.rows() * m + csr.indices
    assert (order.diff() > 0).all()
    kept = codes.topk(2).dense()
    assert torch.equal(kept.abs().sort(1).values[:, -2:], z.abs().sort(1).values[:, -2:])
    assert torch.equal(codes.prefix(m // 2).dense()[:, : m // 2], z[:, : m // 2])
    assert codes.prefix(m // 2).dense()[:, m // 2 :].count_nonzero() == 0
    assert codes.prefix(m // 2).support is codes.support


@quick
@given(n=st.integers(1, 9), m=st.integers(1, 40), seed=st.integers(0, 10**6), a=layouts, b=layouts)
def test_slicing_and_joining(n, m, seed, a, b):
    one, z = random_codes(n, m, seed, a)
    two, y = random_codes(n + 1, m, seed + 1, b)
    assert torch.equal(Codes.cat([one, two]).dense(), torch.cat([z, y]))
    cut = seed % n
    assert torch.equal(Codes.cat([one[:cut], one[cut:]]).dense(), z)
    mask = torch.arange(n) % 2 == 0
    assert torch.equal(one[mask].dense(), z[mask])
    back = torch.arange(n - 1, -1, -1)
    assert torch.equal(one[back].dense(), z[back]) and torch.equal(one[-1].dense(), z[-1:])


@quick
@given(n=st.integers(0, 6), m=st.integers(1, 60), seed=st.integers(0, 10**6), layout=layouts)
def test_decode_and_its_gradients_equal_dense(n, m, seed, layout):
    codes, z = random_codes(n, m, seed, layout, torch.float64)
    W, b, to = (torch.randn(s, dtype=torch.float64) for s in ((m, 5), (5,), (n, 5)))
    W.requires_grad_(), b.requires_grad_(), codes.values.requires_grad_()
    mine = decode(codes, W, b)
    ours = torch.autograd.grad(((mine - to) ** 2).sum(), [codes.values, W, b])
    z = codes.dense()
    theirs = torch.autograd.grad(((z @ W + b - to) ** 2).sum(), [z, W, b])
    rows, latents = codes.rows(), codes.indices.reshape(-1).long()
    torch.testing.assert_close(mine, z @ W + b)
    torch.testing.assert_close(ours[0].reshape(-1), theirs[0][rows, latents])
    torch.testing.assert_close(ours[1], theirs[1])
    torch.testing.assert_close(ours[2], theirs[2])


@pytest.mark.parametrize("encode,k", [(topk_encode, 4), (batch_topk_encode, 3.5)])
@pytest.mark.parametrize("dtype,bound", [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_a_training_step_has_the_dense_gradients(encode, k, dtype, bound):
    torch.manual_seed(0)
    n, d, m = 64, 32, 256
    x = torch.randn(n, d, dtype=dtype)
    params = [torch.randn(s, dtype=dtype) / 5 for s in ((m, d), (m,), (m, d), (d,))]
    W_enc, b_enc, W_dec, b_dec = (p.requires_grad_() for p in params)
    codes = encode(x - b_dec, W_enc, b_enc, k)
    mine = torch.autograd.grad(((decode(codes, W_dec, b_dec) - x) ** 2).sum(), params)
    pre = (x - b_dec) @ W_enc.T + b_enc
    dense = (pre * (codes.dense() > 0)) @ W_dec + b_dec
    theirs = torch.autograd.grad(((dense - x) ** 2).sum(), params)
    for ours, full in zip(mine, theirs):
        assert (ours - full).norm() <= bound * full.norm()


def test_gradcheck():
    torch.manual_seed(1)
    shape = ((6, 5), (20, 5), (20,), (20, 3))
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shape]

    def through(encode, k):
        return lambda x, w, b, W_dec: decode(encode(x, w, b, k), W_dec)

    assert torch.autograd.gradcheck(through(topk_encode, 4), inputs)
    assert torch.autograd.gradcheck(through(batch_topk_encode, 2.5), inputs)
    dead = torch.arange(20) % 3 == 0
    auxiliary = lambda x, w, b, W_dec: decode(topk_dead(x, w, b, dead, 3), W_dec)
    assert torch.autograd.gradcheck(auxiliary, inputs)
    assert torch.autograd.gradcheck(lambda x, w, b, D: revive(x, w, b, D, dead, 3), inputs)
    centre = torch.randn(5, dtype=torch.float64, requires_grad=True)
    moved = lambda x, w, b, c: topk_encode(x, w, b, 4, centre=c).values
    assert torch.autograd.gradcheck(moved, [*inputs[:3], centre])


def test_dead_latents_equal_masked_selection():
    torch.manual_seed(2)
    x, w, b = torch.randn(10, 8), torch.randn(100, 8), torch.randn(100)
    dead = torch.rand(100) < 0.3
    pre = preacts(x, w, b).masked_fill(~dead, -torch.inf)
    torch.testing.assert_close(topk_dead(x, w, b, dead, 5).dense(), select_topk(pre, 5).dense())
    assert topk_dead(x, w, b, ~dead | dead, 5).l0().max() == 5
    few = torch.arange(100) < 3
    codes = topk_dead(x, w, b, few, 5)
    torch.testing.assert_close(codes.dense()[:, :3], preacts(x, w, b)[:, :3].relu())


def test_padding_gets_no_gradient():
    x, w, b = torch.ones(2, 1), torch.tensor([[1.0], [-1.0]]), torch.zeros(2)
    w.requires_grad_(), b.requires_grad_()
    codes = topk_encode(x, w, b, 2)
    codes.values.sum().backward()
    assert w.grad.tolist() == [[2.0], [0.0]] and b.grad.tolist() == [2.0, 0.0]


def test_wrong_arguments_are_named():
    with pytest.raises(ShapeError, match="indptr"):
        Codes(torch.ones(3), torch.zeros(3, dtype=torch.int32), 4)
    with pytest.raises(ShapeError, match="W_dec"):
        decode(Codes.from_dense(torch.eye(3)), torch.ones(4, 2))
    for select in (select_topk, select_batch_topk):
        for k in (0, 5):
            with pytest.raises(InputError, match="latents"):
                select(torch.ones(2, 4), k)
    with pytest.raises(InputError):
        Codes.cat([])


def test_nan_is_not_dropped():
    pre = torch.randn(4, 600)
    pre[2, 77] = torch.nan
    assert select_topk(pre, 3).values.isnan().sum() == 1
    assert select_batch_topk(pre, 3).values.isnan().any()


def test_kth_largest():
    v = torch.randn(1001)
    assert kernels.kth_largest(v, 10) == v.sort(descending=True).values[9]


@pytest.mark.parametrize("n,m,k", [(3, 20000, 7), (2, 16384, 32), (5, 4099, 40), (2, 9000, 8999)])
def test_wide_rows(n, m, k):
    pre = torch.randn(n, m, generator=torch.Generator().manual_seed(3))
    best = pre.topk(k, 1).values.relu()
    assert torch.equal(select_topk(pre, k).values.sort(1, descending=True).values, best)
    best = pre.flatten().topk(n * k).values
    mine = select_batch_topk(pre, k).values.sort(descending=True).values
    assert torch.equal(mine, best[best > 0])


def test_crowded_and_sparse_products_agree():
    codes = Codes.from_dense(scores(30, 40, 0, "sparse").double())
    W, g = torch.randn(40, 6, dtype=torch.float64), torch.randn(30, 6, dtype=torch.float64)
    crowded = Codes(codes.values, codes.indices, 40, codes.indptr)
    crowded.support.__dict__["crowded"] = True
    assert not codes.support.crowded
    for kernel, args in ((kernels.combine_rows, W), (kernels.combine_columns, g)):
        mine, theirs = (kernel(c.values, c.support, args) for c in (codes, crowded))
        torch.testing.assert_close(mine, theirs)
    mine, theirs = (kernels.dots(g, c.support, W) for c in (codes, crowded))
    torch.testing.assert_close(mine, theirs)


def test_pool_never_lends_memory_in_use():
    pool, like = kernels.Pool(), torch.zeros(1)
    one = pool.empty((1000, 100), like).fill_(1.0)
    two, part = pool.empty((1000, 100), like), one[3:5]
    where = one.data_ptr()
    del one
    assert where not in (two.data_ptr(), pool.empty((1000, 100), like).data_ptr())
    assert (part == 1).all()
    del part
    assert pool.empty((1000, 100), like).data_ptr() == where
    held = pool.nbytes
    pool.empty((1000, 100), like)
    assert pool.nbytes == held


def test_steps_with_a_pool_reuse_memory_and_change_nothing():
    torch.manual_seed(0)
    pool, x = kernels.Pool(), torch.randn(64, 32)
    shape = ((256, 32), (256,), (256, 32))
    params = [torch.randn(s).requires_grad_() for s in shape]
    for step in range(4):
        grads = []
        for memory in (None, pool):
            codes = topk_encode(x, params[0], params[1], 4, pool=memory)
            loss = (decode(codes, params[2], pool=memory) - x).square().sum()
            loss = loss + decode(codes, params[2], pool=memory).square().sum()
            grads.append(torch.autograd.grad(loss, params))
        for plain, pooled in zip(*grads):
            torch.testing.assert_close(plain, pooled)
        if step == 1:
            held = pool.nbytes
    assert pool.nbytes == held


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_equals_cpu():
    torch.manual_seed(0)
    x, w, b, W_dec = (torch.randn(s) for s in ((64, 32), (512, 32), (512,), (512, 32)))
    for encode in (topk_encode, batch_topk_encode):
        answers = []
        for device in ("cpu", "cuda"):
            args = [t.detach().to(device).requires_grad_() for t in (x, w, b, W_dec)]
            y = decode(encode(*args[:3], 5), args[3])
            answers.append([y, *torch.autograd.grad(y.square().sum(), args)])
        for cpu, cuda in zip(*answers):
            torch.testing.assert_close(cpu, cuda.cpu(), rtol=1e-4, atol=1e-4)
