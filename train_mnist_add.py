"""MNISTDigitAddition: the sum of n MNIST digits. A token is a 28x28 digit; n = 1 is plain MNIST.

    python train_mnist_add.py                           # pretrained GPT-2, frozen, sums of two
    python train_mnist_add.py --pretrained 0 --layers 0    # the baseline without blocks
    python train_mnist_add.py --n 10 --loss l1          # sums of ten, as a regression
    python train_mnist_add.py --demo 1                  # generated images, no download
    python train_mnist_add.py --eval runs/mnist_add/best.pt --predict 3.png,4.png  # white on black
"""
import torch
import torch.nn.functional as F

import data
import fpt

parser = fpt.flags("mnist_add", __doc__, steps=6000, batch_size=64, eval_every=1000)
parser.add_argument("--n", type=fpt.at_least(1), default=2, help="digits to add")
parser.add_argument("--loss", choices=["ce", "l1"], default="ce", help="classify or regress")
parser.add_argument("--augment", type=int, choices=[0, 1], default=1, help="1: rotate, scale, move")

def load(args):
    """The data for fpt.fit(): batch(split, index), and the labels of each split, single digits."""
    splits = data.mnist(args.data, args.demo)
    labels = {split: y for split, (_, y) in splits.items()}
    terms = {split: data.sum_indices(len(y), args.n).to(args.device) for split, y in labels.items()}
    splits = {split: (x.to(args.device), y.to(args.device)) for split, (x, y) in splits.items()}

    def batch(split, index):
        x, y = splits[split]
        rows = terms[split][index.to(args.device, non_blocking=True)]  # of the digits, [batch, n]
        if split == "train":  # all but the first digit of a training sum are drawn each time
            rows[:, 1:] = torch.randint(len(x), rows[:, 1:].shape, device=args.device)
        images = x[rows].float()
        if split == "train" and args.augment:
            images = augment(images)
        return to_tokens(images), None, y[rows].sum(1)
    return batch, labels

def augment(images):
    """Rotate each digit [batch, n, 28, 28] by up to 12 degrees, scale it by up to 15 %, and shift
    it by up to 2 pixels, at random."""
    count, n, side, _ = images.shape
    random = torch.rand(4, count * n, device=images.device) * 2 - 1
    angle, scale, (x, y) = 0.21 * random[0], 1 + 0.15 * random[1], 2 / (side / 2) * random[2:]
    cosine, sine = angle.cos() * scale, angle.sin() * scale
    matrices = torch.stack([cosine, -sine, x, sine, cosine, y], 1).view(-1, 2, 3)
    grid = F.affine_grid(matrices, (count * n, 1, side, side), align_corners=False)
    images = images.view(-1, 1, side, side)
    return F.grid_sample(images, grid, align_corners=False).view(count, n, side, side)

def to_tokens(images):
    """Pixels 0..255 [batch, n, 28, 28] -> float32 [batch, n, 784], mean 0, standard deviation 1."""
    return (images.flatten(2) / 255 - 0.1307) / 0.3081

def main(args):
    classes = 9 * args.n + 1
    outputs = classes if args.loss == "ce" else 1
    model = fpt.FPT(args, inputs=28 * 28, outputs=outputs, time=args.n)
    mean, std = 4.5 * args.n, 2.87 * args.n ** 0.5  # of the sums, which a regression standardises
    def loss_fn(outputs, targets):
        if args.loss == "ce":
            return F.cross_entropy(outputs, targets)
        return F.l1_loss(outputs[:, 0], (targets - mean) / std)
    def metrics(outputs, targets):
        if args.loss == "l1":  # round to a sum, as a classifier would
            sums = (outputs[:, 0] * std + mean).nan_to_num().round().clamp(0, classes - 1)
            outputs = F.one_hot(sums.long(), classes)
        error = (outputs.argmax(1) - targets).abs().float()
        return fpt.accuracy(outputs, targets) | {"mae": error.mean()}
    if not args.predict:
        batch, labels = load(args)
        return fpt.fit(args, model, batch, labels, loss_fn=loss_fn, metrics=metrics)
    images = [data.read_image(path, "L", 28, ground=0) for path in args.predict.split(",")]
    if len(images) != args.n or args.loss == "l1":
        parser.error(f"--predict needs {args.n} images (--n), and a checkpoint of --loss ce")
    fpt.print_prediction(args, model, range(classes), to_tokens(torch.stack(images)[None]))

if __name__ == "__main__":
    fpt.run(parser, main, demo=dict(n=1, steps=60, eval_every=30, augment=0))
