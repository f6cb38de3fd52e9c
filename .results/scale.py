"""How much is the scale? Short runs of every task over the scales of a frozen random GPT-2 and of its input, drawn as scale.svg.

    python .results/scale.py                        # from the top folder; an hour and a half on one core; needs matplotlib
    python .results/scale.py --tasks cifar cyp3a4   # some of it; runs that are there are not made again
"""
import argparse
import itertools
import json
import subprocess
import sys
from pathlib import Path

TASKS = {
    "cifar": "train_cifar.py --patch_size 8 --augment 0 --steps 200 --eval_every 200",
    "speech": "train_speech.py --steps 50 --eval_every 50",
    "cyp3a4": "train_cyp3a4.py --steps 100 --eval_every 100",
    "sums": "train_mnist_add.py --n 2 --augment 0 --steps 400 --batch_size 64 --eval_every 400",
}
READINGS = {  # how the core is used; the original's is all of it, drawn at one scale, and its last token
    "twelve blocks, last token": "--layers 0 --pool last --attn_gain 1 --qk_std {std}",
    "two blocks, the script's defaults": "",
}
STDS, GAINS = (0.02, 0.04, 0.08, 0.16), (0.05, 1.41)


def folder(task, reading, std, gain):
    return Path(f"runs/scale/{task}-{list(READINGS).index(reading)}-{std}-{gain}")


def finished(*run):
    log = folder(*run) / "log.jsonl"
    return log.exists() and "dummy_accuracy" in log.read_text()


def train(task, reading, std, gain):
    flags = f"{TASKS[task]} {READINGS[reading].format(std=std)} --pretrained 0 --init_std {std} --in_gain {gain} --test 0 --resume 1 --out"
    subprocess.run([sys.executable, *flags.split(), folder(task, reading, std, gain)], check=True)


def validation_figure(task, reading, std, gain):
    last = json.loads((folder(task, reading, std, gain) / "log.jsonl").read_text().splitlines()[-1])
    return last["validation_auprc" if task == "cyp3a4" else "validation_accuracy"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="train these; the picture is drawn when all are there")
    args = parser.parse_args()
    grid = list(itertools.product(TASKS, READINGS, STDS, GAINS))
    for run in grid:
        if run[0] in args.tasks and not finished(*run):
            train(*run)
    if not all(finished(*run) for run in grid):
        return print("Not drawn yet: other tasks' runs are missing")

    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(READINGS), len(TASKS), figsize=(10, 5), sharex=True, sharey="col", layout="constrained")
    print("| task | reading | input scale |" + "".join(f" {std} |" for std in STDS) + "\n| --- | --- | ---: |" + " ---: |" * len(STDS))
    for row, reading in zip(axes, READINGS):
        for panel, task in zip(row, TASKS):
            for gain in GAINS:
                curve = [validation_figure(task, reading, std, gain) for std in STDS]
                panel.plot(STDS, curve, "o-", label=f"input at {gain}")
                print(f"| {task} | {reading} | {gain} |" + "".join(f" {value:.3f} |" for value in curve))
            panel.set_xscale("log", base=2)
            panel.set_xticks(STDS, STDS)
            panel.set_title(f"{task}{', AUPRC' * (task == 'cyp3a4')}\n{reading}", fontsize=8)
    axes[0, 0].legend(fontsize=8)
    figure.supxlabel("standard deviation of the frozen random weights (GPT-2's own: 0.02)")
    figure.supylabel("validation accuracy or AUPRC")
    plt.savefig(Path(__file__).with_name("scale.svg"))


if __name__ == "__main__":
    main()
