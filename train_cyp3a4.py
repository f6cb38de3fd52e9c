"""Does a molecule inhibit the liver enzyme CYP3A4? 12,328 molecules, split by scaffold as Therapeutics Data Commons does.

    python train_cyp3a4.py --pretrained 0                      # frozen random GPT-2, an atom a token
    python train_cyp3a4.py --pretrained 0 --tokens smiles      # the letters of the SMILES string instead
    python train_cyp3a4.py --pretrained 0 --demo 1             # no network, about a minute
    python train_cyp3a4.py --eval runs/cyp3a4/best.pt --predict "CC(=O)Nc1ccc(O)cc1"
"""
import sys

import torch

import data
import fpt


def main():
    parser = fpt.flags(
        "cyp3a4", __doc__,
        steps=300, batch_size=32,       # one epoch: in the second the rare environments are learnt by heart
        init_std=0.04, qk_std=0.04, in_gain=0.02,   # the best validation loss of several, see the README
        random_layers=2,                # as good as twelve random blocks, in a sixth of the time
        pool="mean",                    # no atom is the last word on a molecule
        eval_every=100,
    )
    parser.add_argument("--tokens", choices=["atoms", "smiles"], default="atoms", help="atoms: numbers about the whole molecule, then for each atom the summed embeddings of its Morgan environments of radius 0 to 3; smiles: the tokens of the string")
    args = fpt.parse(parser, demo=dict(steps=50, eval_every=25))

    if args.predict:
        ids = data.molecule_ids(args.predict)
        if ids is None:
            sys.exit(f"RDKit cannot read {args.predict} as a SMILES string")
        model = fpt.FPT(args, inputs=data.BUCKETS + 1, outputs=2, discrete=True)
        return fpt.print_prediction(args, model, ["no inhibitor", "inhibitor"], ids[args.tokens == "smiles"][None])

    sets = data.cyp3a4(args.data, args.demo)
    splits, lengths = {}, {}
    for split in ("train", "validation", "test"):
        atoms, atom_counts, tokens, token_counts, labels = sets[split]
        ids, lengths[split] = (atoms, atom_counts) if args.tokens == "atoms" else (tokens, token_counts)
        splits[split] = ids.to(args.device), lengths[split].to(args.device), labels.to(args.device)

    def batch(split, index):
        ids, real, labels = splits[split]
        longest = lengths[split][index].max()  # known on the CPU, so cutting the padding off keeps no device waiting
        index = index.to(args.device, non_blocking=True)
        return ids[index, :longest], real[index], labels[index]

    def ranking(outputs, targets):
        score = outputs[:, 1] - outputs[:, 0]
        return {"auroc": auroc(score, targets), "auprc": auprc(score, targets)}

    model = fpt.FPT(args, inputs=data.BUCKETS + 1, outputs=2, discrete=True)
    sizes = {split: len(labels) for split, (_, _, labels) in splits.items()}
    return fpt.fit(args, model, batch, sizes, dummy=splits["train"][2].mode().values.item(), lengths=lengths, metrics=ranking)


def auroc(score, target):
    """Chance that a positive example scores above a negative one, ties half: score float [n], target 0 or 1 [n]."""
    positive, negative = score[target == 1], score[target == 0].sort().values.contiguous()
    below = torch.searchsorted(negative, positive.contiguous())
    not_above = torch.searchsorted(negative, positive.contiguous(), right=True)
    return ((below + not_above).sum() / (2 * len(positive) * len(negative))).item()


def auprc(score, target):
    """Average precision: mean over the positives of the precision at their score, as scikit-learn defines it."""
    score, order = score.sort(descending=True)
    hits = target[order].cumsum(0)
    # Equal scores share one threshold: the last of them counts for all.
    last = torch.searchsorted(-score, -score, right=True) - 1
    precision = hits[last] / (last + 1)
    return (precision * target[order]).sum().div(target.sum()).item()


if __name__ == "__main__":
    fpt.run(main)
