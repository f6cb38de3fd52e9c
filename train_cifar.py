"""CIFAR-10: 32x32 images of ten classes. A token is a square patch of pixels.

    python train_cifar.py                              # pretrained GPT-2, frozen
    python train_cifar.py --pretrained 0               # random weights, frozen
    python train_cifar.py --pretrained 0 --layers 0    # the baseline without blocks
    python train_cifar.py --patch_size 8               # a quarter of the tokens and of the time
    python train_cifar.py --demo 1                     # generated images, no download
    python train_cifar.py --eval runs/cifar/best.pt --predict cat.png
"""
import torch

import data
import fpt

CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
MEAN, STD = [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]  # of the training pixels, RGB

parser = fpt.flags("cifar", __doc__, steps=2500, eval_every=850)
parser.add_argument("--patch_size", type=int, choices=[1, 2, 4, 8, 16, 32], default=4,
                    help="side of a patch, in pixels")
parser.add_argument("--augment", type=int, choices=[0, 1], default=1, help="1: shift and mirror")

def load(args):
    """The data for fpt.fit(): batch(split, index), and the labels of each split."""
    splits = data.cifar10(args.data, args.demo)
    labels = {split: y for split, (_, y) in splits.items()}
    splits = {split: (x.to(args.device), y.to(args.device)) for split, (x, y) in splits.items()}

    def batch(split, index):
        x, y = splits[split]
        index = index.to(args.device, non_blocking=True)
        images = x[index]
        if split == "train" and args.augment:
            images = augment(images)
        return to_tokens(images, args.patch_size), None, y[index]

    return batch, labels

def augment(images):
    """Shift each image [batch, 32, 32, 3] by up to 4 pixels, repeating its border; mirror half."""
    count, side = images.shape[:2]
    pixel = torch.arange(side, device=images.device)
    rows = (pixel + torch.randint(-4, 5, (count, 1), device=images.device)).clamp(0, side - 1)
    columns = (pixel + torch.randint(-4, 5, (count, 1), device=images.device)).clamp(0, side - 1)
    mirrored = torch.rand(count, 1, device=images.device) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    example = torch.arange(count, device=images.device)
    return images[example[:, None, None], rows[:, :, None], columns[:, None, :]]

def to_tokens(images, patch_size):
    """uint8 [batch, 32, 32, 3] -> float32 [batch, patches, features], the patches row by row."""
    # non_blocking, so that the CPU does not wait for the GPU in every step.
    mean = torch.tensor(MEAN).to(images.device, non_blocking=True)
    std = torch.tensor(STD).to(images.device, non_blocking=True)
    pixels = (images / 255 - mean) / std
    count, n = len(pixels), 32 // patch_size  # n x n patches
    # [image, row, y, column, x, colour] -> [image, row, column, y, x, colour]
    grid = pixels.view(count, n, patch_size, n, patch_size, 3).transpose(2, 3)
    return grid.reshape(count, n * n, patch_size * patch_size * 3)

def main(args):
    size = args.patch_size
    model = fpt.FPT(args, inputs=3 * size * size, outputs=10, time=(32 // size) ** 2)
    if not args.predict:
        batch, labels = load(args)
        return fpt.fit(args, model, batch, labels)
    image = data.read_image(args.predict, "RGB", 32, ground=255)
    fpt.print_prediction(args, model, CLASSES, to_tokens(image[None], size))

if __name__ == "__main__":
    fpt.run(parser, main, demo=dict(steps=60, eval_every=30, patch_size=8, augment=0))
