"""The sum of n MNIST digits (MNISTDigitAddition), one 28x28 digit a token; n = 1 is plain MNIST.

    python train_mnist_add.py --pretrained 0 --n 2          # frozen random GPT-2 on sums of two digits
    python train_mnist_add.py --pretrained 0 --n 10 --attn_gain 0 --augment 2 --steps 8000 --batch_size 32    # each digit is read alone
    python train_mnist_add.py --pretrained 0 --demo 1       # no network, about a minute
    python train_mnist_add.py --eval runs/mnist_add/best.pt --predict three.png,four.png    # white digits on black
"""
import math

import numpy as np
import torch
import torch.nn.functional as F

import data
import fpt


def main():
    parser = fpt.flags(
        "mnist_add", __doc__,
        steps=12000, batch_size=128,    # pairs of digits never run out: longer is better
        lr=3e-3, ln_lr=4.0,             # best of three each on the validation split, see the README
        weight_decay=0.5,               # a norm follows the input layer: it would only grow, and learn ever more slowly
        init_std=0.08, in_gain=0.05,    # at GPT-2's own 0.02 and 1.41 random blocks add little to the tokens
        random_layers=2, attn_gain="0,3", pool="cls",   # read a digit alone, then let an empty token gather them
        eval_every=500, eval_examples=2000,
    )
    parser.add_argument("--n", type=fpt.number(int, 1), default=2, help="digits to add, up to the positions of the model (1,024 in GPT-2, one of them for --pool cls)")
    parser.add_argument("--tokens", choices=["upright", "edges", "pixels"], default="upright", help="what a digit's token holds; edges: how much brighter it gets in 8 directions, 14x14 of each; upright: the same of the digit centred and without its slant; pixels: its 28x28 pixels")
    parser.add_argument("--loss", choices=["ce", "l1", "mse", "digits"], default=None, help="ce: classification over the sums 0..9n; l1, mse: regression of the sum by its absolute or squared error; digits: every token is read as a digit, whatever --pool says, and the loss adds them up; None: ce for one or two digits, digits, by far the best, for more")
    parser.add_argument("--augment", type=int, choices=[0, 1, 2], default=1, help="1: turn, scale and shift training digits a little; needs some thousand steps to pay. 2: bend them too, for some million digits")
    args = fpt.parse(parser, demo=dict(n=1, steps=120, batch_size=32, eval_every=40))
    if args.loss is None:
        args.loss = "ce" if args.n <= 2 else "digits"

    def to_tokens(images):
        images = images.float()
        if args.tokens == "pixels":
            tokens = images.flatten(2) / 255
        else:
            tokens = edges(upright(images) if args.tokens == "upright" else images)
        mean, std = {"pixels": (0.1307, 0.3081), "edges": (0.0604, 0.1671), "upright": (0.0557, 0.1487)}[args.tokens]
        return (tokens - mean) / std  # mean 0 and standard deviation 1 over MNIST's training part

    if args.loss in ("ce", "digits"):
        outputs, logits = 9 * args.n + 1, lambda outputs: outputs
        if args.loss == "digits":
            args.pool, outputs, logits = "each", 10, sum_logits

        def predict(outputs):
            return logits(outputs).argmax(-1)

        def loss_fn(outputs, targets):
            return F.cross_entropy(logits(outputs), targets)
    else:  # in units of the spread of the sums, so that --lr means the same for every n; the tenth calms the output layer
        mean, spread = 4.5 * args.n, 2.87 * args.n ** 0.5
        outputs, predict = 1, lambda outputs: (0.1 * outputs[:, 0] * spread + mean).round().long()

        def loss_fn(outputs, targets):
            loss = F.l1_loss if args.loss == "l1" else F.mse_loss
            return loss(0.1 * outputs[:, 0], (targets - mean) / spread)

    def errors(outputs, targets):  # of the predicted sum, a whole number with every loss
        error = (predict(outputs) - targets).float()
        return {"mae": error.abs().mean().item(), "mse": error.square().mean().item()}

    model = fpt.FPT(args, inputs=28 * 28 if args.tokens == "pixels" else 8 * 14 * 14, outputs=outputs)
    if args.n > model.positions:
        parser.error(f"--n {args.n} is more than the {model.positions} positions of --model {args.model}{' beside the one of --pool cls' * (args.pool == 'cls')}")
    if args.predict:
        images = torch.stack([data.read_image(path, "L", 28) for path in args.predict.split(",")])
        if len(images) != args.n or outputs == 1:
            parser.error(f"--predict takes {args.n} image files, as many as the digits this checkpoint adds, and needs --loss ce or digits")
        return fpt.print_prediction(args, model, range(9 * args.n + 1), to_tokens(images[None]), logits)

    digits = {split: (x.to(args.device), y.to(args.device)) for split, (x, y) in data.mnist(args.data, args.demo).items()}
    fixed = {split: data.sum_indices(len(digits[split][0]), args.n).to(args.device) for split in ("validation", "test")}

    def batch(split, index):
        images, labels = digits[split]
        if split == "train":  # each digit leads one sum an epoch; its partners are drawn anew every time
            chosen = torch.randint(len(images), (len(index), args.n), device=args.device)
            chosen[:, 0] = index.to(args.device, non_blocking=True)
        else:
            chosen = fixed[split][index.to(args.device, non_blocking=True)]
        pixels = images[chosen].float()
        if split == "train" and args.augment:
            pixels = jiggle(pixels, bend=args.augment == 2)
        return to_tokens(pixels), None, labels[chosen].sum(1)

    sizes = {split: len(images) for split, (images, _) in digits.items()}
    return fpt.fit(args, model, batch, sizes, dummy=int(sum_distribution(digits["train"][1], args.n).argmax()),
                   loss_fn=loss_fn, predict=predict, metrics=errors)


def upright(images):
    """Images [batch, n, 28, 28] moved so that the centre of their ink is in the middle, and sheared so that it stands upright."""
    ink = images.flatten(0, 1)
    place = torch.arange(28, device=ink.device) / 14 - 27 / 28  # of the pixels, from left to right and from top to bottom: -1..1
    mass = ink.sum((1, 2)).clamp(min=1)  # an empty image stays as it is
    x, y = (ink.sum(1) @ place) / mass, (ink.sum(2) @ place) / mass
    across, down = (place - x[:, None])[:, None, :], (place - y[:, None])[:, :, None]
    slant = (ink * across * down).sum((1, 2)) / (ink * down**2).sum((1, 2)).clamp(min=1)
    one, zero = torch.ones_like(x), torch.zeros_like(x)
    affine = torch.stack([one, slant, x, zero, one, y], 1).view(-1, 2, 3)
    grid = F.affine_grid(affine, (len(ink), 1, 28, 28), align_corners=False)
    return F.grid_sample(ink[:, None], grid, align_corners=False).view_as(images)


def edges(images):
    """How much brighter images [batch, n, 28, 28] get towards right, lower right, down, ..., mean of 2x2 pixels: [batch, n, 8 * 14 * 14]."""
    framed = F.pad(images / 255, (1, 1, 1, 1))
    right = framed[..., 1:-1, 2:] - framed[..., 1:-1, :-2]
    down = framed[..., 2:, 1:-1] - framed[..., :-2, 1:-1]
    brighter = [(math.cos(angle) * right + math.sin(angle) * down).relu() for angle in np.arange(8) * math.pi / 4]
    return F.avg_pool2d(torch.stack(brighter, 2).flatten(0, 1), 2).view(*images.shape[:2], -1)


def jiggle(images, bend=False):
    """Each image [batch, n, 28, 28] turned by up to 12 degrees, scaled by up to 15 % and shifted by at most 2 pixels;
    with bend also warped smoothly, as by Simard et al. 2003, doi 10.1109/ICDAR.2003.1227801, by 0.7 pixels or so each way."""
    batch, n, side, _ = images.shape
    random = torch.rand(4, batch * n, device=images.device) * 2 - 1
    turn, scale, shift = 0.21 * random[0], 1 + 0.15 * random[1], 2 / (side / 2) * random[2:]
    cosine, sine = turn.cos() * scale, turn.sin() * scale
    affine = torch.stack([torch.stack([cosine, -sine, shift[0]], 1), torch.stack([sine, cosine, shift[1]], 1)], 1)
    grid = F.affine_grid(affine, (batch * n, 1, side, side), align_corners=False)
    if bend:
        warp = 1.4 / side * torch.randn(batch * n, 2, 5, 5, device=images.device)
        grid = grid + F.interpolate(warp, (side, side), mode="bilinear").movedim(1, 3)
    return F.grid_sample(images.view(-1, 1, side, side), grid, align_corners=False).view_as(images)


def sum_logits(outputs):
    """The sum of n digits that are read one by one: logits [batch, n, 10] -> those of the sums 0..9n [batch, 9n + 1], log probabilities."""
    digits = outputs.softmax(-1)
    sums = digits[:, 0]
    for digit in digits[:, 1:].flip(-1).unbind(1):  # each sum's chance is a convolution, one for each example
        sums = F.conv1d(sums[None], digit[:, None], padding=9, groups=len(digits))[0]
    return (sums + 1e-12).log()


def sum_distribution(labels, n):
    """How likely each sum 0..9n of n digits is when digits come as often as in labels: float [9n + 1]."""
    digit = np.bincount(labels.cpu(), minlength=10) / len(labels)
    sums = np.ones(1)
    for _ in range(n):
        sums = np.convolve(sums, digit)
    return sums


if __name__ == "__main__":
    fpt.run(main)
