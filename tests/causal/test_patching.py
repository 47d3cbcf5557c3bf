"Patching agrees with plain Hugging Face hooks; paths agree with them too, and with what is known in closed form."
from dataclasses import replace
from importlib.resources import files

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel

from sae_lab.causal.metrics import kl, logit_difference
from sae_lab.causal.pairs import Pairs, indirect_object_pairs
from sae_lab.causal.patching import _instead, _watched, level, most_changed, patch, paths, ratio, reads, spots
from sae_lab.coders.contract import make
from sae_lab.coders.transcoder import at
from sae_lab.ground.errors import InputError, UnknownName
from sae_lab.ground.sums import bootstrap_mean
from sae_lab.sources.bridge import native
from sae_lab.sources.subject import Subject
from sae_lab.splice.edits import compile, swap
from sae_lab.splice.targets import Component, Heads, Latents, Neurons

FOLDER = str(files("sae_lab") / "data" / "subject")
HEADS = 4


class Plain:
    "The bundled subject as transformers loads it, read and changed by hooks of torch alone."

    def __init__(self, double):
        model = GPT2LMHeadModel.from_pretrained(FOLDER, attn_implementation="eager").eval()
        self.model, blocks = model.double() if double else model, list(model.transformer.h)
        self.places = {("z", i): block.attn.c_proj for i, block in enumerate(blocks)}
        self.places |= {("post", i): block.mlp.c_proj for i, block in enumerate(blocks)}
        self.places |= {("resid", i): each for i, each in enumerate([*blocks[1:], model.transformer.ln_f])}

    @torch.no_grad()
    def run(self, tokens, change=None):
        "Logits, and what each place held before `change` (place -> function) was made there."
        seen, change = {}, change or {}

        def hook(key):
            def pre(_, args):
                seen[key] = args[0].clone()
                return (change[key](args[0].clone()), *args[1:]) if key in change else None
            return pre
        held = [module.register_forward_pre_hook(hook(key)) for key, module in self.places.items()]
        try: return self.model(tokens).logits, seen
        finally: [each.remove() for each in held]


def put(values, mask, columns=slice(None)):
    "Give some columns other values at some tokens."
    def change(y):
        new = y.clone()
        new[..., columns] = values[..., columns]
        return torch.where(mask[..., None], new, y)
    return change


def width(head): return slice(32 * head, 32 * head + 32)


def difference(logits, pairs):
    "The logit difference at the last token, by hand."
    end = logits[torch.arange(len(pairs)), pairs.length - 1]
    return (end.gather(1, pairs.answer[:, None]) - end.gather(1, pairs.distractor[:, None]))[:, 0].double().numpy()


@pytest.fixture(scope="module")
def subject():
    "The bundled subject in float32."
    return Subject.bundled()


@pytest.fixture(scope="module")
def exact():
    "The bundled subject in float64."
    subject = Subject.bundled()
    subject.model.double()
    return subject


@pytest.fixture(scope="module")
def plain(): return Plain(double=True)


@pytest.fixture(scope="module")
def pairs(exact):
    "Indirect-object prompts of unequal length."
    return indirect_object_pairs(exact, 8, seed=3)


@pytest.fixture(scope="module")
def coder():
    "An untrained coder in float64."
    return make("topk", d_in=128, d_sae=96, k=12, seed=1).double()


def sides(pairs, way): return (pairs.corrupt, pairs.clean) if way == "denoise" else (pairs.clean, pairs.corrupt)


@pytest.mark.parametrize("way", ["noise", "denoise"])
def test_heads_are_patched_as_by_hugging_face(exact, pairs, plain, way):
    "Every head, at the second name and at the end: 1e-5."
    found = patch(exact, pairs, level(exact, "head"), logit_difference(pairs), "roles", way, controls=0, progress=False)
    run, source = sides(pairs, way)
    _, other = plain.run(source)
    assert np.abs(found.run - difference(plain.run(run)[0], pairs)).max() < 1e-9
    for name in ("S2", "end"):
        rows = torch.tensor([fact["positions"][name] for fact in pairs.facts])
        mask = torch.arange(run.shape[1]) == rows[:, None]
        for i in range(exact.n_layers * HEADS):
            layer, head = divmod(i, HEADS)
            logits, _ = plain.run(run, {("z", layer): put(other["z", layer], mask, width(head))})
            assert np.abs(found.patched[i, found.along.index(name)] - difference(logits, pairs)).max() < 1e-9 < 1e-5
    assert np.abs(found.effect).max() > 1


def test_heads_are_patched_as_by_hugging_face_in_float32(subject, pairs):
    "As far as rounding allows: 1e-5 of the largest logit, which the untouched models differ by as well."
    plain = Plain(double=False)
    found = patch(subject, pairs, level(subject, "head", [2, 3]), logit_difference(pairs), {"end": -1}, progress=False)
    (want, other), mask = plain.run(pairs.clean), torch.arange(pairs.clean.shape[1]) == pairs.last[:, None]
    for i in range(2 * HEADS):
        layer, head = 2 + i // HEADS, i % HEADS
        logits, _ = plain.run(pairs.corrupt, {("z", layer): put(other["z", layer], mask, width(head))})
        assert np.abs(found.patched[i, 0] - difference(logits, pairs)).max() < 1e-5 * float(want.abs().max())


def latent(coder, j, x, values, mask):
    "What a latent's new value adds to what the coder reads."
    now = coder.encode(x.flatten(0, 1)).dense().unflatten(0, x.shape[:2])[..., j]
    return x + (mask * (values - now))[..., None] * coder.W_dec[j].detach()


def read(coder, j, x): return coder.encode(x.flatten(0, 1)).dense().unflatten(0, x.shape[:2])[..., j].detach()


@pytest.mark.parametrize("what", ["neurons", "stream", "attention", "latent"])
def test_every_level_is_patched_as_by_hugging_face(exact, pairs, plain, coder, what):
    "Neurons, whole components and latents, at all text."
    _, other = plain.run(pairs.clean)
    mask = pairs.corrupt != exact.bos
    hook, some = "blocks.1.hook_resid_post", [3, 77, 400]
    j = most_changed(exact, pairs, Latents(coder, range(96), hook), 1)[0].latents[0]
    target, change = {
        "neurons": (Neurons("blocks.2.mlp.hook_post", tuple(some)), {("post", 2): put(other["post", 2], mask, some)}),
        "stream": (Component(hook), {("resid", 1): put(other["resid", 1], mask)}),
        "attention": (Component("blocks.2.hook_attn_out"), {("z", 2): put(other["z", 2], mask)}),
        "latent": (Latents(coder, (j,), hook),
                   {("resid", 1): lambda x: latent(coder, j, x, read(coder, j, other["resid", 1]), mask)}),
    }[what]
    found = patch(exact, pairs, target, logit_difference(pairs), controls=0)
    assert np.abs(found.patched[0, 0] - difference(plain.run(pairs.corrupt, change)[0], pairs)).max() < 1e-9
    assert np.abs(found.effect).max() > 1e-3 and found.noop[0] == 0


class Paths:
    "Path patching by hand, after Goldowsky-Dill et al."

    def __init__(self, plain, pairs, coder):
        self.plain, self.coder, self.tokens = plain, coder, pairs.corrupt
        (self.logits, self.own), (_, self.other) = plain.run(pairs.corrupt), plain.run(pairs.clean)
        self.mask = pairs.corrupt != 0

    def first(self, sender, kinds=("z", "post")):
        "The run in which the sender alone changes."
        change = {key: (lambda y, key=key: self.own[key]) for key in self.own if key[0] in kinds}
        kind, layer, which = sender
        if kind == "z":
            mine = put(self.other["z", layer], self.mask, width(which))(self.own["z", layer])
            change["z", layer] = lambda y: mine
        elif kind == "mlp": change["post", layer] = lambda y: self.other["post", layer] * self.mask[..., None] + (
            self.own["post", layer] * ~self.mask[..., None])
        else:
            goal = read(self.coder, which, self.other["resid", layer])
            change["resid", layer] = lambda x: latent(self.coder, which, x, goal, self.mask)
        return self.plain.run(self.tokens, change)

    def logits_for(self, sender, receiver, kinds=("z", "post")):
        "Logits of the second run; without receiver, of the first."
        logits, seen = self.first(sender, kinds)
        if receiver is None: return logits
        kind, layer, which = receiver
        if kind == "z": change = {("z", layer): put(seen["z", layer], self.mask, width(which))}
        elif kind == "post": change = {("post", layer): put(seen["post", layer], self.mask)}
        else:
            goal = read(self.coder, which, seen["resid", layer])
            change = {("resid", layer): lambda x: latent(self.coder, which, x, goal, self.mask)}
        return self.plain.run(self.tokens, change)[0]


@pytest.mark.parametrize("sender, receiver, frozen", [
    (("z", 0, 2), ("z", 2, 0), ("attn", "mlp")),
    (("z", 0, 2), ("z", 2, 0), ("attn",)),
    (("z", 2, 0), None, ("attn", "mlp")),
    (("z", 2, 0), None, ("attn",)),
    (("z", 2, 0), ("post", 3, None), ("attn", "mlp")),
    (("z", 1, 1), ("post", 1, None), ("attn", "mlp")),
    (("mlp", 0, None), ("z", 2, 0), ("attn", "mlp")),
    (("z", 1, 1), ("resid", 1, "latent"), ("attn", "mlp")),
    (("resid", 1, "latent"), ("z", 2, 0), ("attn", "mlp")),
    (("resid", 0, "latent"), ("resid", 1, "latent"), ("attn", "mlp")),
], ids=str)
def test_paths_are_those_of_hugging_face(exact, pairs, plain, coder, sender, receiver, frozen):
    "Heads, MLPs and latents as senders and receivers: 1e-5."
    j = most_changed(exact, pairs, Latents(coder, range(96), "blocks.1.hook_resid_post"), 1)[0].latents[0]
    sender, receiver = ((*each[:2], j) if each and each[2] == "latent" else each for each in (sender, receiver))

    def target(kind, layer, which):
        if kind == "z": return Heads(layer, (which,))
        if kind == "resid": return Latents(coder, (which,), f"blocks.{layer}.hook_resid_post")
        return Component(f"blocks.{layer}.mlp.hook_post")
    by_hand = Paths(plain, pairs, coder).logits_for(sender, receiver, [{"attn": "z", "mlp": "post"}[k] for k in frozen])
    found = paths(exact, pairs, target(*sender), target(*receiver) if receiver else None, logit_difference(pairs),
                  frozen=frozen, controls=1)
    assert np.abs(found.patched[0, 0] - difference(by_hand, pairs)).max() < 1e-9 < 1e-5
    assert found.noop[0] < 1e-12 and np.abs(found.effect).max() > 1e-6


def test_the_only_path_is_the_patch(exact, pairs):
    "The last MLP has but one way to the logits; so has the last attention once MLPs are computed anew."
    metric = logit_difference(pairs)
    for what, frozen in (("mlp_out", ("attn", "mlp")), ("attn_out", ("attn",)), ("head", ("attn",))):
        targets = level(exact, what, [3])
        straight = paths(exact, pairs, targets, None, metric, frozen=frozen)
        whole = patch(exact, pairs, targets, metric)
        assert np.abs(straight.effect - whole.effect).max() < 1e-9
        assert np.abs(straight.control[:, 0] - whole.control[:, 0]).max() < 1e-9


def test_all_that_is_read_is_the_head(exact, pairs):
    "Queries, keys and values together are the head; queries alone are not."
    head, metric = Heads(2, (0,)), logit_difference(pairs)
    groups = {"all": reads(exact, head), "head": head, "queries": reads(exact, head, "q")}
    found = paths(exact, pairs, Component("blocks.0.hook_attn_out"), groups, metric)
    assert np.abs(found.effect[0, 0] - found.effect[0, 1]).max() < 1e-9
    assert np.abs(found.effect[0, 0] - found.effect[0, 2]).max() > 1e-6


def made_up(n=5, length=7, words=30):
    "Pairs of random tokens for a subject without a tokenizer."
    draw = torch.Generator().manual_seed(0)
    clean, corrupt = torch.randint(0, words, (2, n, length), generator=draw)
    answer, distractor = torch.randint(0, words, (2, n), generator=draw)
    return Pairs(clean, corrupt, torch.full((n,), length), answer, distractor, ({},) * n, {}, "random")


def test_straight_paths_add_up_without_norms():
    "Where nothing divides the stream, the straight paths of all that writes to it add up to the whole change."
    config = dict(d_model=24, d_head=8, n_layers=3, n_ctx=12, n_heads=3, d_vocab=30, act_fn="relu")
    subject, some = Subject.wrap(native(seed=1, normalization_type=None, **config)), made_up()
    subject.model.double()
    writers = [Component("hook_embed"), *level(subject, "head"), *level(subject, "mlp_out")]
    found = paths(subject, some, writers, None, logit_difference(some), controls=0)
    assert np.abs(found.effect[:, 0].sum(0) - (found.source - found.run)).max() < 1e-9
    whole = patch(subject, some, Component("hook_embed"), logit_difference(some), controls=0)
    assert np.allclose(whole.effect[0, 0], found.source - found.run)
    assert not np.allclose(whole.effect[0, 0], found.effect[0, 0])


def test_transcoders_send_and_receive(exact, pairs):
    "A path from a transcoder's latent is that of the step it adds to the MLP's output."
    hooks = "blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out"
    coder = at(make("transcoder", d_in=128, d_sae=96, k=12, seed=2).double(), *hooks)
    sender = most_changed(exact, pairs, Latents(coder, range(96)), 1)[0]
    found = paths(exact, pairs, [sender, Heads(0, (2,))], {"logits": None, "latent": sender}, logit_difference(pairs))
    assert np.isnan(found.effect[0, 1]).all() and np.isfinite(found.effect[1]).all() and (found.noop < 1e-12).all()
    names = [f"blocks.{i}.{each}" for i in range(4) for each in ("attn.hook_z", "mlp.hook_post")]
    held = {name: (lambda y, x=x: x) for name, x in exact.run(pairs.corrupt, names).items()}
    rise = sender.values(exact, pairs.clean) - sender.values(exact, pairs.corrupt)
    move = rise * coder.W_dec[sender.latents[0]].detach() * (pairs.corrupt != exact.bos)[..., None]
    logits, _ = exact.run_with(pairs.corrupt, {**held, "blocks.1.hook_mlp_out": lambda y: y + move})
    assert np.abs(found.patched[0, 0] - difference(logits, pairs)).max() < 1e-9


def test_senders_inside_a_component_are_not_lost(exact, pairs):
    "What enters a head or an MLP is a sender too: its own component is computed anew, and no other."
    metric = logit_difference(pairs)
    straight = lambda hook: paths(exact, pairs, Component(hook), None, metric, controls=0).effect
    for inside in ("mlp.hook_pre", "ln2.hook_normalized"):
        assert np.abs(straight(f"blocks.2.{inside}") - straight("blocks.2.hook_mlp_out")).max() < 1e-9
    for inside in ("attn.hook_v", "attn.hook_q", "ln2.hook_normalized"):
        assert np.abs(straight(f"blocks.2.{inside}")).max() > 1e-3


def test_controls_change_as_much(exact, pairs, coder):
    "Of equal norm at each token, of the same latents' kind, and elsewhere nothing."
    hook = "blocks.1.hook_resid_post"
    for target, other in ((Heads(2, (1,)), None), (Latents(coder, (3, 5), hook), torch.tensor([10, 20]))):
        held, mask = {}, spots(exact, pairs, "roles")["S2"]
        values = target.values(exact, pairs.clean)
        exact.run_with(pairs.corrupt, _watched(compile(exact, pairs.corrupt, [swap(target, values, mask)]), held))
        (name, step), = held.items()
        changed = _instead(exact, target, held, other, 0)[name](torch.zeros_like(step))
        assert torch.allclose(changed.norm(dim=-1), step.norm(dim=-1)) and (step.norm(dim=-1) > 0).any()
        assert not torch.allclose(changed, step)
        if other is not None:
            rest = changed[step.norm(dim=-1) > 0]
            fitted = rest @ torch.linalg.pinv(coder.W_dec[other].detach()) @ coder.W_dec[other].detach()
            assert torch.allclose(fitted, rest)


def test_ratio_resamples_as_bootstrap_mean():
    "The mean with its interval; a share of it; NaN where nothing is known."
    x = np.random.default_rng(0).normal(2, 1, (3, 40))
    for row, low, high in zip(x, *ratio(x, seed=5)[1:]): assert np.allclose((low, high), bootstrap_mean(row, 5))
    assert np.allclose(ratio(x, x[0])[0], x.mean(1) / x[0].mean())
    low, high = ratio(np.stack([x[0] * 0.3]), x[0])[1:]
    assert np.allclose((low, high), 0.3)
    half = np.where(np.arange(40) < 20, x[0], np.nan)
    assert np.isclose(ratio(half)[0], x[0, :20].mean())
    assert np.isclose(ratio(half, x[1])[0], half[:20].mean() / x[1, :20].mean())
    assert np.isnan(ratio(np.full(40, np.nan))).all() and np.isnan(ratio(np.ones(4), np.zeros(4))[0])


def test_shares_intervals_and_gaps(subject):
    "The whole stream brings all back; prompts without a place are not counted; frames say what there is."
    pairs = indirect_object_pairs(subject, 12, seed=1)
    longest = int(pairs.length.max())
    mask = torch.zeros_like(pairs.mask)
    mask[pairs.length == longest, longest - 1] = True
    places, metric = {"all": None, "longest": mask}, logit_difference(pairs)
    found = patch(subject, pairs, level(subject, "resid_pre"), metric, places, "noise")
    some = int((pairs.length == longest).sum())
    assert 0 < some < 12 and found.frame.n.tolist() == [12, some] * 4
    assert np.isnan(found.patched[:, 1]).sum() == 4 * (12 - some)
    assert np.allclose(found.shares.share[::2], 1, atol=1e-5)
    assert np.allclose(found.effect[:, 0], found.source - found.run, atol=1e-4)
    assert (found.noop == 0).all() and found.null > 0
    first = found.frame.iloc[0]
    assert np.allclose((first.low, first.high), bootstrap_mean(found.effect[0, 0]))
    assert first.low < first.effect < first.high
    assert list(found.frame) == ["layer", "target", "position", "effect", "low", "high", "control", "n"]
    text = found._repr_html_()
    assert "error kept" in text and "12 prompts" in text and "95 % interval" in text and "controls" in text


def test_nothing_depends_on_the_batch(exact, pairs, coder):
    "Some prompts at a time, or all."
    targets, metric = [Heads(2, (0,)), Latents(coder, (3,), "blocks.1.hook_resid_post")], logit_difference(pairs)
    swept = [patch(exact, pairs, targets, metric, "each", batch=each, controls=0).patched for each in (3, 8)]
    assert np.allclose(*swept, equal_nan=True, atol=1e-12)
    one, two = Heads(1, (0,)), Heads(2, (0,))
    some = [paths(exact, pairs, one, two, metric, batch=each, controls=0).patched for each in (3, 8)]
    assert np.allclose(*some, atol=1e-12)


def test_no_change_no_effect(exact, pairs):
    "A prompt patched from itself; and places that come before the prompts differ."
    same = replace(pairs, corrupt=pairs.clean)
    found = patch(exact, same, level(exact, "head", [2]), logit_difference(pairs), "roles")
    assert (found.effect == 0).all() and np.isnan(found.control).all() and found.null is None
    early = patch(exact, pairs, level(exact, "resid_post"), logit_difference(pairs), "roles")
    assert (early.effect[:, early.along.index("S1")] == 0).all() and np.isnan(early.shares.control).any()


def test_metrics_that_compare(exact, pairs):
    "KL is told against the clean prompt's logits, whichever way."
    found = patch(exact, pairs, Component("blocks.0.hook_resid_pre"), kl(pairs.last), way="denoise")
    assert np.allclose(found.patched, 0, atol=1e-9) and (found.run > 1).all() and np.allclose(found.shares.share, 1)


def test_the_model_is_left_as_it_was(subject, pairs):
    "The same bits before and after."
    before = subject.logits(pairs.clean)
    patch(subject, pairs, level(subject, "head", [0]), logit_difference(pairs))
    paths(subject, pairs, Heads(0, (1,)), Heads(2, (0,)), logit_difference(pairs))
    assert torch.equal(before, subject.logits(pairs.clean))


def test_errors_say_what_to_do(exact, pairs):
    "Names that do not exist, paths that run backwards, places without names."
    metric, head = logit_difference(pairs), Heads(2, (0,))
    with pytest.raises(UnknownName, match="noise"): patch(exact, pairs, head, metric, way="noising")
    with pytest.raises(UnknownName, match="roles"): patch(exact, pairs, head, metric, "role")
    with pytest.raises(UnknownName, match="attn_out"): level(exact, "attention")
    with pytest.raises(UnknownName, match="mlp"): paths(exact, pairs, Heads(0, (0,)), head, metric, frozen=("mlps",))
    with pytest.raises(InputError, match="before all senders"): paths(exact, pairs, head, Heads(1, (0,)), metric)
    with pytest.raises(InputError, match="no target"): patch(exact, pairs, [], metric)
    with pytest.raises(InputError, match="each"): patch(exact, made_up(), head, metric, "roles")
    with pytest.raises(InputError, match="dict"): patch(exact, pairs, head, metric, [pairs.differs, pairs.differs])
