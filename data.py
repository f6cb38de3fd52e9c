"""The data sets: one function each, from the official source to tensors (train, validation, test).

    python -c "import data; print(data.mnist('data')['train'][0].shape)"      # downloads on first use

Each takes the data folder and returns {"train": ..., "validation": ..., "test": ...}; with demo=True it reads
generated files of the same format. Validation is a fixed random part of the official training part, or for
speech an official list. What cannot be read ends the program with one line (SystemExit).
"""
import csv
import hashlib
import inspect
import random
import tarfile
import tempfile
import wave
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

SPLITS = ("train", "validation", "test")
SPEECH_URL = "https://storage.googleapis.com/download.tensorflow.org/data/speech_commands_v0.02.tar.gz"
SPEECH_SHA256 = "af14739ee7dc311471de98f5f9d2c9191b18aedfe957f4a6ff791c709868ff58"  # as torchaudio has it
SPEECH_RATE = 16000  # samples a second
CYP3A4_URL = "https://dataverse.harvard.edu/api/access/datafile/4259582"
CYP3A4_SHA256 = "7efaaca5d7680cee34fa74f1b83693883dd03ccd23e9eb8801cd16624614861f"  # SMILES<tab>label lines
SMILES_IDS = 95  # 0 pads, 1..94 are the printable ASCII characters
BUCKETS = 16384  # atom environments are hashed to 1..BUCKETS
OR_DEMO = "delete what is broken there; --demo 1 needs no download"


def cifar10(folder, demo=False):
    """CIFAR-10 (Krizhevsky 2009), https://www.cs.toronto.edu/~kriz/cifar.html, 170 MB, md5 by torchvision.
    Each split is (images uint8 [n, 32, 32, 3], labels int64 [n] in 0..9): 45,000 / 5,000 / 10,000 images.
    A hand-made <folder>/cifar10.npz with train_x, train_y, test_x, test_y is read instead of a download."""
    folder = demo_folder(folder, demo_cifar10) if demo else Path(folder)
    path = folder / "cifar10.npz"
    if path.exists():
        with one_line_exit(f"Mend or delete {path}"), np.load(path) as file:
            train, test = [(file[f"{part}_x"], file[f"{part}_y"]) for part in ("train", "test")]
            for x, y in train, test:
                if x.dtype != np.uint8 or x.shape[1:] != (32, 32, 3):
                    raise ValueError(f"images are {x.dtype} {x.shape}, not uint8 [n, 32, 32, 3]")
                if y.dtype.kind not in "iu" or y.size != len(x) or not np.isin(y, range(10)).all():
                    raise ValueError(f"labels are {y.dtype} {y.shape}, not {len(x)} integers 0..9")
    else:
        from torchvision.datasets import CIFAR10
        with one_line_exit(f"Put {CIFAR10.filename} into {folder}; {OR_DEMO}"):
            parts = [CIFAR10(folder, train=part, download=True) for part in (True, False)]
        train, test = [(part.data, np.array(part.targets)) for part in parts]
    train, test = [(torch.tensor(x), torch.tensor(y.ravel(), dtype=torch.int64)) for x, y in (train, test)]
    return hold_out(*train, len(train[0]) // 10) | {"test": test}


def demo_cifar10(folder):
    """300 training and 60 test images: ten colours, in noise."""
    rng = np.random.default_rng(0)
    colours, y = rng.integers(0, 176, (10, 1, 1, 3)), rng.integers(10, size=360)
    x = np.uint8(colours[y] + rng.integers(0, 80, (360, 32, 32, 3)))
    np.savez(folder / "cifar10.npz", train_x=x[60:], train_y=y[60:], test_x=x[:60], test_y=y[:60])


def mnist(folder, demo=False):
    """MNIST (LeCun et al. 1998), http://yann.lecun.com/exdb/mnist/, 12 MB, downloads md5-checked.
    Each split is (images uint8 [n, 28, 28], labels int64 [n] in 0..9): 55,000 / 5,000 / 10,000 digits."""
    from torchvision.datasets import MNIST
    folder = demo_folder(folder, demo_mnist) if demo else Path(folder)
    with one_line_exit(f"Put the four files *-ubyte into {folder}/MNIST/raw; {OR_DEMO}"):
        train, test = [MNIST(folder, train=part, download=True) for part in (True, False)]
    return hold_out(train.data, train.targets, len(train.data) // 12) | {"test": (test.data, test.targets)}


def sum_indices(size, n):
    """Which digits make the fixed examples of an n-digit sum: int64 [size, n]. Each serves n times."""
    rng = torch.Generator().manual_seed(0)
    return torch.stack([torch.arange(size)] + [torch.randperm(size, generator=rng) for _ in range(n - 1)], 1)


def hold_out(x, y, size):
    """Split off `size` random examples for validation, the same ones every time. Only for independent
    examples: what belongs together (a speaker, a scaffold) must not be on both sides."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return {"train": (x[order[size:]], y[order[size:]]), "validation": (x[order[:size]], y[order[:size]])}


def demo_mnist(folder):
    """600 training and 200 test digits, drawn with a font at random places and angles, as IDX files."""
    from PIL import Image, ImageDraw, ImageFont
    rng, font, raw = random.Random(0), ImageFont.load_default(22), folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, size in ("train", 600), ("t10k", 200):
        y, x = bytes(rng.randrange(10) for _ in range(size)), b""
        for label in y:
            image, place = Image.new("L", (28, 28)), (rng.uniform(12, 16), rng.uniform(12, 16))
            ImageDraw.Draw(image).text(place, str(label), 255, font, anchor="mm")
            x += image.rotate(rng.uniform(-12, 12)).tobytes()
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(np.array([2049, size], ">i4").tobytes() + y)
        (raw / f"{name}-images-idx3-ubyte").write_bytes(np.array([2051, size, 28, 28], ">i4").tobytes() + x)


def speech_commands(folder, demo=False):
    """Speech Commands v0.02 (Warden 2018), https://arxiv.org/abs/1804.03209, 2.4 GB, download sha256-checked.
    Each split is (waves int16 [n, 16000], one second, silence at the end of short clips; labels int64 [n]):
    84,843 / 9,981 / 11,005 clips. "classes" is the sorted list of the words that have a folder."""
    folder = demo_folder(folder, demo_speech) if demo else Path(folder)
    root, archive = folder / "SpeechCommands/speech_commands_v0.02", folder / "speech_commands_v0.02.tar.gz"
    with one_line_exit(f"Put {archive.name} into {folder}, or its folders into {root}; {OR_DEMO}"):
        if not root.exists():
            if not hasattr(tarfile, "data_filter"):  # Debian 12 has 3.11.2
                raise SystemExit(f"Take Python 3.10.12, 3.11.4 or newer, or unpack {archive} into {root}")
            folder.mkdir(parents=True, exist_ok=True)
            if not archive.exists():
                torch.hub.download_url_to_file(SPEECH_URL, str(archive), SPEECH_SHA256)
            with made_aside(root) as new, tarfile.open(archive) as tar:
                tar.extractall(new, tqdm(tar, "unpack", unit="file"), filter="data")
        words = sorted(path.name for path in root.iterdir() if path.is_dir() and path.name[0] not in "_.")
        clips = {"train": {f"{word}/{path.name}" for word in words for path in (root / word).glob("*.wav")}}
        for split, name in ("validation", "validation_list.txt"), ("test", "testing_list.txt"):
            clips[split] = {clip for clip in (root / name).read_text().split() if clip.split("/")[0] in words}
            missing = clips[split] - clips["train"]
            if missing:
                raise ValueError(f"{len(missing)} clips of {name} are missing, {min(missing)} the first")
            clips["train"] -= clips[split]
        sizes = [len(clips[split]) for split in SPLITS]
        if len(words) < 2 or 0 in sizes:
            raise ValueError(f"two words, clips for all splits are needed; here are {words}, {sizes} clips")
    if len(words) != 35 and not demo:
        print(f"{root} holds {len(words)} of the 35 words: compare results only with others on these")
    names = [clip for split in SPLITS for clip in sorted(clips[split])]
    made_by = key(decode, read_wav, SPEECH_RATE, names)
    waves = torch.from_numpy(cached(folder / f"speech_{made_by}.npz", decode, root, names)["waves"])
    labels = torch.tensor([words.index(name.split("/")[0]) for name in names])
    return dict(zip(SPLITS, zip(waves.split(sizes), labels.split(sizes)))) | {"classes": words}


def decode(root, names):
    waves = np.zeros((len(names), SPEECH_RATE), np.int16)
    for row, name in zip(waves, tqdm(names, "decode wav files")):
        samples = read_wav(root / name)[:SPEECH_RATE]
        row[:len(samples)] = samples
    return {"waves": waves}


def read_wav(path):
    """A wav file, mono, 16 bits, 16 kHz -> numpy int16 [samples]."""
    with one_line_exit(f"{path} is not the mono wav file of 16 bits and {SPEECH_RATE} Hz that is needed"):
        with wave.open(str(path)) as file:
            channels, width, rate, count, *_ = file.getparams()
            samples = file.readframes(count)
        if (channels, width, rate) != (1, 2, SPEECH_RATE) or not samples:
            raise ValueError(f"{channels} channels, {8 * width} bits, {rate} Hz, {count} samples")
        if len(samples) < 2 * count:
            raise ValueError(f"it ends after {len(samples) // 2} of {count} samples")
        return np.frombuffer(samples, "<i2")


def demo_speech(folder):
    """Six words, a to f, 70 clips each: tones of six pitches, in noise."""
    rng, root = np.random.default_rng(0), folder / "SpeechCommands" / "speech_commands_v0.02"
    for i, word in enumerate("abcdef"):
        (root / word).mkdir(parents=True)
        for speaker in range(70):
            time = np.arange(rng.integers(12000, 16001)) / SPEECH_RATE
            tone = np.sin(2 * np.pi * 200 * 1.5**i * rng.uniform(0.9, 1.1) * time)
            with wave.open(str(root / word / f"{speaker}.wav"), "wb") as file:
                file.setparams((1, 2, SPEECH_RATE, 0, "NONE", ""))
                file.writeframes(np.int16(6000 * (tone + rng.normal(0, 0.2, len(time)))).tobytes())
    for name, speakers in ("validation_list.txt", range(8)), ("testing_list.txt", range(8, 20)):
        (root / name).write_text("\n".join(f"{word}/{i}.wav" for word in "abcdef" for i in speakers))


def cyp3a4(folder, demo=False, tokens="smiles"):
    """CYP3A4_Veith (Veith et al. 2009), https://tdcommons.ai/single_pred_tasks/adme/, 0.7 MB, sha256-checked.
    Each split is (ids int32, see molecule_ids(), 0 pads; lengths int64 [n]; labels int64 [n], 1: inhibitor).
    Test is TDC's scaffold split (9,862 / 2,466 molecules), validation another of the rest (0.9 / 0.1). Whole
    Murcko scaffolds are kept apart, but 2,281 test molecules have all their ring systems in training."""
    import rdkit
    folder = demo_folder(folder, demo_cyp3a4) if demo else Path(folder)
    path = folder / "cyp3a4_veith.tab"
    with one_line_exit(f"Put {path.name} from {CYP3A4_URL} into {folder}; {OR_DEMO}"):
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(CYP3A4_URL, str(path))
        with open(path, newline="", encoding="utf-8") as file:
            rows = [(row["Drug"], int(float(row["Y"]))) for row in csv.DictReader(file, delimiter="\t")]
        content = "".join(f"{smiles}\t{label}\n" for smiles, label in rows)
        if not demo and hashlib.sha256(content.encode()).hexdigest() != CYP3A4_SHA256:
            raise ValueError(f"the {len(rows)} molecules there are not the 12,328 of CYP3A4_Veith")
    made_by = key(featurise, molecule_ids, scaffold_split, BUCKETS, rdkit.__version__, content)
    arrays = cached(folder / f"cyp3a4_{tokens}_{made_by}.npz", featurise, rows, tokens)
    parts = {name: arrays["split"] == code for code, name in enumerate(SPLITS)}
    tensors = [torch.from_numpy(arrays[name]) for name in ("ids", "lengths", "labels")]
    return {name: tuple(tensor[part] for tensor in tensors) for name, part in parts.items()}


def molecule_ids(smiles, tokens):
    """A SMILES string -> int32 ids, or None if RDKit reads no molecule. tokens="smiles": [time], characters;
    "atoms": [time, 4], each atom's Morgan environments of radius 0 to 3, 1..BUCKETS, 0 for none."""
    from rdkit import Chem, RDLogger
    from rdkit.Chem.rdFingerprintGenerator import AdditionalOutput, GetMorganGenerator
    RDLogger.DisableLog("rdApp.*")
    smiles = smiles.strip()  # a space inside is refused below: RDKit takes what follows it for a name
    molecule = Chem.MolFromSmiles(smiles) if all("!" <= letter <= "~" for letter in smiles) else None
    if molecule is None or not molecule.GetNumAtoms():
        return None
    if tokens == "smiles":
        return torch.tensor([ord(letter) - 32 for letter in smiles], dtype=torch.int32)
    morgan, environments = GetMorganGenerator(radius=3, includeRedundantEnvironments=True), AdditionalOutput()
    environments.AllocateBitInfoMap()  # the redundant ones give each atom all radii the molecule reaches
    morgan.GetSparseCountFingerprint(molecule, additionalOutput=environments)
    ids = torch.zeros(molecule.GetNumAtoms(), 4, dtype=torch.int32)
    for code, places in environments.GetBitInfoMap().items():
        for atom, radius in places:
            ids[atom, radius] = 1 + code % BUCKETS
    return ids


def featurise(rows, tokens):
    """[(SMILES, label)] -> the arrays of cyp3a4() for all, and split: 0 train, 1 validation, 2 test."""
    from rdkit.Chem.Scaffolds.MurckoScaffold import MurckoScaffoldSmiles
    ids = [molecule_ids(smiles, tokens) for smiles, _ in tqdm(rows, "featurise molecules")]
    unread = [smiles for (smiles, _), one in zip(rows, ids) if one is None]
    if unread:
        raise SystemExit(f"This RDKit cannot read {len(unread)} of the molecules, {unread[0]} the first")
    labels = np.array([label for _, label in rows])
    scaffolds = [MurckoScaffoldSmiles(smiles.strip(), includeChirality=False) for smiles, _ in rows]
    learn, test = scaffold_split(scaffolds, 0.8)
    _, validation = scaffold_split([scaffolds[i] for i in learn], 0.9)
    split = np.zeros(len(rows), np.int64)
    split[test], split[[learn[i] for i in validation]] = 2, 1
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True).numpy()
    return {"ids": padded, "lengths": np.array([len(one) for one in ids]), "labels": labels, "split": split}


def scaffold_split(scaffolds, fraction):
    """One scaffold for each molecule -> (indices of the first part, of the second). No scaffold is in both.
    As TDC with seed 0, fractions (fraction, 1 - fraction, 0): shuffled groups go first while they fit."""
    groups = {}
    for i, scaffold in enumerate(scaffolds):
        groups.setdefault(scaffold, []).append(i)
    groups = list(groups.values())
    random.Random(0).shuffle(groups)
    first, second = [], []
    for group in groups:
        (first if len(first) + len(group) <= int(len(scaffolds) * fraction) else second).extend(group)
    return first, second


def demo_cyp3a4(folder):
    """400 molecules; the inhibitors have an azole, which binds the enzyme's iron as antifungals do."""
    rng = random.Random(0)
    heads = "c1ccccc1 c1ccc(Cl)cc1 c1ccc(F)cc1 c1ccncc1 c1ccsc1 C1CCCCC1 C1CCOCC1 c1ccc2ccccc2c1".split()
    tails = "c1ccco1 N1CCCC1 N1CCOCC1 c1ccccc1 C(=O)O C(N)=O".split(), "n1ccnc1 n1cncn1 c1cnc[nH]1".split()
    lines = ['"Drug_ID"\t"Drug"\t"Y"']  # quoted, as in the archive's own copy
    for i in range(400):
        label, chain = rng.randrange(2), "".join(rng.choices("CCON", k=rng.randint(1, 6)))
        lines.append(f'"{i}"\t"{rng.choice(heads)}{chain}C{rng.choice(tails[label])}"\t"{label}"')
    (folder / "cyp3a4_veith.tab").write_text("\n".join(lines))


def read_image(path, mode, side, ground):
    """An image file -> uint8 [side, side] of mode "L" or [side, side, 3] of "RGB", upright and resized.
    Where it is transparent, the grey `ground` shows, 0 (black) to 255 (white)."""
    from PIL import Image, ImageOps
    with one_line_exit(f"{path} is no image that can be read"):
        image = ImageOps.exif_transpose(Image.open(path))
        behind = Image.new("RGBA", image.size, (ground, ground, ground, 255))
        image = Image.alpha_composite(behind, image.convert("RGBA")).convert(mode)
        return torch.from_numpy(np.array(image.resize((side, side))))


@contextmanager
def one_line_exit(text):
    """An error in the body ends the program with one line: the error, then the text."""
    try:
        yield
    except Exception as error:  # parsers of broken files raise anything, from EOFError to SyntaxError
        raise SystemExit(" ".join(f"{type(error).__name__}: {error}. {text}".split()))


@contextmanager
def made_aside(path):
    """Yields a path in a temporary folder; what is made there becomes `path`, unless another was faster."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="unfinished-") as folder:
        yield Path(folder) / path.name
        try:
            (Path(folder) / path.name).replace(path)
        except OSError:
            if not path.exists():
                raise


def key(*parts):
    """A short hash of the parts: functions count by their source text, other things by their value."""
    texts = [inspect.getsource(part) if callable(part) else str(part) for part in parts]
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:12]


def cached(path, make, *args):
    """make(*args), a dict of arrays, kept in `path`, whose name carries a key() of all that went in."""
    if path.exists():
        with one_line_exit(f"Delete {path}, it will be made anew; it cannot be read"), np.load(path) as file:
            return dict(file)
    arrays = make(*args)
    try:
        with made_aside(path) as new:
            np.savez(new, **arrays)
    except OSError as error:  # a folder that may only be read, a full disk
        print(f"Going on without a cache: {error}")
    return arrays


def demo_folder(folder, generate):
    """The folder with the files that generate() makes; its name carries a key() of the code."""
    path = Path(folder) / "demo" / f"{generate.__name__}_{key(generate)}"
    if not path.exists():
        with made_aside(path) as new:
            new.mkdir()
            generate(new)
    return path
