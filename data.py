"""The data sets, one function each: from the official files to tensors.

Each downloads what the folder lacks and returns {"train": ..., "validation": ..., "test": ...}; if
demo=True, generated data like it. Broken or missing files end the program with one line."""
import csv
import fcntl
import hashlib
import itertools
import os
import random
import wave
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

CACHE_VERSION = 1  # of the decoded speech: add 1 when read_wav() changes
SPLITS = ("train", "validation", "test")
MNIST_SHA256 = "06b0d1f124c4e5fa796686ade41a9b778edacc8622f2195a352ef479ad44fc16"
SPEECH_SIZES = [84843, 9981, 11005]  # clips in each split, with all 35 words
SPEECH_RATE = 16000  # samples per second
CYP3A4_URL = "https://dataverse.harvard.edu/api/access/datafile/4259582"
CYP3A4_SHA256 = "7efaaca5d7680cee34fa74f1b83693883dd03ccd23e9eb8801cd16624614861f"
SMILES_IDS = 95  # 0 pads, 1..94 are the printable ASCII characters
BUCKETS = 16384  # atom environments are hashed to 1..BUCKETS

@contextmanager
def exit_if_unreadable(path, hint):
    """An error while reading `path` ends the program with one line: file, error and hint."""
    try:
        yield
    except Exception as error:  # parsers raise anything, from EOFError to SyntaxError
        line = f"{path}: {type(error).__name__}: {error} ({hint})".split()
        raise SystemExit(" ".join(line)) from error

@contextmanager
def one_at_a_time():
    """If processes start together (torchrun), one downloads and decodes, and the others wait."""
    with open(f"/tmp/fpt-data-{os.geteuid()}.lock", "w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        yield

def batches(size, batch_size, seed, lengths=None):
    """Yields int64 [batch_size] forever: the indices of a batch, in a new order each epoch. With
    lengths [size], a batch has similar lengths, to save padding: 50 batches at a time are sorted
    by length and split, then the batches are shuffled."""
    for epoch in itertools.count():
        # Spread out, so that seed 0 in epoch 1 does not have the order of seed 1 in epoch 0.
        rng = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(size, generator=rng)[:size // batch_size * batch_size]
        if lengths is not None:
            chunks = order.split(50 * batch_size)
            order = torch.cat([chunk[lengths[chunk].argsort(stable=True)] for chunk in chunks])
            order = order.view(-1, batch_size)[torch.randperm(size // batch_size, generator=rng)]
        yield from order.view(-1, batch_size)

@one_at_a_time()
def cifar10(folder, demo=False):
    """CIFAR-10 (Krizhevsky 2009), https://www.cs.toronto.edu/~kriz/cifar.html, 170 MB. Splits are
    (images uint8 [n, 32, 32, 3], labels int64 [n] in 0..9): 45,000, 5,000 and 10,000 images. If
    there is a cifar10.npz (train_x, train_y, test_x, test_y), it is read instead."""
    from torchvision.datasets import CIFAR10
    if demo:  # 176: demo_splits() adds noise below 80, and uint8 ends at 255
        return demo_splits(np.random.default_rng(0).integers(176, size=(10, 32, 32, 3)), np.uint8)
    path = Path(folder) / "cifar10.npz"
    if path.exists():
        with exit_if_unreadable(path, "correct or delete it"), np.load(path) as file:
            parts = [(file[f"{part}_x"], file[f"{part}_y"].ravel()) for part in ("train", "test")]
    else:
        path = Path(folder) / CIFAR10.filename
        with exit_if_unreadable(path, f"download it from {CIFAR10.url}, or use --demo 1"):
            parts = CIFAR10(folder, download=True), CIFAR10(folder, train=False)
        parts = [(part.data, np.array(part.targets)) for part in parts]
    return image_splits(path, parts, (32, 32, 3), holdout=10)

@one_at_a_time()
def mnist(folder, demo=False):
    """MNIST (LeCun et al. 1998), http://yann.lecun.com/exdb/mnist/, 12 MB. Each split is
    (images uint8 [n, 28, 28], labels int64 [n] in 0..9): 55,000, 5,000 and 10,000 digits."""
    from torchvision.datasets import MNIST
    if demo:
        return demo_splits(np.random.default_rng(0).integers(176, size=(10, 28, 28)), np.uint8)
    path, names = Path(folder, "MNIST", "raw"), "{train,t10k}-{images-idx3,labels-idx1}-ubyte"
    with exit_if_unreadable(path, f"put the four files {names} there, or use --demo 1"):
        parts = MNIST(folder, download=True), MNIST(folder, train=False)
    parts = [(part.data.numpy(), part.targets.numpy()) for part in parts]
    content = b"".join(x.tobytes() + y.astype(np.uint8).tobytes() for x, y in parts)
    if hashlib.sha256(content).hexdigest() != MNIST_SHA256:
        print(f"{path} is not the original MNIST: results are not comparable")
    return image_splits(path, parts, (28, 28), holdout=12)

def image_splits(path, parts, shape, holdout):
    """Check the official parts, train and test, and hold out a random 1/holdout of train."""
    for x, y in parts:
        if (x.dtype != np.uint8 or x.shape[1:] != shape or x.shape[:1] != y.shape
                or len(x) < holdout or not np.isin(y, range(10)).all()):
            raise SystemExit(f"{path} has images {x.dtype} {x.shape}, labels {y.dtype} {y.shape}; "
                             f"expected at least {holdout}, uint8 {shape}, with labels 0 to 9")
    (x, y), test = [(torch.tensor(x), torch.tensor(y).long()) for x, y in parts]
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    validation, train = [(x[i], y[i]) for i in order.tensor_split([len(x) // holdout])]
    return {"train": train, "validation": validation, "test": test}

def sum_indices(size, n):
    """Which digits are added in `size` fixed sums: int64 [size, n]. Each digit is in n sums."""
    rng = torch.Generator().manual_seed(0)
    others = [torch.randperm(size, generator=rng) for _ in range(n - 1)]
    return torch.stack([torch.arange(size), *others], 1)

@one_at_a_time()
def speech_commands(folder, demo=False):
    """Speech Commands v0.02 (Warden 2018), https://arxiv.org/abs/1804.03209, 2.4 GB. Splits are
    (waves int16 [n, 16000], one second, short clips end in silence; labels int64 [n], indices
    into the list "words"): 84,843, 9,981 and 11,005 clips, memory-mapped from a 3.4 GB file."""
    from torchaudio.datasets import SPEECHCOMMANDS
    if demo:
        tones = 100 * np.sin(np.outer(1200 * 1.5 ** np.arange(6), np.linspace(0, 1, SPEECH_RATE)))
        return demo_splits(tones, np.int16) | {"words": list("abcdef")}
    root = Path(folder) / "SpeechCommands" / "speech_commands_v0.02"
    url = f"http://download.tensorflow.org/data/{root.name}.tar.gz"
    with exit_if_unreadable(root, f"put {url} into {folder}, or use --demo 1"):
        os.makedirs(folder, exist_ok=True)
        SPEECHCOMMANDS(folder, download=True)
        paths = root.glob("[!._]*/[!.]*.wav")  # neither background noise nor hidden files
        clips = {f"{path.parent.name}/{path.name}" for path in paths}
        validation = set((root / "validation_list.txt").read_text().split())
        test = set((root / "testing_list.txt").read_text().split())
    words = sorted({clip.split("/")[0] for clip in clips})
    listed = {clip for clip in validation | test if clip.split("/")[0] in words}
    parts = [clips - listed, clips & validation, clips & test]
    sizes = [len(part) for part in parts]
    is_cut = len(words) == 35 and sizes != SPEECH_SIZES
    if listed - clips or validation & test or 0 in sizes or is_cut:
        raise SystemExit(f"Delete {root}: it has {sizes} clips of {len(words)} words, and lacks "
                         f"{len(listed - clips)} of its lists; 35 words have {SPEECH_SIZES}")
    if len(words) < 35:
        print(f"{root} has {len(words)} of 35 words: results are not comparable")
    names = [name for part in parts for name in sorted(part)]
    files = [(name, (root / name).stat().st_size, (root / name).stat().st_mtime) for name in names]
    made_from = hashlib.sha256(repr([CACHE_VERSION, files]).encode()).hexdigest()[:12]
    cache = Path(folder) / f"speech_{made_from}.npy"
    with exit_if_unreadable(cache, "its folder must be writable; if it is broken, delete it"):
        if not cache.exists():
            with open(f"{cache}.tmp", "wb") as file:
                header = dict(descr="<i2", fortran_order=False, shape=(len(names), SPEECH_RATE))
                np.lib.format.write_array_header_1_0(file, header)
                for name in tqdm(names, "decode wav files"):
                    file.write(read_wav(root / name))
            os.replace(f"{cache}.tmp", cache)
        waves = np.load(cache, mmap_mode="c")  # shared by processes, read on demand
    labels = torch.tensor([words.index(name.split("/")[0]) for name in names])
    splits = zip(torch.from_numpy(waves).split(sizes), labels.split(sizes))
    return dict(zip(SPLITS, splits)) | {"words": words}

def read_wav(path):
    """A wav file, mono, 16 bits, 16 kHz -> int16 [16000], cut or padded with silence."""
    with exit_if_unreadable(path, f"expected a mono wav file, 16 bits, {SPEECH_RATE} Hz"):
        with wave.open(str(path)) as file:
            channels, width, rate, count, *_ = file.getparams()
            content = file.readframes(count)
        if (channels, width, rate) != (1, 2, SPEECH_RATE) or not 0 < len(content) == 2 * count:
            raise ValueError(f"{channels} channels, {8 * width} bits, {rate} Hz, {count} samples")
    samples = np.frombuffer(content, "<i2")[:SPEECH_RATE]
    return np.pad(samples, (0, SPEECH_RATE - len(samples)))

def cyp3a4(folder, demo=False, tokens="smiles"):
    """CYP3A4_Veith (Veith et al. 2009), https://tdcommons.ai/single_pred_tasks/adme/, 0.7 MB.
    Splits are (ids int32 [n, time] or [n, time, 4], see molecule_ids(), 0 pads; lengths int64 [n];
    labels int64 [n], 1 for an inhibitor). Test is TDC's scaffold split (9,862 and 2,466 molecules);
    the 9,862 are split again, 0.9 and 0.1. No Murcko scaffold is in two splits."""
    from rdkit.Chem.Scaffolds.MurckoScaffold import MurckoScaffoldSmiles
    path = Path(folder) / "cyp3a4_veith.tab"
    if demo:
        rows = demo_molecules()
    else:
        with exit_if_unreadable(path, f"get {CYP3A4_URL} or use --demo 1"), one_at_a_time():
            if not path.exists():
                os.makedirs(folder, exist_ok=True)
                torch.hub.download_url_to_file(CYP3A4_URL, path)
            with open(path, newline="", encoding="utf-8") as file:
                table = csv.DictReader(file, delimiter="\t")
                rows = [(row["Drug"], int(float(row["Y"]))) for row in table]
            content = "".join(f"{smiles}\t{label}\n" for smiles, label in rows)
            if hashlib.sha256(content.encode()).hexdigest() != CYP3A4_SHA256:
                raise ValueError(f"its {len(rows)} molecules are not the official 12,328")
    ids, scaffolds, splits = [], [], {}
    for smiles, _ in tqdm(rows, "read molecules"):
        ids.append(molecule_ids(smiles, tokens))
        scaffolds.append(MurckoScaffoldSmiles(smiles.strip(), includeChirality=False))
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    lengths = torch.tensor([len(one) for one in ids])
    labels = torch.tensor([label for _, label in rows])
    rest, test = scaffold_split(scaffolds, 0.8)
    train, validation = scaffold_split([scaffolds[i] for i in rest], 0.9)
    parts = [rest[i] for i in train], [rest[i] for i in validation], test
    for split, part in zip(SPLITS, parts):
        part = torch.tensor(sorted(part), dtype=torch.int64)
        splits[split] = padded[part], lengths[part], labels[part]
    return splits

def scaffold_split(scaffolds, fraction):
    """Scaffolds of molecules -> two lists of indices, no scaffold in both. As TDC with seed 0
    and fractions (fraction, 1 - fraction, 0): shuffled groups go to the first while they fit."""
    groups, first, second = {}, [], []
    for i, scaffold in enumerate(scaffolds):
        groups.setdefault(scaffold, []).append(i)
    groups = list(groups.values())
    random.Random(0).shuffle(groups)
    for group in groups:
        fits = len(first) + len(group) <= int(len(scaffolds) * fraction)
        (first if fits else second).extend(group)
    return first, second

def molecule_ids(smiles, tokens):
    """A SMILES string -> int32 ids, or None if RDKit cannot read it. tokens="smiles": [characters]
    of RDKit's canonical SMILES, the same for every way of writing a molecule. "atoms": [atoms, 4],
    an atom's Morgan environments (Rogers and Hahn 2010) of radius 0 to 3, hashed; 0: none."""
    from rdkit import Chem, RDLogger
    from rdkit.Chem.rdFingerprintGenerator import AdditionalOutput, GetMorganGenerator
    RDLogger.DisableLog("rdApp.*")
    smiles = smiles.strip()  # RDKit would ignore what follows a space, and what is not ASCII
    molecule = Chem.MolFromSmiles(smiles) if all("!" <= x <= "~" for x in smiles) else None
    if molecule is None or molecule.GetNumAtoms() == 0:
        return None
    canonical = Chem.MolToSmiles(molecule)
    if tokens == "smiles":
        return torch.tensor(list(canonical.encode()), dtype=torch.int32) - 32
    molecule = Chem.MolFromSmiles(canonical)  # atoms in canonical order
    environments = AdditionalOutput()
    environments.AllocateBitInfoMap()
    morgan = GetMorganGenerator(radius=3, includeRedundantEnvironments=True)
    morgan.GetSparseCountFingerprint(molecule, additionalOutput=environments)
    ids = torch.zeros(molecule.GetNumAtoms(), 4, dtype=torch.int32)
    for code, centres in environments.GetBitInfoMap().items():
        for atom, radius in centres:
            ids[atom, radius] = 1 + code % BUCKETS
    return ids

def read_image(path, mode, side, ground):
    """An image file -> uint8 [side, side] for mode "L" or [side, side, 3] for "RGB", upright and
    resized. Transparent pixels become the grey `ground`, 0 (black) to 255 (white)."""
    from PIL import Image, ImageOps
    with exit_if_unreadable(path, "expected an image, such as a PNG or JPEG file"):
        image = ImageOps.exif_transpose(Image.open(os.path.expanduser(path)))
        if image.mode[0] == "I":  # grey in 16 bits, which convert() would clip at 255
            image = Image.fromarray(np.uint8(np.asarray(image, float).clip(0, 65535) / 257))
        image = image.convert("RGBA")
    behind = Image.new("RGBA", image.size, (ground, ground, ground, 255))
    pixels = np.array(Image.alpha_composite(behind, image).convert(mode).resize((side, side)))
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    if mode == "L" and border.mean() > 127:
        print(f"{path} is dark on light, but MNIST's digits are light on dark: invert it")
    return torch.from_numpy(pixels)

def demo_splits(patterns, dtype):
    """One pattern for each class -> splits of 600, 100 and 200 examples: patterns in noise."""
    rng, splits = np.random.default_rng(1), {}
    for split, size in zip(SPLITS, (600, 100, 200)):
        labels = rng.integers(len(patterns), size=size)
        examples = patterns[labels] + rng.integers(80, size=(size, *patterns.shape[1:]))
        splits[split] = torch.from_numpy(examples.astype(dtype)), torch.from_numpy(labels)
    return splits

def demo_molecules():
    """[(SMILES, label)]. Inhibitors contain an azole, which binds the enzyme's iron."""
    heads = "c1ccccc1 c1ccc(Cl)cc1 c1ccc(F)cc1 c1ccsc1 C1CCCCC1 c1ccc2ccccc2c1".split()
    chains = "C CC COC CSC CCC CCOC CCCC CCSC".split()
    tails = "n1ccnc1 n1cncn1 c1cnc[nH]1 c1ccco1 c1ccccc1 C(=O)O C1CCOCC1".split()
    molecules = map("".join, itertools.product(heads, chains, tails))
    return [(smiles, int("n" in smiles)) for smiles in molecules]
