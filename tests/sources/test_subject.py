"The port against Hugging Face itself and against a plain forward written out."
import dataclasses

import pytest
import torch
import torch.nn.functional as F

from sae_lab.ground.errors import InputError, ShapeError, UnknownName
from sae_lab.sources.bridge import native
from sae_lab.sources.fables import fables
from sae_lab.sources.subject import Subject

HOOKS = ["hook_embed", "blocks.0.hook_resid_pre", "blocks.1.hook_attn_out", "blocks.1.hook_resid_mid",
         "blocks.1.mlp.hook_pre", "blocks.1.mlp.hook_post", "blocks.1.hook_mlp_out", "blocks.2.attn.hook_z",
         "blocks.2.hook_resid_post"]


def hugging_face(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def truth(model, ids):
    "Activations by Hugging Face's own modules."
    found, handles = {}, []

    def at(name, module, before):
        def keep(_, args, out=None):
            value = args[0] if before else out
            found[name] = value[0] if isinstance(value, tuple) else value

        handles.append(module.register_forward_pre_hook(keep) if before else module.register_forward_hook(keep))

    blocks = model.transformer.h
    at("hook_embed", model.transformer.wte, False)
    at("blocks.0.hook_resid_pre", blocks[0], True)
    at("blocks.1.hook_attn_out", blocks[1].attn, False)
    at("blocks.1.hook_resid_mid", blocks[1].ln_2, True)
    at("blocks.1.mlp.hook_pre", blocks[1].mlp.c_fc, False)
    at("blocks.1.mlp.hook_post", blocks[1].mlp.c_proj, True)
    at("blocks.1.hook_mlp_out", blocks[1].mlp, False)
    at("blocks.2.attn.hook_z", blocks[2].attn.c_proj, True)
    at("blocks.2.hook_resid_post", blocks[2], False)
    with torch.no_grad():
        logits = model(ids).logits
    for handle in handles:
        handle.remove()
    return found, logits


@pytest.fixture(scope="module")
def ids(subject):
    return torch.randint(subject.d_vocab, (4, 30), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("way", ["plain", "bridge"])
def test_activations_equal_hugging_face(subject, folder, ids, way):
    "Every place equals a Hugging Face hook to 1e-5, alone and together, with the bridge and without."
    port = subject if way == "plain" else dataclasses.replace(subject, plain=None)
    found, _ = truth(hugging_face(folder), ids)
    together = port.run(ids, HOOKS)
    for hook in HOOKS:
        assert torch.allclose(together[hook], found[hook], atol=1e-5), hook
        assert torch.allclose(port.run(ids, hook)[hook], found[hook], atol=1e-5), hook
        assert together[hook].shape[-1] == port.hooks[hook]


def test_all_places_are_the_same_both_ways(subject, ids):
    "The plain model and the bridge agree at every place there is."
    bridge = dataclasses.replace(subject, plain=None)
    for hook in subject.hooks:
        assert torch.allclose(subject.run(ids, hook)[hook], bridge.run(ids, hook)[hook], atol=1e-5), hook
    assert {"blocks.1.mlp.out.hook_in", "blocks.1.hook_out"} <= subject.plain.places.keys()


def test_loss_and_logits_equal_hugging_face(subject, folder, ids):
    "Logits and the loss of each token."
    model = hugging_face(folder)
    _, logits = truth(model, ids)
    assert torch.allclose(subject.logits(ids), logits, atol=1e-4)
    per_token = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    assert torch.allclose(subject.loss(ids), per_token, atol=1e-5)
    with torch.no_grad():
        assert abs(float(subject.loss(ids).mean()) - float(model(ids, labels=ids).loss)) < 1e-5


@pytest.mark.parametrize("way", ["plain", "bridge"])
def test_nothing_behind_the_last_place_is_run(subject, ids, way):
    "The layer after the one wanted is never entered, nor what follows the place within its layer."
    port = subject if way == "plain" else dataclasses.replace(subject, plain=None)
    entered = []
    model = port.plain.model.transformer.h if way == "plain" else port.model.blocks
    watch = [model[1].mlp.c_proj if way == "plain" else port.model.blocks[1].mlp.hook_out, model[2]]
    handles = [module.register_forward_hook(lambda *_: entered.append(1)) for module in watch]
    try:
        port.run(ids, ["blocks.0.hook_resid_post", "blocks.1.mlp.hook_post"])
    finally:
        for handle in handles:
            handle.remove()
    assert not entered


def test_edits_leave_nothing_behind(subject, ids):
    "Hooks are gone after a run, after an edit, and after an edit that raises."
    before = subject.logits(ids)

    def broken(act):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        subject.run_with(ids, {"blocks.1.mlp.hook_post": broken})
    changed, _ = subject.run_with(ids, {"blocks.1.mlp.hook_post": torch.zeros_like})
    assert not changed.equal(before) and subject.logits(ids).equal(before)
    assert not any(point.fwd_hooks for point in subject.model.hook_dict.values())


def test_edit_by_definition(subject, folder, ids):
    "Zeroing the neurons is what Hugging Face gives when the MLP's second matrix reads zeros."
    model = hugging_face(folder)
    model.transformer.h[1].mlp.c_proj.register_forward_pre_hook(lambda _, args: (torch.zeros_like(args[0]),))
    with torch.no_grad():
        expected = model(ids).logits
    got, acts = subject.run_with(ids, {"blocks.1.mlp.hook_post": torch.zeros_like}, "blocks.1.mlp.hook_post")
    assert torch.allclose(got, expected, atol=1e-4) and not acts["blocks.1.mlp.hook_post"].any()


def test_gradients_pass_through_edits(subject, ids):
    "With grad=True what an edit adds gets a gradient, after runs without."
    subject.run(ids, "blocks.2.hook_resid_post")
    shift = torch.zeros(subject.d_model, requires_grad=True)
    logits, _ = subject.run_with(ids, {"blocks.0.hook_resid_post": lambda act: act + shift}, grad=True)
    logits[:, -1].logsumexp(-1).sum().backward()
    assert shift.grad.abs().sum() > 0
    assert not subject.run_with(ids, {})[0].requires_grad
    assert not subject.run(ids, "hook_embed")["hook_embed"].is_inference()


def test_aliases_and_order(subject, ids):
    "Either name works and answers under the name asked for; an alias is edited once, not twice."
    both = subject.run(ids, ["blocks.1.hook_out", "blocks.1.hook_resid_post"])
    assert both["blocks.1.hook_out"].equal(both["blocks.1.hook_resid_post"])
    assert subject.hook("blocks.1.hook_out") == "blocks.1.hook_resid_post" and "blocks.1.hook_out" not in subject.hooks


def test_folding(folder, subject, ids):
    "Folded weights give the same distribution and the same centred unembedding; an edit counts once."
    args = dict(fold_ln=True, center_writing_weights=True, center_unembed=True, fold_value_biases=True)
    folded = Subject.load(folder, **args)
    assert folded.identity["processing"] == args and folded.identity["weights"] == subject.identity["weights"]
    assert torch.allclose(folded.loss(ids), subject.loss(ids), atol=1e-4)
    assert torch.allclose(folded.unembed(), subject.unembed(), atol=1e-5)
    plain = folded.run(ids, "blocks.1.hook_resid_post")["blocks.1.hook_resid_post"]
    _, seen = folded.run_with(ids, {"blocks.1.hook_resid_post": lambda act: act + 1}, "blocks.1.hook_resid_post")
    assert torch.allclose(seen["blocks.1.hook_resid_post"], plain + 1, atol=1e-5)


def test_readout(subject, ids):
    "Through W_out, W_O and directly, the parts of the stream add up to the centred logits."
    last = subject.n_layers - 1
    hooks = [f"blocks.{last}.{name}" for name in ("hook_resid_post", "mlp.hook_post", "hook_mlp_out")]
    acts = subject.run(ids, hooks)
    norm = subject.model.ln_final
    x = F.layer_norm(acts[f"blocks.{last}.hook_resid_post"].flatten(0, 1), (subject.d_model,))
    logits = subject.logits(ids).flatten(0, 1)
    shift = norm.b @ subject.model.W_U
    wanted = (logits - shift) - (logits - shift).mean(-1, keepdim=True)
    assert torch.allclose(subject.logit_weights(f"blocks.{last}.hook_resid_post", x), wanted, atol=1e-4)
    neurons = acts[f"blocks.{last}.mlp.hook_post"].flatten(0, 1)
    out = neurons @ subject.to_residual(f"blocks.{last}.mlp.hook_post") + subject.model.blocks[last].mlp.b_out
    assert torch.allclose(out, acts[f"blocks.{last}.hook_mlp_out"].flatten(0, 1), atol=1e-5)
    with pytest.raises(InputError, match="linearly"):
        subject.logit_weights("blocks.0.mlp.hook_pre", neurons[:1])
    with pytest.raises(ShapeError, match="width 7"):
        subject.logit_weights("blocks.0.mlp.hook_post", torch.zeros(1, 7))


def test_mistakes_are_named(subject, ids, tmp_path):
    "What came, what was expected, what to do."
    with pytest.raises(UnknownName, match=r"blocks\.1\.mlp\.hook_post"):
        subject.run(ids, "blocks.1.mlp.hook_pots")
    with pytest.raises(InputError, match="at most the context of 64"):
        subject.tokens("a word " * 100)
    with pytest.raises(InputError, match="at most the context of 64"):
        subject.run(torch.zeros(1, 65, dtype=torch.long), "hook_embed")
    with pytest.raises(InputError, match="tokenizer"):
        Subject.wrap(native(d_model=16, d_head=8, n_layers=1, n_ctx=8, n_heads=2, d_vocab=9, act_fn="relu")).tokens("a")
    with pytest.raises(InputError, match="token ids 600"):
        subject.loss(torch.full((1, 3), 600))
    with pytest.raises(ShapeError, match="batch axis"):
        subject.run(torch.zeros(0, 4, dtype=torch.long), "hook_embed")
    with pytest.raises(InputError, match="on meta"):
        subject.logits(ids.to("meta"))
    with pytest.raises(InputError, match="config.json"):
        Subject.load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="no tokenizer"):
        Subject.load(tmp_path)
    with pytest.raises(InputError, match="float64"):
        Subject.load(tmp_path, dtype="float64")
    with pytest.raises(InputError, match="TransformerLens model"):
        Subject.wrap(torch.nn.Linear(2, 2))


def test_two_threads_do_not_meet(subject, ids):
    "Runs from several threads each see their own places and edits."
    from concurrent.futures import ThreadPoolExecutor

    jobs = [lambda: subject.run(ids[:1], HOOKS[5])[HOOKS[5]], lambda: subject.run(ids[1:], HOOKS[8])[HOOKS[8]],
            lambda: subject.run_with(ids, {HOOKS[5]: torch.zeros_like})[0], lambda: subject.logits(ids)]
    alone = [job() for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda i: (i % 4, jobs[i % 4]()), range(80)))
    assert all(torch.allclose(result, alone[i], atol=1e-6) for i, result in results)


def test_words(subject):
    "Text comes back; padding is at the right and special; strings of half a character are shown, not refused."
    texts = ["One fox 🦊.", "Two"]
    ids = subject.tokens(texts)
    assert [subject.text([i for i in row.tolist() if i not in subject.special_ids]) for row in ids] == texts
    assert set(ids[:, 0].tolist()) == {subject.bos} and ids[1, -1].item() in subject.special_ids
    assert len(subject.strings(ids[0])) == ids.shape[1]
    assert subject.tokens("Two", bos=False).shape[1] == ids[1].ne(subject.bos).sum()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(folder, subject, ids, dtype):
    "A model in half precision runs and is near."
    half = Subject.load(folder, dtype=dtype)
    assert half.identity["weights"] != subject.identity["weights"] and half.identity["dtype"] == dtype
    act, full = (each.run(ids, HOOKS[-1])[HOOKS[-1]].float() for each in (half, subject))
    assert (act - full).norm() < 0.03 * full.norm()


def test_the_bundled_subject():
    "The model in the package loads with no network."
    subject = Subject.bundled()
    story = next(fables(1, 1)).text  # of the seed that it was never trained on
    assert subject.loss(subject.tokens(story)[:, :subject.n_ctx]).mean() < 2
    assert subject.hooks["blocks.1.mlp.hook_post"] == subject.d_mlp
