"Trade-offs that papers claim for binary coders, skip transcoders and Matryoshka coders, on the bundled subject."
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from shared import commit, options, read_rows, write_rows, write_svg

from sae_lab.coders.contract import AbstractCoder, coders, make
from sae_lab.coders.matryoshka import prefix
from sae_lab.coders.transcoder import at
from sae_lab.ground.sparse import Codes
from sae_lab.measures.downstream import measure
from sae_lab.sources.corpus import Tokens, named
from sae_lab.sources.stream import Stream, usable
from sae_lab.sources.subject import Subject
from sae_lab.training.fit import train
from sae_lab.views.figures import SERIES

RESID, READ, WRITE = "blocks.1.hook_resid_post", "blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out"
D_SAE, K, BATCH, FIT, SCORED, LABELLED, SEEDS = 1024, 16, 1024, 500_000, 20_000, 20_000, 3
CASES = {  # name -> kind, hook read, hook written, arguments
    "topk": ("topk", RESID, RESID, {}), "batchtopk": ("batchtopk", RESID, RESID, {}),
    "binary": ("binary", RESID, RESID, {}), "groupmax": ("groupmax", RESID, RESID, {}),
    "groupmax_binary": ("groupmax_binary", RESID, RESID, {}), "matryoshka": ("matryoshka", RESID, RESID, {}),
    "topk, MLP output": ("topk", WRITE, WRITE, {}), "transcoder": ("transcoder", READ, WRITE, {}),
    "skip_transcoder": ("skip_transcoder", READ, WRITE, {}),
    "binary_transcoder": ("binary_transcoder", READ, WRITE, {"skip": True}),
}
MEASURED = ("fvu", "ce_recovered_zero", "l0", "dead", "dense_10")
TOLD = ("concept_f1", "concept_f1_low", "concept_f1_high", "concept_f1_by_count", "general_f1", "latents")
COLUMNS = ["coder", "seed", *(f"{m}{end}" for m in MEASURED for end in ("", "_low", "_high")),
           *TOLD, "commit"]
WORDS = ("coder", "commit")  # the columns that are no numbers


@dataclass(frozen=True)
class Concepts:
    "Which tokens of labelled fables have which concept."
    tokens: Tokens
    masks: torch.Tensor    # [n, m] 0 or 1: each value of each concept
    general: torch.Tensor  # [n, c] 0 or 1: any value of a concept


def labelled(subject: Subject) -> Concepts:
    "Fables of the score part and their labels, at the tokens that a stream gives."
    tokens = named("fables").split("score", seed=0).tokens(subject, LABELLED)
    keep, masks, general = usable(tokens, True), [], []
    for concept in tokens.concepts.values():
        codes = concept.codes[keep]
        masks += [codes == i for i in range(len(concept.values)) if int((codes == i).sum()) >= 20]
        general.append(codes >= 0)
    return Concepts(tokens, torch.stack(masks, 1).float(), torch.stack(general, 1).float())


def f1(fires: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    "F1 of every latent's firing for every concept, [d_sae, m]."
    return 2 * (fires.T @ masks) / (fires.sum(0)[:, None] + masks.sum(0)).clamp(min=1)


@torch.no_grad()
def told(coder: AbstractCoder, subject: Subject, concepts: Concepts, seed: int) -> dict[str, float]:
    "How well single latents tell the concepts of fables: best F1 of each latent, and of each whole concept."
    source = Stream(subject, concepts.tokens, list(coder.spec.hooks_in), seed=None)
    codes = Codes.cat([coder.encode(batch.joined(coder.spec.hooks_in)).csr() for batch in source.batches()])
    fires = (codes.dense() > 0).float()
    best, count = f1(fires, concepts.masks).amax(1), fires.sum(0)
    alive = count >= 10
    draw = torch.Generator().manual_seed(seed)
    again = best[alive][torch.randint(int(alive.sum()), (1000, int(alive.sum())), generator=draw)].mean(1)
    numbers = {"concept_f1": best[alive].mean(),
               "concept_f1_low": again.quantile(0.025), "concept_f1_high": again.quantile(0.975),
               "concept_f1_by_count": (best * count)[alive].sum() / count[alive].sum(),
               "general_f1": f1(fires, concepts.general).amax(0).mean(), "latents": alive.sum()}
    return {key: float(value) for key, value in numbers.items()}


def trained(seed: int, subject: Subject, tokens: Tokens) -> dict[str, AbstractCoder]:
    "Every coder of one seed, trained on one stream; a prefix of the Matryoshka coder too."
    made = {}
    for name, (kind, read, write, args) in CASES.items():
        width = subject.hooks[subject.hook(read)]
        made[name] = at(make(kind, d_in=width, d_sae=D_SAE, k=K, seed=seed, **args), read, write)
    train(made, Stream(subject, tokens, [RESID, READ, WRITE], batch=BATCH, seed=seed), seed=seed)
    nested = made["matryoshka"]
    return made | {f"matryoshka, first {D_SAE // 4}": prefix(nested, size=D_SAE // 4)}


def blind(seed: int, subject: Subject, tokens: Tokens) -> dict[str, AbstractCoder]:
    "The null: random directions around the mean of the data."
    source = Stream(subject, tokens, RESID, batch=BATCH, seed=seed)
    some = (batch.acts[RESID] for batch, _ in zip(source.batches(), range(50)))
    coder = make("random", d_in=subject.hooks[RESID], d_sae=D_SAE, k=K, seed=seed)
    return {"random directions": at(coders["random"].meta["solve"](coder, some), RESID)}


def judged(coder: AbstractCoder, seed: int, subject: Subject, tokens: Tokens, concepts: Concepts) -> dict:
    "All numbers about one coder."
    found = measure(coder, subject, tokens, seed=seed)
    numbers = {f"{m}{end}": getattr(found[m], part) for m in MEASURED
               for end, part in (("", "value"), ("_low", "low"), ("_high", "high"))}
    return {key: round(value, 5) for key, value in {**numbers, **told(coder, subject, concepts, seed)}.items()}


def names(rows: list[dict]) -> list[str]:
    "Coders, in the order they came."
    return list(dict.fromkeys(row["coder"] for row in rows))


def cell(rows: list[dict], column: str, digits: int = 3) -> str:
    "Mean over seeds and their range."
    values = [row[column] for row in rows]
    return f"{statistics.mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def table(rows: list[dict]) -> str:
    "A Markdown table, a line a coder."
    shown = {"FVU": "fvu", "CE recovered": "ce_recovered_zero", "L0": "l0", "dead": "dead",
             "density > 10 %": "dense_10", "concept F1": "concept_f1", "the same by count": "concept_f1_by_count",
             "whole concepts": "general_f1"}
    lines = ["| coder | " + " | ".join(shown) + " |", "|---|" + "---|" * len(shown)]
    for name in names(rows):
        mine = [row for row in rows if row["coder"] == name]
        lines.append(f"| {name} | " + " | ".join(cell(mine, column) for column in shown.values()) + " |")
    return "\n".join(lines)


def difference(rows: list[dict], column: str, one: str, other: str) -> str:
    "Paired by seed: mean of one minus other, with the range over seeds."
    by = {(row["coder"], row["seed"]): row[column] for row in rows}
    seeds = sorted({seed for name, seed in by if name == one} & {seed for name, seed in by if name == other})
    values = [by[one, seed] - by[other, seed] for seed in seeds]
    if not values: return "not run"
    return f"{statistics.mean(values):+.3f} ({min(values):+.3f} to {max(values):+.3f}, {len(values)} seeds)"


def picture(rows: list[dict]):
    "Unexplained variance against concept F1, a dot a seed; random directions as a line."
    import plotly.graph_objects as go
    fig = go.Figure()
    null = statistics.mean(row["concept_f1"] for row in rows if row["coder"] == "random directions")
    fig.add_hline(null, line={"color": "#777", "dash": "dot", "width": 1}, annotation_text="random directions")
    for i, name in enumerate(name for name in names(rows) if name != "random directions"):
        mine = [row for row in rows if row["coder"] == name]
        symbol = ("circle", "diamond", "square")[i // len(SERIES) % 3]
        high, low = ([abs(row[f"concept_f1_{end}"] - row["concept_f1"]) for row in mine] for end in ("high", "low"))
        fig.add_scatter(x=[row["fvu"] for row in mine], y=[row["concept_f1"] for row in mine], name=name,
                        mode="markers", marker={"color": SERIES[i % len(SERIES)], "symbol": symbol, "size": 7},
                        error_y={"type": "data", "array": high, "arrayminus": low, "thickness": 0.8, "width": 0})
    fig.update_xaxes(title_text="variance unexplained", rangemode="tozero")
    return fig.update_yaxes(title_text="best concept F1 of a latent, mean")


PAGE = """# Trade-offs, re-tested

Coders of {d_sae:,} latents with {k} a token, each trained on {fit:,} tokens of the bundled corpus in batches of
{batch:,} with its recipe as it stands, {seeds} seeds; measured on {scored:,} tokens of the score part. *Concept F1*:
for each latent that fires on at least 10 of {labelled:,} labelled tokens of held-out fables, its firing's best F1
over all values of all concepts (a character's name, a place, a mood, ...), mean over latents; *by count* weighs
latents by how often they fire; *whole concepts*: for each concept as a whole (any character), the best F1 of a single
latent. Cells are means over seeds with their range; intervals over documents or latents are in `tradeoffs.csv`. One
small model and templated text: what is found here is found here. *random directions* are the null: a tied dictionary
that saw nothing but the mean.

{table}

![Variance unexplained against concept F1](tradeoffs.svg)

## Binary latents (Quirke, Shabalin & Belrose 2025)
Claimed: interpretability improves when every latent counts the same, reconstruction gets worse, more latents fire
very often, and weighed by firing the continuous coders come out ahead. Found, `binary` minus `topk`: FVU
{binary_fvu}; share of latents with a density above 10 % {binary_dense}; concept F1 {binary_f1}; by count
{binary_count}. `groupmax_binary` minus `groupmax`: FVU {group_fvu}; concept F1 {group_f1}; by count {group_count}.

## Skip transcoders (Paulo, Shabalin & Belrose 2025)
Claimed: transcoders are more interpretable than autoencoders, and the skip path lowers their error at no cost in
interpretability. Found, `skip_transcoder` minus `transcoder`: FVU {skip_fvu}; CE recovered {skip_ce}; concept F1
{skip_f1}. `transcoder` minus the autoencoder of the MLP's output: FVU {trans_fvu}; concept F1 {trans_f1}.

## Matryoshka (Bussmann et al. 2025)
Claimed: slightly worse reconstruction at the same L0, similar downstream loss, far less absorption, so that whole
concepts keep a latent. Found, `matryoshka` minus `batchtopk`: FVU {nest_fvu}; CE recovered {nest_ce}; whole concepts
{nest_general}; concept F1 {nest_f1}.

```sh
python docs/bench/tradeoffs.py --seeds 3
```
"""
PAIRS = {"binary": ("binary", "topk"), "group": ("groupmax_binary", "groupmax"),
         "skip": ("skip_transcoder", "transcoder"), "trans": ("transcoder", "topk, MLP output"),
         "nest": ("matryoshka", "batchtopk")}
SHORT = {"fvu": "fvu", "ce": "ce_recovered_zero", "dense": "dense_10", "f1": "concept_f1",
         "count": "concept_f1_by_count", "general": "general_f1"}


def draw(rows: list[dict], out: Path) -> None:
    "Page and figure; the figure needs Chromium."
    facts = {f"{pair}_{short}": difference(rows, column, *PAIRS[pair])
             for pair in PAIRS for short, column in SHORT.items()}
    seeds = len({row["seed"] for row in rows})
    page = PAGE.format(d_sae=D_SAE, k=K, batch=BATCH, fit=FIT, seeds=seeds, scored=SCORED, labelled=LABELLED,
                       table=table(rows), **facts)
    (out / "tradeoffs.md").write_text(page, encoding="utf-8")
    write_svg(picture(rows), out / "tradeoffs.svg")


def main() -> None:
    "Run what is missing, then draw and write."
    parser = options(__doc__)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    args = parser.parse_args()
    path, subject = args.out / "tradeoffs.csv", Subject.bundled()
    corpus = named("bundled")
    text = {part: corpus.split(part, seed=0).tokens(subject, n) for part, n in (("fit", FIT), ("score", SCORED))}
    concepts = labelled(subject)
    for seed in [] if args.draw else range(args.seeds):
        for ways in (trained, blind):
            rows = read_rows(path, WORDS)
            have = {row["coder"] for row in rows if row["seed"] == seed}
            if have & ({"random directions"} if ways is blind else set(CASES)): continue
            rows += [{"coder": name, "seed": seed, **judged(coder, seed, subject, text["score"], concepts),
                      "commit": commit()} for name, coder in ways(seed, subject, text["fit"]).items()]
            write_rows(path, COLUMNS, ({**row, "seed": int(row["seed"])} for row in rows))
    draw(read_rows(path, WORDS), args.out)


if __name__ == "__main__":
    main()
