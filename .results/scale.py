"""Which rule draws the random core and scales the tokens? Short runs of all four tasks, validation, one seed.

    python .results/scale.py                        # from the top folder; about an hour on one core
    python .results/scale.py --tasks cifar speech   # a part of it; finished runs are not made again

Prints the table of what is there: validation loss and accuracy with `--pretrained 0`.
"""
import argparse
import itertools
import json
import subprocess
import sys
from pathlib import Path

TASKS = {
    "sums": "train_mnist_add.py --n 2 --augment 0 --steps 400 --batch_size 64",
    "cifar": "train_cifar.py --patch_size 8 --augment 0 --steps 200",
    "speech": "train_speech.py --augment 0 --steps 100",
    "cyp3a4": "train_cyp3a4.py --steps 100",
}
STDS = {"0.02": "--init_std 0.02", "1/sqrt(width)": ""}
IN_SCALES = ("0.1", "0.3", "1.0")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--lr", default="3e-3")
    args = parser.parse_args()
    print("| task | in_scale |" + "".join(f" std {std}: loss, accuracy |" for std in STDS))
    print("| --- | ---: |" + " ---: |" * len(STDS))
    for task, in_scale in itertools.product(args.tasks, IN_SCALES):
        cells = []
        for name, std in STDS.items():
            out = Path(f"runs/scale/{task}-{args.lr}-{in_scale}-{len(std)}")
            if not (out / "last.pt").exists():
                words = f"{TASKS[task]} --pretrained 0 {std} --in_scale {in_scale} --lr {args.lr} --test 0"
                words = [sys.executable, *words.split(), "--eval_every", "1000", "--out", str(out)]
                subprocess.run(words, check=True, capture_output=True)
            row = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
            cells.append(f" {row['validation_loss']:.3f}, {row['validation_accuracy']:.3f} |")
        print(f"| {task} | {in_scale} |" + "".join(cells), flush=True)


if __name__ == "__main__":
    main()
