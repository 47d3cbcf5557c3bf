"Estimates against true patches: exact where all is linear, complete by integration, ranked as the truth on prompts."
import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from sae_lab.causal.attribution import attribute, check, completeness
from sae_lab.causal.metrics import Metric, logit_difference
from sae_lab.causal.pairs import indirect_object_pairs
from sae_lab.coders.contract import make
from sae_lab.coders.transcoder import at
from sae_lab.ground.errors import InputError
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
