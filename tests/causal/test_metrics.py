"Metrics against plain torch in float64."
import pytest
import torch

from sae_lab.causal.metrics import Metric, accuracy, as_metrics, check_metric, kl, logit_difference, loss, probability
from sae_lab.causal.pairs import indirect_object_pairs
from sae_lab.ground.errors import InputError, NumericError, ShapeError
from sae_lab.sources.subject import Subject

N, POS, VOCAB = 5, 7, 11


@pytest.fixture(scope="module")
def scene():
    g = torch.Generator().manual_seed(0)
    logits, clean = (3 * torch.randn(N, POS, VOCAB, generator=g, dtype=torch.float64) for _ in range(2))
    return logits, clean, torch.randint(VOCAB, (N, POS), generator=g), torch.tensor([6, 3, 1, 4, 2])


def rows(values): return torch.stack(list(values))


def test_what_is_said_at_the_last_token(scene):
    logits, _, tokens, last = scene
    answer = tokens[:, 0]
    p = rows(logits[i, last[i]].softmax(-1)[answer[i]] for i in range(N))
    torch.testing.assert_close(probability(answer, last)(logits, tokens), p, rtol=1e-12, atol=0)
    right = rows((logits[i, last[i]].argmax() == answer[i]).double() for i in range(N))
    assert torch.equal(accuracy(answer, last)(logits, tokens), right)


def test_loss_and_divergence(scene):
    logits, clean, tokens, last = scene
    p, q = clean.softmax(-1), logits.softmax(-1)
    each = -q[:, :-1].log().gather(2, tokens[:, 1:, None])[..., 0]
    torch.testing.assert_close(loss()(logits, tokens), each.mean(1), rtol=1e-12, atol=1e-12)
    where = torch.zeros(N, POS, dtype=torch.bool)
    where[:, 2:5] = True
    torch.testing.assert_close(loss(where)(logits, tokens), each[:, 1:4].mean(1), rtol=1e-12, atol=1e-12)
    apart = (p * (p.log() - q.log())).sum(-1)
    torch.testing.assert_close(kl(where, clean)(logits, tokens), apart[:, 2:5].mean(1), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(kl(last, clean)(logits, tokens), apart[torch.arange(N), last], rtol=1e-9, atol=1e-12)
    assert kl(where, clean)(clean, tokens).abs().max() < 1e-12


def test_the_difference_on_real_pairs():
    subject = Subject.bundled()
    pairs = indirect_object_pairs(subject, 6)
    logits = subject.logits(pairs.clean)
    found = logit_difference(pairs)(logits, pairs.clean)
    for i in range(6):
        end = logits[i, int(pairs.length[i]) - 1]
        assert found[i] == end[pairs.answer[i]] - end[pairs.distractor[i]]
    for metric in (logit_difference(pairs), loss(pairs.mask), kl(pairs.mask, logits)):
        check_metric(metric, logits, pairs.clean)


def test_what_is_no_metric_says_so(scene):
    logits, clean, tokens, last = scene
    with pytest.raises(InputError, match="against"): kl(last)(logits, tokens)
    whole, broken = (Metric("x", "", fn) for fn in (lambda x, t: x.mean(), lambda x, t: x[:, 0, 0] * torch.nan))
    with pytest.raises(ShapeError, match="one number for each"): whole(logits, tokens)
    with pytest.raises(NumericError, match="prompts"): broken(logits, tokens)
    with pytest.raises(InputError, match="name"): as_metrics([loss(), loss()])
    mixed = Metric("of the batch", "", lambda x, t: x[:, 0, 0] - x[:, 0, 0].mean())
    with pytest.raises(InputError, match="among others"): check_metric(mixed, logits, tokens)
