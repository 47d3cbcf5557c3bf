"Mediation against closed forms: linear models, mediators through which everything or nothing runs."
from itertools import combinations

import numpy as np
import pytest
import torch

from sae_lab.causal.mediation import ROWS, mediate, necessity, rest_of, share
from sae_lab.causal.metrics import Metric, kl, logit_difference
from sae_lab.causal.pairs import Pairs, indirect_object_pairs
from sae_lab.causal.patching import patch
from sae_lab.coders.contract import make
from sae_lab.ground.errors import InputError
from sae_lab.sources.bridge import native
from sae_lab.sources.subject import Subject
from sae_lab.splice.targets import Component, Directions, Heads, Latents, Neurons


@pytest.fixture(scope="module")
def subject():
    "The bundled subject."
    return Subject.bundled()


@pytest.fixture(scope="module")
def pairs(subject):
    "Indirect-object prompts."
    return indirect_object_pairs(subject, 12, seed=3)


@pytest.fixture(scope="module")
def linear():
    "One layer without norms, whose logits are linear in every head and neuron, in float64."
    config = dict(d_model=24, d_head=8, n_layers=1, n_ctx=12, n_heads=3, d_vocab=30, act_fn="relu")
    subject = Subject.wrap(native(seed=1, normalization_type=None, **config))
    subject.model.double()
    with torch.no_grad(): subject.model.blocks[0].mlp.W_out.zero_()
    return subject


@pytest.fixture(scope="module")
def random_pairs():
    "Pairs of random tokens, for a subject without a tokenizer."
    draw = torch.Generator().manual_seed(0)
    clean, corrupt = torch.randint(0, 30, (2, 9, 7), generator=draw)
    answer = torch.randint(0, 30, (9,), generator=draw)
    return Pairs(clean, corrupt, torch.full((9,), 7), answer, (answer + 1) % 30, ({},) * 9, {}, "random")


def test_linear_effects_in_closed_form(linear, random_pairs):
    "Heads of a linear model: indirect is their own readout, direct the rest; nothing interacts; effects add up."
    pairs, metric = random_pairs, logit_difference(random_pairs)
    sets = [Heads(0, each) for n in (1, 2, 3) for each in combinations(range(3), n)]
    found = mediate(linear, pairs, sets, metric, controls=1)
    z = [linear.run(ids, "blocks.0.attn.hook_z")["blocks.0.attn.hook_z"][:, -1].unflatten(-1, (3, 8))
         for ids in (pairs.clean, pairs.corrupt)]
    model, rows = linear.model, torch.arange(9)
    read = model.W_U[:, pairs.answer] - model.W_U[:, pairs.distractor]
    each = torch.einsum("bhd,hdm,mb->hb", z[1] - z[0], model.blocks[0].attn.W_O, read).detach().numpy()
    ends = [linear.logits(ids)[:, -1] for ids in (pairs.clean, pairs.corrupt)]
    total = ((ends[1] - ends[0])[rows, pairs.answer] - (ends[1] - ends[0])[rows, pairs.distractor]).numpy()
    assert np.allclose(found.total, total) and np.abs(each).min() > 0
    for i, target in enumerate(sets):
        mine = each[list(target.heads)].sum(0)
        assert np.allclose(found.indirect[i], mine) and np.allclose(found.direct[i], total - mine)
    assert np.allclose(found.table.interaction, 0, atol=1e-9) and (found.noop == 0).all()
    assert np.allclose(found.table["share"], found.indirect.mean(1) / total.mean())


def test_linear_necessity_in_closed_form(linear, random_pairs):
    "In a linear model what is necessary is as much sufficient, and what is embedded stays with neither."
    pairs, metric = random_pairs, logit_difference(random_pairs)
    mine, rest = (mediate(linear, pairs, Heads(0, each), metric, controls=0) for each in ((0,), (1, 2)))
    part, other, total = (x.mean() for x in (mine.indirect[0], rest.indirect[0], mine.total))
    found = {name: one.value for name, one in necessity(linear, pairs, Heads(0, (0,)), metric).items()}
    alone, left = part / total, 1 - other / total
    assert found == pytest.approx({"necessary": alone, "sufficient": alone,
                                   "sufficient in its place": left, "necessary in its place": left})


def test_everything_is_a_whole_mediator(subject, pairs):
    "The stream at every token: indirect is all, direct nothing, however it is named; necessary and sufficient."
    hook, every = "blocks.1.hook_resid_post", tuple(range(128))
    rows = torch.randn(128, 128, generator=torch.Generator().manual_seed(0))
    whole = [Component(hook), Neurons(hook, every), Directions(hook, torch.linalg.qr(rows).Q)]
    found = mediate(subject, pairs, whole, logit_difference(pairs), controls=2)
    assert np.abs(found.indirect - found.total).max() < 1e-3 and np.abs(found.direct).max() < 1e-3
    assert np.allclose(found.table["share"], 1, atol=1e-4) and (np.abs(found.total) > 1).any()
    assert found.table.controls.abs().max() < 0.2 * abs(found.total.mean())
    asked = necessity(subject, pairs, whole[0], logit_difference(pairs))
    assert list(asked) == ["necessary", "sufficient"]
    assert all(abs(one.value - 1) < 1e-4 and one.null is None for one in asked.values())


def test_what_the_answer_does_not_see_is_no_mediator(subject, pairs):
    "The last MLP at an early token: nothing runs through it, all around it."
    found = mediate(subject, pairs, Component("blocks.3.hook_mlp_out"), logit_difference(pairs), at=1, controls=1)
    assert np.abs(found.indirect).max() < 1e-4 and np.abs(found.direct - found.total).max() < 1e-4
    assert found.measure("share").value == pytest.approx(0, abs=1e-5)


def test_indirect_is_noising_and_total_less_direct_is_denoising(subject, pairs):
    "The same patches by another way."
    coder = make("topk", d_in=128, d_sae=96, k=12, seed=1)
    targets = [Heads(2, (0,)), Neurons("blocks.3.mlp.hook_post", (1, 2, 3)),
               Latents(coder, (4, 5), "blocks.1.hook_resid_post")]
    metric = logit_difference(pairs)
    found = mediate(subject, pairs, targets, metric, controls=2)
    noise, back = (patch(subject, pairs, targets, metric, way=way, controls=0) for way in ("noise", "denoise"))
    assert np.allclose(found.indirect, noise.effect[:, 0], atol=1e-4)
    assert np.allclose(found.direct, back.patched[:, 0] - noise.run, atol=1e-4)
    assert np.allclose(found.total, noise.source - noise.run, atol=1e-5) and (found.noop == 0).all()
    assert found.control.shape == (3, 2, 12)


def test_necessity_in_its_place(subject, pairs):
    "All heads but one exchanged, by hand; nulls are other heads; a whole layer has no rest."
    metric, target = logit_difference(pairs), Heads(2, (0,))
    found = necessity(subject, pairs, target, metric)
    assert list(found) == list(ROWS) and found["sufficient"].value > 0.5 > 5 * abs(found["sufficient"].null)
    rest = patch(subject, pairs, Heads(2, (1, 2, 3)), metric, way="noise", controls=0)
    want = (rest.patched[0, 0] - rest.source).mean() / (rest.run - rest.source).mean()
    assert found["sufficient in its place"].value == pytest.approx(want, abs=1e-5)
    assert found["sufficient"].low <= found["sufficient"].value <= found["sufficient"].high
    assert found["sufficient"].count == len(pairs)
    assert list(necessity(subject, pairs, Heads(2, (0, 1, 2, 3)), metric)) == ["necessary", "sufficient"]


def test_all_latents_and_the_error_are_the_stream(subject, pairs):
    "With every latent exchanged only the error stays; an exact coder leaves none, and is a whole mediator."
    coder = make("relu_l1", d_in=128, d_sae=256)
    with torch.no_grad():
        eye = torch.eye(128)
        coder.W_enc.copy_(torch.cat([eye, -eye], 1))
        coder.W_dec.copy_(torch.cat([eye, -eye]))
        coder.b_enc.zero_(), coder.b_dec.zero_()
    every = Latents(coder, tuple(range(256)), "blocks.1.hook_resid_post")
    found = mediate(subject, pairs, every, logit_difference(pairs), controls=0)
    assert np.abs(found.indirect - found.total).max() < 1e-3 and np.abs(found.direct).max() < 1e-3


def test_metrics_that_compare(subject, pairs):
    "KL against the clean prompt: the total is the KL of the corrupt one."
    found = mediate(subject, pairs, Component("blocks.0.hook_resid_pre"), kl(pairs.last), controls=0)
    end = lambda ids: subject.logits(ids)[torch.arange(len(pairs)), pairs.last].log_softmax(-1)
    logits = end(pairs.clean), end(pairs.corrupt)
    want = (logits[0].exp() * (logits[0] - logits[1])).sum(-1).numpy()
    assert np.allclose(found.total, want, atol=1e-4) and np.allclose(found.indirect[0], want, atol=1e-4)


def test_shares():
    "A ratio of means, its interval, and none of nothing."
    part, whole = np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0])
    assert (one := share("half", part, whole)).value == one.low == one.high == 0.5 and one.count == 3
    assert np.isnan(share("none", part, np.zeros(3)).value) and np.isnan(share("one", part[:1], whole[:1]).low)


def test_the_rest(subject):
    "Heads, neurons and latents that are left; errors where there are none."
    coder = make("topk", d_in=128, d_sae=6, k=2)
    assert rest_of(subject, Heads(1, (2, 0))).heads == (1, 3)
    assert rest_of(subject, Latents(coder, (5, 0), "blocks.0.hook_resid_post")).latents == (1, 2, 3, 4)
    assert len(rest_of(subject, Neurons("blocks.0.mlp.hook_post", (7,))).neurons) == 511
    with pytest.raises(InputError, match="latents, neurons or heads"): rest_of(subject, Component("hook_embed"))
    with pytest.raises(InputError, match="no others"): rest_of(subject, Heads(1, (0, 1, 2, 3)))


def test_what_is_shown(subject, pairs):
    "Total, error, no-op, controls, intervals; kinds by name; a metric of the user's."
    mean = Metric("mean logit", "logits", lambda logits, tokens: logits.mean((1, 2)))
    found = mediate(subject, pairs, Heads(2, (0,)), mean, controls=2)
    for text in (found._repr_html_(), repr(found)):
        assert "error kept" in text and "no-op" in text and "2 controls" in text
    assert found.measure("share").null is not None and found.measure("indirect").null is not None
    assert found.measure("direct").null is None and found.measure().unit == "logits"
    with pytest.raises(InputError, match="share"): found.measure("natural")
    with pytest.raises(InputError, match="no mediator"): mediate(subject, pairs, [], mean)
