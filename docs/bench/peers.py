"Training steps of other libraries beside ours, as table and picture. Writes peers.csv, .svg, .md."
import json
from dataclasses import asdict
from pathlib import Path

from shared import commit, options, read_rows, write_rows, write_svg

COLUMNS = ["case", "value", "unit", "bound", "ratio"]
LIBRARIES = ("sae_lab", "saelens", "dictionary_learning", "sparsify")
SYMBOLS = ("circle", "square", "diamond", "triangle-up")


def read(path: Path) -> list[dict]:
    "Rows of a run, with library, kind, variant and size apart."
    found = []
    for row in read_rows(path, number=str):
        library, name, size = row["case"].split("/")
        kind, _, variant = name.partition("+")
        found.append({"library": library, "kind": kind, "variant": variant, "size": int(size),
                      "value": float(row["value"]), "ratio": float(row["ratio"])})
    return found


def run(path: Path, reps: int, kinds: list[str]) -> None:
    "Measure here, kind by kind, and keep the rows and what they were measured on; other kinds stay as they are."
    from sae_lab.bench.frame import machine
    from sae_lab.bench.peers import OURS, left_out, rows
    facts = {"machine": machine(), "left_out": left_out(), "reps": reps, "commit": commit()}
    path.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    for kind in kinds or OURS:
        made = [{key: value for key, value in asdict(row).items() if key in COLUMNS} for row in rows(reps, (kind,))]
        kept = [row for row in read_rows(path, number=str) if row["case"].split("/")[1].split("+")[0] != kind]
        write_rows(path, COLUMNS, kept + made)
        print(*(f"{row['case']} {row['ratio']:.2f}" for row in made), sep="\n", flush=True)


def best(rows: list[dict], kind: str, library: str, size: int) -> dict | None:
    "The fastest variant of a library."
    mine = [r for r in rows if (r["kind"], r["library"], r["size"]) == (kind, library, size)]
    return min(mine, key=lambda r: r["ratio"], default=None)


def table(rows: list[dict]) -> str:
    "A Markdown table: a line a kind and size, a column a library, steps in units of the bound."
    head = ["kind", "latents", *LIBRARIES, "next / ours"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for kind in dict.fromkeys(r["kind"] for r in rows):
        for size in sorted({r["size"] for r in rows}):
            found = {library: best(rows, kind, library, size) for library in LIBRARIES}
            cells = ["" if f is None else f"{f['ratio']:.2f}" + (f" ({f['variant']})" if f["variant"] else "")
                     for f in found.values()]
            ours = found.pop("sae_lab")
            others = [f["ratio"] for f in found.values() if f]
            factor = f"{min(others) / ours['ratio']:.1f}" if ours and others else ""
            lines.append(f"| {kind} | {size:,} | " + " | ".join(cells) + f" | {factor} |")
    return "\n".join(lines)


def slower(rows: list[dict]) -> list[str]:
    "Cases in which another library's step of the same kind and size is as fast as ours, or faster."
    ours = {(r["kind"], r["size"]): r["ratio"] for r in rows if r["library"] == "sae_lab"}
    fast = [r for r in rows if r["library"] != "sae_lab" and r["ratio"] <= ours.get((r["kind"], r["size"]), 0)]
    return [f"{r['kind']}, {r['size']:,}: {ours[r['kind'], r['size']]:.2f}, {r['library']} {r['ratio']:.2f}"
            for r in fast]


def picture(rows: list[dict]):
    "Steps in units of the bound: a panel a size, a line a kind, a sign a library."
    from plotly.subplots import make_subplots

    from sae_lab.views.figures import SERIES
    sizes, kinds = sorted({r["size"] for r in rows}), list(dict.fromkeys(r["kind"] for r in rows))[::-1]
    fig = make_subplots(1, len(sizes), subplot_titles=[f"{size:,} latents" for size in sizes], shared_yaxes=True,
                        horizontal_spacing=0.04)
    for i, library in enumerate(LIBRARIES):
        for column, size in enumerate(sizes, start=1):
            found = [best(rows, kind, library, size) for kind in kinds]
            fig.add_scatter(x=[f["ratio"] for f in found if f], y=[f["kind"] for f in found if f], mode="markers",
                            name=library, legendgroup=library, showlegend=column == 1, row=1, col=column,
                            marker={"color": SERIES[i], "symbol": SYMBOLS[i], "size": 8})
    fig.add_vline(x=1, line={"color": "#777", "dash": "dot", "width": 1})
    fig.update_xaxes(type="log", title_text="step / five products", tickvals=[0.25, 0.5, 1, 2, 4, 8])
    fig.update_yaxes(categoryorder="array", categoryarray=kinds)
    return fig


PAGE = """# A training step, beside those of other libraries

Every library takes its own public training step (`SAETrainer.step` of SAELens, `trainer.update` of dictionary_learning,
a batch of `Trainer.fit` of sparsify; ours is a step of `fit`, update, counters and reports included) on the same sparse
mixture, `d_in` 512, `k` 32, batches of 2,048, float32, two threads. Steps of one kind and size are taken in turn, each
right after the five matrix products of a plain dense step (10 · batch · d_in · d_sae FLOP, each product in its fastest
layout); the figure is the median over {reps} repetitions of step ÷ products. Below 1 is less than a dense step's
products alone.

Dead-feature losses are idle for all. Coders without a fixed k were brought to the sparsity of trained ones by their
biases: 32 latents a row, 64 for JumpReLU. Each library runs with its defaults; where it offers a faster way (sparse
activations in SAELens, Adam in place of signum in sparsify), the fastest stands here, named in brackets. Steps of
dictionary_learning are numbered past its warm-ups. The kinds bear our names: SAELens's `standard` is `relu_april`.

![Steps in units of five matrix products, by kind, library and size](peers.svg)

{table}

{verdict}

Measured on {cpu}, {cores} cores, torch {torch}, at commit {commit}; all variants, in seconds too, are in `peers.csv`.
To make it again (`make peers` makes the environment; the figure needs Chromium):

```sh
.venv-peers/bin/python docs/bench/peers.py
python docs/bench/peers.py --draw
```
"""


def main() -> None:
    "Measure, or draw and write what was measured."
    parser = options(__doc__)
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument("--kinds", nargs="*", default=[], help="of ours; none: all")
    args = parser.parse_args()
    path = args.out / "peers.csv"
    if not args.draw: return run(path, args.reps, args.kinds)
    rows, facts = read(path), json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    behind = slower(rows)
    said = f"As fast as ours or faster: {'; '.join(behind)}." if behind else "No kind of ours is slower than another's."
    machine = facts["machine"]
    text = PAGE.format(reps=facts["reps"], table=table(rows), verdict=said, commit=facts["commit"],
                       **{key: machine[key] for key in ("cpu", "cores", "torch")})
    (args.out / "peers.md").write_text(text, encoding="utf-8")
    write_svg(picture(rows), args.out / "peers.svg", "page")


if __name__ == "__main__":
    main()
