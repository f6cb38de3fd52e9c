"""The ladder: what does a frozen transformer give beyond none, and beyond one of the same sizes of weights?

    python .results/ladder.py --make                          # from the top folder: write the cores
    python .results/ladder.py --cores minilm --tasks speech   # train what is missing of this part; or all
    python .results/ladder.py --test                          # once, at the end: read the test sets
    python .results/ladder.py --draw                          # tables, figure: pip install matplotlib scipy

Several processes may work side by side (OMP_NUM_THREADS=1 for a core each): they share the runs among them.
A finished run is a line of .results/ladder.jsonl and is never made again. A stopped one begins anew.

Rungs, from the bottom: none (no block), random (every matrix of the blocks normal, 1/sqrt(width)), shuffled
(the pretrained entries of each matrix in random order), spectrum (its singular values, random singular
vectors), pretrained. Norms, biases and positions start as pretrained in all of them. all-random and
all-pretrained train everything, from the random and from the pretrained matrices.
"""
import argparse
import contextlib
import importlib
import itertools
import json
import math
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AutoModel

sys.path.insert(0, ".")
import fpt  # noqa: E402

# Where each pretrained core comes from and what it was trained on.
CORES = {"whisper": ("cores/whisper", "speech"), "dinov2": ("cores/dinov2", "images"),
         "minilm": ("cores/minilm", "text")}
LAYERS = 6  # the blocks that are used: all of whisper's encoder and minilm, the first half of dinov2
# name: (modality, script and flags, steps, test examples, how often each of them serves)
TASKS = {"speech": ("speech", "train_speech.py", 600, 2626, 1),
         "cifar": ("images", "train_cifar.py --patch_size 8", 1000, 10000, 1),
         "sums": ("digits", "train_mnist_add.py --n 2", 2000, 10000, 2),
         "cyp3a4": ("molecules", "train_cyp3a4.py", 300, 2466, 1)}
RUNGS = ("none", "random", "shuffled", "spectrum", "pretrained", "all-random", "all-pretrained")
RATES = ("3e-4", "1e-3", "3e-3", "1e-2")
SEEDS = (0, 1, 2)  # of the matrices that are drawn, of the new layers and of the order of the data
# name, first rung, second rung; what each says stands in .results/README.md.
HYPOTHESES = [("H1", "pretrained", "spectrum"), ("H2", "pretrained", "spectrum"),
              ("H2", "pretrained", "shuffled"), ("H3", "shuffled", "pretrained"),
              ("H4", "all-pretrained", "all-random")]
# Digits are images, and SMILES is text of a kind: these pairs are shown, and stand for no hypothesis.
NEITHER = {("dinov2", "sums"), ("minilm", "cyp3a4")}
MARGIN = 0.02
LINES = [("none", "no block", "#000000", "--"),
         ("all-random", "everything trained, from random", "#D55E00", ":"),
         ("all-pretrained", "everything trained, from pretrained", "#D55E00", "-.")]
FOLDER, RUNS, CORE_FOLDER = Path(".results"), Path("runs/ladder"), Path("cores/ladder")


# ---- The cores of the rungs ----------------------------------------------------------------------
def orthogonal(rows, columns, seed, stream):
    """A random matrix with orthonormal columns, rows >= columns, all directions alike (Mezzadri 2007)."""
    q, r = torch.linalg.qr(fpt.normal((rows, columns), 1.0, seed, stream).double())
    return q * r.diagonal().sign()


def changed(weight, rung, width, seed, stream):
    """The matrix that stands on this rung for a pretrained one: float32, the same shape."""
    if rung == "random":
        return fpt.normal(weight.shape, width ** -0.5, seed, stream)
    if rung == "shuffled":
        order = np.random.default_rng([seed, stream]).permutation(weight.numel())
        return weight.flatten()[torch.from_numpy(order)].view_as(weight)
    singular = torch.linalg.svdvals(weight.double())
    left = orthogonal(weight.shape[0], len(singular), seed, 1000 + stream)
    right = orthogonal(weight.shape[1], len(singular), seed, 2000 + stream)
    return (left * singular @ right.T).float()


def make_cores(names):
    """Write the folders of all rungs; those that are drawn once for every seed."""
    for name in names:
        for rung in "pretrained", "random", "shuffled", "spectrum":
            for seed in SEEDS if rung != "pretrained" else (0,):
                model = AutoModel.from_pretrained(CORES[name][0], dtype=torch.float32)
                stack = model.encoder if name == "whisper" else model
                blocks = next(module for module in stack.modules() if isinstance(module, nn.ModuleList))
                matrices = [weight for weight in blocks.parameters() if weight.ndim == 2]
                for stream, weight in enumerate(matrices if rung != "pretrained" else ()):
                    weight.data = changed(weight.data, rung, model.config.hidden_size, seed, stream)
                model.save_pretrained(folder(name, rung, seed))
        print(f"{name}: {len(matrices)} matrices in {len(blocks)} blocks", flush=True)


def folder(core, rung, seed):
    drawn = rung in ("random", "shuffled", "spectrum")
    return CORE_FOLDER / (f"{core}-{rung}-{seed}" if drawn else f"{core}-pretrained")


# ---- Runs ----------------------------------------------------------------------------------------
def script(command):
    """Run a script of this collection in this process. Returns the last line of its log.jsonl."""
    sys.argv = command.split()
    module = importlib.import_module(sys.argv[0].removesuffix(".py"))
    with open(RUNS / f"output-{os.getpid()}.txt", "w") as file, contextlib.redirect_stdout(file), \
            contextlib.redirect_stderr(file):
        return fpt.run(module.parser, module.main)


def lines(name):
    path = FOLDER / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def finished():
    """{(core, task, rung, rate, seed, steps): the line of the run}"""
    names = ("core", "task", "rung", "rate", "seed", "steps")
    return {tuple(line[name] for name in names): line for line in lines("ladder.jsonl")}


def best_rate(core, task, rung, done):
    """The rate with the lowest validation loss after a quarter of the steps, or None if one is missing."""
    tried = [done.get((core, task, rung, rate, 0, TASKS[task][2] // 4)) for rate in RATES]
    return min(tried, key=lambda line: line["validation_loss"])["rate"] if all(tried) else None


def missing(args, done):
    """The runs still to be made whose rate is known: first those that choose the rate, then the seeds."""
    runs = []
    for task in args.tasks:
        for core in args.cores:
            for rung in args.rungs:
                steps, rate = TASKS[task][2], best_rate(core, task, rung, done)
                runs += [(core, task, rung, rate, 0, steps // 4) for rate in RATES]
                if rate and not args.rates:
                    runs += [(core, task, rung, rate, seed, budget)
                             for budget in (steps, steps // 4)[:1 + args.quarter] for seed in SEEDS]
    return [run for run in dict.fromkeys(runs) if run not in done]


def train(core, task, rung, rate, seed, steps):
    """Make one run and write its line. Returns False if another process is at it."""
    path = folder(core, rung.removeprefix("all-"), seed)
    out = RUNS / "-".join(map(str, (core, task, rung, rate, seed, steps)))
    flags = f"--layers {0 if rung == 'none' else LAYERS}" + " --train all" * rung.startswith("all-")
    command = f"{TASKS[task][1]} --model {path} {flags} --lr {rate} --seed {seed} --steps {steps}"
    command = " ".join(f"{command} --eval_every {steps} --test 0".split())
    start = time.time()
    try:
        result = script(f"{command} --resume 1 --out {out}")
    except SystemExit as error:
        if "another process is training there" in str(error):
            return False
        raise
    line = {"core": core, "task": task, "rung": rung, "rate": rate, "seed": seed, "steps": steps,
            "command": command, "seconds": round(time.time() - start), "amp": result["amp"],
            "device": result["device"], "date": time.strftime("%Y-%m-%d")}
    figures = "validation_loss", "validation_accuracy", "trainable_parameters"
    line |= {name: result[name] for name in figures}
    with open(FOLDER / "ladder.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")
    print(time.strftime("%H:%M"), *(f"{value:.4f}" if isinstance(value, float) else value for value in
          (core, task, rung, rate, seed, steps, line["seconds"], result["validation_loss"],
           result["validation_accuracy"])), flush=True)
    return True


# ---- The test pass -------------------------------------------------------------------------------
def test(args, done):
    """Read the test split with every run that is one of three seeds at its rate, and was not read yet."""
    read = {tuple(line["run"]) for line in lines("ladder-test.jsonl")}
    infer, caught = fpt.infer, []

    def infer_and_keep(*words):
        caught[:] = infer(*words)
        return caught

    fpt.infer = infer_and_keep
    for run in done:
        core, task, rung, rate, seed, steps = run
        if core not in args.cores or task not in args.tasks or rung not in args.rungs or run in read:
            continue
        if rate != best_rate(core, task, rung, done):
            continue
        out, model = RUNS / "-".join(map(str, run)), folder(core, rung, seed)
        result = script(f"{TASKS[task][1].split()[0]} --eval {out}/best.pt --model {model}")
        outputs, targets = caught
        losses = nn.functional.cross_entropy(outputs, targets, reduction="none")
        np.save(out / "test.npy", np.stack([losses.cpu(), (outputs.argmax(1) == targets).cpu()]))
        keep = {name: value for name, value in result.items() if name.startswith("test_")}
        with open(FOLDER / "ladder-test.jsonl", "a") as file:
            file.write(json.dumps({"run": run, "date": time.strftime("%Y-%m-%d")} | keep) + "\n")


def mean_and_error(values, times):
    """values [seeds, test examples] -> mean, its standard error over seeds and examples together, and the
    degrees of freedom of that error (Welch and Satterthwaite). Each test item serves `times` times."""
    seeds, examples = values.shape
    by_seeds = values.mean(1).var(ddof=1) / seeds
    by_examples = values.mean(0).var(ddof=1) / (examples / times)
    both = by_seeds + by_examples
    freedom = both ** 2 / (by_seeds ** 2 / (seeds - 1) + by_examples ** 2 / (examples - 1))
    return values.mean(), math.sqrt(both), freedom


def contrasts(done):
    """Print every hypothesis that the finished runs can answer, with Holm's correction over all of them.

    A number is a difference of test losses in nats, paired over seeds and test examples: below zero the first
    rung is better. The margin of H1 and H3 is 0.02 nats.
    """
    from scipy import stats
    found = []
    for (core, (_, home)), (task, (modality, _, whole, _, times)), (name, first, second) in itertools.product(
            CORES.items(), TASKS.items(), HYPOTHESES):
        if name in ("H1", "H3") and (home == modality or (core, task) in NEITHER):
            continue
        if name == "H2" and home != modality:
            continue
        for steps in whole, whole // 4:
            sides = []
            for rung in first, second:
                rate = best_rate(core, task, rung, done)
                paths = [RUNS / f"{core}-{task}-{rung}-{rate}-{seed}-{steps}/test.npy" for seed in SEEDS]
                sides.append([np.load(path)[0] for path in paths if path.exists()])
            if {len(side) for side in sides} != {len(SEEDS)}:
                continue
            mean, error, freedom = mean_and_error(np.array(sides[0]) - np.array(sides[1]), times)
            below = [stats.t.sf((margin - mean) / error, freedom) for margin in (0, MARGIN)]
            above = stats.t.sf((MARGIN + mean) / error, freedom)
            p = {"H1": max(below[1], above), "H2": below[0], "H3": below[1], "H4": below[0]}[name]
            half = stats.t.ppf(0.975, freedom) * error
            found.append((p, name, core, task, steps, first, second, mean, half))
    print("| hypothesis | core | task | steps | contrast | nats, 95 % | p | holds after Holm |")
    print("| --- | --- | --- | ---: | --- | ---: | ---: | --- |")
    holds = {}
    for rank, row in enumerate(sorted(found)):
        holds[row] = row[0] * (len(found) - rank) < 0.05 and all(holds.values())
    for row in sorted(found, key=lambda row: row[1:5]):
        p, name, core, task, steps, first, second, mean, half = row
        print(f"| {name} | {core} | {task} | {steps} | {first} - {second} | {mean:+.3f} ± {half:.3f} |"
              f" {p:.1g} | {'yes' if holds[row] else 'no'} |")


def table(done):
    """Print a row for every core, task, rung and budget with three seeds. Returns {row: test losses}."""
    read = {tuple(line["run"]): line for line in lines("ladder-test.jsonl")}
    print("| core | task | rung | steps | rate | validation loss | test loss | test accuracy, % | seconds |")
    print("| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    losses = {}
    for task, core, rung in itertools.product(TASKS, CORES, RUNGS):
        _, _, whole, _, times = TASKS[task]
        rate = best_rate(core, task, rung, done)
        for steps in whole, whole // 4:
            runs = [(core, task, rung, rate, seed, steps) for seed in SEEDS]
            if not all(run in done for run in runs):
                continue
            cells = [f"{statistics.mean(done[run]['validation_loss'] for run in runs):.3f}", "", ""]
            if all(run in read for run in runs):
                values = np.array([np.load(RUNS / "-".join(map(str, run)) / "test.npy") for run in runs])
                (loss, loss_error, _), (right, right_error, _) = (
                    mean_and_error(values[:, i].astype(float), times) for i in (0, 1))
                cells[1:] = f"{loss:.3f} ± {loss_error:.3f}", f"{100 * right:.1f} ± {100 * right_error:.1f}"
                losses[core, task, rung, steps] = [read[run]["test_loss"] for run in runs]
            seconds = statistics.mean(done[run]["seconds"] for run in runs)
            print(f"| {core} | {task} | {rung} | {steps} | {rate} | {' | '.join(cells)} | {seconds:.0f} |")
    return losses


def draw(losses):
    """Write ladder.svg: a panel for each core and task, the rungs from left to right, a dot for each seed."""
    import matplotlib
    matplotlib.use("svg")
    import matplotlib.pyplot as plt
    plt.rcParams |= {"font.size": 15, "svg.fonttype": "none", "svg.hashsalt": "ladder"}
    rungs = [rung for rung in RUNGS[1:5] if any(key[2] == rung for key in losses)]
    tasks = [task for task in TASKS if any(key[1] == task for key in losses)]
    figure, axes = plt.subplots(len(CORES), len(tasks), figsize=(4 * len(tasks), 9), squeeze=False)
    for (i, (core, (_, home))), (j, task) in itertools.product(enumerate(CORES.items()), enumerate(tasks)):
        axis, steps = axes[i, j], max(key[3] for key in losses if key[1] == task)
        for x, rung in enumerate(rungs):
            values = losses.get((core, task, rung, steps), [])
            axis.plot([x] * len(values), values, "o", color="#0072B2", ms=7, alpha=0.7)
            if values:
                axis.plot([x - 0.3, x + 0.3], [statistics.mean(values)] * 2, color="#0072B2", lw=2.5)
        for rung, label, colour, style in LINES:
            if values := losses.get((core, task, rung, steps)):
                axis.axhline(statistics.mean(values), color=colour, ls=style, lw=2, label=label)
        axis.set_xlim(-0.6, len(rungs) - 0.4)
        axis.set_xticks(range(len(rungs)), rungs if i == len(CORES) - 1 else [""] * len(rungs), rotation=30)
        axis.grid(axis="y", alpha=0.3)
        if home == TASKS[task][0]:
            axis.set_facecolor("#FFF4CC")
        if i == 0:
            axis.set_title(f"{task}, {steps} steps")
        if j == 0:
            axis.set_ylabel(f"{core} ({home})\ntest loss")
    handles = {label: line for axis in axes.flat for line, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=len(handles), frameon=False)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(FOLDER / "ladder.svg", metadata={"Date": None})


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--cores", nargs="+", choices=CORES, default=list(CORES))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--rungs", nargs="+", choices=RUNGS, default=list(RUNGS))
    parser.add_argument("--quarter", action="store_true", help="three seeds of the quarter budget as well")
    parser.add_argument("--rates", action="store_true", help="only the runs that choose the rates")
    for name in "make", "test", "draw":
        parser.add_argument(f"--{name}", action="store_true")
    args = parser.parse_args()
    RUNS.mkdir(parents=True, exist_ok=True)
    if args.make:
        return make_cores(args.cores)
    if args.test:
        return test(args, finished())
    if args.draw:
        losses = table(finished())
        contrasts(finished())
        return draw(losses)
    while runs := missing(args, finished()):
        if not any(train(*run) for run in runs):  # stops at the first that it could make, then looks again
            time.sleep(10)  # the other processes are at all of them


if __name__ == "__main__":
    main()
