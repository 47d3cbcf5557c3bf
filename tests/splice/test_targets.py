"What targets hold, against the model's own activations; what a change puts there, against hooks set by hand."
import pytest
import torch

from sae_lab.coders.contract import make
from sae_lab.coders.transcoder import at
from sae_lab.ground.errors import InputError, ShapeError, UnknownName
from sae_lab.ground.sparse import Codes
from sae_lab.sources.subject import Subject
from sae_lab.splice.targets import Component, Directions, Heads, Latents, Memory, Neurons, said, values_of

RESID, POST = "blocks.1.hook_resid_post", "blocks.2.mlp.hook_post"


@pytest.fixture(scope="module")
def subject():
    return Subject.bundled()


@pytest.fixture(scope="module")
def ids(subject):
    return subject.tokens(["Anna saw the cat by the river.", "The cat slept."])


def raw(subject, ids, name):
    "Activations as the model itself gives them."
    found = {}
    keep = lambda act, hook: found.update(act=act.detach().clone())
    subject.model.run_with_hooks(ids, return_type=None, fwd_hooks=[(name, keep)])
    return found["act"]


def rows(m, d=128, seed=0):
    return torch.randn(m, d, generator=torch.Generator().manual_seed(seed))


def test_values_are_the_models_own(subject, ids):
    coder = make("topk", d_in=128, d_sae=64, k=8)
    z, x, post = (raw(subject, ids, name) for name in ("blocks.1.attn.hook_z", RESID, POST))
    assert z.ndim == 4
    same = {Heads(1, (2, 0)): z[:, :, [2, 0]].flatten(2), Neurons(POST, (7, 500, 3)): post[..., [7, 500, 3]],
            Component(RESID): x, Directions(RESID, 5 * rows(3)): x @ (rows(3) / rows(3).norm(dim=1, keepdim=True)).T,
            Latents(coder, (9, 4), RESID): coder.encode(x.flatten(0, 1)).dense().unflatten(0, ids.shape)[..., [9, 4]]}
    for target, truth in same.items():
        found = target.values(subject, ids)
        assert found.shape[-1] == target.size(subject) and not found.requires_grad
        torch.testing.assert_close(found, truth.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["padded", "csr"])
def test_latents_are_gathered_from_sparse_codes(kind):
    dense = torch.randn(30, 20, generator=torch.Generator().manual_seed(1)) * (rows(30, 20) > 0.8)
    codes = Codes.from_dense(dense)
    codes = codes.csr() if kind == "csr" else codes
    for latents in ((3,), (19, 0, 7), tuple(range(20))):
        assert torch.equal(values_of(codes, latents), dense[:, list(latents)])
    assert values_of(Codes.from_dense(dense[:0]), (1, 2)).shape == (0, 2)


def test_only_the_marked_tokens_change(subject, ids):
    where = torch.rand(ids.shape, generator=torch.Generator().manual_seed(2)) < 0.4
    coder = make("topk", d_in=128, d_sae=64, k=8)
    for target in (Heads(1, (2,)), Neurons(POST, (7, 8)), Component(RESID), Directions(RESID, rows(2)),
                   Latents(coder, (1, 2), RESID)):
        (hook,) = target.write(subject)
        edits = target.edits(subject, ids, lambda v: v + 1, where)
        _, after = subject.run_with(ids, edits, hook)
        clean = subject.run_with(ids, {}, hook)[1][hook]
        assert torch.equal(after[hook][~where], clean[~where])
        assert not torch.isclose(after[hook][where], clean[where]).all(-1).any()


def test_a_direction_moves_what_it_must_and_nothing_else(subject, ids):
    "The least change that gives the coefficients: solved by least squares, in float64."
    where, target = torch.ones_like(ids, dtype=torch.bool), Directions(RESID, rows(4) + 1)
    wanted = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)  # a value of another precision
    _, after = subject.run_with(ids, target.edits(subject, ids, lambda v: v * 0 + wanted, where), RESID)
    x, unit = (each.double() for each in (subject.run(ids, RESID)[RESID].flatten(0, 1), target.rows))
    step = torch.linalg.lstsq(unit, (wanted - x @ unit.T).T, driver="gelsd").solution.T
    torch.testing.assert_close(after[RESID].flatten(0, 1).double(), x + step, rtol=1e-4, atol=1e-4)
    before = (x @ unit.T).float().unflatten(0, ids.shape)
    torch.testing.assert_close(target.values(subject, ids), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("error", ["keep", "drop"])
@pytest.mark.parametrize("kind", ["topk", "transcoder", "skip_transcoder", "standardised", "crosscoder"])
def test_latents_of_every_kind_of_splice(subject, ids, kind, error):
    "What a change of two latents writes: decode(f') with the plain reconstruction taken off, or in its place."
    mlp, pair = ("blocks.1.ln2.hook_out", "blocks.1.hook_mlp_out"), ("blocks.0.hook_resid_post", RESID)
    read, write = {"topk": (RESID, RESID), "standardised": (RESID, RESID), "crosscoder": (pair, pair)}.get(kind, mlp)
    coder = make(kind, d_sae=64, **(dict(d_in=256, widths=[128, 128]) if kind == "crosscoder" else dict(d_in=128)))
    with torch.no_grad():
        for i, each in enumerate(coder.parameters()): each.add_(rows(1, each.numel(), i).reshape(each.shape) / 8)
    target, where = Latents(at(coder, read, write), (5, 40)), torch.rand(ids.shape) < 2
    acts = subject.run(ids, target.read(subject))
    x = torch.cat([acts[name] for name in target.read(subject)], -1).flatten(0, 1)
    f = coder.encode(x).dense().detach()
    new = f.clone()
    new[:, [5, 40]] = 2 * new[:, [5, 40]] + 1
    before, after = (coder.decode(Codes.from_dense(each), x).detach() for each in (f, new))
    logits = subject.run_with(ids, target.edits(subject, ids, lambda v: 2 * v + 1, where, error))[0]
    widths, hooks = [subject.hooks[name] for name in target.write(subject)], []
    for name, plain, edited in zip(target.write(subject), before.split(widths, -1), after.split(widths, -1)):
        put = (lambda act, hook, step=edited - plain: act + step.reshape(act.shape)) if error == "keep" else (
            lambda act, hook, value=edited: value.reshape(act.shape))
        hooks.append((name, put))
    by_hand = subject.model.run_with_hooks(ids, return_type="logits", fwd_hooks=hooks)
    torch.testing.assert_close(logits, by_hand.detach(), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(logits, subject.logits(ids), atol=1e-2)


def test_codes_are_remembered_for_the_same_tokens_alone(subject, ids):
    coder, memory, x = make("topk", d_in=128, d_sae=64, k=8), Memory(), rows(20)
    key, other = (ids, ids > 0), (ids, ids > 500)
    with torch.no_grad():
        first = memory.codes(coder, key, x)
        assert memory.codes(coder, (ids.clone(), ids > 0), x * 0) is first
        assert memory.codes(coder, other, x[:5]).n == 5
        assert memory.codes(make("topk", d_in=128, d_sae=64, k=8, seed=1), key, x) is not first
    coded = memory.codes(make("topk", d_in=128, d_sae=64, k=8, seed=2), key, x)
    assert coded.values.requires_grad and len(memory._held) == 3  # what has a gradient is not kept


def test_targets_are_named():
    assert said("latent", [3]) == "latent 3" and said("head", range(9)) == "heads 0, 1, 2, 3, 4, 5 … (9 in all)"
    assert str(Heads(2, (1, 3))) == "heads 1, 3 of layer 2" and str(Component(RESID)) == RESID
    assert str(Directions(RESID, rows(2))) == f"2 directions at {RESID}"


def test_what_cannot_be_is_refused(subject, ids):
    coder = make("topk", d_in=128, d_sae=64, k=8)
    for error, match, call in (
        (InputError, "no latent", lambda: Latents(coder, ())),
        (InputError, "latent 64", lambda: Latents(coder, (64,))),
        (InputError, "latent -1", lambda: Latents(coder, (-1,))),
        (InputError, "each once", lambda: Latents(coder, (1, 1))),
        (InputError, "names no hook", lambda: Latents(coder, (1,)).values(subject, ids)),
        (ShapeError, "reads 128", lambda: Latents(coder, (1,), POST).values(subject, ids)),
        (InputError, "head 4", lambda: Heads(1, (4,)).values(subject, ids)),
        (UnknownName, "blocks.9", lambda: Heads(9, (1,)).values(subject, ids)),
        (InputError, "neuron 512", lambda: Neurons(POST, (512,)).values(subject, ids)),
        (UnknownName, "hook_post", lambda: Component("blocks.1.mlp.hook_pots").values(subject, ids)),
        (ShapeError, "width 128", lambda: Directions(POST, rows(1)).values(subject, ids)),
        (ShapeError, "rows", lambda: Directions(RESID, rows(1)[0])),
        (InputError, "length zero", lambda: Directions(RESID, torch.zeros(1, 128))),
        (InputError, "NaN", lambda: Directions(RESID, rows(1) * torch.nan)),
        (InputError, "depend on each other", lambda: Directions(RESID, torch.cat([rows(1), -2 * rows(1)]))),
    ):
        with pytest.raises(error, match=match): call()
