"""Trains the bundled subject, a small GPT-2, on Python's own text and on fables (hand-written).

Run `python -m sae_lab.sources.train_bundled --out sae_lab/data/subject`; a run that was stopped (SIGTERM stops it after the
step and exports what there is) goes on with `--resume`, to fewer `--tokens` if need be. Tokenised text and checkpoints are
kept in the folder `--work`. The batch at a step depends on how far the run is and on nothing else, so a stopped run goes on
as if it had not been stopped: to the same bits with `Plan(compile=False)`; compiled, embedding gradients are added in an
order that varies. `python -m sae_lab.sources.bundled_card` writes the model card.
"""

import argparse
import functools
import hashlib
import json
import logging
import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import chain, count, islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from sae_lab.ground.files import atomic
from sae_lab.sources.documents import Document
from sae_lab.sources.fable_tasks import Prompt, indirect_object, number_agreement, pronoun_agreement
from sae_lab.sources.fable_worlds import lexicon
from sae_lab.sources.fables import fables
from sae_lab.sources.python_docs import python_docs

log = logging.getLogger("sae_lab.train_bundled")
END = "<|endoftext|>"
SOURCES = ("python_docs", "fables")


@dataclass(frozen=True)
class Plan:
    "Everything that decides the trained weights, apart from the machine."

    tokens: int = 17_500_000  # training tokens of text, both sources together
    d_vocab: int = 4096  # vocabulary, the end-of-text token included
    n_ctx: int = 256  # context, tokens
    d_model: int = 128  # width of the residual stream
    n_layers: int = 4
    n_heads: int = 4
    init: float = 0.05  # standard deviation of the first weights
    embed_init: float = 0.4  # standard deviation of the first token embeddings; positions get half of it
    final_gain: float = 0.2  # first gain of the last layer norm, so that large embeddings give calm logits
    batch_rows: int = 16  # contexts in one optimiser step
    micro_rows: int = 8  # contexts in one forward pass
    lr: float = 2e-3  # highest learning rate on text
    embed_lr: float = 3.0  # times that rate for embeddings, which start larger than other weights
    warmup: float = 0.02  # share of the steps over which the rate rises
    decay: float = 0.7  # last share of the steps, over which it falls to 0
    weight_decay: float = 0.1  # on matrices, embeddings excepted
    seed: int = 0  # weights and order of the batches
    train_seed: int = 0  # fables to train on
    heldout_seed: int = 1  # fables never trained on
    heldout_share: float = 0.05  # share of the library's files never trained on
    heldout_tokens: int = 200_000  # held-out fable tokens kept
    tokenizer_chars: int = 10_000_000  # text per source that the tokenizer learns from
    name_repeats: int = 1000  # each name is added so often, so that it is one token where no space precedes it
    lesson_steps: int = 1500  # steps on lessons alone, before any text
    lesson_rows: int = 128  # lessons in one of these steps
    lesson_lr: float = 1e-3  # learning rate of these steps, embeddings included
    review_rows: int = 32  # lessons beside each batch of text
    review_weight: float = 0.25  # weight of their loss against that of the text
    lesson_ctx: int = 32  # tokens in a lesson's row
    lessons: int = 131_072  # different lessons, read again and again
    echoes: float = 0.2  # share of the lessons that are random tokens said again
    disguised: float = 0.5  # share of the prompts about names in which words are exchanged for random tokens
    exchanged: float = 0.25  # share of the words exchanged in these
    compile: bool = True  # fuse the forward and backward pass; False gives the same model more slowly

    @property
    def rows(self) -> int:
        "Contexts in the run: whole batches."
        return max(1, self.tokens // (self.batch_rows * self.n_ctx)) * self.batch_rows


# ---------------------------------------------------------------------------------------------------------------- text


def is_heldout(
    document: Document,  # a document of `python_docs`
    share: float,  # share of the files to hold out
) -> bool:  # True for held-out; the same for all documents of a file
    "Whether a file is kept out of training, by a hash of its name; the help topics, one file, always train."
    digest = hashlib.sha256(document.meta["file"].encode()).digest()
    return document.kind != "topic" and int.from_bytes(digest[:8], "big") < share * 2**64


def library_texts(
    plan: Plan,  # says which share of files is held out
    heldout: bool,  # which side of the split to give
) -> list[str]:  # texts in an order drawn from the plan's seed
    "One side of the Python text, split by file and shuffled by document."
    texts = [d.text for d in python_docs() if is_heldout(d, plan.heldout_share) == heldout]
    return [texts[i] for i in np.random.default_rng(plan.seed).permutation(len(texts))]


def _fable_texts(job: tuple[int, int, int]) -> list[str]:
    seed, start, n = job
    return [document.text for document in fables(seed, n, start)]


def fable_texts(
    seed: int,  # seed of the fables
    chunk: int = 2000,  # fables made by one call of a worker
) -> Iterator[str]:  # endless
    "Texts of fables in order, made by a pool of processes."
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        for first in count(0, 8 * chunk):
            jobs = [(seed, first + i * chunk, chunk) for i in range(8)]
            yield from chain.from_iterable(pool.map(_fable_texts, jobs))


def _take_chars(texts: Iterable[str], chars: int) -> Iterator[str]:
    for text in texts:
        if chars <= 0:
            return
        chars -= len(text)
        yield text


# ----------------------------------------------------------------------------------------------------------- tokenizer


def train_tokenizer(
    texts: Iterable[str],  # text to learn merges from
    d_vocab: int,  # tokens in all, the end-of-text token (id 0) included
) -> Tokenizer:  # byte-level: any text has an encoding and decodes to itself
    "Learn byte-pair merges; ties are broken by the trainer's fixed order, so the same text gives the same tokens."
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=d_vocab,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def as_transformers(
    tokenizer: Tokenizer,  # a trained tokenizer
    n_ctx: int,  # context of the model, tokens
) -> PreTrainedTokenizerFast:  # loadable with AutoTokenizer
    "The same tokenizer with the end-of-text token in every special role."
    roles = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), END)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=n_ctx, clean_up_tokenization_spaces=False, **roles
    )


def write_tokens(
    tokenizer: Tokenizer,  # its id 0 is written after each document
    texts: Iterable[str],  # one string a document
    path: Path,  # file of little-endian uint16
    most: int | None = None,  # stop after this many tokens; None: the whole of `texts`
) -> int:  # tokens written
    "Encode documents into one flat file of token ids."
    written, texts, partial = 0, iter(texts), path.with_suffix(".part")
    with partial.open("wb") as file:
        while (most is None or written < most) and (group := list(islice(texts, 4096))):
            ids = [np.array([*e.ids, 0], "<u2") for e in tokenizer.encode_batch_fast(group)]
            flat = np.concatenate(ids)[: None if most is None else most - written]
            file.write(flat.tobytes())
            written += len(flat)
    partial.replace(path)
    return written


Lessons = tuple[Int[np.ndarray, "n pos"], Int[np.ndarray, "n pos"]]  # token ids; 1 where the loss counts


def lesson_prompts(
    seed: int,  # seed of the prompts
    n: int,  # how many
) -> list[Prompt]:  # half indirect objects, three tenths pronouns, two tenths numbers
    "Prompts of the fables' tasks from the training split: no held-out wording, no held-out combination."
    shares = {indirect_object: n // 2, pronoun_agreement: 3 * n // 10}
    shares[number_agreement] = n - sum(shares.values())
    return [prompt for make, share in shares.items() for prompt in make(seed, share, "train")]


def encode_prompts(
    tokenizer: Tokenizer,  # its id 0 begins each row and fills it up
    prompts: list[Prompt],  # each is followed by its answer
    ctx: int,  # tokens in a row
) -> Lessons:  # all tokens of a sentence count
    "One sentence a row."
    rows = np.zeros((len(prompts), ctx), "<u2")
    for row, encoded in zip(rows, tokenizer.encode_batch_fast([p.text + p.answer for p in prompts]), strict=True):
        ids = encoded.ids[: ctx - 1]
        row[1 : len(ids) + 1] = ids
    return rows, (rows != 0).astype("<u2")


def disguise(
    lessons: Lessons,  # changed in place
    chosen: Bool[np.ndarray, "n"],  # rows to disguise
    names: list[int],  # tokens that stay as they are
    plan: Plan,  # share of words exchanged, vocabulary
    rng: np.random.Generator,  # source of chance
) -> None:
    "Exchange words for random tokens and count the answer alone, so that no rule can rest on a wording."
    rows, counted = lessons
    last = (rows != 0).cumsum(1).argmax(1)[:, None]
    inside = (np.arange(rows.shape[1]) < last) & (rows != 0) & ~np.isin(rows, names)
    change = inside & chosen[:, None] & (rng.random(rows.shape) < plan.exchanged)
    rows[change] = rng.integers(1, plan.d_vocab, change.sum())
    counted[chosen] = np.arange(rows.shape[1]) == last[chosen]


def echo_lessons(
    n: int,  # how many
    plan: Plan,  # vocabulary, tokens in a row
    rng: np.random.Generator,  # source of chance
) -> Lessons:  # what has been said before counts
    "Random tokens repeated with a period that differs from row to row, so that only the tokens tell what comes next."
    place = np.arange(plan.lesson_ctx - 1)
    period = rng.integers(4, plan.lesson_ctx // 2, (n, 1))
    spoken = rng.integers(1, plan.d_vocab, (n, plan.lesson_ctx - 1))
    rows, counted = np.zeros((2, n, plan.lesson_ctx), "<u2")
    rows[:, 1:], counted[:, 1:] = np.take_along_axis(spoken, place % period, 1), place >= period
    return rows, counted


def make_lessons(
    tokenizer: Tokenizer,  # trained
    plan: Plan,  # seed, numbers and shares
) -> Int[np.ndarray, "2 n pos"]:  # token ids; 1 where the loss counts
    "All lessons, shuffled."
    rng = np.random.default_rng(plan.train_seed)
    n_echoes = int(plan.lessons * plan.echoes)
    prompts = lesson_prompts(plan.train_seed, plan.lessons - n_echoes)
    lessons = encode_prompts(tokenizer, prompts, plan.lesson_ctx)
    about_names = np.array([p.meta["task"] != "number_agreement" for p in prompts])
    names = [tokenizer.token_to_id(form + name) for name in lexicon()["name_list"] for form in ("", "\u0120")]
    disguise(lessons, about_names & (rng.random(len(prompts)) < plan.disguised), names, plan, rng)
    both = [np.concatenate(pair) for pair in zip(lessons, echo_lessons(n_echoes, plan, rng), strict=True)]
    return np.stack(both)[:, rng.permutation(plan.lessons)]


def prepare(
    plan: Plan,  # what to make
    work: Path,  # folder for tokenizer.json and the token files; what is there already is kept
) -> None:
    "Train the tokenizer and write the token streams of both sources, both sides."
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "tokenizer.json").exists():
        each = plan.tokenizer_chars
        library = _take_chars(library_texts(plan, heldout=False), each)
        stories = _take_chars(fable_texts(plan.train_seed), each)
        names = [f"{name}\n" for name in lexicon()["name_list"]] * plan.name_repeats
        train_tokenizer(chain(library, stories, names), plan.d_vocab).save(str(work / "tokenizer.json"))
    tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
    makers: dict[str, tuple[Callable[[], Iterable[str]], int | None]] = {
        "python_docs.heldout": (lambda: library_texts(plan, heldout=True), None),
        "fables.heldout": (lambda: fable_texts(plan.heldout_seed), plan.heldout_tokens),
        "python_docs.train": (lambda: library_texts(plan, heldout=False), None),
        "fables.train": (lambda: fable_texts(plan.train_seed), plan.tokens // 2),
    }
    for name, (make, most) in makers.items():
        if not (path := work / f"{name}.u16").exists():
            log.info("%s: %d tokens", name, write_tokens(tokenizer, make(), path, most))
    if not (path := work / "lessons.u16").exists():
        with atomic(path) as part:
            make_lessons(tokenizer, plan).tofile(part)


# ------------------------------------------------------------------------------------------------------------- batches


def pack(
    stream: Int[np.ndarray, "n"],  # token ids, documents ended by id 0
    n_ctx: int,  # tokens in a row
    offset: int = 0,  # tokens left out at the beginning
) -> Int[np.ndarray, "batch pos"]:  # rows that begin with id 0 and then follow the stream
    "Cut a stream into contexts, each with a beginning-of-sequence token."
    body = n_ctx - 1
    n = (len(stream) - offset) // body
    rows = np.zeros((n, n_ctx), np.int64)
    rows[:, 1:] = stream[offset : offset + n * body].reshape(n, body)
    return rows


@functools.lru_cache(maxsize=8)
def _order(n: int, *key: int) -> Int[np.ndarray, "n"]:
    return np.random.default_rng(key).permutation(n)


def rows_at(
    stream: Int[np.ndarray, "n"],  # token ids of one source
    first: int,  # running number of the first row in the whole run
    n: int,  # rows
    n_ctx: int,  # tokens in a row
    seed: int,  # decides the order
) -> Int[np.ndarray, "batch pos"]:  # a pure function of the arguments
    "Rows of an endless shuffled reading: each epoch visits all rows once, cut at another offset."
    body, rows = n_ctx - 1, np.zeros((n, n_ctx), np.int64)
    per_epoch = len(stream) // body - 1
    for i in range(n):
        epoch, place = divmod(first + i, per_epoch)
        offset = int(_order(body, seed, epoch, 1)[0]) + body * int(_order(per_epoch, seed, epoch)[place])
        rows[i, 1:] = stream[offset : offset + body]
    return rows


def batch_at(
    streams: list[Int[np.ndarray, "n"]],  # one per source
    done: int,  # contexts read before
    plan: Plan,  # sizes and seed
) -> Int[Tensor, "batch pos"]:  # the sources alternate, so every forward pass sees both
    "The batch after `done` contexts, half from each source."
    n = len(streams)
    parts = [rows_at(s, done // n, plan.batch_rows // n, plan.n_ctx, plan.seed + i) for i, s in enumerate(streams)]
    return torch.from_numpy(np.stack(parts, 1).reshape(-1, plan.n_ctx))


def lessons_at(
    lessons: Int[np.ndarray, "2 n pos"],  # from `make_lessons`
    done: int,  # lessons read before
    n: int,  # how many
) -> Int[Tensor, "2 batch pos"]:  # in order, beginning again at the end
    "The next lessons."
    return torch.from_numpy(lessons[:, np.arange(done, done + n) % lessons.shape[1]].astype(np.int64))


Part = tuple[Tensor, Tensor]  # token ids, and what each prediction weighs in the loss


def text_parts(
    rows: Int[Tensor, "batch pos"],  # contexts of text
    micro: int,  # rows in one forward pass
) -> Iterator[Part]:
    "Cut a batch into forward passes whose losses add up to the mean over its tokens."
    weights = torch.full((len(rows), rows.shape[1] - 1), 1 / (len(rows) * (rows.shape[1] - 1)))
    yield from zip(rows.split(micro), weights.split(micro), strict=True)


def lesson_parts(
    lessons: Int[Tensor, "2 batch pos"],  # token ids; 1 where the loss counts
    weight: float,  # of their mean loss
    micro: int = 32,  # rows in one forward pass
) -> Iterator[Part]:
    "The same for lessons; each lesson weighs the same, however few of its tokens count."
    rows, counted = lessons[0], lessons[1, :, 1:].float()
    weights = weight * counted / counted.sum(1, keepdim=True) / len(rows)
    yield from zip(rows.split(micro), weights.split(micro), strict=True)


# --------------------------------------------------------------------------------------------------------------- model


def sinusoids(
    n_ctx: int,  # positions
    width: int,  # even number of columns
) -> Float[Tensor, "n_ctx width"]:  # sines and cosines with wavelengths from 4 to 2 * n_ctx tokens
    "First position embeddings: with these a head that looks one token back is a rotation, not a table to be learned."
    wavelengths = torch.logspace(2, torch.tensor(2.0 * n_ctx).log2().item(), width // 2, base=2)
    angles = torch.arange(n_ctx)[:, None] * (2 * torch.pi / wavelengths)
    return torch.cat([angles.sin(), angles.cos()], 1)


def new_model(
    plan: Plan,  # sizes and seed
) -> GPT2LMHeadModel:  # untrained, without dropout
    """A GPT-2 of the plan's size with weights drawn from its seed.

    Embeddings start larger than usual: tied embeddings of 0.02 are drowned by what the first block writes, and names, which
    differ in nothing but their embedding, then stay indistinguishable for most of a short run.
    """
    config = GPT2Config(
        vocab_size=plan.d_vocab,
        n_positions=plan.n_ctx,
        n_embd=plan.d_model,
        n_layer=plan.n_layers,
        n_head=plan.n_heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        initializer_range=plan.init,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        model = GPT2LMHeadModel(config)
    body = model.transformer
    body.wte.weight.data.mul_(plan.embed_init / plan.init)
    body.wpe.weight.data.copy_(sinusoids(plan.n_ctx, plan.d_model) * plan.embed_init * 0.5**0.5)
    body.ln_f.weight.data.fill_(plan.final_gain)
    return model


def _project(x: Tensor, conv: torch.nn.Module) -> Tensor:
    return F.linear(x, conv.weight.T, conv.bias)


def _attend(block: torch.nn.Module, x: Tensor, mask: Tensor, heads: int) -> Tensor:
    "Attention written out: for short contexts the compiler fuses it into less time than the stock kernel takes."
    batch, pos, width = x.shape
    q, k, v = _project(x, block.c_attn).view(batch, pos, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    scores = (q @ k.transpose(-1, -2)).float() * (width // heads) ** -0.5 + mask
    mixed = scores.softmax(-1).to(v.dtype) @ v
    return _project(mixed.transpose(1, 2).reshape(batch, pos, width), block.c_proj)


def token_losses(
    model: GPT2LMHeadModel,  # its weights; its own forward is not used
    rows: Int[Tensor, "batch pos"],  # token ids
) -> Float[Tensor, "batch pred"]:  # cross-entropy of each token after the first, nats
    "The model's loss in the form that trains fastest on a CPU."
    body, pos = model.transformer, rows.shape[1]
    mask = torch.full((pos, pos), float("-inf")).triu(1)
    x = body.wte(rows) + body.wpe.weight[:pos]
    for block in body.h:
        x = x + _attend(block.attn, block.ln_1(x), mask, model.config.n_head)
        hidden = F.gelu(_project(block.ln_2(x), block.mlp.c_fc), approximate="tanh")
        x = x + _project(hidden, block.mlp.c_proj)
    logits = F.linear(body.ln_f(x[:, :-1]), body.wte.weight)
    picked = logits.gather(-1, rows[:, 1:, None])[..., 0]
    return logits.float().logsumexp(-1) - picked.float()


# ------------------------------------------------------------------------------------------------------------ training


def rate_at(
    done: int,  # contexts read before the step
    plan: Plan,  # warm-up, decay, highest rate
) -> float:  # learning rate
    "Warm-up, a plateau, and a straight fall to 0: on the plateau the end of the run can still be moved."
    rise = (done + plan.batch_rows) / max(1.0, plan.warmup * plan.rows)
    fall = (plan.rows - done) / max(1.0, plan.decay * plan.rows)
    return plan.lr * min(1.0, rise, fall)


def new_optimiser(
    model: GPT2LMHeadModel,  # the model to train
    plan: Plan,  # weight decay
) -> torch.optim.AdamW:  # one group decayed, one not
    "AdamW with weight decay on the matrices of the blocks and none on embeddings, gains and biases."
    body = model.transformer
    matrices = [p for p in body.h.parameters() if p.dim() == 2]
    vectors = [p for p in body.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": plan.weight_decay, "embeds": False},
        {"params": vectors, "weight_decay": 0.0, "embeds": False},
        {"params": [body.wte.weight, body.wpe.weight], "weight_decay": 0.0, "embeds": True},
    ]
    return torch.optim.AdamW(groups, lr=plan.lr, betas=(0.9, 0.95), fused=True)


def save_checkpoint(
    path: Path,  # one safetensors file, replaced in one move
    model: GPT2LMHeadModel,  # its weights
    optimiser: torch.optim.AdamW,  # its moments
    facts: dict,  # how far the run is
) -> None:
    "Write all that a run needs to go on."
    tensors = {}
    for name, parameter in model.named_parameters():
        state = optimiser.state[parameter]
        tensors[f"model.{name}"] = parameter.detach()
        tensors |= {f"{key}.{name}": value for key, value in state.items()}
    partial = path.with_suffix(".part")
    save_file(tensors, partial, metadata={"facts": json.dumps(facts)})
    partial.replace(path)


def checkpoint_facts(
    path: Path,  # as written by `save_checkpoint`
) -> dict:  # rows, steps, seconds, and the plans followed with the row each began at
    "What a checkpoint says about its run."
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["facts"])


def load_checkpoint(
    path: Path,  # as written by `save_checkpoint`
    model: GPT2LMHeadModel,  # receives the weights
    optimiser: torch.optim.AdamW | None = None,  # receives the moments
) -> dict:  # the facts it was saved with
    "Put a run back to where it was."
    with safe_open(path, "pt") as file, torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(file.get_tensor(f"model.{name}"))
            if optimiser is not None:
                keys = ("step", "exp_avg", "exp_avg_sq")
                optimiser.state[parameter] = {key: file.get_tensor(f"{key}.{name}") for key in keys}
    return checkpoint_facts(path)


def train_step(
    model: GPT2LMHeadModel,  # changed in place
    optimiser: torch.optim.AdamW,  # changed in place
    parts: Iterable[Part],  # forward passes of the step
    rates: tuple[float, float],  # learning rate of the blocks and of the embeddings
    loss_of: Callable[..., Tensor],  # `token_losses` or its compiled form
) -> float:  # weighted loss, nats per token
    "One optimiser step with gradients gathered over forward passes in bfloat16."
    total = 0.0
    for rows, weights in parts:
        with torch.autocast("cpu", torch.bfloat16):
            loss = (loss_of(model, rows) * weights).sum()
        loss.backward()
        total += loss.item()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in optimiser.param_groups:
        group["lr"] = rates[group["embeds"]]
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return total


def next_step(
    facts: dict,  # how far the run is
    plan: Plan,  # what it follows
    streams: list[Int[np.ndarray, "n"]],  # token ids of each source
    lessons: Int[np.ndarray, "2 m pos"],  # from `make_lessons`
) -> tuple[list[Part], tuple[float, float], dict]:  # forward passes, learning rates, facts after the step
    "What the run does next, a pure function of how far it is: lessons first, then text with some lessons beside it."
    after = facts | {"steps": facts["steps"] + 1}
    if facts["steps"] < plan.lesson_steps:
        parts = lesson_parts(lessons_at(lessons, facts["lessons"], plan.lesson_rows), 1.0)
        rate = plan.lesson_lr * min(1.0, (facts["steps"] + 1) / 100)
        return list(parts), (rate, rate), after | {"lessons": facts["lessons"] + plan.lesson_rows}
    parts = list(text_parts(batch_at(streams, facts["rows"], plan), plan.micro_rows))
    if plan.review_rows:
        parts += lesson_parts(lessons_at(lessons, facts["lessons"], plan.review_rows), plan.review_weight)
    rate = rate_at(facts["rows"], plan)
    after |= {"rows": facts["rows"] + plan.batch_rows, "lessons": facts["lessons"] + plan.review_rows}
    return parts, (rate, rate * plan.embed_lr), after


def note_plan(
    facts: dict,  # how far a run is
    plan: Plan,  # what it follows from here on
) -> dict:  # the facts with the plan and its first row, if it is another than before
    "Keep the history of a run whose plan was changed on the way."
    plans = facts["plans"]
    if plans and plans[-1]["plan"] == asdict(plan):
        return facts
    return facts | {"plans": [*plans, {"from_row": facts["rows"], "plan": asdict(plan)}]}


def train(
    plan: Plan,  # what to train
    work: Path,  # holds the token streams; receives checkpoint.safetensors
    resume: bool = False,  # go on from the checkpoint if there is one
    every: float = 180.0,  # time between checkpoints, seconds
    stop: Callable[[int], bool] = lambda steps: False,  # asked before each step; True leaves a checkpoint and returns
) -> tuple[GPT2LMHeadModel, dict]:  # the model and the run's facts, as `checkpoint_facts` gives them
    "Run the plan from its beginning or from the checkpoint, which may have followed another plan until then."
    streams = [np.memmap(work / f"{name}.train.u16", "<u2", "r") for name in SOURCES]
    lessons = np.fromfile(work / "lessons.u16", "<u2").reshape(2, -1, plan.lesson_ctx)
    model, path = new_model(plan), work / "checkpoint.safetensors"
    optimiser = new_optimiser(model, plan)
    facts = {"rows": 0, "lessons": 0, "steps": 0, "seconds": 0.0, "plans": []}
    if resume and path.exists():
        facts = load_checkpoint(path, model, optimiser)
    facts = note_plan(facts, plan)
    loss_of = torch.compile(token_losses, dynamic=False) if plan.compile else token_losses
    begun, saved = time.monotonic() - facts["seconds"], time.monotonic()
    while facts["rows"] < plan.rows and not stop(facts["steps"]):
        parts, rates, after = next_step(facts, plan, streams, lessons)
        loss = train_step(model, optimiser, parts, rates, loss_of)
        now = time.monotonic()
        if facts["steps"] % 50 == 0:
            log.info(
                "step %d, row %d of %d: loss %.4f, %.0f s", facts["steps"], facts["rows"], plan.rows, loss, now - begun
            )
        facts = after | {"seconds": now - begun}
        if now - saved > every:
            save_checkpoint(path, model, optimiser, facts)
            saved = now
    save_checkpoint(path, model, optimiser, facts)
    return model, facts


def export(
    model: GPT2LMHeadModel,  # trained
    work: Path,  # holds tokenizer.json
    out: Path,  # Hugging Face folder to write
) -> None:
    "Write weights, configuration and tokenizer in the form that `from_pretrained` reads."
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
    as_transformers(tokenizer, model.config.n_positions).save_pretrained(out)


def main(
    arguments: list[str] | None = None,  # command line; None: that of the process
) -> None:
    "Command line: prepare, train, export."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished model")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "sae_lab-subject")
    parser.add_argument("--tokens", type=int, default=Plan.tokens, help="training tokens")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --work")
    parser.add_argument("--prepare", action="store_true", help="only tokenise")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    plan = replace(Plan(), tokens=options.tokens)
    prepare(plan, options.work)
    if not options.prepare:
        asked = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: asked.set())
        model, _ = train(plan, options.work, options.resume, stop=lambda steps: asked.is_set())
        export(model, options.work, options.out)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    main()
