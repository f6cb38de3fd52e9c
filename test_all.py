"""Tests: no network and no data set needed, three to five minutes on two cores.

    python -m pytest test_all.py                  # everything
    python -m pytest test_all.py -k cuda          # where there is a GPU: what is different there
    GPT2_ONLINE=1 python -m pytest test_all.py -k own_weights    # downloads GPT-2
Models are tiny folders that the tests save. `toy` is a task that takes a tenth of a second."""
import contextlib, functools, hashlib, importlib, io, json, math, multiprocessing, os, pickle
import random, re, shutil, subprocess, sys, tempfile, threading, time, wave
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # tiny models: two threads only wait for each other
os.environ["HF_HUB_OFFLINE"] = str(1 - int(os.environ.get("GPT2_ONLINE", 0)))  # read at import
if os.environ["HF_HUB_OFFLINE"] == "1":  # nor does data.py find a network
    os.environ |= dict.fromkeys(["http_proxy", "https_proxy"], "http://127.0.0.1:9/")

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from rdkit import Chem
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._pytree import tree_leaves
from tqdm.auto import tqdm
from transformers import (AutoConfig, AutoModel, GPT2Config, GPT2LMHeadModel, GPT2Model,
                          WhisperForAudioClassification)

import data, fpt, train_cifar, train_cyp3a4, train_mnist_add, train_speech

HERE, TEMPORARY = Path(__file__).resolve().parent, tempfile.TemporaryDirectory()
SHARED = HERE.parent / "shared" / "data"  # real files, where they are at hand
SCRIPTS = ["train_cifar", "train_speech", "train_cyp3a4", "train_mnist_add"]
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda:0", marks=NO_GPU)])
BLOCKS = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
              initializer_range=0.2)
TEXT = BLOCKS | dict(vocab_size=50, max_position_embeddings=64)
IMAGE = BLOCKS | dict(image_size=16, patch_size=8, layer_norm_eps=1e-3)
SMALL = dict.fromkeys(fpt.TEXT, TEXT | dict(head_dim=16, num_key_value_heads=1)) | {
    **dict.fromkeys(fpt.STACKS, IMAGE), "bert": TEXT, "gpt2": dict(
        n_layer=2, n_head=2, n_embd=32, n_positions=512, vocab_size=100, initializer_range=0.2),
    "audio-spectrogram-transformer": IMAGE | dict(max_length=32, num_mel_bins=16),
    "whisper": dict(d_model=32, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=64,
                    decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=64, init_std=0.2,
                    num_mel_bins=8, max_source_positions=64, vocab_size=60, pad_token_id=0)}
INPUTS = {"whisper": (1, 8, 128), "audio-spectrogram-transformer": (1, 32, 16)}  # else images
ARCHIVE, TABLE = "speech_commands_v0.02", "cyp3a4_veith.tab"
PIXELS, LABELS = np.zeros((20, 32, 32, 3), np.uint8), np.arange(20) % 10
DIGITS = np.random.default_rng(0).integers(0, 256, (24, 28, 28), np.uint8)

# ---- Helpers -------------------------------------------------------------------------------------
def save(model, path):
    """Save it, no weight being 0 or 1, where an omission would not show."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    model.eval().save_pretrained(path)
    return model

@functools.cache
def folder(kind):
    """A folder with a tiny model of this type."""
    path = f"{TEMPORARY.name}/{kind}"
    without = {"add_pooling_layer": False} if kind == "bert" else {}  # as masked language models
    torch.manual_seed(1)  # the same model whichever test asks for it first
    save(AutoModel.from_config(AutoConfig.for_model(kind, **SMALL[kind]), **without), path)
    return path

def changed(kind, path, weights=None, files={}, **config):
    """A copy of that folder: another config, more files, its state dict changed by weights()."""
    shutil.copytree(folder(kind), path)
    config = json.loads((path / "config.json").read_text()) | config
    (path / "config.json").write_text(json.dumps(config))
    if weights:
        weights(state := load_file(path / "model.safetensors"))
        save_file(state, path / "model.safetensors", {"format": "pt"})
    put(path, files)
    return path

def put(folder, files):
    """Write {name: bytes} into a folder; None deletes."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content) if content is not None else (folder / name).unlink()

def blocks_of(model):
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList))

def toy_parser(*argv):
    sys.argv = ["train_toy.py", *map(str, argv)]
    parser = fpt.flags("toy", "a toy", steps=40, eval_every=20, lr=0.01)
    parser.set_defaults(model=folder("gpt2"), device="cpu", amp="fp32")
    parser.add_argument("--noise", type=float, default=0.0, help="std of noise on training tokens")
    return parser

def parse(*argv):
    """The flags of a script called so. Unless they say otherwise: tiny GPT-2 in fp32 on the CPU."""
    return fpt.run(toy_parser(*argv), lambda args: args)

def core(kind, *argv, inputs=4, **more):
    """An FPT on the tiny model of this type, or on that in another folder."""
    model = folder(kind) if kind in SMALL else kind
    return fpt.FPT(parse("--model", model, *argv), inputs, outputs=3, time=30, **more)

def toy(*argv, hook=lambda *_: None, sizes=(200, 40, 60), seed=0, **more):
    """Train as a script called with these words: which of 3 tokens has the largest sum? Returns the
    log's last line; the model stays in toy.model. hook(split, targets) may change a batch."""
    def main(args):
        tokens = torch.randn(sum(sizes), 3, 4, generator=torch.Generator().manual_seed(seed))
        x = dict(zip(data.SPLITS, tokens.split(sizes)))
        labels = {split: x[split].sum(2).argmax(1) for split in x}
        toy.model = fpt.FPT(args, inputs=4, outputs=3, time=3)
        def batch(split, index):
            tokens, targets = x[split][index], labels[split][index]
            tokens = tokens + args.noise * torch.randn(tokens.shape) * (split == "train")
            hook(split, targets)
            return tokens.to(args.device), None, targets.to(args.device)
        return fpt.fit(args, toy.model, batch, labels, **more)
    return fpt.run(toy_parser(*argv), main)

def stopped(evaluation, *argv):
    """Stop the toy at its first, second ... evaluation, as Ctrl-C does."""
    left = [KeyboardInterrupt] + [None] * (evaluation - 1)
    def hook(split, _):
        if split == "validation" and left.pop():
            raise KeyboardInterrupt
    pytest.raises(KeyboardInterrupt, toy, *argv, hook=hook)

def refused(says, run, *argv, **more):
    """run(*argv) ends with one line that says this. Returns its exit code, 2 for wrong flags."""
    with pytest.raises(SystemExit) as end, contextlib.redirect_stderr(io.StringIO()) as error:
        run(*argv, **more)
    error, stop = error.getvalue(), end.value.code  # a text is printed, and the exit code is 1
    line = error.splitlines()[-1] if stop == 2 else stop
    assert re.search(says, line) and "\n" not in line and "Traceback" not in error, line
    return 2 if stop == 2 else 1

CONTEXT = multiprocessing.get_context("forkserver")  # its processes have seen no GPU
CONTEXT.set_forkserver_preload(["test_all"])

def start(*argv, pause=None):
    """Train the toy in another process. pause: two events. The first is set at the first
    evaluation, which then waits for the second."""
    argv = "--model", folder("gpt2"), *argv
    process = CONTEXT.Process(target=child, args=(argv, os.getcwd(), pause))
    process.start()
    return process

def child(argv, cwd, pause):
    os.chdir(cwd)
    sys.stdout = sys.stderr = open(os.devnull, "w")
    tqdm.set_lock(threading.RLock())  # a killed process may hold the usual one, which is shared
    def hook(split, _):
        if pause and split == "validation":
            pause[0].set()
            pause[1].wait(100)
    toy(*argv, hook=hook)

def run_main(script, *argv):
    """Run a script in this process, which saves the imports. Returns the last line of its log."""
    sys.argv = [f"{script}.py", "--model", folder("gpt2"), *map(str, argv)]
    module = importlib.import_module(script)
    return fpt.run(module.parser, module.main)

def log_lines(folder):
    assert "NaN" not in (text := (folder / "log.jsonl").read_text())  # which is no JSON
    return [json.loads(line) for line in text.splitlines()]

def checkpoint(folder, name="best.pt"):
    return torch.load(f"{folder}/{name}", weights_only=True)

def outcome(folder):
    """What does not depend on stops: the log but for seconds and paths, both checkpoints."""
    passing = re.compile("seconds|^(wandb_id|model)$")
    rows = [{k: v for k, v in row.items() if not passing.search(k)} for row in log_lines(folder)]
    best, last = checkpoint(folder), checkpoint(folder, "last.pt")
    numbers = tree_leaves([best["trained"], best["step"], *map(last.get, (
        "trained", "optimizer", "scaler", "step", "best_loss"))])
    return rows, [number.tolist() if torch.is_tensor(number) else number for number in numbers]

def wav(samples, rate=16000, channels=1):
    with wave.open(buffer := io.BytesIO(), "wb") as file:
        file.setparams((channels, 2, rate, 0, "NONE", ""))
        file.writeframes(np.asarray(samples).astype("<i2").tobytes())
    return buffer.getvalue()

def npz(**changed):
    arrays = {"train_x": PIXELS, "train_y": LABELS, "test_x": PIXELS, "test_y": LABELS} | changed
    np.savez(buffer := io.BytesIO(), **arrays)
    return {"cifar10.npz": buffer.getvalue()}

def idx(images=DIGITS, labels=np.arange(24) % 10, test=DIGITS[:20], test_labels=LABELS):
    """The four files of MNIST, arrays stored as bytes."""
    arrays = {"train-images-idx3": images, "train-labels-idx1": labels,
              "t10k-images-idx3": test, "t10k-labels-idx1": test_labels}
    header = lambda x: np.array([2048 + x.ndim, *x.shape], ">i4").tobytes()
    return {f"MNIST/raw/{name}-ubyte": header(x) + x.astype(np.uint8).tobytes()
            for name, x in arrays.items()}

def clips(words="abc", root=f"SpeechCommands/{ARCHIVE}/", **changed):
    """For each word a clip of speakers s0 to s5; s4 is for validation, s5 for test."""
    rng = np.random.default_rng(0)
    files = {f"{word}/s{i}_nohash_0.wav": wav(rng.integers(-9999, 9999, 16000 - 500 * i))
             for word in words for i in range(6)}
    for name, end, listed in ("validation", "s4", words), ("testing", "s5", [*words, "zebra"]):
        lines = [f"{word}/{end}_nohash_0.wav\n\n" for word in listed]
        files[f"{name}_list.txt"] = "".join(lines).encode()
    files |= changed  # None: it is left out
    return {root + name: files[name] for name in files if files[name] is not None}

def assert_same(one, other):
    assert all(torch.equal(x, y) for split in data.SPLITS for x, y in zip(one[split], other[split]))

# ---- The model -----------------------------------------------------------------------------------
@DEVICES
@pytest.mark.parametrize("activation, saved_as, pool", [
    ("gelu_new", GPT2Model, "mean"), ("relu", GPT2LMHeadModel, "last")])
def test_ours_equals_transformers_gpt2(activation, saved_as, pool, device, tmp_path):
    config = GPT2Config(**SMALL["gpt2"], activation_function=activation, n_inner=80)
    theirs = save(saved_as(config), tmp_path)
    model, tokens = core(tmp_path, "--pool", pool), torch.randn(3, 9, 4)
    hidden = theirs.base_model(inputs_embeds=model.input(tokens)).last_hidden_state
    expected = model.output(hidden.mean(1) if pool == "mean" else hidden[:, -1])
    outputs = model.to(device)(tokens.to(device)).cpu()
    torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-5)

def test_gpt2_with_its_own_weights():
    try:
        theirs = AutoModel.from_pretrained("gpt2", dtype=torch.float32).eval()
    except OSError:
        pytest.skip("neither the hub nor its cache has GPT-2 (GPT2_ONLINE=1 downloads it)")
    model, tokens = core("openai-community/gpt2"), torch.randn(8, 3, 4)
    expected = theirs(inputs_embeds=model.input(tokens)).last_hidden_state[:, -1]
    torch.testing.assert_close(model(tokens), model.output(expected), rtol=1e-4, atol=1e-3)
    before = F.cross_entropy(model(tokens), targets := torch.arange(8) % 3)
    before.backward()
    fpt.adamw(parse("--lr", 1e-3), model).step()
    assert F.cross_entropy(model(tokens), targets) < before

@pytest.mark.parametrize("kind", fpt.TEXT + fpt.STACKS)
def test_another_core_computes_what_transformers_computes(kind):
    theirs = AutoModel.from_pretrained(folder(kind), attn_implementation="eager").eval()
    model, x = core(kind), torch.randn(2, 6, 32)
    if kind in fpt.TEXT:
        expected = theirs(inputs_embeds=x).last_hidden_state
    else:  # feed ours with what enters their first block
        encoder, seen = theirs.encoder if kind == "whisper" else theirs, []
        blocks_of(encoder)[0].register_forward_pre_hook(
            lambda _, x, more: seen.extend((*x, *more.values())), with_kwargs=True)
        expected = encoder(torch.randn(INPUTS.get(kind, (1, 3, 16, 16)))).last_hidden_state
        x = seen[0]
        table = encoder.embed_positions.weight if kind == "whisper" else torch.zeros(1024, 32)
        assert torch.equal(model.core.wpe.weight, table)
        model.core.wpe.weight.data.zero_()
    torch.testing.assert_close(model.core(x), expected, rtol=1e-4, atol=1e-5)
    model(torch.randn(2, 6, 4), torch.tensor([6, 4])).sum().backward()
    assert all((p.grad is None) == (part in ("attn", "ff")) for p, part in model.named_parts())
    whole = core(kind, "--train", "all", "--pool", "mean")
    whole(torch.randn(2, 6, 4)).sum().backward()  # several processes wait for each gradient
    assert not [name for name, p in whole.named_parameters() if p.grad is None]

@pytest.mark.parametrize("layers, pool", [(2, "mean"), (2, "last"), (0, "mean")])
@pytest.mark.parametrize("kind", SMALL)
def test_an_example_does_not_see_its_neighbours_padding(kind, pool, layers):
    model = core(kind, "--pool", pool, "--layers", layers, inputs=20, discrete=True)
    model.input.weight.data *= 10
    short, long = torch.randint(1, 20, (1, 4, 3)), torch.randint(1, 20, (1, 30, 3))
    expected, calls = torch.cat([model(short), model(long)]), []
    for block in blocks_of(model)[:1]:
        block.register_forward_hook(lambda *_: calls.append(1))
    for padding in 0, 7:
        both = torch.cat([F.pad(short, (0, 0, 0, 26), value=padding), long])
        outputs = model(both, torch.tensor([4, 30]))
        torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected[0], expected[1])
    causal = kind == "gpt2" or kind in fpt.CAUSAL  # these run all lengths together
    assert len(calls) == (0 if layers == 0 else 2 if causal else 4)

@pytest.mark.parametrize("layers", [2, 0])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma3_text", "bert", "vit", "whisper"])
def test_the_last_token_of_a_causal_core_is_read_of_others_the_mean(kind, layers):
    auto, last, mean = (core(kind, "--layers", layers, "--pool", pool)(torch.eye(4)[None])
                        for pool in ("auto", "last", "mean"))
    is_causal = layers and kind in ("gpt2", "llama", "gemma3_text")
    assert torch.equal(auto, last if is_causal else mean) and not torch.equal(last, mean)

@pytest.mark.parametrize("pretrained", [1, 0])
@pytest.mark.parametrize("kind", SMALL)
def test_layers_keeps_the_first_blocks_and_changes_no_number(kind, pretrained):
    none, one, two = (core(kind, "--pretrained", pretrained, "--layers", n) for n in (0, 1, 2))
    expected = {"core.wpe.weight": torch.zeros(1024, 32)} | dict(two.named_parameters())
    expected |= {name.replace("model.norm", "norm"): p for name, p in expected.items()}
    for part in none, one:
        assert all(torch.equal(p, expected[name]) for name, p in part.named_parameters())
    assert {part for _, part in none.named_parts()} == {"in", "out", "ln", "pos"}  # if rotary: new
    tokens = torch.randn(3, 2, 4)  # without a block there is still one nonlinearity
    expected = none.output(F.gelu(none.core(none.input(tokens))).mean(1))
    torch.testing.assert_close(none(tokens), expected)

@pytest.mark.parametrize("kind, argv, numbers", [
    ("gpt2", [], [-0.1142, -0.4127, 0.5305]), ("bert", [], [2.1253, -0.2448, 0.8380]),
    ("vit", [], [-1.5017, 1.1537, -0.1582]), ("whisper", [], [-1.3545, -0.2972, -1.3707]),
    ("dinov2", [], [-0.8631, 0.3192, 1.4675]),
    ("gpt2", ["--init_std=0.02", "--seed=1"], [1.7975, -1.3648, 0.5243])])
def test_random_cores_are_the_same_on_every_machine(kind, argv, numbers):
    model = core(kind, "--pretrained", 0, *argv, inputs=500)
    assert [model.fingerprint[i] for i in (0, 1, 16)] == pytest.approx(numbers, abs=1e-3)
    assert model.input(torch.randn(1, 200, 500)).std().item() == pytest.approx(0.1, rel=0.1)

@pytest.mark.parametrize("train", ["in,out,ln,pos", "out", "ln", "attn", "in,ff", "all"])
def test_only_the_named_parts_are_trained_and_saved(tmp_path, train):
    parts = {"input": "in", "output": "out", "ln_": "ln", "wpe": "pos", "attn": "attn", "mlp": "ff"}
    before = dict(core("gpt2", "--train", train).named_parameters())
    toy("--out", tmp_path, "--train", train, "--steps", 3)
    for name, parameter in toy.model.named_parameters():
        part = next(part for word, part in parts.items() if word in name)
        named = train == "all" or part in train.split(",")
        saved = name in checkpoint(tmp_path)["trained"]
        assert saved == named == (not torch.equal(parameter, before[name])), name

# ---- The training loop ---------------------------------------------------------------------------
def test_a_run_learns_and_its_log_is_complete(tmp_path, capsys):
    def metrics(outputs, targets):
        return fpt.accuracy(outputs, targets) | {"nothing": torch.tensor(math.nan)}
    toy("--out", tmp_path, "--steps", 200, "--eval_every", 50, "--seed", 3, metrics=metrics)
    *rows, last = log_lines(tmp_path)
    assert [row["step"] for row in rows] == [50, 100, 150, 200]
    assert rows[3]["train_loss"] < rows[0]["train_loss_first"]
    assert rows[0]["validation_nothing"] is last["test_nothing"] is None  # JSON's null
    assert last["test_accuracy"] > last["test_majority_accuracy"] + 0.2
    assert {"seed": 3, "lr": 0.01, "model": folder("gpt2")}.items() <= last.items()
    printed = capsys.readouterr().out
    assert all(f"| {name.replace('_', ' ')} " in printed for name in rows[0])

def test_the_best_checkpoint_has_the_lowest_validation_loss_and_is_tested_once(tmp_path):
    seen = []
    def hook(split, targets):
        if split != "train":
            seen.append((split, toy.model.input.weight.tolist()))
        if split == "validation" and len(seen) != 3:
            targets.copy_((targets + 1) % 3)  # wrong, but in the third evaluation
    toy("--out", tmp_path, "--steps", 25, "--eval_every", 5, hook=hook)
    best = checkpoint(tmp_path)
    assert [split for split, _ in seen] == ["validation"] * 5 + ["test"]
    assert seen[2][1] == seen[5][1] == best["trained"]["input.weight"].tolist()
    assert best["step"] == log_lines(tmp_path)[-1]["step"] == 15

@DEVICES
def test_eval_gives_the_same_figures_writes_nothing_and_moves_to_the_cpu(tmp_path, device):
    seen, argv = [], ("--eval", tmp_path / "best.pt", "--out", tmp_path / "new", "--seed", 3)
    trained = toy("--out", tmp_path, "--train", "in,out", "--seed", 3, "--device", device,
                  "--test", 0, hook=lambda split, _: seen.append(split))
    assert seen.count("validation") == len(log_lines(tmp_path)) - 1 and "test" not in seen
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    evaluated = toy(*argv, "--device", device)
    assert evaluated.items() <= trained.items() and "validation_loss" in evaluated
    one = toy(*argv, "--device", device, "--test", 1)["test_loss"]
    other = toy(*argv, "--device", "cpu", "--batch_size", 7, "--test", 1)["test_loss"]
    assert other == pytest.approx(one, rel=1e-4)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before

@DEVICES
@pytest.mark.parametrize("argv, tolerance", [
    ("--amp bf16", 0.15), ("--amp fp16", 0.15), ("--compile 1", 1e-4),
    ("--batch_size 16 --accumulate 2", 1e-4)])
def test_other_ways_to_train_give_the_same(argv, tolerance, tmp_path, monkeypatch, device):
    if device == "cpu":  # all of torch.compile but the C++ compiler, which takes a minute
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.utils.counters.clear()
    common = "--device", device, "--steps", 100 if "amp" in argv else 3, "--out"
    plain = toy(*common, tmp_path / "plain")
    other = toy(*common, tmp_path / "other", *argv.split())
    assert other["test_loss"] == pytest.approx(plain["test_loss"], abs=tolerance)
    frozen, dtype = toy.model.core.h[0].mlp.c_fc.weight, fpt.PRECISIONS.get(argv[6:], torch.float32)
    assert (frozen.dtype, toy.model.input.weight.dtype) == (dtype, torch.float32)
    assert ("unique_graphs" in torch._dynamo.utils.counters["stats"]) == ("compile" in argv)

@NO_GPU
@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("flag", ["--amp=bf16", "--amp=fp16", "--compile=1"])
def test_no_step_waits_and_few_lengths_are_compiled_cuda(script, flag, tmp_path, monkeypatch):
    rate, argv = fpt.learning_rate, "--demo 1 --steps 20 --eval_every 20 --device cuda:0"
    def strict(args, step):  # waiting is an error, but in the last step, which evaluates
        torch.cuda.set_sync_debug_mode(2 if step < args.steps and not args.compile else 0)
        return rate(args, step)
    monkeypatch.setattr(fpt, "learning_rate", strict)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with contextlib.ExitStack() as stack:
        stack.callback(torch.cuda.set_sync_debug_mode, 0)
        run_main(script, *argv.split(), flag, "--out", tmp_path)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] < 7

def test_the_learning_rate_warms_up_and_matrices_decay(tmp_path):
    toy("--out", tmp_path)
    rates = [fpt.learning_rate(parse("--lr", 1), step) for step in range(1, 41)]
    assert rates[0] == 1 / 4 and rates.index(max(rates)) == 3 and 0 < rates[-1] < 0.01
    last = checkpoint(tmp_path, "last.pt")["optimizer"]
    decays = {i: group["weight_decay"] for group in last["param_groups"] for i in group["params"]}
    matrices = [last["state"][i]["exp_avg"].shape for i in decays if decays[i]]
    assert sorted(matrices) == [(3, 32), (32, 4)]  # of the output and input layers
    assert len(decays) == 2 + 2 + 1 + 2 * 5  # also two biases, the positions and five norms
    assert last["param_groups"][1]["lr"] == pytest.approx(0.01 * rates[-1])

def test_batches_cover_an_epoch_and_group_lengths():
    feed = data.batches(100, 10, seed=0)
    first, second = (torch.cat([next(feed) for _ in range(10)]).tolist() for _ in "ab")
    assert sorted(first) == sorted(second) == list(range(100)) and first != second
    lengths = torch.randint(5, 60, (3200,), generator=torch.Generator().manual_seed(0))
    feed = data.batches(3200, 32, seed=0, lengths=lengths)
    epoch = torch.stack([lengths[next(feed)] for _ in range(100)])
    longest = epoch.amax(1)
    assert epoch.sum() == lengths.sum() > 0.9 * 32 * longest.sum() and (longest.diff() < 0).any()

@pytest.mark.parametrize("bad_from", [25, 40])  # 40: the evaluation alone sees it
def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, monkeypatch, bad_from):
    monkeypatch.setattr(fpt, "learning_rate", lambda _, step: 0.01 if step < bad_from else math.nan)
    refused("finite", toy, "--out", tmp_path)
    for saved in checkpoint(tmp_path), checkpoint(tmp_path, "last.pt"):
        assert saved["step"] == 20 and all(p.isfinite().all() for p in saved["trained"].values())

# ---- Runs that are stopped, checkpoints of other runs --------------------------------------------
@pytest.mark.parametrize("amp, kills", [("fp32", int(os.environ.get("KILLS", 8))), ("fp16", 2)])
def test_a_run_killed_again_and_again_equals_the_uninterrupted_one(tmp_path, amp, kills):
    argv = "--steps", 150, "--eval_every", 3, "--noise", 0.5, "--accumulate", 2, "--amp", amp
    start("--steps", 1, "--out", tmp_path / "first").join()  # the imports are not to be timed
    begin = time.time()
    start(*argv, "--out", tmp_path / "whole").join()
    seconds = time.time() - begin
    while kills > 0:
        out, code = tmp_path / f"killed-{kills}", -9
        while code:
            process = start(*argv, "--out", out, "--resume", int((out / "last.pt").exists()))
            process.join(random.uniform(0, seconds / 2))
            process.kill()
            process.join()
            code = process.exitcode
            assert code in (0, -9)  # finished or killed
            kills += code // 9
        assert outcome(out) == outcome(tmp_path / "whole")

def flip(state):  # the sign of a matrix in the second block
    state[next(name for name in sorted(state) if "1." in name and state[name].ndim == 2)] *= -1

@pytest.mark.parametrize("train", ["in,out,ln", "all"])
@pytest.mark.parametrize("kind, change", [
    ("bert", dict(weights=flip)), ("bert", dict(num_attention_heads=4)),
    ("bert", dict(hidden_act="relu")), ("bert", dict(layer_norm_eps=1e-3)),
    ("gpt2", dict(weights=flip)), ("gpt2", dict(n_head=4)), ("gpt2", dict(layer_norm_epsilon=1e-3)),
    ("gpt2", dict(activation_function="relu")), ("llama", dict(rms_norm_eps=1e-2))], ids=str)
def test_a_checkpoint_belongs_to_what_its_core_computes(kind, change, train, tmp_path):
    toy("--model", folder(kind), "--out", tmp_path, "--steps", 2, "--train", train)
    other = changed(kind, tmp_path / "other", **change)
    assert refused("core", toy, "--eval", tmp_path / "best.pt", "--model", other) == 1

@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_the_same_core_saved_again_or_moved_is_accepted_and_no_other_is_resumed(kind, tmp_path):
    model, again, run = tmp_path / "moved", tmp_path / "again", ["--out", tmp_path / "run"]
    shutil.copytree(folder(kind), model)
    AutoModel.from_pretrained(model).save_pretrained(again)
    stopped(2, *run, "--model", model)
    one, *others = (toy("--eval", tmp_path / "run" / "best.pt", "--model", each)
                    for each in (folder(kind), model, again))
    assert others == [one, one]
    assert refused("model", toy, *run, "--resume", 1, "--model", again) == 2
    shutil.rmtree(model)
    changed(kind, model, flip)
    assert refused("core", toy, *run, "--resume", 1) == 1

@pytest.mark.parametrize("other", [
    dict(sizes=(201, 40, 60)), dict(sizes=(200, 40, 59)), dict(seed=1)], ids=str)  # other labels
def test_a_run_belongs_to_its_data(other, tmp_path):
    stopped(2, "--out", tmp_path)
    refused("data", toy, "--resume", 1, "--out", tmp_path, **other)
    refused("data", toy, "--eval", tmp_path / "best.pt", **other)
    assert toy("--resume", 1, "--out", tmp_path)["step"] == 40

# ---- Folders, processes, notebooks, Weights & Biases ---------------------------------------------
def test_a_folder_holds_one_run_and_runs_started_at_once_take_others(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pauses = [(CONTEXT.Event(), CONTEXT.Event()) for _ in range(2)]
    first, second = (start(pause=pause) for pause in pauses)
    assert all(pause[0].wait(100) for pause in pauses)  # both are in their first evaluation
    refused("runs/toy ", toy, "--out", "runs/toy")
    toy()
    pauses[0][1].set()
    first.join()
    second.kill()
    second.join()
    runs = sorted(Path("runs").iterdir())
    assert [run.name for run in runs] == ["toy", "toy-2", "toy-3"]
    killed, = [run for run in runs if not (run / "last.pt").exists()]
    toy("--out", killed)  # it is free
    assert outcome(runs[0]) == outcome(runs[1]) == outcome(runs[2])
    refused("holds a run", toy, "--out", killed)

def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    changed("gpt2", tmp_path / "m")
    toy("--out=~/o", "--model=~/m", "--steps", 1)
    args = parse("--eval=~/o/best.pt", "--predict=~/p", "--data=~/d", "--out=~/o", "--model=~/m")
    paths = args.eval, args.predict, args.data, args.out, args.model
    assert all(path.startswith(f"{tmp_path}/") for path in paths) and not Path("~").exists()

TORCHRUN = """import json, sys, test_all, torch.distributed as dist
start, dist.destroy_process_group = dist.init_process_group, lambda: None  # once for all calls
dist.init_process_group = lambda *a, **more: dist.is_initialized() or start(*a, **more)
for argv, more in json.loads(sys.argv[1]):
    test_all.toy(*argv, **more)"""

def test_two_processes_equal_one_and_a_run_resumes_with_another_number(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["--eval_every", "10", "--batch_size", "16", "--model", folder("gpt2"), "--out"]
    eleven, few = {"sizes": (11, 40, 60)}, {"sizes": (1, 40, 60)}
    toy(*argv, "one")
    stopped(3, *argv, "one-two")
    toy(*argv, "eleven", "--batch_size", 10, **eleven)
    calls = [([*argv, "two"], {}), (["--resume", "1", "--out", "one-two"], {}),
             ([*argv, "eleven-two"], eleven), ([*argv, "few"], few)]
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node=2 --".split()
    Path("script.py").write_text(TORCHRUN)
    ended = subprocess.run(
        [sys.executable, *torchrun, "script.py", json.dumps(calls)], timeout=200, text=True,
        env=os.environ | {"PYTHONPATH": str(HERE)}, stderr=subprocess.PIPE)
    assert ended.returncode and re.search("too (few|little)", ended.stderr), ended.stderr
    for two, one in ("two", "one"), ("one-two", "one"), ("eleven-two", "eleven"):
        rows, wanted = log_lines(tmp_path / two), log_lines(tmp_path / one)
        assert [row["step"] for row in rows] == [row["step"] for row in wanted]
        for row, expected in zip(rows, wanted):
            for figure in filter(re.compile("(validation|test)_(loss|acc)").search, expected):
                assert row[figure] == pytest.approx(expected[figure], rel=1e-3), (two, figure)

@pytest.mark.parametrize("world", [None, "2"])
def test_half_an_environment_of_torchrun_is_refused(world, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", world) if world else None
    assert refused("MASTER_ADDR", toy, "--out", tmp_path) == 2

@pytest.mark.parametrize("cpu, amp", [("Intel Xeon", "fp32"), ("AMD EPYC", "bf16")])
def test_a_cpu_trains_in_bf16_if_that_is_faster(cpu, amp, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict(cpu_name=cpu, avx512_bf16=1))
    assert parse("--amp", "auto").amp == amp

def test_the_arguments_of_a_notebook_are_ignored():
    for launcher in "ipykernel_launcher.py", "ipykernel/__main__.py", "colab_kernel_launcher.py":
        parser, sys.argv = toy_parser(), [f"/somewhere/{launcher}", "-f", "kernel-1.json"]
        assert fpt.run(parser, lambda args: args.steps) == 40

def test_every_script_runs_in_a_notebook_cell(tmp_path):
    import nbclient, nbformat
    cells = []
    for script in SCRIPTS:
        words = f"x.py --demo 1 --steps 2 --model {folder('gpt2')} --out {tmp_path / script}"
        cells += [f"import sys; sys.argv = {words.split()}", (HERE / f"{script}.py").read_text()]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(x) for x in cells])
    nbclient.execute(notebook, str(HERE), timeout=300)
    assert all(log_lines(tmp_path / script)[-1]["step"] == 2 for script in SCRIPTS)

def test_weights_and_biases_offline_and_the_same_run_after_a_stop(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    for name, value in ("MODE", "offline"), ("INIT_TIMEOUT", "300"), ("_SERVICE_WAIT", "300"):
        monkeypatch.setenv(f"WANDB_{name}", value)
    stopped(2, "--out", tmp_path, "--wandb", "fpt-test")
    wandb.finish()
    toy("--resume", 1, "--out", tmp_path)
    wandb.finish()
    monkeypatch.setitem(sys.modules, "wandb", None)  # not needed to evaluate
    assert "test_loss" in toy("--eval", tmp_path / "best.pt")
    files = list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))  # one or two
    name, content = checkpoint(tmp_path)["flags"]["wandb_id"], b"".join(map(Path.read_bytes, files))
    assert {path.name for path in files} == {f"run-{name}.wandb"}
    assert all(word in content for word in (b"validation_acc", b"test_accuracy", b"eval_every"))

@pytest.mark.parametrize("prepare", ["sys.modules['wandb'] = None", "'nobody is logged in'"])
def test_without_weights_and_biases_a_run_ends_before_any_work(prepare, tmp_path):
    code = f"import sys; {prepare}; import train_cifar as s; s.fpt.run(s.parser, print)"
    environment = {name: os.environ[name] for name in os.environ if not name.startswith("WANDB")}
    environment |= {"HOME": str(tmp_path), "PYTHONPATH": str(HERE), "WANDB_MODE": "online"}
    ended = subprocess.run(
        [sys.executable, "-c", code, "--demo", "1", "--wandb", "P"], cwd=tmp_path, text=True,
        env=environment, timeout=200, stdin=subprocess.DEVNULL, capture_output=True)
    assert ended.returncode == 2 and "Namespace" not in ended.stdout  # what main() would print
    assert "--wandb" in ended.stderr.splitlines()[-1] and "Traceback" not in ended.stderr

# ---- The data sets -------------------------------------------------------------------------------
def test_cifar10_from_its_archive_and_from_an_npz(tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.utils.check_md5", lambda *_: True)  # ours is another
    pixels = np.random.default_rng(0).integers(0, 256, (120, 3072), np.uint8)
    labels = pixels[:, 0] % 10
    files = {"batches.meta": {"label_names": list("abcdefghij")}}
    for i, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        part = slice(20 * i, 20 * i + 20)
        files[name] = {"data": pixels[part], "labels": labels[part].tolist()}
    put(tmp_path / "to/cifar-10-batches-py", {x: pickle.dumps(files[x]) for x in files})
    shutil.make_archive(tmp_path / "cifar-10-python", "gztar", tmp_path / "to")
    splits = data.cifar10(tmp_path)
    images, y = torch.tensor(pixels).view(-1, 3, 32, 32).movedim(1, 3), torch.tensor(labels).long()
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    parts = [(images[i], y[i]) for i in (order[10:], order[:10], torch.arange(100, 120))]
    assert_same(splits, dict(zip(data.SPLITS, parts)))
    put(tmp_path / "npz", npz(train_x=images[:100], train_y=y[:100, None],
                              test_x=images[100:], test_y=y[100:]))
    assert_same(splits, data.cifar10(tmp_path / "npz"))

def test_mnist_from_its_files(tmp_path, monkeypatch, capsys):
    put(tmp_path, idx())
    splits = data.mnist(tmp_path)
    assert [len(y) for _, y in splits.values()] == [22, 2, 20]
    assert all(map(torch.equal, splits["test"], map(torch.tensor, (DIGITS[:20], LABELS))))
    assert "not the original MNIST" in capsys.readouterr().out
    content = b"".join(file[16 if "images" in name else 8:] for name, file in idx().items())
    monkeypatch.setattr(data, "MNIST_SHA256", hashlib.sha256(content).hexdigest())
    assert data.mnist(tmp_path) and not capsys.readouterr().out

def test_speech_commands_from_its_archive(tmp_path):
    hidden = "_background_noise_/hum.wav", ".git/hum.wav", "no/._s0_nohash_0.wav", "empty/a.txt"
    files = clips(["yes", "no"], root="", **dict.fromkeys(hidden, b"no sound"))
    put(tmp_path / "to", files)
    shutil.make_archive(tmp_path / ARCHIVE, "gztar", tmp_path / "to")
    splits = data.speech_commands(tmp_path)
    assert splits["words"] == ["no", "yes"] and splits["test"][0].dtype == torch.int16
    for split, speakers in zip(data.SPLITS, ("0123", "4", "5")):
        names = [f"{word}/s{i}_nohash_0.wav" for word in ("no", "yes") for i in speakers]
        for name, samples, label in zip(names, *splits[split], strict=True):
            assert samples.numpy().tobytes() == files[name][44:].ljust(32000, b"\0")
            assert splits["words"][label] == name.split("/")[0]

def test_cyp3a4_from_its_table(tmp_path, monkeypatch):
    molecules = {"Cc1ccccc1": 1, "CCc1ccccc1": 0, "NC1CCCCC1": 1, "CCO": 0, "C[C@H](N)C(=O)O": 0}
    head, content = "Drug_ID\tDrug\tY\n", "".join(f"{x}\t{molecules[x]}\n" for x in molecules)
    lines = [f'7.0\t"{smiles}"\t"{label}.0"\n' for smiles, label in molecules.items()]
    put(tmp_path, {"served.tab": "".join([head, *lines]).encode()})
    monkeypatch.setattr(data, "CYP3A4_URL", (tmp_path / "served.tab").as_uri())
    monkeypatch.setattr(data, "CYP3A4_SHA256", hashlib.sha256(content.encode()).hexdigest())
    splits, read = data.cyp3a4(tmp_path), {}
    for ids, lengths, labels in map(splits.get, data.SPLITS):
        for one, length, label in zip(ids, lengths, labels):
            read["".join(chr(32 + i) for i in one[:length])] = label.item()
    assert read == molecules
    put(tmp_path, {TABLE: "".join([head, *lines[::-1]]).encode()})  # would be split otherwise
    refused("5 molecules", data.cyp3a4, tmp_path)

@pytest.mark.parametrize("tokens", ["smiles", "atoms"])
def test_one_molecule_has_the_same_ids_however_it_is_written(tokens):
    for one, other in (
            ("Clc1ccc(CO/N=C(/Cn2ccnc2)c2ccc(Cl)cc2Cl)c(Cl)c1",
             "ClC1=CC(Cl)=C(CO/N=C(/CN2C=CN=C2)C2=C(Cl)C=C(Cl)C=C2)C=C1"),
            ("CCO", "OCC"), ("CCO", " [CH3]CO\n")):
        assert torch.equal(*(data.molecule_ids(smiles, tokens) for smiles in (one, other)))
    for smiles in "CCO ethanol", "CCO\tethanol", "C1CC", "", " ", "CCÖ", "CC\x00O":
        assert data.molecule_ids(smiles, tokens) is None

def test_molecules_as_tokens():
    toluene, ethyl = (data.molecule_ids(x, "atoms") for x in ("Cc1ccccc1", "CCc1ccccc1"))
    assert toluene.shape == (7, 4) and 0 < toluene[:, :3].min() < ethyl.max() <= data.BUCKETS
    assert toluene[0, 0] == ethyl[0, 0] and toluene[0, 1] != ethyl[0, 1]  # two methyl carbons
    assert data.molecule_ids("C.CO", "atoms")[:, 1].gt(0).tolist() == [False, True, True]

def test_the_scaffold_split_by_hand():
    # random.Random(0).shuffle turns the groups a b c d into c a b d.
    scaffolds = ["a", "b", "a", "c", "d", "c", "c", "b", "a", "d"]
    assert data.scaffold_split(scaffolds, 0.7) == ([3, 5, 6, 0, 2, 8], [1, 7, 4, 9])
    assert data.scaffold_split(scaffolds, 0.8) == ([3, 5, 6, 0, 2, 8, 1, 7], [4, 9])

@pytest.mark.skipif(not SHARED.exists(), reason="the real files are not here")
def test_the_real_cyp3a4_has_the_published_split(tmp_path):
    shutil.copy(SHARED / TABLE, tmp_path)
    splits = data.cyp3a4(tmp_path)
    assert [len(y) for *_, y in splits.values()] == [8875, 987, 2466]
    assert sum(y.sum() for *_, y in splits.values()) == 5110  # inhibitors
    table = [line.split("\t")[1] for line in (tmp_path / TABLE).read_text().splitlines()[1:]]
    row = {Chem.CanonSmiles(smiles.strip('"')): i for i, smiles in enumerate(table)}
    # The test rows that PyTDC 1.1.15's create_scaffold_split(df, 0, [0.8, 0.2, 0], "Drug") gives
    rows = [row["".join(chr(32 + i) for i in ids if i)] for ids in splits["test"][0].tolist()]
    digest = hashlib.sha256(",".join(map(str, rows)).encode()).hexdigest()
    assert digest == "883f4b4070a15886f17e6f57b29941e72cde3500934ab23d3b0ca3e9a7b401e0"

def test_the_cache_of_speech_depends_on_the_clips_and_the_version(tmp_path, monkeypatch):
    put(tmp_path, clips())
    first = data.speech_commands(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(wave, "open", lambda *_: pytest.fail("decoded again"))
        assert_same(first, data.speech_commands(tmp_path))
    put(tmp_path / f"SpeechCommands/{ARCHIVE}/a", {"s5_nohash_0.wav": wav(np.full(13500, 5))})
    assert data.speech_commands(tmp_path)["test"][0][0, 0] == 5
    monkeypatch.setattr(data, "CACHE_VERSION", -1)
    data.speech_commands(tmp_path)
    assert len(caches := list(tmp_path.glob("speech_*.npy"))) == 3
    for cache in caches:
        os.truncate(cache, 5000)
    refused("delete", data.speech_commands, tmp_path)

@pytest.mark.parametrize("dtype, suffix, scale", [
    (np.uint8, "png", 1), (np.uint16, "png", 257), (np.int32, "tif", 257)])
def test_an_image_of_any_depth_is_read_upright_and_on_the_ground(dtype, suffix, scale, tmp_path):
    ramp, exif, path = np.arange(256).reshape(16, 16), Image.Exif(), tmp_path / f"ramp.{suffix}"
    exif[0x0112] = 3  # upside down
    Image.fromarray((ramp * scale).astype(dtype)).save(path, exif=exif)
    assert data.read_image(path, "L", 16, 0).tolist() == ramp[::-1, ::-1].tolist()
    Image.new("RGBA", (8, 8)).save(path)  # transparent
    assert data.read_image(path, "RGB", 8, 200).unique().tolist() == [200]

@pytest.mark.parametrize("mode, paper, told", [("L", 250, True), ("L", 10, False), ("RGB", 250, 0)])
def test_ink_on_paper_is_told(mode, paper, told, tmp_path, capsys):
    digit = Image.new("L", (50, 40), paper)
    digit.paste(260 - paper, (20, 5, 30, 35))
    digit.save(tmp_path / "one.png")
    data.read_image(tmp_path / "one.png", mode, 28, 0)
    assert ("one.png is dark on light" in capsys.readouterr().out) == told

# ---- The scripts ---------------------------------------------------------------------------------
def test_patches_are_squares_in_reading_order():
    rows, columns = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    tokens = train_cifar.to_tokens(torch.stack([rows, columns, rows], 2)[None], 8)
    mean, std = torch.tensor(train_cifar.MEAN), torch.tensor(train_cifar.STD)
    square = (tokens[0, 6].view(8, 8, 3) * std + mean) * 255  # second row of patches, third column
    assert square[:, 0, 0].round().tolist() == list(range(8, 16))
    assert square[0, :, 1].round().tolist() == list(range(16, 24))

def test_augmentation_moves_a_little_and_invents_nothing():
    image = torch.arange(32, dtype=torch.uint8).expand(32, 32)
    images = torch.stack([image.T, image, image], 2).expand(200, 32, 32, 3)
    moved = train_cifar.augment(images).int()
    steps = moved[:, 16, :, 1].diff(dim=1)
    assert 60 < (steps < 0).any(1).sum() < 140 and set(steps.unique().tolist()) <= {-1, 0, 1}
    assert set((moved[:, 16, 16, 0] - 16).tolist()) == set(range(-4, 5))
    clips = torch.arange(100.0).expand(50, 100)
    moved = train_speech.augment(clips)
    assert torch.equal(moved.sort(1).values, clips) and 40 <= moved[:, 50].min() < 45

def test_metrics_by_hand():
    def figures(score, targets):
        score = torch.tensor(score)
        metrics = train_cyp3a4.metrics(torch.stack([-score, score], 1), torch.tensor(targets))
        return [value.item() for value in metrics.values()]  # accuracy, majority, AUROC, AUPRC
    assert figures([0.4, 0.3, 0.2, -0.1, -0.2], [1, 0, 1, 1, 0]) == pytest.approx(
        [3 / 5, 3 / 5, 4 / 6, (1 / 1 + 2 / 3 + 3 / 4) / 3])  # 4 of the 6 pairs are in order
    ties = figures([0.5, 0.5, 0.5, 0.1], [1, 0, 0, 1])
    assert ties == pytest.approx([1 / 2, 1 / 2, (0.5 + 0.5) / 4, (1 / 3 + 2 / 4) / 2])

def test_sums_use_every_digit_equally_and_l1_is_the_absolute_error_of_the_sum(tmp_path):
    index = data.sum_indices(100, 5)
    assert index.shape == (100, 5) and (index.flatten().bincount() == 5).all()
    argv = f"--demo 1 --layers 0 --n 3 --steps 1 --loss l1 --out {tmp_path}".split()
    result = run_main("train_mnist_add", *argv)
    error = result["test_loss"] * 2.87 * 3 ** 0.5  # the reported one is of rounded sums
    assert error == pytest.approx(result["test_mae"], abs=0.26)

def test_each_demo_alone_learns_without_a_network_on_cuda_if_there_is_one(tmp_path):
    environment, processes = os.environ | {"WORLD_SIZE": "2"}, {}  # some clusters set that
    for script in SCRIPTS:
        (tmp_path / script).mkdir()
        processes[script] = subprocess.Popen(
            [sys.executable, HERE / f"{script}.py", "--demo", "1"], cwd=tmp_path / script,
            env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    for script, process in processes.items():
        printed, name = process.communicate(timeout=300)[0], script.removeprefix("train_")
        assert process.returncode == 0 and "DEMO" in printed, printed
        *rows, last = log_lines(tmp_path / script / "runs" / f"{name}-demo")
        assert last["test_accuracy"] > last["test_majority_accuracy"] + 0.25
        assert last["pretrained"] == 0 and last["layers"] == 2 and last.get("test_mae", 0) < 1
        assert min(last.get("test_auroc", 1), last.get("test_auprc", 1)) > 0.7

@pytest.mark.parametrize("script, argv, given, classes", [
    ("train_cifar", "--patch_size 16", "{0}/a.png", " ".join(train_cifar.CLASSES)),
    ("train_speech", "--tokens wave", "{0}/a.wav", "a b c d e f"),
    ("train_cyp3a4", "--tokens atoms", "CC(=O)Nc1ccc(O)cc1", "inhibitor not"),
    ("train_mnist_add", "--n 2", "{0}/a.png,{0}/a.png", " ".join(map(str, range(19))))])
def test_a_script_trains_evaluates_and_predicts(script, argv, given, classes, tmp_path, capsys):
    argv, results = [*argv.split(), "--demo", 1, "--steps", 4, "--eval_every", 4], []
    for kind, pretrained in ("gpt2", 0), ("gpt2", 1), ("dinov2", 1):
        out, model = tmp_path / f"{kind}{pretrained}", ["--model", folder(kind)]
        results.append(run_main(script, *model, *argv, "--pretrained", pretrained, "--out", out))
        again = run_main(script, *model, "--eval", out / "best.pt")
        assert again.items() <= results[-1].items() and "test_loss" in again
    differ = {name for name in again if results[0][name] != results[1][name]}
    assert "test_loss" in differ and "trainable_parameters" not in differ
    Image.fromarray(np.arange(2700, dtype=np.uint8).reshape(30, 30, 3)).save(tmp_path / "a.png")
    put(tmp_path, {"a.wav": wav(np.arange(20000) % 500)})
    capsys.readouterr()
    argv = "--eval", out / "best.pt", "--data", "none"  # the checkpoint is enough
    run_main(script, *model, *argv, "--predict", given.format(tmp_path))
    shares, names = zip(*re.findall(r"^ *([\d.]+)%  (\w+)", capsys.readouterr().out, re.MULTILINE))
    assert set(names) <= set(classes.split()) and len(names) == min(10, len(classes.split()))
    assert list(shares) == sorted(shares, key=float)[::-1] and sum(map(float, shares)) <= 100.1

@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_examples_and_explains_every_flag(script, capsys):
    with pytest.raises(SystemExit, match="0"):
        run_main(script, "--help")
    text = capsys.readouterr().out
    assert f"python {script}.py --demo 1" in text
    assert text.count("(default:") >= len(re.findall(r"^  --\w+", text, re.MULTILINE)) > 23

# ---- Bad input: one line, exit code 2 for wrong flags and 1 for the rest, no traceback -----------
def add(name, *shape):
    return lambda state: state.update({name: torch.zeros(shape)})

def spoil(state):
    next(iter(state.values())).view(-1)[0] = math.nan

CODE = dict(auto_map={"AutoConfig": "code.Config", "AutoModel": "code.Model"},
            files={"code.py": b"open('was-run', 'w')"})
MODELS = [  # what the line says (None: it is accepted), model type, what is changed
    ("attention", "gpt2", dict(is_causal=False)),
    ("transformers", "llama", dict(transformers_version="99.0.0")),
    ("q_proj.bias", "llama", dict(weights=add("layers.0.self_attn.q_proj.bias", 32))),
    ("scale_inv", "llama", dict(weights=add("layers.0.mlp.up_proj.weight_scale_inv", 1, 1))),
    (r"h\.1", "gpt2", dict(n_layer=1)), (r"h\.[23]", "gpt2", dict(n_layer=4)),
    ("finite", "gpt2", dict(weights=spoil)), ("it is t5", "gpt2", dict(model_type="t5")),
    ("surprise|code", "gpt2", dict(model_type="surprise", **CODE)), (None, "bert", CODE),
    ("merge", "gpt2", dict(files={"adapter_config.json": b"{}"})),
    ("file", "gpt2", dict(files={"model.safetensors": None})),
    (None, "gpt2", dict(weights=add("h.0.attn.bias", 1, 1, 512, 512))),  # buffers of old files
    (None, "gpt2", dict(weights=add("score.weight", 2, 32)))]  # a head

@pytest.mark.parametrize("says, kind, change", MODELS, ids=str)
def test_a_model_is_used_as_it_is_or_refused_at_once(says, kind, change, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *_: "yes")  # nobody should be asked
    model, begin = changed(kind, tmp_path / "model", **change), time.time()
    if says is None:
        assert torch.equal(core(model)(torch.ones(2, 3, 4)), core(kind)(torch.ones(2, 3, 4)))
    else:
        assert refused(f"^Cannot load --model {model}: .*{says}", core, model) == 1
    assert not Path("was-run").exists() and time.time() - begin < 10

def test_the_encoder_of_a_whisper_for_classification_is_whole(tmp_path):
    config = AutoConfig.for_model("whisper", **SMALL["whisper"])
    weight = save(WhisperForAudioClassification(config), tmp_path).encoder.layers[1].fc1.weight
    assert torch.equal(core(tmp_path).core.blocks[1].fc1.weight, weight)

class Trap:  # a checkpoint that would run code
    def __reduce__(self):
        return os.system, ("touch was-run",)

FAKE = dict(trained={}, fingerprint=[0], splits={}, step=0, flags={"task": "cyp3a4", "layers": 0})
MADE = {  # what a case names in braces
    "trap": lambda path: torch.save(FAKE | {"trained": Trap()}, path),
    "molecules": lambda path: torch.save(FAKE, path), "old": lambda path: torch.save({}, path),
    "empty": lambda path: [toy("--out", path, "--steps", 1), torch.save(
        checkpoint(path) | {"trained": {}}, path / "best.pt")],
    "run": lambda path: toy("--out", path, "--steps", 1)}
BAD_INPUT = [  # script, flags, exit code, what the line says, whether a GPU would do
    *[("cifar", flag, 2, re.split("[ =]", flag)[0]) for flag in (
        "--layers -1", "--init_std -1", "--steps 0", "--batch_size -4", "--accumulate 0",
        "--lr nan", "--eval_every 0", "--seed -1", "--steps many", "--train in,nose",
        "--pool first", "--layers 0 --train in,attn", "--init_std 0.1", "--predict cat.png",
        "--predict=", "--nonsense", "--device abacus", "--resume 1")],
    ("cifar", "--device cuda", 2, "--device", "no GPU"), ("mnist_add", "--n 0", 2, "--n"),
    ("cifar", "--resume 1 --out typo", 1, "typo/last.pt"),
    ("cifar", "--pretrained 0 --model gpt2 --layers 13", 1, "12 blocks"),
    ("toy", "--model LLAMA --train pos", 1, "--train pos"), ("mnist_add", "--n 513", 1, "512 pos"),
    ("cyp3a4", "--eval {molecules} --predict C1CC", 1, "C1CC"),
    ("cifar", "--model nobody/no-model", 1, "Cannot load"), ("cifar", "--eval no.pt", 1, "no.pt"),
    ("cifar", "--eval=", 1, "not a checkpoint"), ("cifar", "--eval {trap}", 1, "Unpickling"),
    ("cifar", "--eval {run}/best.pt", 2, "toy"), ("cifar", "--resume 1 --out {run}", 2, "toy"),
    ("toy", "--resume 1 --out {run} --eval {run}/best.pt", 2, "--resume"),
    ("toy", "--eval {empty}/best.pt", 1, "core"), ("toy", "--eval {old}", 1, "not a checkpoint"),
    ("toy", "--eval {run}/best.pt --pool last", 2, "pool"),
    ("toy", "--resume 1 --out {run} --lr 1", 2, "lr")]

@pytest.mark.parametrize("case", BAD_INPUT, ids=lambda case: " ".join([*case[:2], *case[4:]]))
def test_bad_input(case, tmp_path, monkeypatch):
    script, argv, code, says, *no_gpu = case
    if no_gpu and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.chdir(tmp_path)
    for name in set(re.findall(r"{(\w+)}", argv)):
        MADE[name](tmp_path / name)
    argv = re.sub(r"{(\w+)}", rf"{tmp_path}/\1", argv.replace("LLAMA", folder("llama"))).split()
    run = toy if script == "toy" else functools.partial(run_main, f"train_{script}")
    assert refused(says, run, *argv) == code
    assert not Path("was-run").exists() and not list(Path("runs").rglob("*.pt"))

BAD_FILES = [  # function of data.py, files, what the line says
    ("cifar10", {}, "cifar-10-python.tar.gz.*refused.*--demo 1"),
    ("cifar10", {"cifar10.npz": b"text"}, "cifar10.npz.*delete"),
    ("cifar10", npz(train_x=PIXELS / 255), "cifar10.npz.*float64"),
    ("cifar10", npz(train_x=PIXELS[:9], train_y=LABELS[:9]), r"\(9,\).* 10"),
    ("mnist", {"MNIST/raw/train-images.idx3-ubyte": b""}, "refused.*images-idx3.*--demo"),
    ("mnist", idx(images=DIGITS[:12]), r"raw.*\(12, 28, 28\).*\(24,\)"),
    ("mnist", idx(test_labels=LABELS[:10]), r"\(10,\)"),
    ("mnist", idx(labels=np.arange(24)), "0 to 9"),
    ("mnist", idx(images=np.zeros((24, 32, 32))), "24, 32, 32"),
    ("speech_commands", {}, f"refused.*put http.*/{ARCHIVE}.tar.gz.*--demo 1"),
    ("speech_commands", clips(**{"a/9.wav": wav(range(8))[:-4]}), "a/9.wav.* 8 samples"),
    ("speech_commands", clips(**{"a/9.wav": wav([1, 2], rate=8000)}), "8000 Hz"),
    ("speech_commands", clips(**{"b/s5_nohash_0.wav": None}), "lacks 1"),
    ("speech_commands", clips(**{"testing_list.txt": b""}), r"\[15, 3, 0\]"),
    ("speech_commands", clips([f"w{i}" for i in range(35)]), r"\[140, 35, 35\].*\[84843"),
    ("cyp3a4", {}, f"{TABLE}.*refused.*--demo 1"),
    ("cyp3a4", {TABLE: b"Drug_ID\tDrug\tY\n1\tCCO\t1\n"}, "1 molecules.*12,328")]

@pytest.mark.parametrize("load, files, says", BAD_FILES, ids=[f"{a} {c}" for a, _, c in BAD_FILES])
def test_bad_data(load, files, says, tmp_path):
    put(tmp_path / "a" / "b", files)
    assert refused(says, getattr(data, load), tmp_path / "a" / "b") == 1
