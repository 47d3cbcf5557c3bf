"Estimates against true patches: exact where all is linear, complete by integration, ranked as the truth on prompts."
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from sae_lab.causal.attribution import attribute, check, compare, completeness
from sae_lab.causal.metrics import Metric, kl, logit_difference
from sae_lab.causal.moves import in_groups, moves, radau, sites
from sae_lab.causal.pairs import indirect_object_pairs
from sae_lab.coders.contract import make
from sae_lab.coders.transcoder import at
from sae_lab.ground.errors import InputError, ShapeError
from sae_lab.sources.bridge import native
from sae_lab.sources.corpus import named
from sae_lab.sources.stream import Stream
from sae_lab.sources.subject import Subject
from sae_lab.splice.edits import swap
from sae_lab.splice.targets import Latents
from sae_lab.training.fit import train

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def subject(): return Subject.bundled()


@pytest.fixture(scope="module")
def coder(subject):
    "A small dictionary, trained for some seconds."
    tokens = named("bundled").split("fit", seed=0).tokens(subject, 40_000)
    made = at(make("topk", d_in=subject.d_model, d_sae=512, k=16), HOOK)
    (made,) = train(made, Stream(subject, tokens, HOOK, batch=1024, seed=0), progress=False, seed=0).values()
    return made


@pytest.fixture(scope="module")
def linear():
    "The last place of a model without norms: the logits are linear in it."
    model = native(d_model=16, d_head=8, n_layers=1, n_ctx=8, n_heads=2, d_vocab=30, act_fn="gelu",
                   normalization_type=None)
    subject, hook = Subject.wrap(model), "blocks.0.hook_resid_post"
    g = torch.Generator().manual_seed(0)
    clean = torch.randint(30, (4, 6), generator=g)
    return subject, at(make("topk", d_in=16, d_sae=64, k=4), hook), clean


def test_where_all_is_linear_one_gradient_is_the_truth(linear):
    subject, coder, clean = linear
    metric = Metric("a logit", "logits", lambda logits, tokens: logits[:, -1, 3] - logits[:, -1, 5])
    for method in ("atp", "ig"):
        found = attribute(subject, coder, clean, metric, method)
        checked = check(found, errors=True)
        np.testing.assert_allclose(checked.table["estimate"], checked.table["true"], rtol=1e-3, atol=2e-5)
        whole = completeness(found)
        np.testing.assert_allclose(whole["total"], whole["whole"], rtol=1e-3, atol=1e-4)


def test_the_error_is_a_node_of_its_own(linear):
    subject, coder, clean = linear
    metric = Metric("a logit", "logits", lambda logits, tokens: logits[:, -1, 3])
    found = attribute(subject, coder, clean, metric)
    error = found.nodes[found.nodes.latent == -1]
    assert len(error) == clean.numel()
    hook = coder.spec.hooks_in[0]
    x = subject.run(clean, hook)[hook][:, -1]
    with torch.no_grad(): gap = x - coder(x)[1]
    hand = -gap @ subject.model.W_U[:, 3]
    at_end = error[error.position == clean.shape[1] - 1]
    torch.testing.assert_close(at_end.effect, hand.detach(), rtol=1e-4, atol=1e-5)


def test_a_true_patch_is_a_swap(subject, coder):
    pairs = indirect_object_pairs(subject, 3)
    metric = logit_difference(pairs)
    checked = check(attribute(subject, coder, pairs, metric), top=6, by="node")
    base = metric(subject.logits(pairs.clean), pairs.clean)
    for row in checked.table.to_dict("records"):
        where = torch.zeros_like(pairs.mask)
        where[int(row["prompt"]), int(row["position"])] = True
        edit = swap(Latents(coder, (int(row["latent"]),)), pairs.corrupt, at=where)
        after = metric(subject.run_with(pairs.clean, edit.edits(subject, pairs.clean))[0], pairs.clean)
        assert row["true"] == pytest.approx(float((after - base)[int(row["prompt"])]), abs=2e-4)


def test_integration_is_complete(subject, coder):
    "Along one straight way the estimates of latents and error add up to the whole change."
    pairs = indirect_object_pairs(subject, 8)
    gaps = {}
    for method, settings in (("atp", {}), ("ig", {"steps": 12, "groups": 1})):
        found = completeness(attribute(subject, coder, pairs, logit_difference(pairs), method, **settings))
        gaps[method] = float((found["total"] - found["whole"]).abs().mean() / found["whole"].abs().mean())
    assert gaps["ig"] < 0.02 < gaps["atp"]


def test_ranks_of_64_indirect_objects(subject, coder):
    "Every latent that is active on either prompt of 64 pairs, each patched by itself: rank correlation at least 0.9."
    pairs = indirect_object_pairs(subject, 64)
    checked = check(attribute(subject, coder, pairs, logit_difference(pairs), "ig"))
    rho = checked.correlation
    assert rho.docs == 64 and len(checked.table) > 3000
    assert rho.value >= 0.9 and rho.low >= 0.88 and checked.pooled.value >= 0.9
    both = checked.table[["estimate", "true"]].to_numpy()
    assert checked.pooled.value == pytest.approx(spearmanr(*both.T).statistic, abs=1e-9)
    print(rho, checked.pooled)


def test_refusals(linear):
    subject, coder, clean = linear
    flat = Metric("rank", "", lambda logits, tokens: (logits[:, -1] > 0).float().sum(1))
    with pytest.raises(InputError, match="gradient"): attribute(subject, coder, clean, flat)
    with pytest.raises(InputError, match="method"): attribute(subject, coder, clean, flat, "lrp")


HOOKS = ("blocks.0.hook_resid_post", "blocks.3.hook_resid_post", "blocks.1.hook_mlp_out", "blocks.2.hook_attn_out")


@pytest.mark.slow
@pytest.mark.parametrize("hook", HOOKS)
def test_ranks_at_other_hooks(subject, hook):
    "The same 64 pairs elsewhere, latents and errors, each at all its tokens."
    tokens, pairs = named("bundled").split("fit", seed=0).tokens(subject, 40_000), indirect_object_pairs(subject, 64)
    made = at(make("topk", d_in=subject.hooks[hook], d_sae=512, k=16), hook)
    (made,) = train(made, Stream(subject, tokens, hook, batch=1024, seed=0), progress=False, seed=0).values()
    metric = logit_difference(pairs)
    checked = check(attribute(subject, made, pairs, metric, "ig"), by="latent", errors=True)
    assert checked.correlation.value >= 0.9 and checked.pooled.value >= 0.9
    print(hook, checked.correlation, checked.pooled)


def test_where_one_gradient_fails(subject, coder):
    "KL is flat at the clean prompt: attribution patching says nothing, integrated gradients do."
    pairs = indirect_object_pairs(subject, 16)
    made = [attribute(subject, coder, pairs, kl(pairs.last), *how) for how in (("atp",), ("ig", 10), ("ig", 28))]
    atp, ig, fine = compare(made, by="latent")
    assert abs(atp.table.estimate).max() < 1e-4 < abs(ig.table.estimate).max()
    assert abs(atp.correlation.value) < 0.2 and 0.3 < ig.correlation.value < fine.correlation.value
    assert atp.table.true.equals(fine.table.true) and (ig.table.true > -1e-5).all()


def test_groups_are_moved_one_by_one(subject, coder):
    "A latent's estimate is the mean of gradients where only its group has moved, by hand; batches do not matter."
    pairs = indirect_object_pairs(subject, 5)
    metric, where = logit_difference(pairs), pairs.mask & (pairs.clean != subject.bos)
    found = attribute(subject, coder, pairs, metric, "ig", 4)
    again = attribute(subject, coder, pairs, metric, "ig", 4, batch=2)
    torch.testing.assert_close(found.nodes.effect, again.nodes.effect, rtol=1e-3, atol=1e-5)
    whole = moves(subject, sites(subject, coder)[0], pairs.clean, pairs.corrupt, where)
    x, shares = subject.run(pairs.clean, HOOK)[HOOK], (0.0, 2 / 3)
    assert radau(2)[0] == pytest.approx(shares) and radau(2)[1] == pytest.approx((0.25, 0.75))
    for part in in_groups(whole, where, 3):
        mean = 0
        for share, weight in zip(shares, (0.25, 0.75)):
            y = x.index_put((where,), x[where] + share * part.whole).requires_grad_()
            logits = subject.model.run_with_hooks(pairs.clean, fwd_hooks=[(HOOK, lambda _, hook, y=y: y)])
            mean = mean + weight * torch.autograd.grad(metric(logits, pairs.clean).sum(), y)[0][where]
        row, latent, change = part.codes.flat()
        mine = {(int(row), int(latent)): float(change * (mean[row] @ coder.W_dec[latent].detach()))
                for row, latent, change in zip(row, latent, change)}
        place = torch.full(where.shape, -1).masked_scatter(where, torch.arange(int(where.sum())))
        listed = {(int(place[p, q]), int(j)): float(e) for p, q, j, e in zip(*(
            getattr(found.nodes, key) for key in ("prompt", "position", "latent", "effect")))}
        for key, value in mine.items(): assert listed[key] == pytest.approx(value, rel=1e-3, abs=1e-5)


def test_several_sites_are_as_each_alone(subject, coder):
    "A transcoder beside an autoencoder, by name; each group of its error is the rest of the move."
    pairs = indirect_object_pairs(subject, 4)
    skip = at(make("skip_transcoder", d_in=128, d_sae=64, k=8), "blocks.2.hook_resid_mid", "blocks.2.hook_mlp_out")
    metric = logit_difference(pairs)
    both = attribute(subject, {"stream": coder, "mlp": skip}, pairs, metric, "ig", 4)
    for number, one in enumerate((coder, skip)):
        alone = attribute(subject, one, pairs, metric, "ig", 4)
        mine = both.nodes[both.nodes.site == number]
        torch.testing.assert_close(mine.effect, alone.nodes.effect, rtol=1e-3, atol=1e-5)
    whole = completeness(attribute(subject, skip, pairs, metric, "ig", 10, groups=1))
    np.testing.assert_allclose(whole["total"], whole["whole"], rtol=1e-3, atol=1e-3)


def test_comparisons_need_the_same_patches(subject, coder):
    pairs = indirect_object_pairs(subject, 4)
    metric = logit_difference(pairs)
    one, other = attribute(subject, coder, pairs, metric), attribute(subject, coder, pairs[:3], metric[:3])
    with pytest.raises(InputError, match="different patches"): compare([one, other])
    same = replace(pairs, corrupt=pairs.clean)
    with pytest.raises(InputError, match="node that changes"): check(attribute(subject, coder, same, metric))
    nowhere = torch.zeros_like(pairs.mask)
    with pytest.raises(ShapeError, match="0 tokens"): attribute(subject, coder, pairs, metric, where=nowhere)
    with pytest.raises(InputError, match="as many for"): attribute(subject, coder, pairs, metric, "ig", 10, groups=2)
    with pytest.raises(InputError, match="at least 2"): attribute(subject, coder, pairs, metric, "ig", 1)
