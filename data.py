"""The data sets: one function each, from the official source to tensors (train, validation, test).

    python -c "import data; print(data.mnist('data')['train'][0].shape)"      # downloads on first use

Every function takes the data folder and demo (True: generate a few hundred examples in the data set's own file format
under <folder>/demo and read those instead), and returns {"train": ..., "validation": ..., "test": ...}. Validation is
carved out of the official training part with a fixed seed; the test part is the official one, whole. Tensors are on
the CPU, whole and small (uint8, int16): the scripts move them to the device once and cut batches there.
"""
import csv
import hashlib
import math
import os
import pickle
import random
import re
import shutil
import sys
import tarfile
import wave
import zipfile
import zlib
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

CYP3A4_URL = "https://dataverse.harvard.edu/api/access/datafile/4259582"
SPEECH_URL = "https://storage.googleapis.com/download.tensorflow.org/data/speech_commands_v0.02.tar.gz"
SPEECH_SHA256 = "af14739ee7dc311471de98f5f9d2c9191b18aedfe957f4a6ff791c709868ff58"  # as torchaudio has it
SPEECH_RATE = 16000  # samples a second


def save_cache(path, **arrays):
    """Write aside, then rename: a run that is killed here leaves no half-written cache."""
    aside = path.with_suffix(".tmp.npz")
    np.savez(aside, **arrays)
    os.replace(aside, path)


def load_cache(path):
    try:
        return dict(np.load(path))
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        sys.exit(f"{path} cannot be read ({error}): delete it, it will be made anew")


@contextmanager
def fetching(files, folder):
    """A server out of reach, an altered archive or a broken file end as one line that says what to do."""
    try:
        yield
    except (OSError, RuntimeError, ValueError, AssertionError, EOFError, tarfile.TarError) as error:
        sys.exit(f"Cannot get {files}: {' '.join(str(error).split())}. Without a network put {files} into {folder}; if something broken is there, "
                 "delete it; --demo 1 runs without any download")


def read_image(path, mode, side):
    """An image file -> uint8 [side, side] of mode "L" or [side, side, 3] of "RGB", resized."""
    from PIL import Image

    try:
        return torch.from_numpy(np.array(Image.open(path).convert(mode).resize((side, side))))
    except OSError as error:
        sys.exit(f"{path} is no image that can be read: {error}")


def hold_out(x, y, size):
    """Split off `size` random examples, the same ones every time. Returns (train x, y), (validation x, y)."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return (x[order[size:]], y[order[size:]]), (x[order[:size]], y[order[:size]])


# ---- CIFAR-10 ------------------------------------------------------------------------------------------------------
def cifar10(folder, demo=False):
    """CIFAR-10 (Krizhevsky 2009), https://www.cs.toronto.edu/~kriz/cifar.html, 170 MB, md5-checked by torchvision.

    Each split is (images uint8 [n, 32, 32, 3], labels int64 [n] in 0..9); 45,000 / 5,000 / 10,000 images.
    """
    folder = Path(folder) / "demo" if demo else Path(folder)
    cache = folder / "cifar10.npz"
    if not cache.exists():
        from torchvision.datasets import CIFAR10

        if demo:
            demo_cifar10(folder)
            CIFAR10 = type("DemoCIFAR10", (CIFAR10,), {  # generated files have no official md5
                "train_list": [(name, None) for name, _ in CIFAR10.train_list],
                "test_list": [(name, None) for name, _ in CIFAR10.test_list],
                "meta": CIFAR10.meta | {"md5": None},
            })
        with fetching(CIFAR10.filename, folder):
            train, test = (CIFAR10(folder, train=part, download=not demo) for part in (True, False))
        save_cache(cache, train_x=train.data, train_y=np.uint8(train.targets), test_x=test.data, test_y=np.uint8(test.targets))
    arrays = load_cache(cache)
    x, y, test_x, test_y = (torch.from_numpy(arrays[name]) for name in ("train_x", "train_y", "test_x", "test_y"))
    train, validation = hold_out(x, y.long(), len(x) // 10)
    return {"train": train, "validation": validation, "test": (test_x, test_y.long())}


def demo_cifar10(folder):
    """300 training and 60 test images: five shapes, light on dark or dark on light, make ten classes."""
    rng = np.random.default_rng(0)
    row, column = np.mgrid[:32, :32]
    batches = folder / "cifar-10-batches-py"
    batches.mkdir(parents=True, exist_ok=True)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        labels, images = rng.integers(10, size=60), []
        for label in labels:
            y, x = row - rng.integers(13, 19), column - rng.integers(13, 19)
            shape = [x**2 + y**2 < 100, abs(y) < 4, abs(x) < 4, abs(x - y) < 5, abs(x**2 + y**2 - 90) < 45][label // 2]
            dark, light = rng.integers(0, 80, (3, 1, 1)), rng.integers(170, 256, (3, 1, 1))
            images.append(np.where(shape == (label % 2 == 0), light, dark).ravel())
        (batches / name).write_bytes(pickle.dumps({"data": np.uint8(images), "labels": labels.tolist()}))
    (batches / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"shape {i}" for i in range(10)]}))


# ---- MNIST ---------------------------------------------------------------------------------------------------------
def mnist(folder, demo=False):
    """MNIST (LeCun et al. 1998), http://yann.lecun.com/exdb/mnist/, from torchvision's mirrors, 12 MB, md5-checked.

    Each split is (images uint8 [n, 28, 28], labels int64 [n] in 0..9); 55,000 / 5,000 / 10,000 digits.
    """
    from torchvision.datasets import MNIST

    folder = Path(folder) / "demo" if demo else Path(folder)
    if demo:
        demo_mnist(folder)
    with fetching("the four files *-ubyte", folder / "MNIST" / "raw"):
        train, test = (MNIST(folder, train=part, download=not demo) for part in (True, False))
    train, validation = hold_out(train.data, train.targets, len(train.data) // 12)
    return {"train": train, "validation": validation, "test": (test.data, test.targets)}


def sum_indices(size, n):
    """Which digits the fixed examples of an n-digit sum are made of: int64 [size, n]. Every digit serves n times in
    all, and for n = 1 the examples are the digits themselves."""
    generator = torch.Generator().manual_seed(0)
    return torch.stack([torch.arange(size)] + [torch.randperm(size, generator=generator) for _ in range(n - 1)], 1)


def demo_mnist(folder):
    """600 training and 200 test digits, drawn with a font at random places, sizes and angles, as IDX files."""
    from PIL import Image, ImageDraw, ImageFont

    rng = random.Random(0)
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for name, size in ("train", 600), ("t10k", 200):
        labels, images = [rng.randrange(10) for _ in range(size)], []
        for label in labels:
            image, place, font = Image.new("L", (28, 28)), (rng.uniform(12, 16), rng.uniform(12, 16)), rng.uniform(20, 24)
            ImageDraw.Draw(image).text(place, str(label), 255, ImageFont.load_default(font), anchor="mm")
            images.append(np.asarray(image.rotate(rng.uniform(-12, 12))))
        for kind, array in ("images-idx3", np.uint8(images)), ("labels-idx1", np.uint8(labels)):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
            (raw / f"{name}-{kind}-ubyte").write_bytes(header + array.tobytes())


# ---- Speech Commands -----------------------------------------------------------------------------------------------
def speech_commands(folder, demo=False):
    """Speech Commands v0.02 (Warden 2018), https://arxiv.org/abs/1804.03209, 2.4 GB, sha256-checked.

    Each split is (waves int16 [n, 16000], one second at 16 kHz, shorter clips padded with silence at the end; labels
    int64 [n]), and "classes" is the sorted list of the words, which are the folders present: 35 in the full set.
    Splits are the official lists; 84,843 / 9,981 / 11,005 clips in the full set.
    """
    from torchaudio.datasets import SPEECHCOMMANDS

    folder = Path(folder) / "demo" if demo else Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    root, archive = folder / "SpeechCommands" / "speech_commands_v0.02", folder / "speech_commands_v0.02.tar.gz"
    if demo:
        demo_speech(folder)
    with fetching(f"{archive.name} (or its folders as {root})", folder):
        if not root.exists():
            if not archive.exists():
                torch.hub.download_url_to_file(SPEECH_URL, str(archive), SPEECH_SHA256)
            with tarfile.open(archive) as tar:
                for member in tqdm(tar, "unpack", unit="file"):
                    tar.extract(member, root.with_name("unpacking"), filter="data")  # nothing outside this folder
            root.with_name("unpacking").rename(root)
        lists = {"train": "training", "validation": "validation", "test": "testing"}
        sets = {split: SPEECHCOMMANDS(folder, "speech_commands_v0.02", subset=name) for split, name in lists.items()}
    classes = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("_"))
    if len(classes) != 35 and not demo:
        print(f"{root} holds {len(classes)} of the 35 words: the result is comparable only to others on these")
    clips = []  # (split, file, word)
    for split, subset in sets.items():
        for i in range(len(subset)):
            name, _, word, _, _ = subset.get_metadata(i)
            if word in classes:  # a list names all 35 words, whichever are here
                clips.append((split, root.parent / name, word))
    if len(classes) < 2 or len({split for split, _, _ in clips}) < 3:
        sys.exit(f"{root} must hold two words at least and clips for all three splits; it has {len(classes)} words, {len(clips)} clips")

    cache = folder / "speech_commands.npz"
    names = hashlib.sha256("\n".join(str(path.relative_to(folder)) for _, path, _ in clips).encode()).hexdigest()
    if not cache.exists() or str(load_cache(cache)["names"]) != names:
        missing = [str(path) for _, path, _ in clips if not path.exists()]
        if missing:
            sys.exit(f"{len(missing)} clips that the official lists name are missing, {missing[0]} the first: "
                     f"delete {root} so that it is unpacked again")
        waves = np.zeros((len(clips), SPEECH_RATE), np.int16)
        for row, (_, path, _) in zip(waves, tqdm(clips, "decode wav files")):
            samples = read_wav(path)[:SPEECH_RATE]
            row[:len(samples)] = samples
        save_cache(cache, waves=waves, names=names)
    waves = torch.from_numpy(load_cache(cache)["waves"])
    labels = torch.tensor([classes.index(word) for _, _, word in clips])
    parts = {split: torch.tensor([part == split for part, _, _ in clips]) for split in lists}
    return {split: (waves[part], labels[part]) for split, part in parts.items()} | {"classes": classes}


def read_wav(path):
    """Mono 16-bit PCM at 16 kHz -> int16 [samples]."""
    try:
        with wave.open(str(path)) as file:
            form = file.getnchannels(), file.getsampwidth(), file.getframerate()
            samples = np.frombuffer(file.readframes(file.getnframes()), "<i2" if form[1] == 2 else "i1")
    except (OSError, EOFError, wave.Error) as error:
        sys.exit(f"{path} is no wav file that can be read: {error}")
    if form != (1, 2, SPEECH_RATE) or not len(samples):
        sys.exit(f"{path}: {len(samples)} samples, {form[0]} channels of {8 * form[1]} bits at {form[2]} Hz, where mono, 16 bits, {SPEECH_RATE} Hz is needed")
    return samples


def demo_speech(folder):
    """Six 'words', 70 clips each: a word is a rising, falling or level tone in a low or a high voice, with noise."""
    rng = np.random.default_rng(0)
    words = {"low_rise": (200, 400), "low_fall": (400, 200), "low_level": (300, 300),
             "high_rise": (900, 1800), "high_fall": (1800, 900), "high_level": (1300, 1300)}
    root = folder / "SpeechCommands" / "speech_commands_v0.02"
    lists = {"validation": [], "testing": []}
    for word, (first, last) in words.items():
        (root / word).mkdir(parents=True, exist_ok=True)
        for speaker in range(70):
            samples = int(rng.integers(12000, 16001))
            pitch = np.linspace(first, last, samples) * rng.uniform(0.9, 1.1)
            phase = 2 * np.pi * np.cumsum(pitch) / SPEECH_RATE
            tone = sum(np.sin(k * phase) / k for k in (1, 2, 3)) * np.hanning(samples)
            clip = np.int16(6000 * (tone + rng.normal(0, 0.1, samples)))
            name = f"{word}/{speaker:08x}_nohash_0.wav"
            with wave.open(str(root / name), "wb") as file:
                file.setnchannels(1)
                file.setsampwidth(2)
                file.setframerate(SPEECH_RATE)
                file.writeframes(clip.tobytes())
            if speaker < 20:
                lists["validation" if speaker < 8 else "testing"].append(name)
    for split, names in lists.items():
        (root / f"{split}_list.txt").write_text("\n".join(names) + "\n")


# ---- CYP3A4 inhibition ---------------------------------------------------------------------------------------------
SMILES_TOKEN = re.compile(r"\[[^]]+]|Br|Cl|%\d\d|.")
BUCKETS = 16384


def cyp3a4(folder, demo=False):
    """CYP3A4 inhibition (Veith et al. 2009) as Therapeutics Data Commons publishes it, CYP3A4_Veith, 0.7 MB:
    https://tdcommons.ai/single_pred_tasks/adme/#cyp-p450-3a4-inhibition-veith-et-al; checked by its counts.

    Each split is (atom ids int32 [n, 20 + atoms, 4], their counts int64 [n], SMILES tokens int32 [n, tokens], token counts
    int64 [n], labels int64 [n], 1 for an inhibitor); for the ids see molecule_ids(). The test part is TDC's scaffold
    split (9,862 / 2,466 molecules); validation is a scaffold split of the training part (0.9 / 0.1), so that no ring
    system is in two parts.
    """
    folder = Path(folder) / "demo" if demo else Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "cyp3a4_veith.tab"
    if demo:
        demo_cyp3a4(path)
    elif not path.exists():
        path = folder / "cyp3a4_veith.part"  # gets its name when it has passed the checks
        with fetching(f"{CYP3A4_URL} as cyp3a4_veith.tab", folder):
            torch.hub.download_url_to_file(CYP3A4_URL, str(path))
    content = path.read_bytes()
    cache = folder / "cyp3a4_ids.npz"
    digest = hashlib.sha256(content).hexdigest()
    if not cache.exists() or str(load_cache(cache)["digest"]) != digest:
        try:
            rows = list(csv.DictReader(content.decode().splitlines(), delimiter="\t"))
            counts = len(rows), sum(float(row["Y"]) == 1 for row in rows)
            rows[0]["Drug"]
        except (ValueError, LookupError, TypeError) as error:
            sys.exit(f"{path} is not the tab-separated table with the columns Drug_ID, Drug and Y ({error!r}): delete it, it will be downloaded again")
        if not demo and counts != (12328, 5110):
            sys.exit(f"{path} has {counts[0]:,} molecules, {counts[1]:,} of them inhibitors, where 12,328 and 5,110 are expected: delete it, it will be downloaded again")
        save_cache(cache, digest=digest, **featurise(rows))
    if path.suffix == ".part":
        path.rename(folder / "cyp3a4_veith.tab")
    arrays = {name: torch.from_numpy(array) for name, array in load_cache(cache).items() if name != "digest"}
    splits = {}
    for code, split in enumerate(("train", "validation", "test")):
        part = arrays["split"] == code
        splits[split] = tuple(arrays[name][part] for name in ("atoms", "atom_counts", "tokens", "token_counts", "labels"))
    return splits


def hashed(text):
    return 1 + zlib.crc32(text.encode()) % BUCKETS


def molecule_ids(smiles):
    """A SMILES string -> (atom ids int32 [20 + atoms, 4], token ids int32 [tokens], RDKit molecule), or None if unreadable.

    The first 20 tokens hold 79 numbers about the whole molecule, four a token: RDKit's property list (weight, logP,
    polar surface, rings, connectivity, ...) and its surface areas by logP, refractivity and charge, each rounded on a
    logarithmic scale. Then an atom a token: its Morgan environments of radius 0 to 3 (a lone ion has the first one only).
    The tokens of the string are its atoms, bonds, branches and ring numbers. All are hashed to 1..BUCKETS; 0 pads.
    """
    from rdkit import Chem, RDLogger
    from rdkit.Chem import rdMolDescriptors
    from rdkit.Chem.rdFingerprintGenerator import AdditionalOutput, GetMorganGenerator

    RDLogger.DisableLog("rdApp.*")
    molecule = Chem.MolFromSmiles(smiles)
    if molecule is None or not molecule.GetNumAtoms():
        return None
    # Redundant environments are kept: every atom has one for each radius, as far as the molecule reaches.
    morgan = GetMorganGenerator(radius=3, includeRedundantEnvironments=True)
    environments = AdditionalOutput()
    environments.AllocateBitInfoMap()
    morgan.GetSparseCountFingerprint(molecule, additionalOutput=environments)
    numbers = [*rdMolDescriptors.Properties().ComputeProperties(molecule), *rdMolDescriptors.SlogP_VSA_(molecule),
               *rdMolDescriptors.SMR_VSA_(molecule), *rdMolDescriptors.PEOE_VSA_(molecule)]
    whole = torch.zeros(20, 4, dtype=torch.int32)
    whole.view(-1)[:len(numbers)] = torch.tensor([hashed(f"{i} {10 * math.asinh(number):.0f}") for i, number in enumerate(numbers)])
    atoms = torch.zeros(molecule.GetNumAtoms(), 4, dtype=torch.int32)
    for code, places in environments.GetBitInfoMap().items():
        for atom, radius in places:
            atoms[atom, radius] = 1 + code % BUCKETS
    tokens = [hashed(token) for token in SMILES_TOKEN.findall(smiles)]
    return torch.cat([whole, atoms]), torch.tensor(tokens, dtype=torch.int32), molecule


def featurise(rows):
    """Rows with Drug (a SMILES string) and Y -> the arrays of cyp3a4(), and split: 0 train, 1 validation, 2 test."""
    from rdkit.Chem.Scaffolds.MurckoScaffold import MurckoScaffoldSmiles

    atoms, tokens, labels, scaffolds, unreadable = [], [], [], [], []
    for row in tqdm(rows, "featurise molecules"):
        ids = molecule_ids(row["Drug"])
        if ids is None:
            unreadable.append(row["Drug"])
            continue
        atoms.append(ids[0])
        tokens.append(ids[1])
        labels.append(int(float(row["Y"])))
        scaffolds.append(MurckoScaffoldSmiles(mol=ids[2], includeChirality=False))
    if unreadable:
        tqdm.write(f"{len(unreadable)} SMILES that RDKit cannot read are left out: {' '.join(unreadable)}")

    learn, test = scaffold_split(scaffolds, 0.8)
    _, validation = scaffold_split([scaffolds[i] for i in learn], 0.9)
    split = np.zeros(len(atoms), np.int64)
    split[[learn[i] for i in validation]] = 1
    split[test] = 2
    return {
        "atoms": pad_sequence(atoms, batch_first=True).numpy(), "atom_counts": np.array([len(ids) for ids in atoms]),
        "tokens": pad_sequence(tokens, batch_first=True).numpy(), "token_counts": np.array([len(ids) for ids in tokens]),
        "labels": np.array(labels), "split": split,
    }


def scaffold_split(scaffolds, fraction, seed=0):
    """One scaffold for each molecule -> (indices of the first part, indices of the second).

    Molecules of one scaffold stay together. As Therapeutics Data Commons with fractions (fraction, 1 - fraction, 0):
    groups in order of first appearance are shuffled by Python's random, then each goes to the first part if it fits.
    """
    groups = defaultdict(list)
    for i, scaffold in enumerate(scaffolds):
        groups[scaffold].append(i)
    groups = list(groups.values())
    random.Random(seed).shuffle(groups)
    first, second = [], []
    for group in groups:
        part = first if len(first) + len(group) <= int(len(scaffolds) * fraction) else second
        part += group
    return first, second


def demo_cyp3a4(path):
    """400 molecules of a ring, a chain and a ring; those with an imidazole or a triazole, which bind the enzyme's
    iron as the azole antifungals do, are the inhibitors. Fields are quoted, as in the archive's own copy."""
    rng = random.Random(0)
    heads = ["c1ccccc1", "c1ccc(Cl)cc1", "c1ccc(F)cc1", "c1ccncc1", "c1ccsc1", "C1CCCCC1", "C1CCOCC1", "c1ccc2ccccc2c1"]
    azoles = ["n1ccnc1", "n1cncn1", "c1cnc[nH]1"]
    others = ["c1ccco1", "N1CCCC1", "N1CCOCC1", "c1ccccc1", "C(=O)O", "C(N)=O"]
    lines = ['"Drug_ID"\t"Drug"\t"Y"']
    for i in range(400):
        label = rng.randrange(2)
        chain = "".join(rng.choice(["C", "C", "O", "N", "C(C)", "C(=O)"]) for _ in range(rng.randint(1, 6)))
        lines.append(f'"{i}"\t"{rng.choice(heads)}{chain}C{rng.choice(azoles if label else others)}"\t"{label}"')
    path.write_text("\n".join(lines) + "\n")
