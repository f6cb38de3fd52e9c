"""CYP3A4_Veith: does a molecule inhibit the liver enzyme CYP3A4? A token is a character of SMILES.

    python train_cyp3a4.py                              # pretrained GPT-2, frozen
    python train_cyp3a4.py --pretrained 0               # random weights, frozen
    python train_cyp3a4.py --pretrained 0 --layers 0    # the baseline without blocks
    python train_cyp3a4.py --tokens atoms               # a token is an atom with its surroundings
    python train_cyp3a4.py --demo 1                     # generated molecules, no download
    python train_cyp3a4.py --eval runs/cyp3a4/best.pt --predict "CC(=O)Nc1ccc(O)cc1"
"""
import sys

import torch
import torch.nn.functional as F

import data
import fpt

IDS = {"smiles": data.SMILES_IDS, "atoms": data.BUCKETS + 1}  # how many token ids there are
LONGEST = {"smiles": 401, "atoms": 123}  # tokens in the longest molecule of the data

parser = fpt.flags("cyp3a4", __doc__, steps=600, eval_every=300)
parser.add_argument("--tokens", choices=IDS, default="smiles", help="characters, or atoms")

def load(args):
    """The data for fpt.fit(): batch(split, index), labels, lengths of the training molecules."""
    splits = data.cyp3a4(args.data, args.demo, args.tokens)
    for split, (ids, lengths, y) in splits.items():
        # Sorted by length: evaluation reads in this order, with little padding.
        order = lengths.argsort(stable=True)
        splits[split] = ids[order], lengths[order], y[order]
    all_lengths = {split: lengths for split, (_, lengths, _) in splits.items()}
    labels = {split: y for split, (_, _, y) in splits.items()}
    splits = {split: [part.to(args.device) for part in parts] for split, parts in splits.items()}

    def batch(split, index):
        ids, lengths, y = splits[split]
        time = all_lengths[split][index].max()  # on the CPU, which need not wait for the GPU
        index = index.to(args.device, non_blocking=True)
        return ids[index, :time], lengths[index], y[index]

    return batch, labels, all_lengths["train"]

def metrics(outputs, targets):
    """Logits [n, 2] and targets [n] -> also the areas under the ROC and the precision-recall curve,
    the latter as scikit-learn's average precision."""
    score, order = (outputs[:, 1] - outputs[:, 0]).double().sort(descending=True)
    positive = targets[order].double()
    last = torch.searchsorted(-score, -score, right=True) - 1  # equal scores share a threshold
    hits, count = positive.cumsum(0)[last], last + 1  # at the threshold of each molecule
    precision = hits / count
    recall = F.pad(hits / positive.sum(), (1, 0))  # the curve starts at 0
    false_positives = F.pad((count - hits) / (1 - positive).sum(), (1, 0))
    return fpt.accuracy(outputs, targets) | {
        "auroc": torch.trapezoid(recall, false_positives),
        "auprc": (precision * positive).sum() / positive.sum()}

def main(args):
    model = fpt.FPT(args, IDS[args.tokens], outputs=2, time=LONGEST[args.tokens], discrete=True)
    if not args.predict:
        batch, labels, lengths = load(args)
        return fpt.fit(args, model, batch, labels, lengths, metrics=metrics)
    ids = data.molecule_ids(args.predict, args.tokens)
    if ids is None or len(ids) > LONGEST[args.tokens]:
        sys.exit(f"RDKit cannot read {args.predict!r} as SMILES, or it is too long")
    fpt.print_prediction(args, model, ["not an inhibitor", "inhibitor"], ids[None])

if __name__ == "__main__":
    fpt.run(parser, main, demo=dict(steps=50, eval_every=25))
