"""Does a molecule inhibit the liver enzyme CYP3A4? 12,328 molecules, split by scaffold (CYP3A4_Veith of TDC).

    python train_cyp3a4.py                      # pretrained GPT-2, frozen; a character of the SMILES a token
    python train_cyp3a4.py --pretrained 0       # random weights, frozen
    python train_cyp3a4.py --pretrained 0 --layers 0   # no block at all
    python train_cyp3a4.py --tokens atoms       # an atom a token, with its Morgan environments
    python train_cyp3a4.py --demo 1             # generated molecules, no download
    python train_cyp3a4.py --eval runs/cyp3a4/best.pt --predict "CC(=O)Nc1ccc(O)cc1"
"""
import sys

import torch

import data
import fpt

parser = fpt.flags("cyp3a4", __doc__, steps=600, eval_every=100, demo=dict(steps=50, eval_every=25))
parser.add_argument("--tokens", choices=["smiles", "atoms"], default="smiles", help="what a token is")

IDS = {"smiles": data.SMILES_IDS, "atoms": data.BUCKETS + 1}  # how many token ids there are


def auroc(score, target):
    """Chance that a positive scores above a negative, ties half: score float [n], target 0 or 1 [n]."""
    positive, negative = score[target == 1].contiguous(), score[target == 0].sort().values.contiguous()
    below = torch.searchsorted(negative, positive)
    not_above = torch.searchsorted(negative, positive, right=True)
    return ((below + not_above).sum() / (2 * len(positive) * len(negative))).item()


def auprc(score, target):
    """Average precision as in scikit-learn: mean over the positives of the precision at their score."""
    score, order = score.sort(descending=True)
    hits = target[order].cumsum(0)
    last = torch.searchsorted(-score, -score, right=True) - 1  # equal scores share one threshold
    precision = hits[last] / (last + 1)
    return (precision * target[order]).sum().div(target.sum()).item()


def ranking(outputs, targets):
    """Logits [n, 2] and targets [n] -> how well the molecules are ranked."""
    score = (outputs[:, 1] - outputs[:, 0]).double()
    return {"auroc": auroc(score, targets), "auprc": auprc(score, targets)}


def main(args):
    if args.predict:
        ids = data.molecule_ids(args.predict, args.tokens)
        if ids is None:
            sys.exit(f"RDKit cannot read {args.predict!r} as a SMILES string")
        model = fpt.FPT(args, IDS[args.tokens], outputs=2, time=len(ids), discrete=True)
        return fpt.print_prediction(args, model, ["no inhibitor", "inhibitor"], ids[None])

    splits = data.cyp3a4(args.data, args.demo, args.tokens)
    sizes = {split: len(labels) for split, (_, _, labels) in splits.items()}
    dummy = splits["train"][2].mode().values.item()
    all_lengths = {split: lengths for split, (_, lengths, _) in splits.items()}
    splits = {split: [part.to(args.device) for part in parts] for split, parts in splits.items()}

    def batch(split, index):
        ids, lengths, labels = splits[split]
        time = all_lengths[split][index].max()  # read on the CPU, so that no device waits for it
        index = index.to(args.device, non_blocking=True)
        return ids[index, :time], lengths[index], labels[index]

    longest = max(int(counts.max()) for counts in all_lengths.values())
    model = fpt.FPT(args, IDS[args.tokens], outputs=2, time=longest, discrete=True)
    return fpt.fit(args, model, batch, sizes, dummy, all_lengths, metrics=ranking)


if __name__ == "__main__":
    fpt.run(parser, main)
