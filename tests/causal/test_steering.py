"Steering against runs by hand: doses, natural quantiles, strengths at equal KL, side effects beside naive sums."
import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from sae_lab.causal.metrics import logit_difference
from sae_lab.causal.pairs import indirect_object_pairs
from sae_lab.causal.steering import (
    calibrated, crossing, dose_response, elsewhere, natural_range, side_effects, steer, words_of)
from sae_lab.coders.contract import make
from sae_lab.coders.transcoder import at
from sae_lab.features.index import FeatureIndex
from sae_lab.ground.errors import InputError
from sae_lab.sources.corpus import named
from sae_lab.sources.stream import Stream
from sae_lab.sources.subject import Subject
from sae_lab.splice.edits import ablate
from sae_lab.splice.targets import Component, Heads, Latents

HOOK = "blocks.1.hook_resid_post"
DOSES = (-1.0, 0.0, 0.5, 2.0)


class Scene:
    "A subject, labelled text, an untrained dictionary, its index, and its most frequent latent."

    def __init__(self, folder):
        self.subject = Subject.bundled()
        self.text = named("fables").split("explain", seed=0).tokens(self.subject, 4_000)
        made = make("topk", d_in=self.subject.d_model, d_sae=256, k=8, seed=0)
        self.coder = at(made, HOOK)
        source = Stream(self.subject, self.text, (HOOK,), seed=None)
        words = self.subject.strings(range(self.subject.d_vocab))
        self.index = FeatureIndex.build(self.coder, source, self.text, folder / "index", words)
        self.latent = int(self.index.stats["count"].argmax())
        self.ids = self.text.ids[:5, :40]
        self.said = ~self.text.special[:5, :40]

    def run(self, ids, push, where):
        "Logits with a vector added at some tokens, through the model's own hooks."
        add = [(HOOK, lambda y, hook: y + push * where[..., None])]
        with torch.no_grad(): return self.subject.model.run_with_hooks(ids, return_type="logits", fwd_hooks=add)

    def kl(self, logits, where):
        "Nats from the untouched model, mean over marked tokens of each row, in float64."
        p, q = (each.double().log_softmax(-1) for each in (self.run(self.ids, torch.zeros(128), where), logits))
        return (((p.exp() * (p - q)).sum(-1) * where).sum(1) / where.sum(1)).numpy()

    def loss(self, logits, where):
        "Nats a predicted token, in float64."
        each = -logits[:, :-1].double().log_softmax(-1).gather(2, self.ids[:, 1:, None].long())[..., 0]
        return ((each * where[:, 1:]).sum(1) / where[:, 1:].sum(1)).numpy()

    def along(self, latent):
        "As long as the steered latent's decoder row, in the direction of another."
        rows = self.coder.W_dec.detach()
        return normalize(rows[latent], dim=0) * rows[self.latent].norm()


@pytest.fixture(scope="module")
def scene(tmp_path_factory): return Scene(tmp_path_factory.mktemp("steering"))


@pytest.fixture(scope="module")
def response(scene):
    target = Latents(scene.coder, (scene.latent,))
    return dose_response(scene.subject, target, DOSES, scene.ids, natural=scene.index, unit="natural", controls=5)


def test_natural_quantiles_are_those_of_the_text(scene):
    "Against every activation, from dense codes."
    ids = scene.text.ids
    x = scene.subject.run(ids, HOOK)[HOOK][~scene.text.special]
    with torch.no_grad(): values = scene.coder.encode(x).dense()[:, scene.latent]
    fired, found = values[values != 0].numpy(), natural_range(scene.index, scene.latent)
    assert [level for _, level in found.marks] == pytest.approx(np.quantile(fired, [0.5, 0.9, 0.99]), rel=1e-4)
    assert found.top == pytest.approx(fired.max(), rel=1e-5) and found.count == len(fired) and found.n == len(values)
    assert found.density == len(fired) / len(values) and found.unit == found.marks[2][1]
    silent = int(scene.index.stats["count"].argmin())
    if not scene.index.stats["count"][silent]:
        never = natural_range(scene.index, silent)
        assert never.top is None and never.unit == 1.0 and not never.marks


def test_doses_are_runs_by_hand(scene, response):
    "KL and loss of each prompt at each dose, and of each control, equal those of a plain hook."
    unit = natural_range(scene.index, scene.latent).unit
    for i, dose in enumerate(DOSES):
        logits = scene.run(scene.ids, dose * unit * scene.coder.W_dec[scene.latent].detach(), scene.said)
        np.testing.assert_allclose(response.steered["KL"][i], scene.kl(logits, scene.said), rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(response.steered["loss"][i], scene.loss(logits, scene.said), rtol=1e-4)
        for j, (other,) in enumerate(response.latents):
            away = scene.run(scene.ids, dose * unit * scene.along(other), scene.said)
            np.testing.assert_allclose(response.control["KL"][j, i], scene.kl(away, scene.said), rtol=1e-3, atol=1e-5)
    assert response.noop == 0 and (response.steered["KL"][1] == 0).all() and (response.control["KL"][:, 1] == 0).all()


def test_the_curve_says_interval_control_and_range(scene, response):
    "One row a metric and dose, the natural quantiles as doses, p by rank among controls."
    frame = response.frame.set_index(["metric", "dose"])
    for i, dose in enumerate(DOSES):
        row, mine, others = frame.loc[("KL", dose)], response.steered["KL"][i], response.control["KL"][:, i].mean(-1)
        assert row["value"] == pytest.approx(mine.mean()) and row["low"] <= row["value"] <= row["high"]
        assert row["p"] == (1 + (others >= mine.mean()).sum()) / 6 and row["n"] == 5 and row["controls"] == 5
        assert row["amount"] == pytest.approx(dose * response.unit[0])
    assert response.marks["99%"] == pytest.approx(1.0) and response.marks["50%"] < 1 <= response.marks["largest"]
    assert "error kept" in response._repr_html_() and "random latents of like density" in response._repr_html_()
    rates = scene.index.stats["density"].to_numpy()
    near = [abs(np.log(rates[other] / rates[scene.latent])) for other, in response.latents]
    assert max(near) < np.quantile(np.abs(np.log(rates[rates > 0] / rates[scene.latent])), 0.5)


def test_setting_and_dropping_the_error(scene):
    "A set puts the activation there, whatever it was; a dropped error is told and moves the model by itself."
    where, row = scene.said, scene.coder.W_dec[scene.latent].detach()
    x = scene.subject.run(scene.ids, HOOK)[HOOK]
    with torch.no_grad(): own, plain = (lambda codes, y: (codes.dense()[..., scene.latent], y))(*scene.coder(x[where]))
    for error in ("keep", "drop"):
        made = dose_response(scene.subject, Latents(scene.coder, (scene.latent,)), (3.0,), scene.ids, op="set",
                             error=error, controls=2)
        base = plain.detach() if error == "drop" else x[where]
        hand = x.index_put((where,), base + (3.0 - own)[:, None] * row)
        with torch.no_grad():
            logits = scene.subject.model.run_with_hooks(scene.ids, fwd_hooks=[(HOOK, lambda y, hook, hand=hand: hand)])
        np.testing.assert_allclose(made.steered["KL"][0], scene.kl(logits, where), rtol=2e-3, atol=1e-5)
        assert made.error == {"keep": "kept", "drop": "dropped"}[error] and (made.noop == 0) == (error == "keep")


@pytest.mark.parametrize("nats", [0.02, 0.3])
def test_calibrated_strength_meets_its_target(scene, nats):
    "The mean KL at the strength found, by hand, is what was asked for; downwards too."
    target = Latents(scene.coder, (scene.latent,))
    for sign in (1, -1):
        dose = calibrated(scene.subject, target, scene.ids, nats, 2.0, sign=sign, tolerance=0.01)
        logits = scene.run(scene.ids, dose * 2.0 * scene.coder.W_dec[scene.latent].detach(), scene.said)
        assert scene.kl(logits, scene.said).mean() == pytest.approx(nats, rel=0.011) and dose * sign > 0


def test_what_is_no_latent_is_turned(scene):
    "Heads pushed elsewhere: each token as far, in another direction, and the same one for the same seed."
    edit, ids = ablate(Heads(1, (2,))), scene.ids
    z = scene.subject.run(ids, "blocks.1.attn.hook_z")["blocks.1.attn.hook_z"]
    (real,), (one,), (two,) = ([fn(z) - z for fn in hooks.values()] for hooks in (
        edit.edits(scene.subject, ids), *(elsewhere(scene.subject, ids, [edit], [()], seed) for seed in (1, 2))))
    torch.testing.assert_close(one.norm(dim=-1), real.norm(dim=-1), rtol=1e-4, atol=1e-5)
    again = elsewhere(scene.subject, ids, [edit], [()], 1)["blocks.1.attn.hook_z"](z) - z
    assert torch.equal(one, again) and (one - two).abs().max() > 0.01 and (one - real).abs().max() > 0.01
    made = dose_response(scene.subject, Component(HOOK), (0.5,), ids, controls=2)
    assert not made.latents and "random directions of equal length" in made._repr_html_()


def _naive(scene, push, watched, words):
    "Every side effect as a plain sum over predictions that count."
    text, coder, stats = scene.text, scene.coder, {}
    keep = ~text.special[:, 1:] & (text.doc[:, :-1] == text.doc[:, 1:]) & (text.doc[:, 1:] >= 0)
    read, codes = (~text.special[:, :-1])[keep], {}
    for run, vector in (("clean", torch.zeros(128)), ("steered", push)):
        hooks = [(HOOK, lambda y, hook, vector=vector: y + vector * (~text.special)[..., None])]
        with torch.no_grad():
            logits = scene.subject.model.run_with_hooks(text.ids, return_type="logits", fwd_hooks=hooks)
            x = scene.subject.run(text.ids, HOOK)[HOOK] + vector * (~text.special)[..., None]
            codes[run] = coder.encode(x[:, :-1][keep]).dense() != 0
        log = logits[:, :-1][keep].double().log_softmax(-1)
        stats[run, "log"] = log
        stats[run, "loss"] = -log.gather(1, text.ids[:, 1:][keep][:, None])[:, 0].mean()
        stats[run, "perplexity"] = stats[run, "loss"].exp()
        for name, which in watched.items():
            stats[run, f"fires: {name}"] = codes[run][read][:, list(which)].any(1).double().mean()
        for name, which in words.items(): stats[run, f"says: {name}"] = log.exp()[:, which].sum(1).mean()
    log = stats["clean", "log"]
    stats["steered", "KL"] = (log.exp() * (log - stats["steered", "log"])).sum(1).mean()
    others = torch.arange(coder.d_sae) != scene.latent
    one, two = (codes[run][read][:, others] for run in ("clean", "steered"))
    either = (one | two).sum(1)
    share = torch.where(either > 0, (one ^ two).sum(1) / either.clamp(min=1), 0.0)
    stats["steered", "exchanged"] = share.double().mean()
    return stats


def test_side_effects_are_plain_sums(scene):
    "Perplexity, KL, latents exchanged, concepts that fire or are said: each as computed naively."
    name = next(iter(scene.text.concepts))
    words, other = words_of(scene.text, name), int(scene.index.stats["count"].argsort()[-3:].iloc[0])
    watched = {"steered": (scene.latent,), "others": (other, other + 1)}
    edit = steer(Latents(scene.coder, (scene.latent,)), 3.0, natural_range(scene.index, scene.latent).unit)
    found = side_effects(scene.subject, edit, scene.text, scene.coder, watched, words, scene.index, controls=3)
    stats = _naive(scene, edit.value * scene.coder.W_dec[scene.latent].detach(), watched, words)
    frame = found.frame.set_index("what")
    assert set(frame.index) == {key for _, key in stats} - {"log"} and len(words) > 1
    for what, row in frame.iterrows():
        after, before = float(stats["steered", what]), float(stats.get(("clean", what), 0.0))
        assert row["after"] == pytest.approx(after, rel=2e-3, abs=1e-5), what
        assert row["before"] == pytest.approx(before, rel=2e-3, abs=1e-5), what
        assert row["change"] == pytest.approx(row["after"] - row["before"], rel=1e-4, abs=1e-7)
        assert row["low"] <= row["change"] <= row["high"] and 1 / 4 <= row["p"] <= 1
    assert frame["on purpose"].to_dict() == {what: what == "fires: steered" for what in frame.index}
    assert frame.loc["KL", "n"] == len(stats["clean", "log"]) and found.error == "kept"


def test_words_of_a_concept_are_those_that_mostly_carry_it(scene):
    "Against a count token by token."
    name = next(iter(scene.text.concepts))
    concept, seen = scene.text.concepts[name], {}
    said = ~scene.text.special
    for id_, code in zip(scene.text.ids[said].tolist(), concept.codes[said].tolist()):
        seen.setdefault(id_, []).append(code)
    for number, value in enumerate(concept.values):
        want = sorted(i for i, codes in seen.items() if codes.count(number) and codes.count(number) >= 0.5 * len(codes))
        assert words_of(scene.text, name).get(f"{name}: {value}", torch.tensor([])).tolist() == want


def test_metrics_of_ones_own_are_beside_the_others(scene):
    "A logit difference of pairs at a dose."
    pairs = indirect_object_pairs(scene.subject, 6)
    made = dose_response(scene.subject, Latents(scene.coder, (scene.latent,)), (0.0, 4.0), pairs,
                         [logit_difference(pairs)], controls=1)
    where = pairs.mask & (pairs.clean != scene.subject.bos)
    logits = scene.run(pairs.clean, 4.0 * scene.coder.W_dec[scene.latent].detach(), where)
    want = logit_difference(pairs)(logits, pairs.clean).numpy()
    np.testing.assert_allclose(made.steered["logit difference"][1], want, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(made.steered["logit difference"][0], made.clean["logit difference"])


def test_refusals(scene):
    "What cannot be steered, met or watched says so."
    target = Latents(scene.coder, (scene.latent,))
    with pytest.raises(InputError, match="op="): steer(target, 1.0, op="scale")
    with pytest.raises(InputError, match="units for"):
        dose_response(scene.subject, target, (1.0,), scene.ids, unit=(1.0, 2.0))
    with pytest.raises(InputError, match="without an index"):
        dose_response(scene.subject, target, (1.0,), scene.ids, unit="natural")
    with pytest.raises(InputError, match="no strength"): dose_response(scene.subject, target, (), scene.ids)
    with pytest.raises(InputError, match="nats"): calibrated(scene.subject, target, scene.ids, 0.0)
    with pytest.raises(InputError, match="at a strength of 0"):
        calibrated(scene.subject, target, scene.ids, 1e-4, op="set", error="drop")
    with pytest.raises(InputError, match="after"): crossing(lambda x: 1 - 1 / (1 + x), 2.0, most=10)
    with pytest.raises(InputError, match="without a coder"): side_effects(scene.subject, steer(target, 1.0), scene.text,
                                                                          latents={"a": (1,)})
    with pytest.raises(InputError, match="no edit"): side_effects(scene.subject, [], scene.text)
