"Equal data, steps and L0: our kinds beside those of others. Writes quality.csv, .svg, .md; keeps rows that exist."
import importlib
import io
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from shared import HERE, commit, options, read_rows, write_rows, write_svg

from sae_lab.coders import formats
from sae_lab.coders.contract import AbstractCoder, coders, make
from sae_lab.measures.downstream import measure
from sae_lab.sources.corpus import Tokens, named
from sae_lab.sources.stream import Stream, TensorSource
from sae_lab.sources.subject import Subject
from sae_lab.training.fit import train

HOOK, D_SAE, K, BATCH, STEPS, HELD, SCORED = "blocks.1.hook_resid_post", 1024, 32, 1024, 400, 16_384, 20_000
WARM, DECAY, DEAD = 0.05, 0.2, 0.02  # shares of the run: rate up, rate down, silence that makes a latent dead
SPANS = (1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2)  # of the nested groups
COLUMNS = ["kind", "library", "seed", "rate", "strength", "chosen", "fvu", "fvu_low", "fvu_high", "ce", "ce_low",
           "ce_high", "l0", "dead", "held_fvu", "seconds", "commit"]
WORDS = ("kind", "library", "commit")


@dataclass(frozen=True)
class Data:
    "Rows of the subject, harvested once: to train on, and held back to choose and calibrate with."
    subject: Subject
    rows: torch.Tensor   # [STEPS * BATCH, d_in]
    held: torch.Tensor   # [HELD, d_in]
    score: Tokens        # of the score part

    def source(self, seed: int) -> TensorSource:
        "The same batches in the same order for everyone with this seed."
        return TensorSource(self.rows, batch=BATCH, seed=seed, hook=HOOK)


class Feed:
    "The batches of a source as fresh tensors, as often as they are asked for."

    def __init__(self, source: TensorSource): self.source = source
    def __iter__(self) -> Iterator[torch.Tensor]: return (batch.acts[HOOK].clone() for batch in self.source.batches())


def harvested(folder: Path) -> Data:
    "The activations, from a file where they were harvested before."
    subject = Subject.bundled()
    score = named("bundled").split("score", seed=0).tokens(subject, SCORED)
    path, wanted = folder / f"quality-{STEPS * BATCH}-{HELD}.pt", STEPS * BATCH + HELD
    if not path.is_file():
        tokens = named("bundled").split("fit", seed=0).tokens(subject, wanted)
        batches = Stream(subject, tokens, [HOOK], seed=0).batches()
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(torch.cat([batch.acts[HOOK] for batch in batches])[:wanted], path)
    rows = torch.load(path, weights_only=True, mmap=True)
    return Data(subject, rows[HELD:], rows[:HELD], score)


# ---- everyone trains: (data, seed, rate or None for the default, strength of the penalty) -> a coder of ours

def ours(kind: str, data: Data, seed: int, rate: float | None, strength: float | None, **args: object) -> AbstractCoder:
    "The recipe of the kind; another rate where one is given."
    coder, recipe = make(kind, d_in=data.rows.shape[1], d_sae=D_SAE, seed=seed, **args), coders[kind].meta["recipe"]
    if rate: recipe = replace(recipe, lr=rate, lr_width=None)
    if strength: recipe = replace(recipe, objective=partial(recipe.objective, l1=strength))
    return next(iter(train({kind: coder}, data.source(seed), recipes=recipe, seed=seed, progress=False).values()))


def saelens(name: str, data: Data, seed: int, rate: float | None, strength: float | None, nested: bool = False,
            **args: object) -> AbstractCoder:
    "SAETrainer.fit, inputs scaled as it recommends; what it saves for inference is read again."
    lib, rate = importlib.import_module("sae_lens"), rate or 3e-4
    torch.manual_seed(seed)
    if nested: args["matryoshka_widths"] = [round(D_SAE * sum(SPANS[: i + 1])) for i in range(len(SPANS))]
    if strength: args["l1_coefficient"] = strength
    config = getattr(lib, name + "Config")(d_in=data.rows.shape[1], d_sae=D_SAE,
                                           normalize_activations="expected_average_only_in", **args)
    run = importlib.import_module("sae_lens.config").SAETrainerConfig(
        total_training_samples=STEPS * BATCH, train_batch_size_samples=BATCH, lr=rate, lr_end=rate / 10,
        lr_warm_up_steps=round(WARM * STEPS), lr_decay_steps=round(DECAY * STEPS), n_batches_for_norm_estimate=8,
        dead_feature_window=round(DEAD * STEPS))
    feed = iter([*(batch for batch, _ in zip(Feed(data.source(seed)), range(8))), *Feed(data.source(seed))])
    sae = lib.SAETrainer(run, getattr(lib, name)(config), feed).fit()
    with TemporaryDirectory() as folder:
        sae.save_inference_model(folder)
        return formats.read(folder, format="saelens")


def dictionary_learning(module: str, name: str, data: Data, seed: int, rate: float | None, strength: float | None,
                        **args: object) -> AbstractCoder:
    "Their trainSAE with the normalisation that it recommends; the folder it writes is read again."
    lib = importlib.import_module(f"dictionary_learning.trainers.{module}")
    def trainer(**config):
        made = getattr(lib, name)(**config)
        made.dead_feature_threshold = round(DEAD * STEPS * BATCH)
        return made
    config = {"trainer": trainer, "steps": STEPS, "activation_dim": data.rows.shape[1], "dict_size": D_SAE, "layer": 1,
              "lm_name": "bundled", "device": "cpu", "seed": seed, "warmup_steps": round(WARM * STEPS),
              "decay_start": round((1 - DECAY) * STEPS), **args, **({"lr": rate} if rate else {}),
              **({"l1_penalty": strength} if strength else {})}
    with TemporaryDirectory() as folder:
        importlib.import_module("dictionary_learning.training").trainSAE(
            Feed(data.source(seed)), [config], steps=STEPS, save_dir=folder, normalize_activations=True, device="cpu")
        return formats.read(Path(folder) / "trainer_0", format="dictionary_learning")


SPARSE = {"sparsity_warmup_steps": round(WARM * STEPS)}
LATE = {"threshold_start_step": round((1 - DECAY) * STEPS)}
CONTENDERS: dict[str, dict[str, Callable[..., AbstractCoder]]] = {
    "topk": {
        "sae_lab": partial(ours, "topk", k=K), "saelens": partial(saelens, "TopKTrainingSAE", k=K),
        "dictionary_learning": partial(dictionary_learning, "top_k", "TopKTrainer", k=K, **LATE)},
    "batchtopk": {
        "sae_lab": partial(ours, "batchtopk", k=K), "saelens": partial(saelens, "BatchTopKTrainingSAE", k=float(K)),
        "dictionary_learning": partial(dictionary_learning, "batch_top_k", "BatchTopKTrainer", k=K, **LATE)},
    "matryoshka": {
        "sae_lab": partial(ours, "matryoshka", k=K),
        "saelens": partial(saelens, "MatryoshkaBatchTopKTrainingSAE", nested=True, k=float(K)),
        "dictionary_learning": partial(dictionary_learning, "matryoshka_batch_top_k", "MatryoshkaBatchTopKTrainer", k=K,
                                       group_fractions=list(SPANS), **LATE)},
    "jumprelu": {
        "sae_lab": partial(ours, "jumprelu", target_l0=float(K)),
        "saelens": partial(saelens, "JumpReLUTrainingSAE", jumprelu_sparsity_loss_mode="quadratic", target_l0=float(K),
                           l0_warm_up_steps=round(WARM * STEPS)),
        "dictionary_learning": partial(dictionary_learning, "jumprelu", "JumpReluTrainer", target_l0=float(K),
                                       **SPARSE)},
    "relu_april": {
        "sae_lab": partial(ours, "relu_april"),
        "saelens": partial(saelens, "StandardTrainingSAE", l1_warm_up_steps=round(WARM * STEPS)),
        "dictionary_learning": partial(dictionary_learning, "standard", "StandardTrainerAprilUpdate", **SPARSE)},
    "relu_l1": {
        "sae_lab": partial(ours, "relu_l1"),
        "dictionary_learning": partial(dictionary_learning, "standard", "StandardTrainer", **SPARSE)}}
PRICED = {"relu_april": {"sae_lab": 0.1, "saelens": 1.0, "dictionary_learning": 0.1},
          "relu_l1": {"sae_lab": 0.1, "dictionary_learning": 0.1}}  # kind -> library -> first price of the search
RATES = (None, 4e-3, 1e-2)  # what everyone may choose from on seed 0: its own default, and these


# ---- equal L0, and what is measured

def mean_l0(coder: AbstractCoder, x: torch.Tensor) -> float:
    "Latents a row."
    with torch.no_grad(): return float(coder.encode(x).l0().double().mean())


def calibrated(coder: AbstractCoder, x: torch.Tensor) -> AbstractCoder:
    "Thresholds of all latents times one factor, so that K latents fire on a held row; others as they are."
    state = dict(coder.state_dict())
    keys = [key for key in state if key.endswith("threshold") or key == "gate.unit"]  # a jump's is level * unit
    if not keys: return coder
    key, before = keys[0], state[keys[0]].clone()
    if "log" not in key and not bool((before > 0).any()): before = torch.ones_like(before)
    low, high = -5.0, 5.0
    for _ in range(30):
        middle = (low + high) / 2
        state[key].copy_(before + middle if "log" in key else before * torch.tensor(middle).exp())
        low, high = (middle, high) if mean_l0(coder, x) > K else (low, middle)
    return coder


def held_fvu(coder: AbstractCoder, x: torch.Tensor) -> float:
    "FVU on the held rows."
    with torch.no_grad(): y = coder(x)[1]
    return float((x - y).square().sum() / (x - x.mean(0)).square().sum())


def trained(kind: str, library: str, data: Data, seed: int, rate: float | None, strength: float | None
            ) -> tuple[AbstractCoder, dict]:
    "One coder, and what there is to say of it before the score part is opened."
    begun, noise = time.perf_counter(), io.StringIO()
    with redirect_stdout(noise), redirect_stderr(noise), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        coder = calibrated(CONTENDERS[kind][library](data, seed, rate, strength), data.held)
    coder.spec = coder.spec.with_(hooks_in=(HOOK,), hooks_out=(HOOK,))
    facts = {"kind": kind, "library": library, "seed": seed, "rate": rate or 0.0, "strength": strength or 0.0,
             "l0": mean_l0(coder, data.held), "held_fvu": held_fvu(coder, data.held),
             "seconds": time.perf_counter() - begun}
    said = (f"{key}={value}" if isinstance(value, str) else f"{key}={value:.4g}" for key, value in facts.items())
    print(*said, flush=True)
    return coder, facts


def measured(coder: AbstractCoder, facts: dict, data: Data) -> dict:
    "A row of the table."
    found = measure(coder, data.subject, data.score, seed=0)
    fvu, ce = found["fvu"], found["ce_recovered_mean"]
    return facts | {"fvu": fvu.value, "fvu_low": fvu.low, "fvu_high": fvu.high, "ce": ce.value,
                    "ce_low": ce.low, "ce_high": ce.high, "l0": found["l0"].value, "dead": found["dead"].value,
                    "commit": commit()}


def priced(kind: str, library: str, data: Data, rate: float | None) -> float:
    "The price of activity at which K latents fire, to 7 %, by secants in the logarithms."
    price, seen = PRICED[kind][library], list[tuple[float, float]]()
    for _ in range(5):
        l0 = trained(kind, library, data, 0, rate, price)[1]["l0"]
        seen.append((price, max(l0, 0.1)))
        if abs(l0 / K - 1) < 0.07: break
        slope = -1.0
        if len(seen) > 1:
            (p, a), (q, b) = (torch.tensor(each).log().tolist() for each in seen[-2:])
            slope = min(-0.2, (b - a) / (q - p)) if q != p else -1.0
        price *= float((K / seen[-1][1]) ** (1 / slope))
    return min(seen, key=lambda each: abs(each[1] / K - 1))[0]


def rates(kind: str, library: str) -> list[float | None]:
    "What a library may choose from: a rate that is its default stands once."
    recipe = coders[kind].meta["recipe"] if library == "sae_lab" and kind in coders else None
    return [rate for rate in RATES if recipe is None or rate != recipe.rate(D_SAE)]


def contest(kind: str, library: str, data: Data, have: list[dict], keep: Callable[[dict], None], seeds: int) -> None:
    "Choose the rate on seed 0 by the held rows, then run the other seeds at it; the score part is for the chosen."
    mine = [r for r in have if (r["kind"], r["library"]) == (kind, library)]
    made: dict[float, AbstractCoder] = {}
    if not any(r["chosen"] for r in mine):
        for rate in rates(kind, library):
            if any(r["seed"] == 0 and r["rate"] == (rate or 0.0) for r in mine): continue
            strength = priced(kind, library, data, rate) if kind in PRICED else None
            coder, facts = trained(kind, library, data, 0, rate, strength)
            made[facts["rate"]] = coder
            mine.append(facts)
            keep(facts)
        first = min((r for r in mine if r["seed"] == 0), key=lambda r: r["held_fvu"])
        at = kind, library, data, 0, first["rate"] or None, first["strength"] or None
        coder = made[first["rate"]] if first["rate"] in made else trained(*at)[0]
        mine.append(chosen := measured(coder, first, data) | {"chosen": 1})
        keep(chosen)
    best = next(r for r in mine if r.get("chosen"))
    for seed in range(1, seeds):
        if any(r["seed"] == seed for r in mine): continue
        coder, facts = trained(kind, library, data, seed, best["rate"] or None, best["strength"] or None)
        keep(measured(coder, facts, data) | {"chosen": 1})


# ---- the table and the picture

def read(path: Path) -> list[dict]:
    "Rows that are there; a run that was not chosen has no measures."
    return read_rows(path, WORDS, lambda text: float(text or 0))


def put(path: Path, row: dict) -> None:
    "Add a row, or replace the one of the same kind, library, seed and rate."
    same = lambda r: all(r[key] == row[key] for key in ("kind", "library", "seed", "rate"))
    rows = [r for r in read(path) if not same(r)] + [row]
    order = {(kind, library): i for i, (kind, library) in enumerate((k, x) for k in CONTENDERS for x in CONTENDERS[k])}
    rows.sort(key=lambda r: (order[r["kind"], r["library"]], r["seed"], r["rate"]))
    told = ({key: value if key in WORDS else f"{value:.6g}" for key, value in r.items()} for r in rows)
    write_rows(path, COLUMNS, told)


def mean(numbers: list[float]) -> float:
    "Their mean."
    return sum(numbers) / len(numbers)


def summary(rows: list[dict]) -> list[dict]:
    "Per kind and library: the mean over seeds, and the least and largest bound of the seeds' intervals."
    found = []
    for kind, libraries in CONTENDERS.items():
        for library in libraries:
            mine = [r for r in rows if (r["kind"], r["library"], r["chosen"]) == (kind, library, 1)]
            if not mine: continue
            line = {"kind": kind, "library": library, "seeds": len(mine), "rate": mine[0]["rate"]}
            line |= {key: mean([r[key] for r in mine]) for key in ("fvu", "ce", "l0", "dead")}
            line |= {f"{key}_low": min(r[f"{key}_low"] for r in mine) for key in ("fvu", "ce")}
            line |= {f"{key}_high": max(r[f"{key}_high"] for r in mine) for key in ("fvu", "ce")}
            found.append(line)
    return found


def verdict(lines: list[dict]) -> list[str]:
    "Where a kind of ours is more than 0.01 worse than another library's."
    best, worse = {line["kind"]: line for line in lines if line["library"] == "sae_lab"}, []
    for line in lines:
        mine = best.get(line["kind"], line)
        for key, sign, name in (("fvu", 1, "FVU"), ("ce", -1, "CE recovered")):
            if sign * (mine[key] - line[key]) > 0.01:
                worse.append(f"{line['kind']}, {name}: {mine[key]:.3f}, {line['library']} {line[key]:.3f}")
    return worse


def table(lines: list[dict]) -> str:
    "A Markdown table, a line a kind and library."
    head = ["kind", "library", "FVU, lower is better", "CE recovered, higher is better", "L0", "dead", "rate", "seeds"]
    text = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for line in lines:
        spans = [f"{line[key]:.4f} ({line[key + '_low']:.4f} to {line[key + '_high']:.4f})" for key in ("fvu", "ce")]
        rate = f"{line['rate']:g}" if line["rate"] else "default"
        text.append(f"| {line['kind']} | {line['library']} | {spans[0]} | {spans[1]} | {line['l0']:.1f} | "
                    f"{line['dead']:.3f} | {rate} | {line['seeds']} |")
    return "\n".join(text)


def picture(lines: list[dict]):
    "FVU and CE recovered: a panel each, a group a kind, a colour a library, the interval as a bar."
    from plotly.subplots import make_subplots

    from sae_lab.views.figures import SERIES
    fig = make_subplots(1, 2, subplot_titles=["FVU (lower is better)", "CE recovered (higher is better)"])
    symbols = {"sae_lab": "circle", "saelens": "square", "dictionary_learning": "diamond"}
    kinds = list(dict.fromkeys(line["kind"] for line in lines))
    for i, (library, symbol) in enumerate(symbols.items()):
        mine = [line for line in lines if line["library"] == library]
        at = [kinds.index(line["kind"]) + 0.22 * (i - 1) for line in mine]
        for column, key in enumerate(("fvu", "ce"), start=1):
            above = [line[f"{key}_high"] - line[key] for line in mine]
            below = [line[key] - line[f"{key}_low"] for line in mine]
            fig.add_scatter(x=at, y=[line[key] for line in mine], mode="markers", name=library, legendgroup=library,
                            showlegend=column == 1, row=1, col=column,
                            marker={"color": SERIES[i], "symbol": symbol, "size": 7},
                            error_y={"type": "data", "array": above, "arrayminus": below, "thickness": 1, "width": 2})
    fig.update_xaxes(tickvals=list(range(len(kinds))), ticktext=kinds, tickangle=-40)
    return fig


PAGE = """# Quality at equal data, steps and L0

Dictionaries of {d_sae:,} latents at `{hook}` of the bundled subject, {tokens:,} tokens of its fit part, harvested
once: {steps} steps of {batch:,} rows, the same batches in the same order for everyone with the same seed. Each
library trains through its own public loop (`fit`; `SAETrainer.fit`; `trainSAE`) with the hyper-parameters that it
comes with and the scaling of inputs that it recommends. Settings that count steps or tokens are scaled to the run,
alike for all: the rate rises over the first {warm:.0%} and falls over the last {decay:.0%}, a latent is dead after
{dead:.0%} without firing. The rate is chosen on seed 0, on rows held back: the library's own default,
0.004 or 0.01; the other seeds run at it.

L0 is {k} for all on the rows held back (documents of the score part fire a few more): by k where a kind has one; by
the price of activity, searched to 7 %, for the L1 kinds; by the target for JumpReLU; and where a kind has thresholds
they are multiplied by one factor after training (the first two seeds of SAELens's Matryoshka were left at 32.4 and
32.6). What other libraries trained is saved by them and read through `formats.read`.

![FVU and CE recovered by kind and library](quality.svg)

FVU and CE recovered (against mean ablation) on {scored:,} tokens of the score part, through the splice: the mean over
seeds, and in brackets the least lower and largest upper bound of the seeds' 95 % intervals over documents.

{table}

{verdict} A kind that the script knows and the table lacks has not been run.

All runs, those at other rates too, are in `quality.csv`. To make it again (it runs what the table lacks, in the
environment of `make peers`; `--draw` needs Chromium):

```sh
.venv-peers/bin/python docs/bench/quality.py
python docs/bench/quality.py --draw
```
"""


def main() -> None:
    "Run what is missing, then write; draw on request."
    parser = options(__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--kinds", nargs="*", default=list(CONTENDERS))
    parser.add_argument("--libraries", nargs="*", default=["sae_lab", "saelens", "dictionary_learning"])
    parser.add_argument("--cache", type=Path, default=HERE.parent.parent / "runs", help="where activations are kept")
    args = parser.parse_args()
    path = args.out / "quality.csv"
    if not args.draw:
        data = harvested(args.cache)
        for kind in args.kinds:
            for library in CONTENDERS[kind]:
                if library in args.libraries: contest(kind, library, data, read(path), partial(put, path), args.seeds)
        return
    lines = summary(read(path))
    worse = verdict(lines)
    said = "Where we are more than 0.01 worse: " + "; ".join(worse) if worse else \
        "Nowhere is a kind of ours more than 0.01 worse than another library's, in FVU or in CE recovered."
    text = PAGE.format(d_sae=D_SAE, hook=HOOK, tokens=STEPS * BATCH, steps=STEPS, batch=BATCH, warm=WARM, decay=DECAY,
                       dead=DEAD, k=K, scored=SCORED, table=table(lines), verdict=said)
    (args.out / "quality.md").write_text(text, encoding="utf-8")
    write_svg(picture(lines), args.out / "quality.svg", "page")


if __name__ == "__main__":
    main()
