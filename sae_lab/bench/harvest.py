"""Harvest through the subject beside a bare Hugging Face forward that is stopped at the same place (hand-written)."""
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.resources import files
from pathlib import Path

import torch

from sae_lab.bench.frame import Row, interleaved
from sae_lab.sources.bridge import untrained
from sae_lab.sources.corpus import Tokens
from sae_lab.sources.stream import CHUNK, harvest
from sae_lab.sources.subject import Subject


class _Reached(Exception):
    "The bare model has come to the place wanted."


def bare(
    folder: Path,  # a Hugging Face GPT-2
    layer: int,  # whose MLP activations are wanted
    ids: torch.Tensor,  # token ids [batch, pos]
) -> Callable[[], None]:  # runs once over `ids`
    "The bound: the model as Hugging Face runs it, sdpa attention, stopped before the MLP's second matrix."
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa", local_files_only=True).eval()
    step = max(1, CHUNK["cpu"] // ids.shape[1])

    def stop(module: torch.nn.Module, args: tuple) -> None:
        raise _Reached

    model.transformer.h[layer].mlp.c_proj.register_forward_pre_hook(stop)

    @torch.inference_mode()
    def run() -> None:
        for part in ids.split(step):
            try:
                model(part, use_cache=False)
            except _Reached:
                pass

    return run


def case(
    folder: Path,  # a Hugging Face GPT-2
    layer: int,  # whose MLP activations are harvested
    sequences: int,  # how many
) -> tuple[Callable[[], object], Callable[[], object]]:  # harvest and its bound, over the same tokens
    "Both sides of one comparison."
    subject = Subject.load(folder)
    ids = torch.randint(subject.d_vocab, (sequences, subject.n_ctx), generator=torch.Generator().manual_seed(0))
    tokens = Tokens(ids, torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool), ("random",), {})
    hook = [f"blocks.{layer}.mlp.hook_post"]
    return partial(harvest, subject, tokens, torch.arange(sequences), hook), bare(folder, layer, ids)


def rows(
    reps: int = 5,  # repetitions after one warm-up
) -> list[Row]:  # seconds; ratio to the bare forward, lower is better
    "Harvest of one MLP's activations: a 6-layer model of width 512, and the bundled subject."
    bundled = Path(str(files("sae_lab") / "data" / "subject"))
    with tempfile.TemporaryDirectory() as folder:
        wide = untrained(folder, ["a text"], seed=0, n_layer=6, n_embd=512, n_head=8, n_positions=256)
        pairs = {"harvest/512x6": case(wide, 3, 16)}
        if not (bundled / "config.json").exists():  # the same shape, untrained
            bundled = untrained(Path(folder) / "small", ["a text"], n_layer=4, n_embd=128, n_head=4, n_positions=256)
        pairs["harvest/bundled"] = case(bundled, 1, 64)
        return interleaved({k: v[0] for k, v in pairs.items()}, {k: v[1] for k, v in pairs.items()}, reps)
