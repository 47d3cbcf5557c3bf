"The port over transformer-lens 3.9: its bridge, and its HookedTransformer by duck typing (make test-compat)."
from importlib.metadata import version

import pytest
import torch

pytestmark = [pytest.mark.compat, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
if not version("transformer-lens").startswith("3."):
    pytest.skip("needs transformer-lens 3.9", allow_module_level=True)

CONFIG = dict(d_model=32, d_head=8, n_layers=2, n_ctx=32, n_heads=4, d_vocab=50, act_fn="gelu", d_mlp=64)
HOOKS = ["blocks.0.attn.hook_z", "blocks.1.hook_resid_pre", "blocks.1.mlp.hook_post", "blocks.1.hook_resid_post"]


@pytest.fixture(scope="module", params=["hooked", "bridge"])
def subject(request):
    "The same port over both kinds of model."
    from sae_lab.sources.bridge import native
    from sae_lab.sources.subject import Subject

    if request.param == "bridge":
        return Subject.wrap(native(**CONFIG))
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    return Subject.wrap(HookedTransformer(HookedTransformerConfig(seed=0, normalization_type="LN", **CONFIG)).eval())


@pytest.fixture(scope="module")
def ids():
    return torch.randint(50, (3, 20), generator=torch.Generator().manual_seed(0))


def test_activations_equal_the_cache(subject, ids):
    "What the port gives is what run_with_cache gives."
    _, cache = subject.model.run_with_cache(ids)
    for hook, act in subject.run(ids, HOOKS).items():
        assert torch.allclose(act, cache[hook].flatten(2), atol=1e-6) and act.shape[-1] == subject.hooks[hook]


def test_edits_and_loss(subject, ids):
    "Edits count once and leave nothing; the loss is the model's own."
    before = subject.logits(ids)
    plain = subject.run(ids, HOOKS[1])[HOOKS[1]]
    moved, seen = subject.run_with(ids, {HOOKS[1]: lambda act: act + 1}, HOOKS[1])
    assert torch.allclose(seen[HOOKS[1]], plain + 1, atol=1e-6) and subject.logits(ids).equal(before)
    own = subject.model(ids, return_type="loss", loss_per_token=True)
    assert torch.allclose(subject.loss(ids), own, atol=1e-5)

    def broken(act):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        subject.run_with(ids, {HOOKS[1]: broken})
    assert not any(point.fwd_hooks for point in subject.model.hook_dict.values())


def test_readout_and_names(subject, ids):
    "Classic names only for folded places, maps to the stream, and the readout against the logits."
    assert set(HOOKS) <= subject.hooks.keys() and subject.to_residual(HOOKS[0]).shape == (32, 32)
    assert subject.to_residual(HOOKS[2]).shape == (64, 32)
    stream = subject.run(ids, HOOKS[3])[HOOKS[3]].flatten(0, 1)
    direct = subject.logit_weights(HOOKS[3], torch.nn.functional.layer_norm(stream, (32,)))
    logits = subject.logits(ids).flatten(0, 1)
    shift = (subject.model.ln_final.b @ subject.model.W_U + subject.model.b_U).detach()
    wanted = (logits - shift) - (logits - shift).mean(-1, keepdim=True)
    assert torch.allclose(direct, wanted, atol=1e-4)


def test_a_hugging_face_folder(tmp_path):
    "Subject.load bridges with 3.9 as it does with 4, and reads plain places the same."
    import dataclasses

    from sae_lab.sources.bridge import untrained
    from sae_lab.sources.subject import Subject

    subject = Subject.load(untrained(tmp_path, ["the fox met the crow"] * 5))
    ids = subject.tokens("the crow met the fox")
    bridge = dataclasses.replace(subject, plain=None)
    assert subject.plain.places
    for hook in HOOKS:
        assert torch.allclose(subject.run(ids, hook)[hook], bridge.run(ids, hook)[hook], atol=1e-5)
    assert torch.isfinite(subject.loss(ids)).all()
