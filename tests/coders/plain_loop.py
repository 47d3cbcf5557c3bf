"A loop written out plainly, so that coders are tested without the one that trains them in earnest."
from dataclasses import replace

import torch

from sae_lab.coders.contract import Hints, coders, fold


def small(kind):
    "The recipe of a kind with batches of 256: some hundred steps from few tokens."
    return replace(coders[kind].meta["recipe"], batch=256)


def _constrain(coder):
    grad, rows = coder.dec.grad, coder.dec.detach()
    grad -= (grad * rows).sum(1, keepdim=True) * rows


def train(coder, x, recipe, objective=None, steps=None, scale=None, dtype=torch.float32):
    "Adam with the recipe's schedule, norm constraint, clipping and count of silence; (folded coder, losses)."
    scale = scale or (float(x.shape[1] ** 0.5 / x.norm(dim=1).mean()) if recipe.scale else 1.0)
    x, size = (x * scale).to(dtype), recipe.batch
    coder, objective = coder.to(dtype), objective or recipe.objective
    coder.b_dec.data.copy_(x.mean(0))
    steps = steps or len(x) // size
    adam = torch.optim.Adam(coder.parameters(), lr=1.0, betas=recipe.betas, eps=recipe.eps, fused=True)
    silent, window = torch.zeros(coder.d_sae), recipe.dead_window(steps * size)
    losses = []
    for step in range(steps):
        at = step * size % (len(x) - size + 1)
        batch = x[at:at + size]
        loss = objective(coder, batch, batch, Hints(silent >= window, step, steps))
        adam.zero_grad(set_to_none=True)
        loss.total.backward()
        if recipe.unit_norm: _constrain(coder)
        if recipe.clip: torch.nn.utils.clip_grad_norm_(coder.parameters(), recipe.clip)
        rise, fall = (step + 1) / max(1, recipe.warmup * steps), (steps - step) / max(1, recipe.decay * steps)
        adam.param_groups[0]["lr"] = recipe.rate(coder.d_sae) * min(1.0, rise, fall)
        adam.step()
        if recipe.unit_norm: coder.dec.data /= coder.dec.data.norm(dim=1, keepdim=True)
        for name, value in loss.updates.items(): coder.get_buffer(name).copy_(value)
        silent = torch.where(loss.codes.counts() > 0, 0.0, silent + size)
        losses.append(float(loss.total.detach()))
    return fold(coder, scale), torch.tensor(losses), int((silent >= window).sum())


def gradients(total, coder):
    "The gradient of each parameter by name."
    names, parameters = zip(*coder.named_parameters())
    return dict(zip(names, torch.autograd.grad(total, parameters, allow_unused=True)))


def distances(mine, other):
    "Relative distance of each gradient, by name."
    return {name: float((mine[name] - other[name]).norm() / other[name].norm()) for name in other
            if other[name] is not None}
