"Schedule, norm constraint, clipping and Adam against closed forms and plain references."
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_lab.training.optimiser import adam, clip_, gradient_norm, remove_parallel_, schedule, unit_rows_


@given(st.integers(1, 10_000), st.floats(0, 0.5), st.floats(0, 0.5))
@settings(max_examples=50, deadline=None)
def test_schedule_is_a_trapezium(steps, warmup, decay):
    "Never 0, never above 1, up, level, down; 1 somewhere when the shares leave room."
    rates = [schedule(t, steps, warmup, decay) for t in range(steps)]
    assert all(0 < r <= 1 for r in rates)
    top = rates.index(max(rates))
    assert all(a <= b + 1e-12 for a, b in zip(rates[:top], rates[1 : top + 1]))
    assert all(a >= b - 1e-12 for a, b in zip(rates[top:], rates[top + 1 :]))


def test_schedule_closed_form():
    "Linear on both sides, and without shares always 1."
    assert [schedule(t, 1000, 0.05, 0.2) for t in (0, 24, 49, 500, 800, 900, 999)] == pytest.approx(
        [1 / 50, 0.5, 1, 1, 1, 0.5, 1 / 200])
    assert {schedule(t, 100, 0, 0) for t in range(100)} == {1.0}


@pytest.mark.parametrize("shape", [(7, 5), (3000, 300)])  # within a block, and several blocks
def test_norm_constraint_equals_naive_float64(shape):
    "The part along each row is gone, the rest untouched, and rows have length 1."
    torch.manual_seed(0)
    rows, grad = unit_rows_(torch.randn(shape)), torch.randn(shape)
    r, g = rows.double(), grad.double()
    want = g - (g * r).sum(1, keepdim=True) * r
    assert torch.allclose(remove_parallel_(grad.clone(), rows).double(), want, atol=1e-6)
    longer = torch.randn(shape) * 3
    want = longer.double() / longer.double().norm(dim=1, keepdim=True)
    assert torch.allclose(unit_rows_(longer).double(), want, atol=1e-6)


def test_a_row_of_zeros_stays_finite():
    "Normalising nothing gives nothing, not NaN."
    assert unit_rows_(torch.zeros(2, 3)).eq(0).all()


@pytest.mark.parametrize("limit", [None, 0.1, 1.0, 1e6])
def test_clipping_equals_torch(limit):
    "Same norm, same gradients as torch.nn.utils.clip_grad_norm_."
    torch.manual_seed(1)
    mine = [torch.nn.Parameter(torch.zeros(s)) for s in ((40, 30), (30,), (1,))]
    other = [torch.nn.Parameter(p.detach().clone()) for p in mine]
    for a, b in zip(mine, other): a.grad = torch.randn_like(a); b.grad = a.grad.clone()
    norm = gradient_norm([p.grad for p in mine])
    assert norm == pytest.approx(float(torch.nn.utils.clip_grad_norm_(other, limit or math.inf)), rel=1e-6)
    clip_([p.grad for p in mine], norm, limit)
    for a, b in zip(mine, other): assert torch.allclose(a.grad, b.grad, rtol=1e-5, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_gradient_norm_shows_what_is_not_finite(bad):
    "One bad number anywhere makes the norm say so."
    assert not math.isfinite(gradient_norm([torch.ones(3), torch.tensor([1.0, bad])]))


def test_fused_adam_equals_textbook_adam_in_float64():
    "Kingma and Ba's algorithm 1, with bias correction, over 50 steps of a changing rate."
    torch.manual_seed(2)
    start, betas, eps = torch.randn(60), (0.9, 0.99), 1e-8
    p = torch.nn.Parameter(start.clone())
    optimiser, x, m, v = adam({"p": p}, 1.0, betas, eps), start.double(), 0.0, 0.0
    for t in range(1, 51):
        g, lr = torch.randn(60) + 0.3, 1e-2 * schedule(t - 1, 50, 0.2, 0.4)
        p.grad = g.clone()
        optimiser.param_groups[0]["lr"] = lr
        optimiser.step()
        g = g.double()
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g**2
        x = x - lr * (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps)
    assert torch.allclose(p.detach().double(), x, atol=1e-6)
