"What it costs to know what an edit is worth: beside bare passes of the same subject (hand-written)."
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from sae_lab.bench.frame import Row, interleaved
from sae_lab.causal.attribution import attribute
from sae_lab.causal.effects import effect
from sae_lab.causal.metrics import Metric, logit_difference
from sae_lab.causal.pairs import Pairs, indirect_object_pairs
from sae_lab.coders.contract import AbstractCoder, make
from sae_lab.sources.subject import Subject
from sae_lab.splice.edits import ablate
from sae_lab.splice.targets import Latents

PROMPTS, CONTROLS, D_SAE, K, STEPS = 64, 16, 4096, 32, 10
HOOK = "blocks.1.hook_resid_post"


@dataclass(frozen=True)
class Scene:
    "Indirect-object prompts, an untrained dictionary at one hook, and the bare passes of the subject."
    subject: Subject
    pairs: Pairs
    coder: AbstractCoder

    @property
    def metric(self) -> Metric: return logit_difference(self.pairs)

    @cached_property
    def latent(self) -> int:
        "The latent that fires most often."
        x = self.subject.run(self.pairs.clean, HOOK)[HOOK][self.pairs.mask]
        with torch.no_grad(): return int(self.coder.encode(x).counts().argmax())

    def forward(self) -> torch.Tensor:
        "One pass of the subject's own model, without a hook and without a graph."
        with torch.no_grad(): return self.subject.model.run_with_hooks(self.pairs.clean, return_type="logits", fwd_hooks=[])

    def passes(self, n: int) -> None:
        "So many of them, nothing kept."
        for _ in range(n): self.forward()

    def backward(self) -> torch.Tensor:
        "One pass of the subject's own model and back again: the gradient of the metric by the embeddings, of no weight."
        held: list[torch.Tensor] = []

        def leaf(x: torch.Tensor, **_: object) -> torch.Tensor:
            held.append(x.detach().requires_grad_())
            return held[0]
        logits = self.subject.model.run_with_hooks(self.pairs.clean, return_type="logits", fwd_hooks=[("hook_embed", leaf)])
        return torch.autograd.grad(self.metric(logits, self.pairs.clean).sum(), held)[0]


def scene() -> Scene:  # the bundled subject
    "What all cases run on."
    subject = Subject.bundled()
    pairs = indirect_object_pairs(subject, PROMPTS)
    return Scene(subject, pairs, make("topk", d_in=subject.hooks[HOOK], d_sae=D_SAE, k=K))


def cases(
    on: Scene,  # prompts, dictionary, subject
) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:  # case -> what is timed, its bound
    "An edit with everything beside it, and both estimates over all latents of a hook."
    edit = ablate(Latents(on.coder, (on.latent,), HOOK))
    given = on.subject, on.coder, on.pairs, on.metric
    return {
        f"edit/{PROMPTS}": (lambda: effect(on.subject, edit, on.pairs, on.metric, CONTROLS),
                            lambda: on.passes(3 + CONTROLS)),
        "atp": (lambda: attribute(*given, "atp", hook=HOOK), on.backward),
        "ig": (lambda: attribute(*given, "ig", STEPS, hook=HOOK), on.backward),
    }


def rows(
    reps: int = 5,  # repetitions after one warm-up
) -> list[Row]:  # seconds; bound of `edit`: its 19 passes, bare; of `atp` and `ig`: one bare forward and backward pass
    "Time an effect with no-op and controls, and attribution, on 64 prompts of the bundled subject."
    both = cases(scene())
    timed, bounds = ({name: pair[side] for name, pair in both.items()} for side in (0, 1))
    return interleaved(timed, bounds, reps)
