"""The sum of n MNIST digits (MNISTDigitAddition), one 28x28 digit a token; n = 1 is plain MNIST.

    python train_mnist_add.py --n 2                     # pretrained GPT-2, frozen, on sums of two digits
    python train_mnist_add.py --n 2 --pretrained 0      # random weights, frozen
    python train_mnist_add.py --n 2 --pretrained 0 --layers 0   # no block at all
    python train_mnist_add.py --n 10 --loss l1          # sums of ten, as a regression
    python train_mnist_add.py --demo 1                  # digits of a font, no download
    python train_mnist_add.py --eval runs/mnist_add/best.pt --predict three.png,four.png    # white on black
"""
import torch
import torch.nn.functional as F

import data
import fpt

demo = dict(n=1, steps=120, eval_every=40)
parser = fpt.flags("mnist_add", __doc__, steps=6000, batch_size=64, eval_every=1000, demo=demo)
parser.add_argument("--n", type=fpt.number(int, 1), default=2, help="digits to add")
parser.add_argument("--loss", choices=["ce", "l1", "mse"], default="ce", help="ce: each sum is a class")
parser.add_argument("--augment", type=int, choices=[0, 1], default=1, help="1: turn, scale, shift a little")


def to_tokens(images):
    """Pixels 0..255 [batch, n, 28, 28] -> float [batch, n, 784], mean 0 and standard deviation 1."""
    return (images.flatten(2) / 255 - 0.1307) / 0.3081


def jiggle(images):
    """Turn each image [batch, n, 28, 28] by up to 12 degrees, scale it by 15 % and shift it by 2 pixels."""
    batch, n, side, _ = images.shape
    random = torch.rand(4, batch * n, device=images.device) * 2 - 1
    turn, scale, shift = 0.21 * random[0], 1 + 0.15 * random[1], 2 / (side / 2) * random[2:]
    cosine, sine = turn.cos() * scale, turn.sin() * scale
    rows = torch.stack([cosine, -sine, shift[0]], 1), torch.stack([sine, cosine, shift[1]], 1)
    grid = F.affine_grid(torch.stack(rows, 1), (batch * n, 1, side, side), align_corners=False)
    return F.grid_sample(images.view(-1, 1, side, side), grid, align_corners=False).view_as(images)


def main(args):
    regression = args.loss != "ce"
    mean, spread = 4.5 * args.n, 2.87 * args.n ** 0.5  # of the sums; a regression predicts in these units
    model = fpt.FPT(args, inputs=28 * 28, outputs=1 if regression else 9 * args.n + 1, time=args.n)
    if args.predict:
        images = [data.read_image(path, "L", 28, ground=0) for path in args.predict.split(",")]
        if len(images) != args.n or regression:
            parser.error(f"--predict takes {args.n} images here (--n {args.n}) and a checkpoint of --loss ce")
        return fpt.print_prediction(args, model, range(9 * args.n + 1), to_tokens(torch.stack(images)[None]))

    splits = data.mnist(args.data, args.demo)
    sizes = {split: len(labels) for split, (_, labels) in splits.items()}
    # The sums of validation and test are fixed. In training each is drawn anew.
    fixed = {split: data.sum_indices(size, args.n).to(args.device) for split, size in sizes.items()}
    dummy = splits["train"][1][fixed["train"].cpu()].sum(1).mode().values.item()
    splits = {split: [part.to(args.device) for part in parts] for split, parts in splits.items()}

    def batch(split, index):
        images, labels = splits[split]
        index = index.to(args.device, non_blocking=True)
        if split == "train":  # each digit leads one sum an epoch; the others are drawn anew every time
            digits = torch.randint(len(images), (len(index), args.n), device=args.device)
            digits[:, 0] = index
        else:
            digits = fixed[split][index]
        pixels = images[digits].float()
        if split == "train" and args.augment:
            pixels = jiggle(pixels)
        return to_tokens(pixels), None, labels[digits].sum(1)

    def loss_fn(outputs, targets):
        if not regression:
            return F.cross_entropy(outputs, targets)
        loss = F.l1_loss if args.loss == "l1" else F.mse_loss
        return loss(outputs[:, 0], (targets - mean) / spread)

    def predict(outputs):
        return (outputs[:, 0] * spread + mean).round().long() if regression else outputs.argmax(1)

    def errors(outputs, targets):
        error = (predict(outputs) - targets).double()
        return {"mae": error.abs().mean().item(), "mse": error.square().mean().item()}

    return fpt.fit(args, model, batch, sizes, dummy, loss_fn=loss_fn, predict=predict, metrics=errors)


if __name__ == "__main__":
    fpt.run(parser, main)
