"Every operation on every target against hooks set by hand; no-ops to the bit; a thousand edits leave nothing behind."
import random
import signal
import threading

import pytest
import torch

from sae_lab.coders.contract import make
from sae_lab.coders.transcoder import at
from sae_lab.ground.errors import InputError, ShapeError
from sae_lab.sources.corpus import named
from sae_lab.sources.generate import generate, steps
from sae_lab.sources.subject import Subject
from sae_lab.splice.edits import (
    Edit,
    Reference,
    ablate,
    add,
    compile,
    continued,
    fires,
    mean_of,
    noop,
    resample_of,
    scale,
    set_to,
    swap,
    told,
    token,
    where,
)
from sae_lab.splice.splice import splice
from sae_lab.splice.targets import Component, Directions, Heads, Latents, Neurons

RESID, POST, Z, OUT = ("blocks.1.hook_resid_post", "blocks.2.mlp.hook_post", "blocks.1.attn.hook_z",
                       "blocks.2.hook_attn_out")


@pytest.fixture(scope="module")
def subject():
    return Subject.bundled()


@pytest.fixture(scope="module")
def ids(subject):
    return subject.tokens(["Anna saw the cat by the river.", "The cat slept."])


def rows(m, d=128, seed=0):
    return torch.randn(m, d, generator=torch.Generator().manual_seed(seed))


CODER = make("topk", d_in=128, d_sae=64, k=8)
with torch.no_grad():
    for one in CODER.parameters(): one.add_(rows(1, one.numel(), 9).reshape(one.shape) / 10)
LATENTS = (22, 40, 18)
TARGETS = {"latents": Latents(CODER, LATENTS, RESID), "neurons": Neurons(POST, (7, 500, 3)),
           "heads": Heads(1, (2, 0)), "component": Component(OUT), "directions": Directions(RESID, rows(2))}
HOOKS = {"latents": RESID, "neurons": POST, "heads": Z, "component": OUT, "directions": RESID}


def codes_of(x):
    "Codes of the coder in dense torch."
    best = ((x - CODER.b_dec) @ CODER.W_enc + CODER.b_enc).topk(8, dim=-1)
    return torch.zeros(*x.shape[:-1], 64).scatter(-1, best.indices, best.values.relu())


@torch.no_grad()
def changed(which, act, fn, error="keep"):
    "The model's own activations with the values of a target put through a function, by hand."
    if which == "heads":
        new = act.clone()
        new[:, :, [2, 0]] = fn(act[:, :, [2, 0]].flatten(2)).unflatten(2, (2, 32))
        return new
    if which == "component": return fn(act)
    if which == "neurons":
        new = act.clone()
        new[..., [7, 500, 3]] = fn(act[..., [7, 500, 3]])
        return new
    if which == "directions":
        unit = rows(2) / rows(2).norm(dim=1, keepdim=True)
        coefficient = act @ unit.T
        return act + (fn(coefficient) - coefficient) @ torch.linalg.inv(unit @ unit.T) @ unit
    f = codes_of(act)
    new = f.clone()
    new[..., LATENTS] = fn(f[..., LATENTS])
    return act + (new - f) @ CODER.W_dec if error == "keep" else new @ CODER.W_dec + CODER.b_dec


def by_hand(subject, ids, which, fn, mask, error="keep"):
    "Logits with a target changed at some tokens, by one hook of the model's own."
    def put(act, hook):
        marked = mask.reshape(*mask.shape, *[1] * (act.ndim - 2))
        return torch.where(marked, changed(which, act, fn, error), act)
    return subject.model.run_with_hooks(ids, return_type="logits", fwd_hooks=[(HOOKS[which], put)]).detach()


def values_by_hand(subject, ids, which):
    "What a target holds, by one hook of the model's own."
    found = {}

    def keep(act, hook):
        changed(which, act.detach(), lambda v: found.setdefault("v", v))
    subject.model.run_with_hooks(ids, return_type=None, fwd_hooks=[(HOOKS[which], keep)])
    return found["v"]


def operations(subject, ids, which):
    "Each operation as an edit of a target, and as a function of its values."
    target, size = TARGETS[which], TARGETS[which].size(subject)
    other = subject.tokens(["Anna hid the fox by the well.", "The fox ran."])
    assert other.shape == ids.shape
    level, each = torch.linspace(-1, 2, size), rows(ids.numel(), size, 4).reshape(*ids.shape, size)
    theirs, a_token = values_by_hand(subject, other, which), each[..., 0]
    yield ablate, (target,), lambda v: v * 0
    yield set_to, (target, 1.5), lambda v: v * 0 + 1.5
    yield set_to, (target, level), lambda v: v * 0 + level
    yield set_to, (target, each.double()), lambda v: each
    yield scale, (target, -2), lambda v: -2 * v
    yield scale, (target, a_token), lambda v: a_token[..., None] * v
    yield add, (target, level.tolist()), lambda v: v + level
    yield swap, (target, other), lambda v: theirs
    yield swap, (target, each), lambda v: each


@pytest.mark.parametrize("which, error", [*((which, "keep") for which in TARGETS), ("latents", "drop")])
def test_every_operation_on_every_target(subject, ids, which, error):
    text = ids != subject.bos
    clean = subject.logits(ids)
    for op, given, fn in operations(subject, ids, which):
        edit = op(*given, error=error)
        found = subject.run_with(ids, edit.edits(subject, ids))[0]
        torch.testing.assert_close(found, by_hand(subject, ids, which, fn, text, error), rtol=1e-3, atol=1e-3)
        assert not torch.allclose(found, clean, atol=1e-2), edit
        assert ("error dropped" in str(edit)) == (error == "drop") and str(TARGETS[which]) in str(edit)


def places(subject, ids):
    "Choices of tokens, and the same as masks written out."
    marks = lambda *spots: torch.zeros_like(ids, dtype=torch.bool).index_put(
        tuple(torch.tensor(each) for each in zip(*spots)), torch.tensor(True))
    the, held = subject.tokens(" the", bos=False)[0, 0], subject.run(ids, RESID)[RESID]
    firing, text = codes_of(held)[..., 22] > 0, ids != subject.bos
    mask = torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    assert 1 < (firing & text).sum() < text.sum() and (ids == the).sum() == 2 and text.sum(1).tolist() == [8, 4]
    yield None, text
    yield 2, marks((0, 2), (1, 2))
    yield 0, marks((0, 0), (1, 0))
    yield 7, marks((0, 7))
    yield -1, marks((0, 8), (1, 4))
    yield [1, -2], marks((0, 1), (0, 7), (1, 1), (1, 3))
    yield torch.tensor([1, -2]), marks((0, 1), (0, 7), (1, 1), (1, 3))
    yield slice(2, 4), marks((0, 2), (0, 3), (1, 2), (1, 3))
    yield slice(-2, None), marks((0, 7), (0, 8), (1, 3), (1, 4))
    yield slice(None, None, 3), marks((0, 3), (0, 6), (1, 3))
    yield token(" the"), ids == the
    yield token(int(the)), ids == the
    yield mask, mask
    yield fires(CODER, 22, hook=RESID), firing & text
    yield fires(CODER, 22, above=2.5, hook=RESID), (codes_of(held)[..., 22] > 2.5) & text


def test_every_choice_of_tokens(subject, ids):
    for choice, mask in places(subject, ids):
        assert torch.equal(where(subject, ids, choice), mask), choice
        edit = set_to(TARGETS["neurons"], 3.0, at=choice)
        truth = by_hand(subject, ids, "neurons", lambda v: v * 0 + 3, mask)
        torch.testing.assert_close(subject.run_with(ids, edit.edits(subject, ids))[0], truth, rtol=1e-4, atol=1e-4)
        assert told(choice) in str(edit)


def test_what_is_no_choice_or_no_value_says_so(subject, ids):
    target = TARGETS["heads"]
    run = lambda *how, **more: Edit(target, *how, **more).edits(subject, ids)
    for error, match, call in (
        (InputError, "position 9", lambda: run("set", 1.0, 9)),
        (InputError, "position -10", lambda: run("set", 1.0, [0, -10])),
        (InputError, "which is", lambda: run("set", 1.0, token("the river"))),
        (InputError, "at=", lambda: run("set", 1.0, "the")),
        (InputError, "at=", lambda: run("set", 1.0, True)),
        (ShapeError, "a mask", lambda: run("set", 1.0, torch.ones(2, 3, dtype=torch.bool))),
        (ShapeError, "a value", lambda: run("set", rows(1, 5)[0])),
        (ShapeError, "whole numbers", lambda: run("set", ids)),
        (ShapeError, "whole numbers", lambda: run("swap", ids[:, :3])),
        (InputError, "NaN", lambda: run("add", float("nan"))),
        (InputError, "NaN", lambda: run("set", rows(1, 64)[0] / 0)),
        (InputError, "no value", lambda: run("set")),
        (InputError, "a value", lambda: run("same", 1.0)),
        (InputError, "op=", lambda: run("double", 1.0)),
        (InputError, "error=", lambda: run("set", 1.0, error="lose")),
        (InputError, "both kept and dropped", lambda: compile(subject, ids, [
            ablate(TARGETS["latents"]), ablate(TARGETS["latents"], error="drop")])),
        (InputError, "grows", lambda: ablate(target, at=-1).edits(subject, ids, 3)),
    ):
        with pytest.raises(error, match=match): call()


@pytest.fixture(scope="module")
def corpus(subject):
    return named("fables", seed=1).tokens(subject, 1_500)


@pytest.mark.parametrize("which", TARGETS)
def test_ablation_with_what_a_named_corpus_holds(subject, ids, corpus, which):
    target, text = TARGETS[which], ids != subject.bos
    held = values_by_hand(subject, corpus.ids.long(), which)[~corpus.special]
    mean, drawn = mean_of(subject, target, corpus, rows=7), resample_of(subject, target, corpus, seed=3)
    assert mean.n == drawn.n == corpus.n == len(held) and "fables" in str(mean) and "resample" in str(drawn)
    torch.testing.assert_close(mean.values[0], held.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(drawn.values, held, rtol=1e-4, atol=1e-4)
    for reference in (mean, drawn):
        values = reference.at(*ids.shape)
        assert all((values[row, pos] == reference.values).all(-1).any() for row, pos in ((0, 1), (1, 4)))
        edit = ablate(target, reference)
        truth = by_hand(subject, ids, which, lambda v, values=values: values, text)
        torch.testing.assert_close(subject.run_with(ids, edit.edits(subject, ids))[0], truth, rtol=1e-3, atol=1e-3)
        assert str(reference) in str(edit)


def test_a_resample_is_a_fair_draw_of_whole_tokens():
    "Each token of the corpus as often as another, its values together; the draw is a matter of seed and place."
    pool = torch.stack([torch.arange(50.0), 100 + torch.arange(50.0)], 1)
    one, other = (Reference(pool, "resample", "x", 50, seed) for seed in (0, 1))
    drawn = one.at(40, 100)
    assert torch.equal(drawn[..., 1] - drawn[..., 0], torch.full((40, 100), 100.0))
    counts = drawn[..., 0].flatten().long().bincount(minlength=50).double()
    assert ((counts - 80).square() / 80).sum() < 94  # chi-square with 49 degrees of freedom: 0.9999
    assert not torch.equal(drawn, other.at(40, 100)) and torch.equal(drawn[:3, :7], one.at(3, 7))


def test_edits_of_one_coder_act_on_its_codes(subject, ids):
    "Set, then scale, then add: on codes that are encoded once, each at its own tokens."
    one, two, text = Latents(CODER, (18,), RESID), Latents(CODER, (22, 18), RESID), ids != subject.bos
    early = torch.zeros_like(text)
    early[:, 1:3] = True
    edits = [set_to(one, 5.0), scale(two, torch.tensor([2.0, 3.0]), at=slice(1, 3)), add(one, 1.0, at=slice(1, 3))]

    def put(act, hook):
        f = codes_of(act)
        new = f.clone()
        new[..., 18] = torch.where(text, 5.0, f[..., 18])
        new[..., 18] = torch.where(early, 3 * new[..., 18] + 1, new[..., 18])
        new[..., 22] = torch.where(early, 2 * f[..., 22], f[..., 22])
        return act + ((new - f) @ CODER.W_dec).detach()

    truth = subject.model.run_with_hooks(ids, return_type="logits", fwd_hooks=[(RESID, put)]).detach()
    torch.testing.assert_close(subject.run_with(ids, compile(subject, ids, edits))[0], truth, rtol=1e-3, atol=1e-3)


def test_edits_of_several_coders_and_places_act_in_order(subject, ids):
    "Coders at two hooks, a head between them, a direction at the hook of the first: each reads what stands there."
    other = make("topk", d_in=128, d_sae=64, k=8, seed=5)
    late, text = "blocks.2.hook_resid_post", (ids != subject.bos)[..., None]
    edits = [scale(TARGETS["latents"], 3.0, error="drop"), add(TARGETS["directions"], 2.0), ablate(Heads(2, (1,))),
             set_to(Latents(other, (4, 50), late), 6.0)]
    unit = rows(2) / rows(2).norm(dim=1, keepdim=True)

    def first(act, hook):
        new = codes_of(act)
        new[..., LATENTS] *= 3
        value = new @ CODER.W_dec + CODER.b_dec
        return torch.where(text, value + 2 * torch.ones(2) @ torch.linalg.inv(unit @ unit.T) @ unit, act).detach()

    def head(act, hook):
        return torch.where(text[..., None] & (torch.arange(4) == 1)[:, None], 0.0, act)

    def last(act, hook):
        f = other.encode(act.flatten(0, 1)).dense().unflatten(0, ids.shape).detach()
        new = f.clone()
        new[..., [4, 50]] = 6.0
        return torch.where(text, act + (new - f) @ other.W_dec.detach(), act)

    hooks = [(RESID, first), ("blocks.2.attn.hook_z", head), (late, last)]
    truth = subject.model.run_with_hooks(ids, return_type="logits", fwd_hooks=hooks).detach()
    torch.testing.assert_close(subject.run_with(ids, compile(subject, ids, edits))[0], truth, rtol=1e-3, atol=1e-3)
    twice = [scale(TARGETS["neurons"], 2.0)] * 2  # one edit, twice
    once = scale(TARGETS["neurons"], 4.0)
    torch.testing.assert_close(subject.run_with(ids, compile(subject, ids, twice))[0],
                               subject.run_with(ids, once.edits(subject, ids))[0], rtol=1e-4, atol=1e-4)


def test_a_crosscoder_is_edited_in_two_passes_on_top_of_other_edits(subject, ids):
    "Its codes come from a run with the edits before it, and what it writes is added where they stand."
    pair, text = ("blocks.0.hook_resid_post", RESID), (ids != subject.bos)[..., None]
    coder = at(make("crosscoder", d_in=256, d_sae=64, widths=[128, 128]), pair)
    lift = add(Component("blocks.0.hook_attn_out"), 0.5)
    acts = subject.run_with(ids, lift.edits(subject, ids), pair)[1]
    f = coder.encode(torch.cat([acts[name] for name in pair], -1).flatten(0, 1)).dense().unflatten(0, ids.shape)
    step = text * ((2 - f[..., [8, 9]]) @ coder.W_dec[[8, 9]]).detach()
    hooks = [("blocks.0.hook_attn_out", lambda act, hook: act + 0.5 * text),
             *((name, lambda act, hook, part=part: act + part) for name, part in zip(pair, step.split(128, -1)))]
    truth = subject.model.run_with_hooks(ids, return_type="logits", fwd_hooks=hooks).detach()
    found = subject.run_with(ids, compile(subject, ids, [lift, set_to(Latents(coder, (8, 9)), 2.0)]))[0]
    torch.testing.assert_close(found, truth, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("cached", [True, False], ids=["cache", "none"])
def test_edits_while_a_text_is_continued(subject, cached):
    "Token for token and logit for logit what one run over the finished text says, with masks written out."
    ids = subject.tokens(["The fox met the crow. The fox was", "Anna saw the cat. Then the girl was"])[:, :11]
    pair = ("blocks.0.hook_resid_post", RESID)
    across = at(make("crosscoder", d_in=256, d_sae=64, widths=[128, 128]), pair)
    mask = torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    other = ids.flip(1).contiguous()
    kinds = {  # an edit, and the tokens it changes when the text has grown to n
        "all text": (scale(TARGETS["latents"], 3.0), lambda n: torch.arange(n) > 0),
        "error dropped": (scale(TARGETS["latents"], 0.0, error="drop"), lambda n: torch.arange(n) > 0),
        "last of the prompt": (set_to(TARGETS["directions"], 9.0, at=-1), lambda n: torch.arange(n) == 10),
        "positions": (ablate(TARGETS["heads"], at=[2, -3]), lambda n: (torch.arange(n) == 2) | (torch.arange(n) == 8)),
        "from the fifth on": (add(TARGETS["neurons"], 4.0, at=slice(5, None)), lambda n: torch.arange(n) >= 5),
        "but the last two": (add(TARGETS["neurons"], 4.0, at=slice(1, -2)),
                             lambda n: (torch.arange(n) >= 1) & (torch.arange(n) < 9)),
        "mask": (scale(TARGETS["component"], 2.0, at=mask), lambda n: torch.nn.functional.pad(mask, (0, n - 11))),
        "swap": (swap(TARGETS["heads"], other, at=slice(1, None)),
                 lambda n: (torch.arange(n) > 0) & (torch.arange(n) < 11)),
        "a latent fires": (add(TARGETS["directions"], 5.0, at=fires(CODER, 18, hook=RESID)), None),
        "a token": (add(TARGETS["directions"], 5.0, at=token(" the")), None),
        "crosscoder": (set_to(Latents(across, (8, 9)), 2.0), lambda n: torch.arange(n) > 0),
    }
    seen = subject.tokens(" the", bos=False)[0, 0]
    for name, (edit, choice) in kinds.items():
        found = list(steps(subject, ids, 6, continued(subject, edit, ids), temperature=0.0, cache=cached))
        text = torch.cat([ids, *(step.token[:, None] for step in found)], 1)[:, :-1]
        n = text.shape[1]
        if choice is not None: at_ = choice(n).expand(text.shape).clone()
        elif name == "a token": at_ = text == seen
        else: at_ = (codes_of(subject.run(text, RESID)[RESID])[..., 18] > 0) & (torch.arange(n) > 0)
        value = edit.value if name != "swap" else torch.nn.functional.pad(
            edit.target.values(subject, other), (0, 0, 0, n - 11))
        whole = Edit(edit.target, edit.op, value, at_, edit.error)
        truth = subject.run_with(text, whole.edits(subject, text))[0][:, 10:]
        logits = torch.stack([step.logits for step in found], 1)
        torch.testing.assert_close(logits, truth, rtol=1e-3, atol=2e-3, msg=lambda text, name=name: f"{name}: {text}")
        assert torch.equal(torch.stack([step.token for step in found], 1), truth.argmax(-1)), name
        assert not torch.allclose(logits, subject.logits(text)[:, 10:], atol=1e-2), name


def test_continued_takes_several_edits_and_samples_as_it_does_without_a_cache(subject):
    ids = subject.tokens("The fox met the crow. The fox was")
    edits = [add(TARGETS["directions"], 3.0), ablate(TARGETS["heads"], at=-1)]
    told_on = [torch.stack(list(generate(subject, ids, 8, continued(subject, edits, ids), seed=4, cache=cache)))
               for cache in (True, False)]
    assert torch.equal(*told_on)


def bits(x): return x.detach().view(torch.int32)


def every(hook, width):
    "Every kind of target at a hook, and an edit that would change it."
    coder = make("topk", d_in=width, d_sae=4 * width if width < 9 else 48, k=min(4, width))
    yield Latents(coder, (0, 3), hook)
    yield Component(hook)
    yield Neurons(hook, (0, width // 2) if width > 1 else (0,))
    yield Directions(hook, rows(min(2, width), width))
    if hook.endswith("attn.hook_z"): yield Heads(int(hook.split(".")[1]), (1, 3))


def test_nothing_is_changed_to_the_bit_at_every_hook(subject):
    "Through the full path of an edit and of a splice, at every hook of the subject, for every kind of target."
    ids = subject.tokens(["The fox met the crow", "A cat"])
    clean = bits(subject.logits(ids))
    assert len(subject.hooks) > 100 and clean.dtype == torch.int32
    for hook, width in subject.hooks.items():
        targets = list(every(hook, width))
        same = compile(subject, ids, [noop(set_to(target, 7.0)) for target in targets])
        assert torch.equal(bits(subject.run_with(ids, same)[0]), clean), hook
        spliced = splice(subject, targets[0].coder, hook=hook, special=True)
        assert torch.equal(bits(spliced.logits(ids)), clean), hook
    loud = {hook: set_to(next(every(hook, width)), 50.0) for hook, width in subject.hooks.items()}
    quiet = [hook for hook, edit in loud.items() if torch.equal(
        bits(subject.run_with(ids, edit.edits(subject, ids))[0]), clean)]
    assert quiet == [], f"an edit there changes nothing: {quiet}"


@pytest.mark.parametrize("kind", ["standardised", "gated", "binary", "matching_pursuit", "transcoder",
                                  "skip_transcoder", "crosscoder"])
def test_nothing_is_changed_to_the_bit_whatever_the_coder(subject, ids, kind):
    mlp, pair = ("blocks.1.ln2.hook_out", "blocks.1.hook_mlp_out"), ("blocks.0.hook_resid_post", RESID)
    read, write = (pair, pair) if kind == "crosscoder" else mlp if "transcoder" in kind else (RESID, RESID)
    coder = at(make(kind, d_sae=64, **(dict(d_in=256, widths=[128, 128]) if kind == "crosscoder" else dict(d_in=128))),
               read, write)
    clean = bits(subject.logits(ids))
    same = noop(ablate(Latents(coder, (1, 2))))
    assert torch.equal(bits(subject.run_with(ids, same.edits(subject, ids))[0]), clean)
    assert torch.equal(bits(splice(subject, coder)(ids)), clean)
    dropped = noop(ablate(Latents(coder, (1, 2)), error="drop"))
    assert not torch.equal(bits(subject.run_with(ids, dropped.edits(subject, ids))[0]), clean)


def modules(subject):
    "Every module of the model and of its plain twin."
    return [*subject.model.named_modules(), *subject.plain.model.named_modules()]


def state(subject, parts):
    "Every hook of some modules, the gradient mode, and how deep the model thinks it is in."
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs",
             "_forward_hooks_always_called", "_backward_hooks", "_backward_pre_hooks", "fwd_hooks", "bwd_hooks")
    found = [(name, kind, tuple(held.items() if isinstance(held, dict) else map(id, held)))
             for name, module in parts for kind in kinds if (held := getattr(module, kind, ()))]
    return found, torch.is_grad_enabled(), getattr(subject.model, "context_level", 0)


class Fault(Exception): pass


def drawn(subject, ids, pick, coders):
    "A random edit: target, operation, tokens, error."
    hook = pick.choice([name for name, width in subject.hooks.items() if width > 1])
    width, layer = subject.hooks[hook], pick.randrange(4)
    target = pick.choice([
        lambda: Latents(pick.choice(coders), tuple(pick.sample(range(48), pick.randint(1, 4)))),
        lambda: Neurons(f"blocks.{layer}.mlp.hook_post", tuple(pick.sample(range(512), 5))),
        lambda: Heads(layer, tuple(pick.sample(range(4), pick.randint(1, 3)))),
        lambda: Component(hook),
        lambda: Directions(hook, rows(pick.randint(1, 3), width, pick.randrange(99)))])()
    mask = torch.tensor([[pick.random() < 0.5 for _ in row] for row in ids.tolist()])
    place = pick.choice([None, 1, -1, [0, -2], slice(1, 3), slice(-2, None), token(int(ids[0, 2])), mask,
                         fires(coders[0], pick.randrange(48))])
    other, size = ids.flip(0).contiguous(), target.size(subject)
    noise, number = Reference(rows(9, size), "resample", "noise", 9, pick.randrange(9)), pick.uniform(-3, 3)
    op, value = pick.choice([("ablate", 0.0), ("ablate", noise), ("set", number), ("set", rows(1, size)[0]),
                             ("scale", number), ("add", number), ("swap", other)])
    return Edit(target, op, value, place, pick.choice(["keep", "drop"]))


def faulty(hooks, pick, fault):
    "The same edits, one of which fails before or after it has run."
    name = pick.choice(list(hooks))
    fn, before = hooks[name], pick.random() < 0.5

    def edit(y):
        if before: raise fault
        fn(y)
        raise fault
    return {**hooks, name: edit}


def cut_off(fn, seconds):
    "Run until a timer interrupts it, if it does; True: it did."
    def ring(*_): raise KeyboardInterrupt
    before = signal.signal(signal.SIGALRM, ring)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        fn()
        signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt: return True
    finally: signal.signal(signal.SIGALRM, before)
    return False


def test_a_thousand_edits_with_faults_and_interrupts_leave_nothing_behind(subject):
    "Exceptions and interrupts inside edits, and real interrupts at any moment of a run."
    ids, pick = subject.tokens(["The fox met", "A cat"]), random.Random(0)
    coders = [at(make("topk", d_in=128, d_sae=48, k=8), RESID),
              at(make("transcoder", d_in=128, d_sae=48, k=8), "blocks.2.ln2.hook_out", "blocks.2.hook_mlp_out"),
              at(make("topk", d_in=256, d_sae=48, k=8), ("blocks.0.hook_resid_post", RESID))]
    clean, parts = bits(subject.logits(ids)), modules(subject)
    before = state(subject, parts)
    for point in (subject.model.hook_dict[RESID], subject.plain.model.transformer.h[0]):  # one left there is seen
        handle = point.register_forward_hook(lambda *_: None)
        assert state(subject, parts) != before
        handle.remove()
    counts = dict.fromkeys(["whole", "exception", "interrupt", "alarm", "late"], 0)
    real = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    for i in range(1000):
        edits = [drawn(subject, ids, pick, coders) for _ in range(pick.choice([1, 1, 1, 2]))]
        if len({edit.error for edit in edits}) > 1: edits = edits[:1]
        made = compile(subject, ids, edits)
        kind = pick.choice(["whole", "exception", "interrupt", "alarm"]) if real else pick.choice(list(counts)[:3])
        if kind == "whole":
            assert subject.run_with(ids, made)[0].shape == (*ids.shape, subject.d_vocab)
        elif kind == "alarm":
            run = lambda made=made: (subject.run_with(ids, made), subject.run(ids, [RESID, "blocks.3.hook_in"]))
            if not cut_off(run, pick.uniform(1e-5, 0.02)): kind = "late"
        else:
            fault = Fault if kind == "exception" else KeyboardInterrupt
            with pytest.raises(fault): subject.run_with(ids, faulty(made, pick, fault))
        counts[kind] += 1
        assert state(subject, parts) == before, (i, kind, [str(edit) for edit in edits])
    assert min(counts[kind] for kind in ("whole", "exception", "interrupt")) > 100, counts
    assert not real or counts["alarm"] > 50, counts
    assert modules(subject) == parts and torch.equal(bits(subject.logits(ids)), clean)
    free = []
    thread = threading.Thread(target=lambda: free.append(subject.lock.acquire(timeout=1) and subject.lock.release()))
    thread.start()
    thread.join()
    assert free == [None]  # acquired, and given back
