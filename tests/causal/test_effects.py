"Effects against runs by hand; controls that are as dense, as long and as far; what is said about the error."
import numpy as np
import pytest
import torch

from sae_lab.causal.effects import controls, effect, moved, ranked, turned
from sae_lab.causal.metrics import Metric, kl, logit_difference, probability
from sae_lab.causal.pairs import indirect_object_pairs
from sae_lab.coders.contract import make
from sae_lab.coders.transcoder import at
from sae_lab.ground.errors import InputError, ShapeError
from sae_lab.ground.sums import bootstrap_mean
from sae_lab.sources.subject import Subject
from sae_lab.splice.edits import ablate, add
from sae_lab.splice.targets import Heads, Latents

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def scene():
    subject = Subject.bundled()
    pairs = indirect_object_pairs(subject, 12)
    coder = at(make("topk", d_in=subject.d_model, d_sae=256, k=16, seed=3), HOOK)
    x = subject.run(pairs.clean, HOOK)[HOOK]
    with torch.no_grad(): latent = int(coder.encode(x[pairs.mask][1:]).counts().argmax())
    return subject, pairs, coder, latent


def by_hand(subject, pairs, fn):
    "Logits with a function of the stream, through TransformerLens's own hooks."
    hooks = [(HOOK, lambda y, hook: fn(y))]
    with torch.no_grad(): return subject.model.run_with_hooks(pairs.clean, return_type="logits", fwd_hooks=hooks)


def text(subject, pairs): return pairs.mask & (pairs.clean != subject.bos)


@pytest.mark.parametrize("error", ["keep", "drop"])
def test_an_ablation_is_the_run_by_hand(scene, error):
    subject, pairs, coder, latent = scene
    where = text(subject, pairs)

    def silenced(y):
        codes, plain = coder(y[where])
        dense = codes.dense()
        dense[:, latent] = 0
        new = dense @ coder.W_dec + coder.b_dec
        return y.index_put((where,), (y[where] + new - plain if error == "keep" else new).detach())
    metric = [logit_difference(pairs), probability(pairs.answer, pairs.last), kl(pairs.last)]
    found = effect(subject, ablate(Latents(coder, (latent,)), error=error), pairs, metric, controls=3)
    clean, hand = subject.logits(pairs.clean), by_hand(subject, pairs, silenced)
    for name, each in {one.name: one.against(clean) for one in metric}.items():
        np.testing.assert_allclose(found.edited[name], each(hand, pairs.clean).numpy(), rtol=1e-3, atol=2e-4)
        np.testing.assert_array_equal(found.clean[name], each(clean, pairs.clean).double().numpy())
    if error == "keep":
        assert found.noop == 0 and "error kept" in str(found)
        base = found.clean["logit difference"]
    else:
        assert found.noop > 0 and "dropping the error, without any edit" in str(found)
        base = found.spliced["logit difference"]
    np.testing.assert_allclose(found.change("logit difference"), found.edited["logit difference"] - base)


def test_the_table_of_tokens_is_the_mean_over_prompts(scene):
    subject, pairs, coder, latent = scene
    found = effect(subject, ablate(Heads(2, (0,))), pairs, logit_difference(pairs), controls=0)
    end = lambda logits: logits[torch.arange(len(pairs)), pairs.last].softmax(-1).mean(0)
    before = end(subject.logits(pairs.clean))
    for row in found.tokens.to_dict("records"):
        assert row["before"] == pytest.approx(float(before[row["id"]]), abs=1e-6)
    assert int(before.argmax()) in set(found.tokens["id"]) and found.rank().n == 0 and found.measure().null is None


def test_controls_are_as_dense_and_as_long():
    coder, g = make("topk", d_in=16, d_sae=600, k=4), torch.Generator().manual_seed(0)
    with torch.no_grad(): coder.dec.mul_(torch.rand(600, 1, generator=g) * 3 + 0.2)
    density = 10 ** (-4 * torch.rand(600, generator=g))
    found, norm = controls(coder, [7, 11], density, 16, seed=1), coder.W_dec.detach().norm(dim=1)
    assert found.shape == (16, 2) and torch.equal(found, controls(coder, [7, 11], density, 16, seed=1))
    assert not torch.equal(found, controls(coder, [7, 11], density, 16, seed=2))
    for column, own in ((0, 7), (1, 11)):
        far = (density.log() - density[own].log()).abs() + (norm.log() - norm[own].log()).abs()
        assert own not in found[:, column] and len(set(found[:, column].tolist())) == 16
        assert far[found[:, column]].max() < far.quantile(0.2)
    few = make("topk", d_in=16, d_sae=8, k=4)
    with pytest.raises(InputError, match="fewer controls"): controls(few, [1], density[:8])
    with pytest.raises(ShapeError, match="one number a latent"): controls(coder, [7], density[:5])


def test_a_control_moves_each_token_as_far():
    g = torch.Generator().manual_seed(0)
    own, other, values = (torch.randn(*shape, generator=g) for shape in ((2, 16), (2, 16), (9, 2)))
    step = values @ own
    for new in (moved(step, own, other), turned(step, 3)):
        torch.testing.assert_close(new.norm(dim=1), step.norm(dim=1), rtol=1e-5, atol=1e-6)
    along = moved(step, own, other)
    assert torch.linalg.matrix_rank(torch.cat([along, other]).double(), rtol=1e-5) == 2
    angle = lambda rows: torch.nn.functional.normalize(rows, dim=1) @ torch.nn.functional.normalize(rows, dim=1).T
    torch.testing.assert_close(angle(turned(step, 3)), angle(step), rtol=1e-4, atol=1e-5)


def test_interval_and_rank():
    subject = Subject.bundled()
    pairs = indirect_object_pairs(subject, 40)
    found = effect(subject, ablate(Heads(2, (0,)), at=-1), pairs, logit_difference(pairs), controls=9)
    change, one = found.change("logit difference"), found.measure()
    error = change.std(ddof=1) / len(change) ** 0.5
    assert one.value == pytest.approx(change.mean()) and one.count == 40
    assert one.low == pytest.approx(one.value - 1.96 * error, abs=0.5 * error)
    assert one.high == pytest.approx(one.value + 1.96 * error, abs=0.5 * error)
    assert found.rank() == ranked(change.mean(), found.control_change("logit difference").mean(1))
    assert found.rank().p == 0.1
    assert ranked(2.0, np.array([-3.0, 1.0, 2.0])) == (2 / 3, 3 / 4, 3)


def test_a_metric_of_ones_own_and_several_edits(scene):
    subject, pairs, coder, latent = scene
    mine = Metric("first logit", "logits", lambda logits, tokens: logits[:, -1, 0])
    both = [add(Latents(coder, (latent,)), 2.0), ablate(Heads(3, (1, 2)))]
    found = effect(subject, both, pairs, mine, controls=2)
    assert list(found.metrics) == ["first logit"] and len(found.edits) == 2 and found.noop == 0
    assert found.to_dict()["edits"] == list(found.edits) and "<table" in found._repr_html_()
    with pytest.raises(InputError, match="no edit"): effect(subject, [], pairs, mine)
    with pytest.raises(InputError, match="metric 'x'"): found.measure("x")


def test_a_control_is_the_run_by_hand(scene):
    "Another latent's direction added, token by token as far as the edit went; the same for the same seed."
    subject, pairs, coder, latent = scene
    where, metric = text(subject, pairs), logit_difference(pairs)
    run = lambda seed: effect(subject, ablate(Latents(coder, (latent,))), pairs, metric, controls=3, seed=seed)
    found, other = run(0), run(1)
    x = subject.run(pairs.clean, HOOK)[HOOK][where]
    with torch.no_grad(): value = coder.encode(x).dense()[:, latent]
    rows = coder.W_dec.detach()
    for i, (one,) in enumerate(found.controls.tolist()):
        push = -value[:, None] * rows[one] / rows[one].norm() * rows[latent].norm()
        hand = by_hand(subject, pairs, lambda y, push=push: y.index_put((where,), y[where] + push))
        mine = found.control["logit difference"][i]
        np.testing.assert_allclose(mine, metric(hand, pairs.clean), rtol=1e-3, atol=2e-4)
    again = run(0)
    assert torch.equal(found.controls, again.controls) and not torch.equal(found.controls, other.controls)
    np.testing.assert_array_equal(found.control["logit difference"], again.control["logit difference"])


def test_edits_of_one_coder_share_their_controls(scene):
    "No control of one edit is what another edits, nor twice the same."
    subject, pairs, coder, latent = scene
    rest = [j for j in range(256) if j != latent]
    edits = [ablate(Latents(coder, (latent, rest[0]))), add(Latents(coder, (rest[1],)), 1.0, at=-1),
             ablate(Heads(1, (0,)))]
    found = effect(subject, edits, pairs, logit_difference(pairs), controls=8)
    assert found.controls.shape == (8, 3) and found.noop == 0
    assert not {latent, rest[0], rest[1]} & set(found.controls.flatten().tolist())
    assert all(len(set(row)) == 3 for row in found.controls.tolist())


def test_intervals_cover():
    "Of intervals from 40 prompts about nine in ten hold the mean of all 400."
    subject = Subject.bundled()
    pairs = indirect_object_pairs(subject, 400)
    found = effect(subject, ablate(Heads(2, (0,)), at=-1), pairs, logit_difference(pairs), controls=0)
    change = found.change("logit difference")
    draw, held = np.random.default_rng(0), []
    for i in range(200):
        low, high = bootstrap_mean(draw.choice(change, 40), seed=i, r=300)
        held.append(low <= change.mean() <= high)
    assert 0.88 <= np.mean(held) <= 0.99
