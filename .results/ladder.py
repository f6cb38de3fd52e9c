"""The ladder: what does a frozen transformer give beyond none, and beyond one of the same sizes of weights?

    python .results/ladder.py --make                          # from the top folder: write the cores
    python .results/ladder.py --cores minilm --tasks speech   # train what is missing of this part; or all
    python .results/ladder.py --test                          # once, at the end: read the test sets
    python .results/ladder.py --draw                          # tables, figure: pip install matplotlib scipy

Several processes may work side by side (OMP_NUM_THREADS=1 for a core each): they share the runs among them.
A finished run is a line of .results/ladder.jsonl and is never made again. A stopped one begins anew.

Rungs: none (no block), random (every matrix of the blocks normal, 1/sqrt(width)), scaled (normal with the
standard deviation of the pretrained matrix), shuffled (its entries in random order), spectrum (its singular
values, random singular vectors), pretrained.
Everything else in the blocks is the pretrained one on all of them. all-random, all-shuffled, all-pretrained:
everything is trained, from these matrices. Design and hypotheses: .results/README.md.
"""
import argparse
import contextlib
import fcntl
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

# A folder or a hub name (openai/whisper-base, facebook/dinov2-small, sentence-transformers/all-MiniLM-L6-v2,
# HuggingFaceTB/SmolLM2-135M-Instruct), and what it was pretrained on.
CORES = {"whisper": ("cores/whisper", "speech"), "dinov2": ("cores/dinov2", "images"),
         "minilm": ("cores/minilm", "text"), "smollm2": ("cores/smollm2", "text")}
# Begun after the test passes of the others, on two tasks: in the tables and in C1, C2, not in the figure.
LATER, LATER_TASKS = ("smollm2",), ("speech", "cifar")
LAYERS = 6  # the blocks that are used: all of whisper's encoder and minilm, the first ones of the others
# name: (modality, script and flags, steps)
TASKS = {"speech": ("speech", "train_speech.py", 600),
         "cifar": ("images", "train_cifar.py --patch_size 4", 1000),
         "sums": ("digits", "train_mnist_add.py --n 2", 2000),
         "cyp3a4": ("molecules", "train_cyp3a4.py", 300)}
DRAWN = ("random", "scaled", "shuffled", "spectrum")  # anew for every seed
RUNGS = ("none", *DRAWN, "pretrained", "all-random", "all-shuffled", "all-pretrained")
RATES = ("1e-4", "3e-4", "1e-3", "3e-3", "1e-2", "3e-2")
SEEDS = (0, 1, 2)  # of the matrices that are drawn, of the new layers and of the order of the data
# Name, first rung, what it is claimed to be, second rung. H1 to H4 are about the first three cores.
CLAIMS = [("H1", "pretrained", "equal", "spectrum"), ("H2", "pretrained", "better", "spectrum"),
          ("H2", "pretrained", "better", "shuffled"), ("H3", "shuffled", "not worse", "pretrained"),
          ("H4", "all-pretrained", "better", "all-random"),
          ("C1", "all-pretrained", "better", "all-random"),
          ("C1", "all-pretrained", "better", "all-shuffled"),
          ("C2", "shuffled", "not worse", "pretrained")]
MARGIN = 0.02  # nats that count as equal
# The differences that the texts name: what each step gives, and what training everything adds.
PAIRS = [("random", "none"), ("scaled", "none"), ("scaled", "random"), ("shuffled", "scaled"),
         ("shuffled", "random"), ("shuffled", "none"), ("shuffled", "spectrum"), ("spectrum", "none"),
         ("pretrained", "none"), ("pretrained", "random"), ("pretrained", "scaled"),
         ("pretrained", "shuffled"), ("pretrained", "spectrum"), ("all-random", "none"),
         ("all-pretrained", "none"), ("all-shuffled", "all-random"), ("all-pretrained", "all-random"),
         ("all-pretrained", "all-shuffled"), ("all-random", "random"), ("all-shuffled", "shuffled"),
         ("all-pretrained", "pretrained")]
# Digits are images, and SMILES is text of a kind: these pairs are shown, and stand for no hypothesis.
NEITHER = {("dinov2", "sums"), ("minilm", "cyp3a4")}
LINES = [("none", "no block", "#000000", "--"),
         ("all-random", "all trained: random", "#D55E00", ":"),
         ("all-shuffled", "all trained: shuffled", "#CC79A7", (0, (6, 2))),
         ("all-pretrained", "all trained: pretrained", "#009E73", "-.")]
FOLDER, RUNS, CORE_FOLDER = Path(".results"), Path("runs/ladder"), Path("cores/ladder")


# ---- The cores of the rungs ----------------------------------------------------------------------
def orthogonal(rows, columns, seed, stream):
    """A random matrix with orthonormal columns, rows >= columns, all directions alike (Mezzadri 2007)."""
    q, r = torch.linalg.qr(fpt.normal((rows, columns), 1.0, seed, stream).double())
    return q * r.diagonal().sign()


def changed(weight, rung, width, seed, stream):
    """The matrix that stands on this rung for a pretrained one: float32, the same shape."""
    if rung in ("random", "scaled"):
        std = width ** -0.5 if rung == "random" else weight.std().item()
        return fpt.normal(weight.shape, std, seed, stream)
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
        for rung in (*DRAWN, "pretrained"):
            for seed in SEEDS if rung in DRAWN else (0,):
                model = AutoModel.from_pretrained(CORES[name][0], dtype=torch.float32)
                stack = model.encoder if name == "whisper" else model
                blocks = next(module for module in stack.modules() if isinstance(module, nn.ModuleList))
                matrices = [weight for weight in blocks.parameters() if weight.ndim == 2]
                for stream, weight in enumerate(matrices if rung != "pretrained" else ()):
                    weight.data = changed(weight.data, rung, model.config.hidden_size, seed, stream)
                model.save_pretrained(folder(name, rung, seed))
        print(f"{name}: {len(matrices)} matrices in {len(blocks)} blocks", flush=True)


def folder(core, rung, seed):
    rung = rung.removeprefix("all-")
    return CORE_FOLDER / (f"{core}-{rung}-{seed}" if rung in DRAWN else f"{core}-pretrained")


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
    return {tuple(line[name] for name in names): line for line in reversed(lines("ladder.jsonl"))}


def best_rate(core, task, rung, done):
    """The rate with the lowest validation loss after a quarter of the steps, or None if one is missing."""
    tried = [done.get((core, task, rung, rate, 0, TASKS[task][2] // 4)) for rate in RATES]
    return min(tried, key=lambda line: line["validation_loss"])["rate"] if all(tried) else None


def whole_runs(core, task, rung, done):
    """The three runs of a cell, or [] if its rate is not known yet."""
    rate = best_rate(core, task, rung, done)
    return [(core, task, rung, rate, seed, TASKS[task][2]) for seed in SEEDS] if rate else []


def missing(args, done):
    """The runs still to be made whose rate is known: first those that choose the rate, then the seeds."""
    runs = []
    for task, core, rung in itertools.product(args.tasks, args.cores, args.rungs):
        short = TASKS[task][2] // 4
        runs += [(core, task, rung, rate, 0, short) for rate in RATES]
        whole = whole_runs(core, task, rung, done)
        runs += whole
        if args.short:
            runs += [(*run[:5], short) for run in whole]
    return [run for run in dict.fromkeys(runs) if run not in done]


def train(core, task, rung, rate, seed, steps):
    """Make one run and write its line. Returns False if another process is at it."""
    run = core, task, rung, rate, seed, steps
    flags = f"--layers {0 if rung == 'none' else LAYERS}" + " --train all" * rung.startswith("all-")
    command = f"{TASKS[task][1]} --model {folder(core, rung, seed)} {flags} --lr {rate} --seed {seed}"
    command += f" --steps {steps} --eval_every {steps} --test 0"
    start, lock = time.time(), open(RUNS / f"{run_folder(run).name}.lock", "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with this process or at the end of train()
        resume = int((run_folder(run) / "last.pt").exists())
        result = script(f"{command} --resume {resume} --out {run_folder(run)}")
        names = "validation_loss", "validation_accuracy", "trainable_parameters", "amp", "device"
        figures = {name: result[name] for name in names}
    except BlockingIOError:
        return False
    except SystemExit as error:
        if "The loss is no number" not in str(error):
            raise
        figures = {"validation_loss": math.inf}  # too high a rate, so it is not chosen
    if run in finished():  # another process has written it meanwhile
        return True
    line = {"core": core, "task": task, "rung": rung, "rate": rate, "seed": seed, "steps": steps, **figures,
            "seconds": round(time.time() - start), "date": time.strftime("%Y-%m-%d"), "command": command}
    with open(FOLDER / "ladder.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")
    print(time.strftime("%H:%M"), *run, line["seconds"], "s, loss", figures["validation_loss"], flush=True)
    return True


def run_folder(run):
    return RUNS / "-".join(map(str, run))


def test_file(run):
    """float16 [2, test examples]: losses, and 1 where it is right. In git, so --draw needs no runs.

    (For speech it needs the data all the same: the names of the files name the speakers.)
    """
    return FOLDER / "ladder-test" / f"{run_folder(run).name}.npy"


# ---- The test pass -------------------------------------------------------------------------------
def test(args, done):
    """Read the test split with the three whole runs of every chosen core, task and rung, once each."""
    if left := missing(args, done):
        sys.exit(f"{len(left)} runs are still to be made: the test sets are opened when none is left")
    read = {tuple(line["run"]) for line in lines("ladder-test.jsonl")}
    infer, caught = fpt.infer, []

    def infer_and_keep(*words):
        caught[:] = infer(*words)
        return caught

    fpt.infer = infer_and_keep
    for cell in itertools.product(args.cores, args.tasks, args.rungs):
        for run in whole_runs(*cell, done):
            core, task, rung, _, seed, _ = run
            if run in read:
                continue
            best = run_folder(run) / "best.pt"
            if not best.exists():  # the line is there, the folder was lost
                train(*run)
            words = f"--eval {best} --model {folder(core, rung, seed)}"
            result = script(f"{TASKS[task][1].split()[0]} {words}")
            outputs, targets = caught
            losses = nn.functional.cross_entropy(outputs, targets, reduction="none")
            right = (outputs.argmax(1) == targets).float()
            np.save(test_file(run), torch.stack([losses, right]).half().cpu())
            keep = {name: value for name, value in result.items() if name.startswith("test_")}
            with open(FOLDER / "ladder-test.jsonl", "a") as file:
                file.write(json.dumps({"run": run, "date": time.strftime("%Y-%m-%d")} | keep) + "\n")


def of_test(core, task, rung, done):
    """float [2, seeds, test examples]: losses, and 1 where the prediction is right. None: not read yet."""
    paths = [test_file(run) for run in whole_runs(core, task, rung, done)]
    there = paths and all(path.exists() for path in paths)
    return np.stack([np.load(path) for path in paths], 1).astype(float) if there else None


def mean_and_variances(values, task):
    """values [seeds, test examples] -> their mean, its variance due to the seeds, due to the examples."""
    seeds, examples = values.shape
    groups, times = np.arange(examples), 1
    if task == "speech":  # a speaker's clips are alike; the order is that of data.speech_commands()
        root = Path("data/SpeechCommands/speech_commands_v0.02")
        clips = (root / "testing_list.txt").read_text().split()
        clips = sorted(clip for clip in clips if (root / clip).exists())
        groups = np.unique([Path(clip).name.split("_")[0] for clip in clips], return_inverse=True)[1]
    if task == "sums":  # every test digit serves in two sums
        times = 2
    rest = values.mean(0) - values.mean()
    by_examples = times * (np.bincount(groups, rest) ** 2).sum() / examples ** 2
    return values.mean(), values.mean(1).var(ddof=1) / seeds, by_examples


def interval(by_seeds, by_examples):
    """Half of the 95 % interval, after Cochran and Cox (1950): the seeds' part has few degrees of freedom."""
    from scipy import stats
    both, t = by_seeds + by_examples, stats.t.ppf(0.975, len(SEEDS) - 1)
    return (by_seeds * t + by_examples * stats.norm.ppf(0.975)) / math.sqrt(both)


def chance(distance, by_seeds, by_examples):
    """One-sided p of a mean that lies `distance` on the claimed side."""
    from scipy import stats
    both = by_seeds + by_examples
    z = distance / math.sqrt(both)
    return (by_seeds * stats.t.sf(z, len(SEEDS) - 1) + by_examples * stats.norm.sf(z)) / both


def contrasts(done):
    """Print the verdicts. A number is a difference of test losses in nats, below 0: the first is better.

    A claim holds after Holm's correction over all cells of its name, finished or not. It is refuted
    where the 95 % interval, which is not corrected, lies outside of it. Else it is open, which shows nothing.
    """
    print("| | core | task | contrast | nats, 95 % | p | verdict |")
    print("| --- | --- | --- | --- | ---: | ---: | --- |")
    for name in dict.fromkeys(claim[0] for claim in CLAIMS):
        found, cells = [], 0
        for (core, (_, home)), (task, (modality, *_)), (whose, first, claim, second) in itertools.product(
                CORES.items(), TASKS.items(), CLAIMS):
            foreign = home != modality and (core, task) not in NEITHER
            asked = {"H1": foreign, "H2": home == modality, "H3": foreign, "H4": True}
            asked = asked.get(name, task in LATER_TASKS) and (core in LATER) == (name in ("C1", "C2"))
            if whose != name or not asked:
                continue
            cells += 1
            text, estimate = difference(core, task, first, second, done)
            if estimate is None:
                continue
            mean, half = estimate[0], interval(*estimate[1:])
            better, not_worse, not_better = (
                chance(distance, *estimate[1:]) for distance in (-mean, MARGIN - mean, MARGIN + mean))
            p = {"equal": max(not_worse, not_better), "better": better, "not worse": not_worse}[claim]
            refuted = mean - half > (0 if claim == "better" else MARGIN)
            refuted |= claim == "equal" and mean + half < -MARGIN
            found.append((p, core, task, f"{first} - {second}", text, refuted))
        holding = True
        for rank, (p, core, task, what, text, refuted) in enumerate(sorted(found)):
            holding = holding and p * (cells - rank) < 0.05
            verdict = "holds" if holding else "refuted" if refuted else "open"
            print(f"| {name} | {core} | {task} | {what} | {text} | {p:.2g} | {verdict} |")


def differences(done):
    """Print the differences of test losses that the texts name; the hypotheses test some of them."""
    print(f"| core | difference | {' | '.join(TASKS)} |")
    print(f"| --- | --- |{' ---: |' * len(TASKS)}")
    for core, (first, second) in itertools.product(CORES, PAIRS):
        cells = [difference(core, task, first, second, done)[0] for task in TASKS]
        if any(cells):
            print(f"| {core} | {first} - {second} | {' | '.join(cells)} |")


def difference(core, task, first, second, done):
    """Test loss of one rung minus another's, paired by seed and example: (text, estimate), or ("", None)."""
    sides = [of_test(core, task, rung, done) for rung in (first, second)]
    if any(side is None for side in sides):
        return "", None
    estimate = mean_and_variances(sides[0][0] - sides[1][0], task)
    return f"{estimate[0]:+.3f} ± {interval(*estimate[1:]):.3f}", estimate


def table(done):
    """Print a row for every core, task and rung with three whole runs. Returns {row: test losses by seed}."""
    print("| task | core | rung | rate | short, validation | validation loss | test loss |"
          " test accuracy, % | seconds |")
    print("| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    losses = {}
    for task, core, rung in itertools.product(TASKS, CORES, RUNGS):
        runs = whole_runs(core, task, rung, done)
        if not runs or not all(run in done for run in runs):
            continue
        rate = runs[0][3]
        short = done[(core, task, rung, rate, 0, TASKS[task][2] // 4)]["validation_loss"]
        validation, seconds = (statistics.mean(done[run][name] for run in runs)
                               for name in ("validation_loss", "seconds"))
        values, cells = of_test(core, task, rung, done), ["", ""]
        if values is not None:
            losses[core, task, rung] = values[0].mean(1).tolist()
            for i, (part, unit, digits) in enumerate(((values[0], 1, 3), (values[1], 100, 1))):
                mean, *variances = mean_and_variances(part, task)
                cells[i] = f"{unit * mean:.{digits}f} ± {unit * interval(*variances):.{digits}f}"
        edge = " (edge)" * (rate in (RATES[0], RATES[-1]))
        print(f"| {task} | {core} | {rung} | {rate}{edge} | {short:.3f} | {validation:.3f} |"
              f" {' | '.join(cells)} | {seconds:.0f} |")
    return losses


def draw(losses):
    """Write ladder.svg: a row of panels for each task that all cores have, in it one a core, in it the rungs.

    A dot is a seed, a bar their mean. Yellow: the core was pretrained on the task's modality.
    """
    import matplotlib
    matplotlib.use("svg")
    import matplotlib.pyplot as plt
    plt.rcParams |= {"font.size": 15, "svg.fonttype": "none", "svg.hashsalt": "ladder"}
    cores = {core: home for core, (_, home) in CORES.items() if core not in LATER}
    there = {key[2] for key in losses if key[0] in cores}
    rungs = [rung for rung in (*DRAWN, "pretrained") if rung in there]
    tasks = [task for task in TASKS if {key[0] for key in losses if key[1] == task} >= set(cores)]
    figure, axes = plt.subplots(len(tasks), len(cores), figsize=(13, 3 * len(tasks) + 1), sharey="row",
                                squeeze=False)
    for (i, task), (j, (core, home)) in itertools.product(enumerate(tasks), enumerate(cores.items())):
        axis = axes[i, j]
        for x, rung in enumerate(rungs):
            values = losses.get((core, task, rung), [])
            axis.plot([x] * len(values), values, "o", color="#0072B2", ms=7, alpha=0.7)
            if values:
                axis.plot([x - 0.3, x + 0.3], [statistics.mean(values)] * 2, color="#0072B2", lw=2.5)
        for rung, label, colour, style in LINES:
            if values := losses.get((core, task, rung)):
                mean = statistics.mean(values)
                axis.plot([-1, len(rungs)], [mean, mean], color=colour, ls=style, lw=2, label=label)
        axis.set_xlim(-0.6, len(rungs) - 0.4)
        axis.set_xticks(range(len(rungs)), rungs if i == len(tasks) - 1 else [""] * len(rungs), rotation=25)
        axis.grid(axis="y", alpha=0.3)
        if home == TASKS[task][0]:
            axis.set_facecolor("#FFF4CC")
        if i == 0:
            axis.set_title(f"{core} (of {home})")
        if j == 0:
            axis.set_ylabel(f"{task}, {TASKS[task][2]} steps\ntest loss")
    handles = {label: line for axis in axes.flat for line, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=len(handles), frameon=False)
    figure.tight_layout(rect=(0, 0.4 / figure.get_figheight(), 1, 1))
    figure.savefig(FOLDER / "ladder.svg", metadata={"Date": None})


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--cores", nargs="+", choices=CORES, default=list(CORES))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--rungs", nargs="+", choices=RUNGS, default=list(RUNGS))
    parser.add_argument("--short", action="store_true", help="three seeds of the short budget as well")
    for name in "make", "test", "draw":
        parser.add_argument(f"--{name}", action="store_true")
    args = parser.parse_args()
    RUNS.mkdir(parents=True, exist_ok=True)
    (FOLDER / "ladder-test").mkdir(exist_ok=True)
    if args.make:
        return make_cores(args.cores)
    if args.test:
        return test(args, finished())
    if args.draw:
        losses = table(finished())
        contrasts(finished())
        differences(finished())
        return draw(losses) if losses else None
    while runs := missing(args, finished()):
        if not any(train(*run) for run in runs):  # stops at the first that it could make, then looks again
            time.sleep(2)  # the other processes are at all of them


if __name__ == "__main__":
    main()
