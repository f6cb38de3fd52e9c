"""Tables, verdicts and figure of transfer.py, from the committed files alone. From the top folder:

    python .results/figures.py          # prints markdown, writes .results/transfer.svg
    python .results/figures.py --first  # no figure; learning rates as first registered"""
import json
import math
import sys

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from scipy import optimize, stats

from probe import PROBE
from transfer import ARRAYS as ARRAYS_FILE
from transfer import (CONDITIONS, DRAWN, PANELS, SEEDS, array_name, equal_time_run, finished,
                      full_runs)

# In the order of the figure, with what the core was pretrained on. Below speech and CIFAR-10 is the
# core pretrained on that modality.
TITLES = {"smollm2-sums": "SmolLM2 (text): sums of digits",
          "smollm2-speech": "SmolLM2 (text): speech",
          "smollm2-cifar": "SmolLM2 (text): CIFAR-10",
          "smollm2-smiles": "SmolLM2 (text): molecules",
          "whisper-speech": "Whisper (speech): speech",
          "dinov2-cifar": "DINOv2 (images): CIFAR-10"}
COLOURS = dict(zip(CONDITIONS, ("#999999", "#E69F00", "#56B4E9", "#0072B2", "#009E73")))
# "<task>/majority": the accuracy of always predicting the majority class; "<task>/groups": int
# [test examples], the same for what belongs together; and what values() returns.
ARRAYS = dict(np.load(ARRAYS_FILE))
DONE, FIRST = finished(), "--first" in sys.argv

def five_runs(panel, condition):
    return full_runs(panel, condition, DONE, not FIRST)

def values(panel, condition, name):
    """name: "loss" or "correct" -> float64 [seeds + test examples], the means of each"""
    array = ARRAYS[f"{array_name(five_runs(panel, condition)[0])}/{name}"].astype(float)
    assert abs(array[:len(SEEDS)].mean() - array[len(SEEDS):].mean()) < 1e-3
    return array

# ---- Statistics ----------------------------------------------------------------------------------
class Mean:
    """The mean of what values() returns and the variances of it: due to the seeds, of which there
    are few, and due to the examples, of which those of a group are alike."""
    def __init__(self, values, task):
        self.seeds, examples = np.split(values, [len(SEEDS)])
        self.mean = self.seeds.mean()
        self.by_seeds = self.seeds.var(ddof=1) / len(SEEDS)
        rest = np.bincount(ARRAYS[f"{task}/groups"], examples - self.mean)
        # Every test digit is in two sums.
        self.by_examples = (rest ** 2).sum() / len(examples) ** 2 * (2 if task == "sums" else 1)

    def half(self, p=0.05):
        """Half of the 1 - p interval after Cochran and Cox: Student's t for the seeds' part, normal
        for the examples' part, weighted by the variances."""
        t, z = stats.t.isf(p / 2, len(SEEDS) - 1), stats.norm.isf(p / 2)
        both = self.by_seeds + self.by_examples
        return (self.by_seeds * t + self.by_examples * z) / math.sqrt(both)

    def p(self):
        """Two-sided: the p whose interval ends at 0."""
        def distance(log_p):
            return self.half(10 ** log_p) - abs(self.mean)
        return 10 ** optimize.brentq(distance, -30, 0) if distance(-30) > 0 else 0.0

    def text(self, unit=1, digits=3, sign="+"):
        return f"{unit * self.mean:{sign}.{digits}f} ± {unit * self.half():.{digits}f}"

def fieller(top, bottom, task):
    """The 95 % interval of mean(top) / mean(bottom), after Fieller: the ratios for which the
    interval of top - ratio * bottom has 0 in it. That of bottom must not have 0 in it."""
    def distance(ratio):
        difference = Mean(top - ratio * bottom, task)
        return abs(difference.mean) - difference.half()
    ratio = Mean(top, task).mean / Mean(bottom, task).mean
    return ratio, *(optimize.brentq(distance, ratio, far) for far in (-1e3, 1e3))

def contrast(panel, first, second):
    """Loss and accuracy of one condition minus another's, paired by seed and example, as Mean."""
    task = PANELS[panel][1]
    return [Mean(values(panel, first, name) - values(panel, second, name), task)
            for name in ("loss", "correct")]

def is_better(loss, accuracy):  # "beats": both intervals exclude 0
    return loss.mean + loss.half() < 0 < accuracy.mean - accuracy.half()

def row(*cells):
    print("|", " | ".join(map(str, cells)), "|")

# ---- Tables --------------------------------------------------------------------------------------
def main_table():
    """Test loss, test accuracy in % and learning rate."""
    row("test", *CONDITIONS)
    row("---", *["---:"] * len(CONDITIONS))
    for panel, (_, task) in PANELS.items():
        cells = []
        for condition in CONDITIONS:
            loss, accuracy = (Mean(values(panel, condition, name), task)
                              for name in ("loss", "correct"))
            lr = five_runs(panel, condition)[0].lr
            cells.append(f"{loss.mean:.3f}, {accuracy.text(100, 1, '')}, {lr}")
        row(panel, *cells)

def pretraining():
    """Differences between conditions; T, R and H use pretrained minus scaled and shuffled. Bold:
    one beats the other. Returns {panel: (the largest p, 1 if pretrained is not better; the smallest
    gain in points; whether it beats both)}."""
    pairs = [*(("pretrained", other) for other in CONDITIONS[:-1]), ("scaled", "random"),
             ("random", "no blocks"), ("shuffled", "no blocks")]
    result = {}
    row("test loss, points", *map(" minus ".join, pairs))
    row("---", *["---:"] * len(pairs))
    for panel in PANELS:
        p, gain, better, cells = 0.0, math.inf, [], []
        for pair in pairs:
            loss, accuracy = contrast(panel, *pair)
            cell = f"{loss.text()}, {accuracy.text(100, 1)}"
            is_clear = is_better(loss, accuracy) or is_better(accuracy, loss)
            cells.append(f"**{cell}**" if is_clear else cell)
            if pair in (("pretrained", drawn) for drawn in DRAWN):
                p, gain = max(p, loss.p(), accuracy.p()), min(gain, 100 * accuracy.mean)
                better.append(is_better(loss, accuracy))
        row(panel, *cells)
        result[panel] = (p if all(better) else 1.0), gain, all(better)
    return result

def verdict_t(result):
    names, holds, holding = ["smollm2-cifar", "smollm2-sums", "smollm2-smiles"], 0, True
    # Holm: the smallest p times 3, the next times 2, while they stay below 0.05.
    for rank, panel in enumerate(sorted(names, key=lambda name: result[name][0])):
        p, gain, _ = result[panel]
        corrected = min(1.0, p * (len(names) - rank))
        holding = holding and corrected < 0.05
        holds += holding and gain >= 1
        verdict = "holds" if holding else "does not hold"
        verdict += "" if gain >= 1 else " (not material)"
        print(f"- T, {panel}: {verdict}, corrected p {corrected:.2g}, {gain:+.1f} points at least.")
    words = ["on speech only, so far", "mixed", "a frozen language model transfers"]
    print(f"- **T: {holds} of 3 hold and are material: {words[min(holds, 2)]}.**")

def verdicts():
    result = pretraining()
    print()
    verdict_t(result)
    losses = [contrast("smollm2-speech", "pretrained", other)[0] for other in DRAWN]
    below = sum(loss.mean + loss.half() < 0 for loss in losses)
    print(f"- **R, at {'registered' if FIRST else 'chosen'} rates: "
          f"{'confirmed' if below == 2 else 'not confirmed'}**: {below} of 2 intervals of test loss "
          f"lie below 0. Beats both: {'yes' if result['smollm2-speech'][2] else 'no'}.")
    for panel in PANELS:
        random, scaled, pretrained = (values(panel, condition, "loss")
                                      for condition in ("random", "scaled", "pretrained"))
        gain = Mean(random - pretrained, PANELS[panel][1])
        if gain.mean < gain.half():
            print(f"- S, {panel}: pretrained has no clear gain over random, so no share.")
        else:
            share = fieller(random - scaled, random - pretrained, PANELS[panel][1])
            words = "mostly size" if share[1] > 0.5 else "not shown to be mostly size"
            words += " (more than all of it)" if share[1] > 1 else ""
            print("- S, {}: scaled has {:.2f} of the gain, {:.2f} to {:.2f}: {}.".format(
                panel, *share, words))
    for home, away in ("whisper-speech", "smollm2-speech"), ("dinov2-cifar", "smollm2-cifar"):
        verdict_h(home, away, result)
    for panel in PANELS if not FIRST else ():
        run = equal_time_run(panel, DONE)
        first, second = DONE[five_runs(panel, "pretrained")[0]], DONE[run]  # both seed 3
        holds = (first["validation_loss"] < second["validation_loss"]
                 and first["validation_accuracy"] > second["validation_accuracy"])
        texts = [f"{line['validation_loss']:.3f}, {100 * line['validation_accuracy']:.1f} %, "
                 f"{line['train_seconds']:.0f} s" for line in (first, second)]
        print(f"- B, {panel}: {'holds' if holds else 'does not hold'}: validation, pretrained "
              f"{texts[0]}; no blocks, {run.steps} steps, {texts[1]}.")

def verdict_h(home, away, result):
    task, more, texts = PANELS[home][1], [], []
    for other in ("random", *DRAWN):  # random: for comparison, not in the hypothesis
        means = [Mean(values(home, "pretrained", name) - values(home, other, name)
                      - values(away, "pretrained", name) + values(away, other, name), task)
                 for name in ("loss", "correct")]
        more += [is_better(*means)] * (other in DRAWN)
        texts.append(f"over {other} {means[0].text()} nats, {means[1].text(100, 1)} points")
    verdict = "holds" if all(more) and result[home][2] else "does not hold"
    print(f"- H, {home}: {verdict}; beats both: {'yes' if result[home][2] else 'no'}; more than "
          f"{away}: {'; '.join(texts)}.")

def probe_table():
    lines = [json.loads(text) for text in PROBE.read_text().splitlines()]
    row("SmolLM2, speech: before; after training", *CONDITIONS[1:])
    row("---", *["---:"] * len(CONDITIONS[1:]))
    for title, name, blocks in (("a block adds", "added", slice(0, 6)),
                                ("without the first", "added", slice(1, 6)),
                                ("the last three", "added", slice(3, 6)),
                                ("entropy", "entropy", slice(0, 6))):
        means = [[np.mean([line[name][blocks] for line in lines
                           if line["condition"] == condition and line["trained"] == trained])
                  for trained in (0, 1)] for condition in CONDITIONS[1:]]
        row(title, *(f"{before:.2f}; {after:.2f}" for before, after in means))

# ---- Figure --------------------------------------------------------------------------------------
def draw():
    matplotlib.rcParams |= {"font.size": 11, "svg.fonttype": "none", "svg.hashsalt": "transfer"}
    figure, axes = plt.subplots(2, 3, figsize=(9.6, 6.2))
    for axis, panel in zip(axes.flat, TITLES):
        for x, condition in enumerate(CONDITIONS):
            mean = Mean(100 * values(panel, condition, "correct"), PANELS[panel][1])
            axis.bar(x, mean.mean, 0.75, color=COLOURS[condition])
            axis.errorbar(x, mean.mean, mean.half(), color="black", capsize=4, lw=1.3)
            axis.plot(x + np.linspace(-0.25, 0.25, len(SEEDS)), mean.seeds, "o", color="white",
                      mec="black", ms=3.5, mew=0.7)
            axis.text(x, max(mean.mean + mean.half(), mean.seeds.max()) + 1.5, f"{mean.mean:.1f}",
                      ha="center", va="bottom")
        axis.axhline(100 * ARRAYS[f"{PANELS[panel][1]}/majority"], color="black", ls="--", lw=1.2)
        axis.set_title(TITLES[panel], fontsize=11.5)
        axis.set_ylim(0, 108)
        axis.set_yticks(range(0, 101, 25))
        axis.set_xticks(range(len(CONDITIONS)), CONDITIONS, rotation=30, ha="right",
                        rotation_mode="anchor")
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("test accuracy, %")
    figure.text(0.5, 0.01, "Bar: mean of five seeds (dots), 95 % interval. Dashed: the majority "
                "class.", ha="center")
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(ARRAYS_FILE.with_suffix(".svg"), metadata={"Date": None})

main_table()
print()
verdicts()
if not FIRST:
    print()
    probe_table()
    draw()
