"""The table of results: every task without a block, on frozen random blocks, and with everything trained.

    python .results/table.py --rows sums1 sums2     # from the top folder: train what is missing of these rows
    python .results/table.py                        # print the table of what is there
    OMP_NUM_THREADS=1 python .results/table.py --rows cifar &     # two side by side, a core each

For each row and arm: the learning rate is chosen among RATES on the validation split, with a quarter of the
steps and seed 0; then three seeds with all steps read the test split once each. A finished run is a line of
.results/table.jsonl and is never made again.
"""
import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path

# name: (what the README calls it, command without steps, steps, test examples, how many times each serves)
ROWS = {
    "sums1": ("MNIST (n = 1)", "train_mnist_add.py --n 1", 1000, 10000, 1),
    "sums2": ("sums of 2 digits", "train_mnist_add.py --n 2", 1000, 10000, 2),
    "cifar": ("CIFAR-10, patches of 8", "train_cifar.py --patch_size 8", 400, 10000, 1),
    "atoms": ("CYP3A4, an atom a token", "train_cyp3a4.py --tokens atoms", 150, 2466, 1),
    "speech": ("speech, 12 words", "train_speech.py", 100, 2626, 1),
    "smiles": ("CYP3A4, SMILES", "train_cyp3a4.py --tokens smiles", 100, 2466, 1),
    "sums10": ("sums of 10 digits", "train_mnist_add.py --n 10 --loss l1 --batch_size 32", 400, 10000, 10),
}
ARMS = {"no block": "--pretrained 0 --layers 0", "frozen random": "--pretrained 0",
        "all trained": "--pretrained 0 --train all"}
RATES = ("1e-4", "5e-4", "2e-3", "1e-2")
SEEDS = (0, 1, 2)
FILE = Path(".results/table.jsonl")


def finished():
    """{(row, arm, rate, seed, steps): the line of the run}"""
    lines = [json.loads(line) for line in FILE.read_text().splitlines()] if FILE.exists() else []
    return {(line["row"], line["arm"], line["rate"], line["seed"], line["steps"]): line for line in lines}


def train(row, arm, rate, seed, steps, test):
    """The line of one run: trained now if it is not there yet."""
    key = (row, arm, rate, seed, steps)
    if key not in finished():
        command = f"{ROWS[row][1]} {ARMS[arm]} --lr {rate} --seed {seed} --steps {steps} --eval_every {steps}"
        command += f" --test {test}"
        out = f"runs/table/{row}-{arm.replace(' ', '-')}-{rate}-{seed}-{steps}"
        words = [sys.executable, *command.split(), "--resume", "1", "--out", out]
        subprocess.run(words, check=True, capture_output=True)
        *_, before, last = map(json.loads, (Path(out) / "log.jsonl").read_text().splitlines())
        keep = ("loss", "accuracy", "dummy_accuracy", "auroc", "auprc", "mae")
        line = {"row": row, "arm": arm, "rate": rate, "seed": seed, "steps": steps, "command": command,
                "seconds": round(before["train_seconds"]), "amp": last["amp"], "device": last["device"],
                "date": time.strftime("%Y-%m-%d"), "trainable_parameters": last["trainable_parameters"]}
        for split, figures in ("validation", before), ("test", last):
            names = [f"{split}_{name}" for name in keep]
            line |= {name: figures[name] for name in names if name in figures}
        with open(FILE, "a") as file:
            file.write(json.dumps(line) + "\n")
        print(row, arm, rate, seed, steps, line.get("test_accuracy", line["validation_accuracy"]), flush=True)
    return finished()[key]


def best_rate(row, arm, lines):
    """The rate with the lowest validation loss after a quarter of the steps, or None if one is missing."""
    tried = [lines.get((row, arm, rate, 0, ROWS[row][2] // 4)) for rate in RATES]
    return min(tried, key=lambda line: line["validation_loss"])["rate"] if all(tried) else None


def cell(row, arm, figure, lines):
    """Mean over the seeds and its standard error, over seeds and, where known, test examples together."""
    _, _, steps, examples, times = ROWS[row]
    values = [line[figure] for key, line in lines.items()
              if key[0] == row and key[1] == arm and key[4] == steps and figure in line]
    if len(values) < len(SEEDS):
        return ""
    mean, spread = statistics.mean(values), statistics.stdev(values)
    if figure == "test_accuracy":
        sampling = mean * (1 - mean) / (examples / times)  # in sums of n every test digit serves n times
        return f"{100 * mean:.1f} ± {100 * math.sqrt(spread ** 2 / len(values) + sampling):.1f}"
    sampling = 0.0  # not known for the others
    if row == "sums10":  # of absolute values of normal errors the variance is (pi / 2 - 1) mean ** 2
        sampling = (math.pi / 2 - 1) * mean ** 2 / (examples / times)
    return f"{mean:.3f} ± {math.sqrt(spread ** 2 / len(values) + sampling):.3f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="*", choices=ROWS, default=[])
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=list(ARMS))
    args = parser.parse_args()
    for row in args.rows:
        steps = ROWS[row][2]
        for arm in args.arms:
            for rate in RATES:
                train(row, arm, rate, 0, steps // 4, test=0)
        for seed in SEEDS:
            for arm in args.arms:
                train(row, arm, best_rate(row, arm, finished()), seed, steps, test=1)

    lines = finished()
    print("| task | dummy |" + "".join(f" {arm} |" for arm in ARMS) + " rates |")
    print("| --- |" + " ---: |" * (len(ARMS) + 2))
    for row, (name, *_) in ROWS.items():
        dummy = {f"{100 * line['test_dummy_accuracy']:.1f}" for key, line in lines.items()
                 if key[0] == row and "test_dummy_accuracy" in line}
        rates = ", ".join(best_rate(row, arm, lines) or "" for arm in ARMS)
        cells = [cell(row, arm, "test_accuracy", lines) for arm in ARMS]
        print(f"| {name} | {''.join(dummy)} |" + "".join(f" {text} |" for text in cells) + f" {rates} |")
        for figure in ("test_auprc", "test_mae"):
            cells = [cell(row, arm, figure, lines) for arm in ARMS]
            if any(cells):
                print(f"| {name}, {figure[5:].upper()} | |" + "".join(f" {text} |" for text in cells) + " |")


if __name__ == "__main__":
    main()
