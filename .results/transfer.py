"""Does a frozen pretrained transformer transfer? Six panels, five conditions, five seeds.

    python .results/transfer.py                             # make all runs that are missing
    python .results/transfer.py --panels smollm2-sums       # those of this panel
    python .results/transfer.py --equal_time                # also: no blocks, as long as pretrained
    python .results/transfer.py --test                      # read the test sets, of what is trained

Run it from the top folder. It needs data/ and, in cores/, the folders smollm2, whisper and dinov2.
A finished run is a line of transfer.jsonl and is not repeated; several processes share the runs
among them (OMP_NUM_THREADS=1 gives each a core). Design and hypotheses: .results/README.md.
"""
import argparse
import csv
import fcntl
import importlib
import itertools
import json
import math
import re
import subprocess
import sys
import tempfile
import time
import zlib
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel

sys.path.insert(0, ".")
import data  # noqa: E402
import fpt  # noqa: E402

# A core is a folder in cores/: HuggingFaceTB/SmolLM2-135M-Instruct, openai/whisper-base and
# facebook/dinov2-small. The last two are controls: there the modality is that of pretraining.
PANELS = {"smollm2-sums": ("smollm2", "sums"), "smollm2-smiles": ("smollm2", "smiles"),
          "smollm2-speech": ("smollm2", "speech"), "whisper-speech": ("whisper", "speech"),
          "smollm2-cifar": ("smollm2", "cifar"), "dinov2-cifar": ("dinov2", "cifar")}
TASKS = {"sums": ("train_mnist_add.py --n 2", 2000), "smiles": ("train_cyp3a4.py", 300),
         "speech": ("train_speech.py", 600), "cifar": ("train_cifar.py", 600)}
POOL = dict.fromkeys(["smollm2-speech", "smollm2-cifar"], "mean")  # chosen by a check, see design
COMPILED = "smollm2-speech", "smollm2-cifar", "dinov2-cifar"  # to save time
FP32 = "whisper-speech", "smollm2-cifar"  # bf16 takes twice as long on a CPU without AMX
LAYERS = 6  # Whisper's encoder has no more
CONDITIONS = ("no blocks", "random", "scaled", "shuffled", "pretrained")
DRAWN = ("scaled", "shuffled")  # their matrices are drawn, for each seed
RATES = ("1e-4", "3e-4", "1e-3", "3e-3", "1e-2", "3e-2", "1e-1")
TUNING_SEED, SEEDS = 9, (3, 4, 5, 6, 7)
LINES, ARRAYS = Path(".results/transfer.jsonl"), Path(".results/transfer.npz")
CORES, RUNS = Path("cores"), Path("runs/transfer")
Run = namedtuple("Run", "panel condition lr seed steps")

# ---- Cores ---------------------------------------------------------------------------------------
def core_folder(run):
    core = PANELS[run.panel][0]
    is_drawn = run.condition in DRAWN
    return CORES / "transfer" / f"{core}-{run.condition}-{run.seed}" if is_drawn else CORES / core

def make_core(run):
    """Write the six blocks of a drawn condition. Biases, norms, positions stay as pretrained."""
    folder = core_folder(run)
    if run.condition not in DRAWN or folder.exists():
        return
    model = AutoModel.from_pretrained(CORES / PANELS[run.panel][0], dtype=torch.float32)
    blocks = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    del blocks[LAYERS:]
    for i, p in enumerate(p for p in blocks.parameters() if p.ndim >= 2):
        if run.condition == "scaled":
            p.data = fpt.normal(p.shape, p.std().item(), run.seed, i)
        else:
            order = np.random.default_rng([run.seed, i]).permutation(p.numel())
            p.data = p.data.flatten()[torch.from_numpy(order)].view_as(p)
    changes = {"num_hidden_layers": LAYERS}
    if model.config.model_type in fpt.TEXT:  # the embedding is not used, and larger than the blocks
        model.set_input_embeddings(nn.Embedding(1, model.config.hidden_size))
        changes |= dict(vocab_size=1, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        new = Path(temporary) / folder.name
        model.save_pretrained(new)
        config = json.loads((new / "config.json").read_text()) | changes
        for name in "out_features", "out_indices", "stage_names":  # of DINOv2's twelve blocks
            config.pop(name, None)
        (new / "config.json").write_text(json.dumps(config))
        if not folder.exists():  # another process may have been faster
            new.rename(folder)

# ---- Which runs ----------------------------------------------------------------------------------
def finished():
    """{Run: its line}"""
    lines = map(json.loads, LINES.read_text().splitlines() if LINES.exists() else [])
    return {Run(*(line[name] for name in Run._fields)): line for line in lines}

def tune(panel, condition, done, is_final=True):
    """The tuning runs that are missing and, if there are none, the best learning rate. The grid is
    1e-3 to 3e-2 at a quarter of the steps; while an end of it wins, its neighbour is tried, too.
    If is_final, the best rate and the next lower one are then tried at full length."""
    def best_of(rates, steps):
        runs = [Run(panel, condition, lr, TUNING_SEED, steps) for lr in rates]
        missing = [run for run in runs if run not in done]
        if missing:
            return missing, None
        return [], min(runs, key=lambda run: done[run]["validation_loss"]).lr

    steps, grid, near = TASKS[PANELS[panel][1]][1], (), RATES[2:6]
    while not set(near) <= set(grid):
        grid = [rate for rate in RATES if rate in (*grid, *near)]
        missing, lr = best_of(grid, steps // 4)
        if missing:
            return missing, None
        best = RATES.index(lr)
        near = RATES[max(0, best - 1):best + 2]
    return best_of(RATES[max(0, best - 1):best + 1], steps) if is_final else ([], lr)

def full_runs(panel, condition, done, is_final=True):
    """The five runs that count, or [] while their learning rate is not known. If not is_final,
    those with the rate that was best at a quarter of the steps, as first registered."""
    lr, steps = tune(panel, condition, done, is_final)[1], TASKS[PANELS[panel][1]][1]
    return [Run(panel, condition, lr, seed, steps) for seed in SEEDS] if lr else []

def equal_time_run(panel, done):
    """No blocks, trained for as long as pretrained takes, or None while the times are not known."""
    seconds = []
    for condition in "pretrained", "no blocks":
        runs = full_runs(panel, condition, done)
        if not runs or not all(run in done for run in runs):
            return None
        seconds.append(np.median([done[run]["train_seconds"] for run in runs]))
    return runs[0]._replace(steps=round(runs[0].steps * seconds[0] / seconds[1]))

def missing_runs(args, done):
    runs = []
    for panel in args.panels:
        for condition in CONDITIONS:
            runs += tune(panel, condition, done)[0] or (
                full_runs(panel, condition, done) + full_runs(panel, condition, done, False))
        runs += [equal_time_run(panel, done)] * args.equal_time
    return [run for run in runs if run and run not in done]

# ---- Training ------------------------------------------------------------------------------------
def run_folder(run):
    return RUNS / "-".join(map(str, run)).replace(" ", "-")

def command(run):
    script, steps = TASKS[PANELS[run.panel][1]]
    every = run.steps // 10 if run.steps > steps else run.steps  # of equal time: may overfit
    layers = 0 if run.condition == "no blocks" else LAYERS
    pretrained = 0 if run.condition in ("no blocks", "random") else 1
    return (f"{script} --model {core_folder(run)} --layers {layers} --pretrained {pretrained} "
            f"--pool {POOL.get(run.panel, 'auto')} --lr {run.lr} --seed {run.seed} "
            f"--steps {run.steps} --eval_every {every} --test 0"
            + " --compile 1" * (layers > 0 and run.panel in COMPILED)
            + " --amp fp32" * (run.panel in FP32))

def device():
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return re.search("model name.*: (.*)", Path("/proc/cpuinfo").read_text())[1]

def train(run):
    """Make a run and write its line. Returns False if another process is making it."""
    out = run_folder(run)
    with open(f"{out}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        if run in finished():
            return True
        make_core(run)
        words = command(run).split()
        if (out / "last.pt").exists():  # the other flags come from the checkpoint
            words = [words[0], "--resume", "1"]
        # The child inherits the lock, so that it holds even if this process is killed.
        child = subprocess.run([sys.executable, *words, "--out", out], stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True, pass_fds=[lock.fileno()])
        rows, result = [], {"validation_loss": math.inf}
        if child.returncode == 0:
            *rows, result = map(json.loads, (out / "log.jsonl").read_text().splitlines())
        elif "The loss is not finite" not in child.stdout:  # if it is, the learning rate is too high
            sys.exit(f"{run}:\n{child.stdout[-3000:]}")
        names = "validation_loss", "validation_accuracy", "trainable_parameters", "amp"
        line = run._asdict() | {name: result.get(name) for name in names} | {
            "train_seconds": sum(row["train_seconds"] for row in rows), "device": device(),
            "date": time.strftime("%Y-%m-%d"), "command": command(run),
            "commit": subprocess.getoutput("git describe --always --dirty")}
        with open(LINES, "a") as file:
            file.write(json.dumps(line) + "\n")
        print(time.strftime("%H:%M"), *run, line["validation_loss"], flush=True)
        return True

# ---- Test sets -----------------------------------------------------------------------------------
def build(run, is_trained=True):
    """A run's model and data, which the main() of its script gives to fpt.fit()."""
    make_core(run)
    script, *words = command(run).split()
    if is_trained:  # the other flags come from the checkpoint
        words = ["--model", str(core_folder(run)), "--eval", f"{run_folder(run)}/best.pt"]
    sys.argv = [script, *words]
    module = importlib.import_module(script.removesuffix(".py"))
    fpt.fit = lambda *given, **more: given
    flags, model, batch, labels = module.main(fpt.parse(module.parser))[:4]
    if is_trained:
        checks = {split: [len(y), zlib.crc32(y.numpy().tobytes())] for split, y in labels.items()}
        fpt.load_checkpoint(flags.eval, model, checks)
    return flags, model, batch, labels

def read_test(panels, done):
    """Evaluate every condition that is trained on its test set, once. Kept are the losses and the
    correct answers (1 or 0), float32 [seeds + examples]: the mean of each seed over the examples,
    then that of each example over the seeds. figures.py needs no more."""
    arrays = dict(np.load(ARRAYS)) if ARRAYS.exists() else {}
    for panel, condition, is_final in itertools.product(panels, CONDITIONS, (True, False)):
        runs = full_runs(panel, condition, done, is_final)
        if (not runs or any(run not in done for run in runs)
                or f"{array_name(runs[0])}/loss" in arrays):
            continue
        losses, correct = [], []  # of each seed
        def keep(outputs, targets):
            losses.append(F.cross_entropy(outputs, targets, reduction="none").cpu().numpy())
            correct.append((outputs.argmax(1) == targets).float().cpu().numpy())
            return {"majority": (targets == targets.mode().values).float().mean()}
        for run in runs:
            flags, model, batch, labels = build(run)
            sizes = {"test": [len(labels["test"])]}
            row = fpt.evaluate(flags, model, batch, "test", sizes, F.cross_entropy, keep)
        for name, values in ("loss", np.stack(losses)), ("correct", np.stack(correct)):
            by_example = values.mean(0).round(3)  # rounded, the file is smaller
            arrays[f"{array_name(runs[0])}/{name}"] = np.append(values.mean(1), by_example)
        task = PANELS[panel][1]
        arrays[f"{task}/majority"] = np.float32(row["test_majority"])
        arrays[f"{task}/groups"] = groups(task, labels["test"].tolist())
        temporary = ARRAYS.with_name("unfinished.npz")
        np.savez_compressed(temporary, **arrays)
        temporary.rename(ARRAYS)
        print(time.strftime("%H:%M"), array_name(runs[0]), "is read", flush=True)

def array_name(run):  # the same for the five seeds
    return f"{run.panel}/{run.condition}/{run.lr}"

def groups(task, labels):
    """Which test examples belong together, int16 [examples]: the clips of a speaker, the molecules
    of a scaffold; in the order of the loaders, checked against the labels."""
    if task == "speech":
        root = Path("data/SpeechCommands/speech_commands_v0.02")
        clips = sorted((root / "testing_list.txt").read_text().split())
        clips = [re.split("[/_]", clip)[:2] for clip in clips if (root / clip).exists()]
        words, names = zip(*clips)
        ours = np.unique(words, return_inverse=True)[1].tolist()
    elif task == "smiles":
        from rdkit.Chem.Scaffolds.MurckoScaffold import MurckoScaffoldSmiles
        with open("data/cyp3a4_veith.tab", newline="", encoding="utf-8") as file:
            table = list(csv.DictReader(file, delimiter="\t"))
        smiles = [row["Drug"].strip() for row in table]
        scaffolds = [MurckoScaffoldSmiles(one, includeChirality=False) for one in smiles]
        rows = sorted(data.scaffold_split(scaffolds, 0.8)[1])
        rows.sort(key=lambda i: len(data.molecule_ids(smiles[i], "smiles")))
        names = [scaffolds[i] for i in rows]
        ours = [int(float(table[i]["Y"])) for i in rows]
    else:
        names, ours = range(len(labels)), labels
    if ours != labels:
        sys.exit(f"The test set of {task} has another order in data.py than here")
    return np.unique(names, return_inverse=True)[1].astype(np.int16)

def main():
    parser = argparse.ArgumentParser(None, None, __doc__, formatter_class=fpt.HelpFormatter)
    parser.add_argument("--panels", nargs="+", choices=PANELS, default=list(PANELS), help="which")
    parser.add_argument("--equal_time", action="store_true", help="also the runs of hypothesis B")
    parser.add_argument("--test", action="store_true", help="read the test sets, once each")
    args = parser.parse_args()
    if args.test:
        return read_test(args.panels, finished())
    RUNS.mkdir(parents=True, exist_ok=True)
    while runs := missing_runs(args, finished()):
        # The first that no other process is making; then look again, for tuning may be complete.
        if not any(train(run) for run in runs):
            time.sleep(5)

if __name__ == "__main__":
    main()
