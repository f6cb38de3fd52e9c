"""Tests: no network and no data set needed, about three minutes on two cores.

    python -m pytest test_all.py                  # everything
    python -m pytest test_all.py -k bad_input     # one part
    python -m pytest test_all.py -k cuda          # where there is a GPU: what is different there
    KILLS=100 python -m pytest test_all.py -k killed
    GPT2_ONLINE=1 python -m pytest test_all.py -k own_weights    # downloads GPT-2

Models are tiny folders that the tests save. `toy` is a task that takes a tenth of a second.
"""
import functools
import importlib
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import wave
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = str(1 - int(os.environ.get("GPT2_ONLINE", 0)))  # read at import
os.environ["OMP_NUM_THREADS"] = "1"  # tiny models: two threads only wait for each other

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._pytree import tree_leaves
from tqdm.auto import tqdm
from transformers import (AutoConfig, AutoModel, GPT2Config, GPT2LMHeadModel, GPT2Model,
                          WhisperForAudioClassification)

import data
import fpt
import train_cifar
import train_cyp3a4
import train_mnist_add
import train_speech

HERE, TEMPORARY = Path(__file__).parent, tempfile.TemporaryDirectory()
SCRIPTS = ["train_cifar", "train_speech", "train_cyp3a4", "train_mnist_add"]
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda:0", marks=NO_GPU)])
COMPILER = pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++")))
                              or not Path(sysconfig.get_path("include"), "Python.h").exists(),
                              reason="no C++ compiler or no headers of Python")

BLOCKS = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
              initializer_range=0.2)
TEXT = BLOCKS | dict(vocab_size=50, max_position_embeddings=64)
IMAGE = BLOCKS | dict(image_size=16, patch_size=8, layer_norm_eps=1e-3)
SMALL = dict.fromkeys(fpt.TEXT, TEXT | dict(head_dim=16, num_key_value_heads=1)) | {
    **dict.fromkeys(fpt.STACKS, IMAGE), "bert": TEXT,
    "gpt2": dict(n_layer=2, n_head=2, n_embd=32, n_positions=128, vocab_size=100,
                 initializer_range=0.2),
    "audio-spectrogram-transformer": IMAGE | dict(max_length=32, num_mel_bins=16),
    "whisper": dict(d_model=32, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=64,
                    decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=64, init_std=0.2,
                    num_mel_bins=8, max_source_positions=64, vocab_size=60, pad_token_id=0)}
INPUTS = {"whisper": (1, 8, 128), "audio-spectrogram-transformer": (1, 32, 16)}  # else images

# ---- Helpers -------------------------------------------------------------------------------------
def disturb(model):
    """Leave no weight at 0 or 1, where an omission would not show."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return model.eval()

@functools.cache
def folder(kind):
    """A folder with a tiny model of this type."""
    path = Path(TEMPORARY.name) / kind
    without = {"add_pooling_layer": False} if kind == "bert" else {}  # as masked language models
    torch.manual_seed(1)  # the same model whichever test asks for it first
    model = AutoModel.from_config(AutoConfig.for_model(kind, **SMALL[kind]), **without)
    disturb(model).save_pretrained(path)
    return str(path)

def changed(kind, path, weights=None, **config):
    """A copy of that folder with another config; weights() changes its state dict in place."""
    shutil.copytree(folder(kind), path)
    config = json.loads((path / "config.json").read_text()) | config
    (path / "config.json").write_text(json.dumps(config))
    if weights:
        state = load_file(path / "model.safetensors")
        weights(state)
        save_file(state, path / "model.safetensors", {"format": "pt"})
    return path

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

def toy(*argv, hook=lambda *_: None, sizes=(200, 40, 60), seed=0, **more):
    """Train as a script called with these words: which of 3 tokens has the largest sum? Returns
    the last line of its log. The model stays in toy.model. hook(split, tokens, targets) sees every
    batch and may change it; sizes and seed are those of the data; more goes to fpt.fit()."""
    def main(args):
        tokens = torch.randn(sum(sizes), 3, 4, generator=torch.Generator().manual_seed(seed))
        x = dict(zip(data.SPLITS, tokens.split(sizes)))
        labels = {split: x[split].sum(2).argmax(1) for split in x}
        toy.model = fpt.FPT(args, inputs=4, outputs=3, time=3)

        def batch(split, index):
            tokens, targets = x[split][index], labels[split][index]
            tokens = tokens + args.noise * torch.randn(tokens.shape) * (split == "train")
            hook(split, tokens, targets)
            return tokens.to(args.device), None, targets.to(args.device)
        return fpt.fit(args, toy.model, batch, labels, **more)
    return fpt.run(toy_parser(*argv), main)

def stopped(evaluation, *argv):
    """Stop the toy at its first, second ... evaluation, as Ctrl-C does."""
    count = itertools.count(1)
    def hook(split, *_):
        if split == "validation" and next(count) == evaluation:
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        toy(*argv, hook=hook)

def start(*argv, pause=None):
    """Train the toy in another process. pause: two events. The first is set at the first
    evaluation, which then waits for the second."""
    context = multiprocessing.get_context("forkserver")  # its processes have seen no GPU
    context.set_forkserver_preload(["test_all"])
    process = context.Process(target=child, args=(argv, folder("gpt2"), os.getcwd(), pause))
    process.start()
    return process

def child(argv, model, cwd, pause):
    sys.stdout = sys.stderr = open(os.devnull, "w")
    os.chdir(cwd)
    tqdm.set_lock(threading.RLock())  # the usual one is shared, and may be held by a killed process
    def hook(split, *_):
        if pause and split == "validation":
            pause[0].set()
            pause[1].wait(100)
    toy("--model", model, *argv, hook=hook)

def run_main(script, *argv):
    """Run a script in this process, which saves the imports. Returns the last line of its log."""
    sys.argv = [f"{script}.py", "--model", folder("gpt2"), *map(str, argv)]
    module = importlib.import_module(script)
    return fpt.run(module.parser, module.main)

def log_lines(folder):
    lines = (folder / "log.jsonl").read_text().splitlines()
    def no_json(constant):
        raise ValueError(f"{constant} is no JSON")
    return [json.loads(line, parse_constant=no_json) for line in lines]

def checkpoint(folder, name="best.pt"):
    return torch.load(folder / name, weights_only=True)

def outcome(folder):
    """What does not depend on stops: the log but for seconds and paths, both checkpoints."""
    passing = re.compile("seconds|^(wandb_id|model)$")
    rows = [{k: v for k, v in row.items() if not passing.search(k)} for row in log_lines(folder)]
    saved = [checkpoint(folder, file) for file in ("best.pt", "last.pt")]
    names = "trained", "optimizer", "scaler", "step", "best_loss"
    numbers = tree_leaves([[part.get(name) for name in names] for part in saved])
    assert len(numbers) > 30
    return rows, [number.tolist() if torch.is_tensor(number) else number for number in numbers]

@pytest.fixture(autouse=True)
def leave_the_process_as_it_was(monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)

# ---- The model -----------------------------------------------------------------------------------
@DEVICES
@pytest.mark.parametrize("activation, saved_as, pool", [
    ("gelu_new", GPT2Model, "mean"), ("relu", GPT2LMHeadModel, "last")])
def test_ours_equals_transformers_gpt2(activation, saved_as, pool, device, tmp_path):
    config = GPT2Config(**SMALL["gpt2"], activation_function=activation, n_inner=80)
    theirs = disturb(saved_as(config))
    theirs.save_pretrained(tmp_path)
    model, tokens = fpt.FPT(parse("--model", tmp_path, "--pool", pool), 12, 5, 9), torch.randn(3, 9, 12)
    hidden = theirs.base_model(inputs_embeds=model.input(tokens)).last_hidden_state
    expected = model.output(hidden.mean(1) if pool == "mean" else hidden[:, -1])
    outputs = model.to(device)(tokens.to(device)).cpu()
    torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-5)

def test_gpt2_with_its_own_weights(tmp_path):
    try:
        theirs = AutoModel.from_pretrained("gpt2", dtype=torch.float32).eval()
    except OSError:
        pytest.skip("neither the hub nor its cache has GPT-2 (GPT2_ONLINE=1 downloads it)")
    model = fpt.FPT(parse("--model", "gpt2"), 4, 3, 3)
    tokens = torch.randn(8, 3, 4)
    expected = theirs(inputs_embeds=model.input(tokens)).last_hidden_state[:, -1]
    torch.testing.assert_close(model(tokens), model.output(expected), rtol=1e-4, atol=1e-3)
    one_batch = "--batch_size", 32, "--eval_every", 1, "--steps", 2, "--lr", 1e-3
    toy("--model", "gpt2", "--out", tmp_path, *one_batch, sizes=(32, 40, 60))
    first, second, _ = log_lines(tmp_path)
    assert second["train_loss"] < first["train_loss"]

@pytest.mark.parametrize("kind", fpt.TEXT + fpt.STACKS)
def test_another_core_computes_what_transformers_computes(kind):
    theirs = AutoModel.from_pretrained(folder(kind), attn_implementation="eager").eval()
    model, x = fpt.FPT(parse("--model", folder(kind)), 7, 3, 20), torch.randn(2, 6, 32)
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
    model(torch.randn(2, 6, 7), torch.tensor([6, 4])).sum().backward()
    assert model.input.weight.grad.abs().sum() > 0
    assert all((p.grad is None) == (part in ("attn", "ff")) for p, part in model.named_parts())
    whole = fpt.FPT(parse("--model", folder(kind), "--train", "all", "--pool", "mean"), 7, 3, 20)
    whole(torch.randn(2, 6, 7)).sum().backward()  # several processes wait for each gradient
    assert not [name for name, p in whole.named_parameters() if p.grad is None]

@pytest.mark.parametrize("layers, pool", [(2, "mean"), (2, "last"), (0, "mean")])
@pytest.mark.parametrize("kind", SMALL)
def test_an_example_does_not_see_its_neighbours_padding(kind, pool, layers):
    args = parse("--model", folder(kind), "--pool", pool, "--layers", layers)
    model, calls = fpt.FPT(args, 20, 2, 30, discrete=True), []
    model.input.weight.data *= 10
    short, long = torch.randint(1, 20, (1, 4, 3)), torch.randint(1, 20, (1, 30, 3))
    expected = torch.cat([model(short), model(long)])
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
@pytest.mark.parametrize("kind, rule", [("gpt2", "last"), ("llama", "last"), ("gemma3_text", "last"),
                                        ("bert", "mean"), ("vit", "mean"), ("whisper", "mean")])
def test_the_last_token_of_a_causal_core_is_read_of_others_the_mean(kind, rule, layers):
    tokens, outputs = torch.randn(2, 5, 4), {}
    for pool in "auto", "last", "mean":
        args = parse("--model", folder(kind), "--pool", pool, "--layers", layers)
        outputs[pool] = fpt.FPT(args, 4, 3, 5)(tokens)
    rule = rule if layers else "mean"
    assert [name for name in outputs if torch.equal(outputs[name], outputs["auto"])] == ["auto", rule]

@pytest.mark.parametrize("pretrained", [1, 0])
@pytest.mark.parametrize("kind", SMALL)
def test_layers_keeps_the_first_blocks_and_changes_no_number(kind, pretrained):
    argv = "--model", folder(kind), "--pretrained", pretrained, "--layers"
    none, one, two = (fpt.FPT(parse(*argv, n), 4, 2, 3) for n in (0, 1, 2))
    for part in none, one:
        weights, all_weights = dict(part.named_parameters()), dict(two.named_parameters())
        assert weights.keys() < all_weights.keys()
        assert all(torch.equal(weights[name], all_weights[name]) for name in weights)
    assert not {"attn", "ff"} & {part for _, part in none.named_parts()}
    tokens = torch.randn(3, 2, 4)  # without a block there is still one nonlinearity
    expected = none.output(F.gelu(none.core(none.input(tokens))).mean(1))
    torch.testing.assert_close(none(tokens), expected)

def test_random_matrices_have_one_scale_the_rest_is_neutral_and_tokens_have_theirs():
    for argv, std in ([], 32 ** -0.5), (["--init_std", 0.02], 0.02), (["--seed", 1], 32 ** -0.5):
        model = fpt.FPT(parse("--pretrained", 0, *argv), 4, 2, 3)
        for name, p in model.core.named_parameters():
            if p.ndim == 2:
                chance = 0.1 + 2 / p.numel() ** 0.5
                assert p.std().item() == pytest.approx(std, rel=chance), name
                assert abs(p.mean()) < std * chance, name
            else:
                assert torch.equal(p, torch.full_like(p, float("bias" not in name))), name
    for discrete, tokens in (True, torch.arange(1, 500)[None]), (False, torch.randn(1, 200, 500)):
        vectors = fpt.FPT(parse(), 500, 2, 3, discrete).input(tokens)
        assert vectors.std().item() == pytest.approx(0.1, rel=0.1)

@pytest.mark.parametrize("kind, numbers", [
    ("gpt2", [0, 0]), ("bert", [0, 0]), ("llama", [0, 0]), ("whisper", [0, 0]), ("vit", [0, 0])])
def test_a_random_core_is_the_same_on_every_machine(kind, numbers, tmp_path):
    """These numbers were written down once. If one changes, checkpoints of random cores are lost."""
    AutoConfig.for_model(kind, **SMALL[kind]).save_pretrained(tmp_path)  # no weights are needed
    model = fpt.FPT(parse("--model", tmp_path, "--pretrained", 0), 4, 3, 3)
    ramp = torch.linspace(-1, 1, 5 * 32).view(1, 5, 32)
    assert model.core(ramp)[0, -1, :2].tolist() == pytest.approx(numbers, rel=1e-3)

@pytest.mark.parametrize("inputs, outputs, count", [
    (48, 10, 83_722), (784, 91, 711_259), (16, 10, 59_146), (80, 35, 127_523)])
def test_as_many_parameters_are_trained_as_in_the_original(inputs, outputs, count, tmp_path):
    GPT2Config(n_inner=1, vocab_size=1).save_pretrained(tmp_path)  # as wide and deep, with less MLP
    args = parse("--model", tmp_path, "--pretrained", 0, "--train", "in,out,ln")
    model = fpt.FPT(args, inputs, outputs, 64)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
    with torch.device("meta"):  # shapes without numbers
        core = fpt.GPT2(GPT2Config(), layers=12)
    assert sum(p.numel() for p in core.parameters()) == 124_439_808 - 50257 * 768  # all but wte

@pytest.mark.parametrize("train", ["in,out,ln,pos", "out", "ln", "attn", "in,ff", "all"])
def test_only_the_named_parts_are_trained_and_saved(tmp_path, train):
    parts = {"input": "in", "output": "out", "ln_": "ln", "wpe": "pos", "attn": "attn", "mlp": "ff"}
    before = dict(fpt.FPT(parse("--train", train), 4, 3, 3).named_parameters())
    toy("--out", tmp_path, "--train", train, "--steps", 3)
    saved = checkpoint(tmp_path)["trained"]
    for name, parameter in toy.model.named_parameters():
        part = next(part for word, part in parts.items() if word in name)
        named = train == "all" or part in train.split(",")
        assert (name in saved) == named == (not torch.equal(parameter, before[name])), name

# ---- The training loop ---------------------------------------------------------------------------
def test_a_run_learns_and_its_log_is_complete(tmp_path, capsys):
    toy("--out", tmp_path, "--steps", 200, "--eval_every", 50, "--seed", 3)
    *rows, last = log_lines(tmp_path)
    assert [row["step"] for row in rows] == [50, 100, 150, 200]
    assert rows[3]["train_loss"] < rows[0]["train_loss"]
    names = [f"train_{name}" for name in "loss loss_start loss_final accuracy seconds".split()]
    names += ["validation_loss", "validation_accuracy", "validation_majority_accuracy"]
    printed = capsys.readouterr().out
    for name in names + ["evaluation_seconds"]:
        assert isinstance(rows[0][name], float) and name.replace("_", " ") in printed
    assert last["test_accuracy"] > last["test_majority_accuracy"] + 0.2
    trained = sum(p.numel() for p in toy.model.parameters() if p.requires_grad)
    assert last["trainable_parameters"] == trained
    expected = {"seed": 3, "lr": 0.01, "model": folder("gpt2"), "pretrained": 1}
    assert expected.items() <= last.items()

def test_the_best_checkpoint_has_the_lowest_validation_loss_and_is_tested_once(tmp_path):
    seen = []
    def hook(split, tokens, targets):
        if split != "train":
            seen.append((split, toy.model.input.weight.clone()))
        if split == "validation" and len(seen) != 3:
            targets.copy_((targets + 1) % 3)  # wrong, but in the third evaluation
    def worst(outputs, targets):  # an accuracy that would choose another one
        return {"accuracy": -fpt.accuracy(outputs, targets)["accuracy"]}
    argv = "--out", tmp_path, "--steps", 25, "--eval_every", 5
    assert toy(*argv, hook=hook, metrics=worst)["step"] == 15
    rows, best = log_lines(tmp_path)[:-1], checkpoint(tmp_path)
    assert min(rows, key=lambda row: row["validation_loss"])["step"] == best["step"] == 15
    assert [split for split, _ in seen] == ["validation"] * 5 + ["test"]
    assert torch.equal(seen[2][1], seen[5][1]) and torch.equal(best["trained"]["input.weight"], seen[2][1])

def test_the_test_split_may_stay_unread(tmp_path):
    seen = set()
    result = toy("--out", tmp_path, "--test", 0, hook=lambda split, *_: seen.add(split))
    assert seen == {"train", "validation"} and not any("test_" in name for name in result)
    losses = [row["validation_loss"] for row in log_lines(tmp_path)[:-1]]
    assert result["validation_loss"] == pytest.approx(min(losses), rel=1e-6)

@DEVICES
def test_eval_gives_the_same_figures_writes_nothing_and_moves_to_the_cpu(tmp_path, device):
    trained = toy("--out", tmp_path / "run", "--train", "in,out", "--seed", 3, "--device", device)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    argv = "--eval", tmp_path / "run" / "best.pt", "--out", tmp_path / "new", "--seed", 3
    evaluated = toy(*argv, "--device", device)
    assert evaluated.items() <= trained.items() and "test_loss" in evaluated
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    moved = toy(*argv, "--device", "cpu", "--batch_size", 7, "--test", 1)
    assert moved["test_loss"] == pytest.approx(trained["test_loss"], rel=1e-4)

@DEVICES
@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_half_precision_trains_as_fp32_does(tmp_path, amp, device):
    argv = "--steps", 100, "--device", device, "--amp"
    fp32, half = (toy("--out", tmp_path / name, *argv, name) for name in ("fp32", amp))
    assert toy.model.core.h[0].mlp.c_fc.weight.dtype == fpt.PRECISIONS[amp]
    assert toy.model.input.weight.dtype == torch.float32
    assert half["test_loss"] != fp32["test_loss"]
    assert half["test_accuracy"] == pytest.approx(fp32["test_accuracy"], abs=0.1)
    assert half["test_loss"] == pytest.approx(fp32["test_loss"], abs=0.15)

@pytest.mark.parametrize("kind", SMALL)
def test_what_leaves_a_block_is_float32_whatever_the_products_are(kind):
    model, seen = fpt.FPT(parse("--model", folder(kind), "--amp", "bf16"), 4, 3, 3), []
    for block in blocks_of(model):
        block.register_forward_hook(lambda _, x, y: seen.append(y if torch.is_tensor(y) else y[0]))
    with model.autocast:
        seen.append(model(torch.randn(2, 3, 4)))
    assert [x.dtype for x in seen] == 3 * [torch.float32]

@DEVICES
def test_fp16_steps_that_overflow_are_skipped(tmp_path, monkeypatch, device):
    large = functools.partialmethod(torch.amp.GradScaler.__init__, init_scale=2.0**40)
    monkeypatch.setattr(torch.amp.GradScaler, "__init__", large)
    toy("--out", tmp_path, "--amp", "fp16", "--steps", 80, "--device", device)
    states = checkpoint(tmp_path, "last.pt")["optimizer"]["state"].values()
    assert 35 < max(state["step"] for state in states) < 77

@pytest.fixture
def without_cpp(monkeypatch, device):
    """On a CPU: all of torch.compile but the C++ compiler, which takes a minute."""
    if device == "cpu":
        without = functools.partialmethod(nn.Module.compile, backend="aot_eager")
        monkeypatch.setattr(nn.Module, "compile", without)

@DEVICES
@pytest.mark.parametrize("argv", [
    ["--accumulate", 2, "--batch_size", 8], pytest.param(["--compile", 1], marks=COMPILER)],
    ids=["halves", "compile"])
def test_half_batches_and_a_compiled_model_train_as_plain_ones(tmp_path, without_cpp, device, argv):
    for name, more in ("one", []), ("two", argv):
        common = "--out", tmp_path / name, "--steps", 3, "--batch_size", 16, "--device", device
        toy(*common, *more)
    assert (toy.model._compiled_call_impl is not None) == ("--compile" in argv)
    one, two = checkpoint(tmp_path / "one")["trained"], checkpoint(tmp_path / "two")["trained"]
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-4, msg=name)

@COMPILER
@DEVICES
def test_molecules_of_many_lengths_are_compiled_few_times(tmp_path, without_cpp, device):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    argv = "--demo 1 --steps 20 --eval_every 20 --batch_size 8 --amp fp32 --device".split()
    plain, compiled = (run_main("train_cyp3a4", *argv, device, "--compile", compile,
                                "--out", tmp_path / str(compile)) for compile in (0, 1))
    assert compiled["test_loss"] == pytest.approx(plain["test_loss"], rel=1e-2)
    assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] < 7

@NO_GPU
@pytest.mark.parametrize("script", SCRIPTS)
def test_no_step_waits_for_the_gpu_cuda(script, tmp_path, monkeypatch):
    rate = fpt.learning_rate
    def strict(args, step):  # waiting is an error, but in the last step, which evaluates
        torch.cuda.set_sync_debug_mode("error" if step < args.steps else 0)
        return rate(args, step)
    monkeypatch.setattr(fpt, "learning_rate", strict)
    try:
        for amp in "bf16", "fp16":
            run_main(script, "--demo", 1, "--steps", 5, "--eval_every", 5, "--device", "cuda:0",
                     "--amp", amp, "--out", tmp_path / amp)
    finally:
        torch.cuda.set_sync_debug_mode(0)

def test_the_learning_rate_warms_up_and_ends_above_0(tmp_path):
    for steps, warmup in (1000, 50), (40, 4), (1, 1):
        args = parse("--steps", steps, "--lr", 1)
        rates = [fpt.learning_rate(args, step) for step in range(1, steps + 1)]
        assert rates[0] == pytest.approx(1 / warmup) and max(rates) > 0.97 and rates[-1] > 0
        assert rates.index(max(rates)) == warmup - 1
        assert rates[warmup:] == sorted(rates[warmup:])[::-1]
    toy("--out", tmp_path)
    groups = checkpoint(tmp_path, "last.pt")["optimizer"]["param_groups"]
    assert [group["lr"] for group in groups] == [fpt.learning_rate(parse(), step=40)] * 2

def test_matrices_decay_and_norms_biases_and_positions_do_not(tmp_path):
    toy("--out", tmp_path, "--steps", 1)
    last = checkpoint(tmp_path, "last.pt")["optimizer"]
    decay = {i: group["weight_decay"] for group in last["param_groups"] for i in group["params"]}
    shapes = {i: tuple(state["exp_avg"].shape) for i, state in last["state"].items()}
    assert sorted(shapes[i] for i in decay if decay[i]) == [(3, 32), (32, 4)]  # output and input
    # Two biases, the positions, weight and bias of five norms.
    assert sorted(decay.values()) == [0] * 13 + [0.01] * 2 and (128, 32) in shapes.values()

def test_batches_cover_an_epoch_and_group_lengths():
    feed = data.batches(100, 10, seed=0)
    first, second = (torch.cat([next(feed) for _ in range(10)]).tolist() for _ in "ab")
    assert sorted(first) == sorted(second) == list(range(100)) and first != second
    feed = data.batches(95, 10, seed=0, lengths=torch.arange(95))  # an epoch leaves out any five
    assert max(torch.cat([next(feed) for _ in range(9)]).tolist()) > 90
    lengths = torch.randint(5, 60, (3200,), generator=torch.Generator().manual_seed(0))
    feed = data.batches(3200, 32, seed=0, lengths=lengths)
    epoch = [lengths[next(feed)] for _ in range(100)]
    longest = [int(batch.max()) for batch in epoch]
    assert torch.cat(epoch).sum() == lengths.sum() > 0.9 * 32 * sum(longest)
    assert longest != sorted(longest)

@pytest.mark.parametrize("bad_from", [25, 40])  # 40: the evaluation alone sees it
def test_a_loss_that_is_not_finite_ends_the_run_and_leaves_the_last_good(tmp_path, monkeypatch, bad_from):
    monkeypatch.setattr(fpt, "learning_rate", lambda _, step: 0.01 if step < bad_from else math.nan)
    with pytest.raises(SystemExit, match="finite"):
        toy("--out", tmp_path)
    for saved in checkpoint(tmp_path), checkpoint(tmp_path, "last.pt"):
        assert saved["step"] == 20 and all(p.isfinite().all() for p in saved["trained"].values())
    assert [row["step"] for row in log_lines(tmp_path)] == [20]

def test_a_figure_that_cannot_be_computed_is_null(tmp_path):
    def metrics(outputs, targets):
        return fpt.accuracy(outputs, targets) | {"nothing": torch.tensor(math.nan)}
    toy("--out", tmp_path, metrics=metrics)
    for row, figure in zip(log_lines(tmp_path), ["validation_nothing"] * 2 + ["test_nothing"]):
        assert row[figure] is None

# ---- Runs that are stopped, checkpoints of other runs --------------------------------------------
@pytest.mark.parametrize("amp, kills", [("fp32", int(os.environ.get("KILLS", 8))), ("fp16", 2)])
def test_a_run_killed_again_and_again_equals_the_uninterrupted_one(tmp_path, amp, kills):
    argv = "--steps", 150, "--eval_every", 3, "--noise", 0.5, "--accumulate", 2, "--amp", amp
    start("--steps", 1, "--out", tmp_path / "first").join()  # the imports are not to be timed
    begin, done = time.time(), 0
    whole = start(*argv, "--out", tmp_path / "whole")
    whole.join()
    seconds = time.time() - begin
    while done < kills:
        out, code = tmp_path / f"killed-{done}", -signal.SIGKILL
        while code:
            process = start(*argv, "--out", out, "--resume", int((out / "last.pt").exists()))
            process.join(random.uniform(0, seconds / 2))
            process.kill()
            process.join()
            code = process.exitcode
            assert code in (0, -signal.SIGKILL)
            done += code == -signal.SIGKILL
        assert outcome(out) == outcome(tmp_path / "whole")
    toy(*argv, "--out", tmp_path / "other", "--seed", 1)
    assert outcome(tmp_path / "other")[0] != outcome(out)[0]

@DEVICES
def test_a_stopped_run_resumes_with_the_same_losses(tmp_path, device):
    argv = "--amp", "fp16", "--eval_every", 10, "--noise", 0.5, "--device", device
    whole = toy("--out", tmp_path / "whole", *argv)
    stopped(3, "--out", tmp_path / "cut", *argv)
    assert len(log_lines(tmp_path / "cut")) == 2
    resumed = toy("--out", tmp_path / "cut", "--resume", 1, "--device", device, "--noise", 0.5)
    for name in "step", "test_loss", "test_accuracy":
        assert resumed[name] == pytest.approx(whole[name], rel=1e-3)
    with pytest.raises(SystemExit, match="2"):  # another value of a flag
        toy("--out", tmp_path / "cut", "--resume", 1, "--device", device, "--noise", 0.4)

@functools.cache
def finished(kind, train="in,out,ln"):
    """The folder of a run on the tiny model of this type."""
    out = Path(TEMPORARY.name) / f"{kind}-{train}"
    toy("--model", folder(kind), "--out", out, "--steps", 2, "--train", train)
    return out

def flip(state):  # the sign of one matrix of the second block
    state[next(name for name in sorted(state) if "1." in name and state[name].ndim == 2)] *= -1

@pytest.mark.parametrize("train", ["in,out,ln", "all"])
@pytest.mark.parametrize("kind, weights, config", [
    ("bert", flip, {}), ("bert", None, dict(num_attention_heads=4)),
    ("bert", None, dict(hidden_act="relu")), ("bert", None, dict(layer_norm_eps=1e-3)),
    ("gpt2", flip, {}), ("gpt2", None, dict(n_head=4)),
    ("gpt2", None, dict(activation_function="relu")), ("gpt2", None, dict(layer_norm_epsilon=1e-3)),
    ("llama", None, dict(rms_norm_eps=1e-2)), ("vit", None, dict(hidden_act="relu"))])
def test_a_checkpoint_belongs_to_what_its_core_computes(kind, weights, config, train, tmp_path):
    other = changed(kind, tmp_path / "other", weights, **config)
    with pytest.raises(SystemExit, match="core"):
        toy("--eval", finished(kind, train) / "best.pt", "--model", other)

@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_the_same_core_saved_again_or_moved_is_accepted_and_another_is_not_resumed(kind, tmp_path):
    AutoModel.from_pretrained(folder(kind)).save_pretrained(tmp_path / "again")
    shutil.copytree(folder(kind), model := tmp_path / "moved")
    best = finished(kind) / "best.pt"
    one, two, three = (toy("--eval", best, "--model", m) for m in (folder(kind), tmp_path / "again", model))
    assert one == two == three
    argv = "--out", tmp_path / "run"
    stopped(2, *argv, "--model", model)
    with pytest.raises(SystemExit, match="2"):  # a flag of the run
        toy(*argv, "--resume", 1, "--model", tmp_path / "again")
    shutil.rmtree(model)
    changed(kind, model, flip)
    with pytest.raises(SystemExit, match="core"):
        toy(*argv, "--resume", 1)

@pytest.mark.parametrize("other", [dict(sizes=(201, 40, 60)), dict(sizes=(200, 40, 59)), dict(seed=1)])
def test_a_run_belongs_to_its_data(other, tmp_path):
    stopped(2, "--out", tmp_path)
    for argv in ("--resume", 1, "--out", tmp_path), ("--eval", tmp_path / "best.pt"):
        with pytest.raises(SystemExit, match="data"):
            toy(*argv, **other)  # other sizes, or other labels in their order
    assert toy("--resume", 1, "--out", tmp_path)["step"] == 40

# ---- Folders, processes, notebooks, Weights & Biases ---------------------------------------------
def test_a_folder_holds_one_run_and_runs_started_at_once_take_others(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv, context = ("--noise", 0.5), multiprocessing.get_context("forkserver")
    pauses = [(context.Event(), context.Event()) for _ in range(2)]
    first, second = (start(*argv, pause=pause) for pause in pauses)
    assert all(pause[0].wait(100) for pause in pauses)  # both are in their first evaluation
    with pytest.raises(SystemExit, match="runs/toy "):
        toy("--out", "runs/toy")
    toy(*argv)
    assert sorted(path.name for path in Path("runs").iterdir()) == ["toy", "toy-2", "toy-3"]
    pauses[0][1].set()
    first.join()
    second.kill()  # leaves its folder free
    second.join()
    killed = next(out for out in Path("runs").iterdir() if not (out / "last.pt").exists())
    toy(*argv, "--out", killed)
    assert outcome(Path("runs/toy")) == outcome(Path("runs/toy-2")) == outcome(Path("runs/toy-3"))
    with pytest.raises(SystemExit, match="holds a run"):
        toy("--out", killed)

def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    changed("gpt2", tmp_path / "model")
    toy("--out=~/run", "--model=~/model", "--steps", 1)
    args = parse("--eval=~/run/best.pt", "--predict=~/a.png", "--data=~/d", "--out=~/o")
    paths = args.eval, args.predict, args.data, args.out, args.model
    assert paths == tuple(f"{tmp_path}/{name}" for name in ("run/best.pt", "a.png", "d", "o", "model"))
    assert not Path("~").exists()

def test_two_processes_equal_one_and_a_run_resumes_with_another_number(tmp_path):
    common = "--eval_every", "10", "--batch_size", "16", "--model", folder("gpt2"), "--out"
    toy(*common, tmp_path / "one")
    stopped(3, *common, tmp_path / "one-two")
    toy(*common, tmp_path / "eleven", "--batch_size", 10, sizes=(11, 40, 60))
    calls = [([*common, "two"], {}), (["--resume", "1", "--out", "one-two"], {}),
             ([*common, "eleven-two"], {"sizes": (11, 40, 60)}), ([*common, "few"], {"sizes": (1, 40, 60)})]
    code = "import sys, json, test_all\nfor argv, more in json.loads(sys.argv[1]):\n    test_all.toy(*argv, **more)"
    (tmp_path / "script.py").write_text(code)
    command = [sys.executable, *"-m torch.distributed.run --standalone --nproc_per_node=2 --".split()]
    ended = subprocess.run([*command, "script.py", json.dumps(calls)], cwd=tmp_path, timeout=200, text=True,
                           capture_output=True, env=os.environ | {"PYTHONPATH": str(HERE)})
    assert "few for 2 processes" in ended.stderr or "too little" in ended.stderr, ended.stderr
    assert "Traceback" not in ended.stderr.split("torch/distributed")[0] and ended.returncode
    for two, one in ("two", "one"), ("one-two", "one"), ("eleven-two", "eleven"):
        rows, wanted = log_lines(tmp_path / two), log_lines(tmp_path / one)
        assert [row["step"] for row in rows] == [row["step"] for row in wanted] == [10, 20, 30, 40, 40]
        for row, expected in zip(rows, wanted):
            for figure in filter(re.compile("(validation|test)_(loss|accuracy)").search, expected):
                assert row[figure] == pytest.approx(expected[figure], rel=1e-3), (two, figure)

@pytest.mark.parametrize("environment", [{"RANK": "0"}, {"RANK": "1", "WORLD_SIZE": "2"}])
def test_half_an_environment_of_torchrun_is_refused(environment, tmp_path, monkeypatch, capsys):
    for name in environment:
        monkeypatch.setenv(name, environment[name])
    with pytest.raises(SystemExit, match="2"):
        toy("--out", tmp_path / "run")
    assert "MASTER_ADDR" in capsys.readouterr().err and not (tmp_path / "run").exists()

@pytest.mark.parametrize("launcher", ["ipykernel_launcher.py", "ipykernel/__main__.py", "colab_kernel_launcher.py"])
def test_the_arguments_of_a_notebook_are_not_ours(launcher):
    parser = toy_parser()
    sys.argv = [f"/somewhere/{launcher}", "-f", "kernel-1.json"]
    assert fpt.run(parser, lambda args: args.steps) == 40

def test_every_script_runs_in_a_notebook_cell(tmp_path):
    import nbclient
    import nbformat
    cells = ["import sys, fpt; fpt.run(fpt.flags('x', ''), lambda args: print('steps', args.steps))"]
    for script in SCRIPTS:
        words = f"x.py --demo 1 --steps 2 --model {folder('gpt2')} --out {tmp_path / script}"
        cells += [f"sys.argv = {words.split()}", (HERE / f"{script}.py").read_text()]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.execute(notebook, str(HERE), timeout=200)
    assert "steps 1000" in "".join(part.get("text", "") for part in notebook.cells[0].outputs)
    assert all(log_lines(tmp_path / script)[-1]["step"] == 2 for script in SCRIPTS)

def test_weights_and_biases_offline_and_the_same_run_after_a_stop(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    for name, value in ("MODE", "offline"), ("INIT_TIMEOUT", "300"), ("_SERVICE_WAIT", "300"):
        monkeypatch.setenv(f"WANDB_{name}", value)
    stopped(2, "--out", tmp_path, "--wandb", "fpt-test")
    wandb.finish()
    toy("--resume", 1, "--out", tmp_path)
    wandb.finish()
    files = list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    run_id = checkpoint(tmp_path)["flags"]["wandb_id"]
    assert {path.name for path in files} == {f"run-{run_id}.wandb"}
    content = b"".join(path.read_bytes() for path in files)
    assert all(word in content for word in (b"validation_accuracy", b"test_accuracy", b"eval_every"))

@pytest.mark.parametrize("why", ["not installed", "nobody is logged in"])
def test_without_weights_and_biases_a_run_ends_before_any_work(why, tmp_path):
    code = "import sys; sys.modules['wandb'] = None; " * (why == "not installed")
    code += "import train_cifar as s; s.fpt.run(s.parser, lambda args: print('work'))"
    environment = {name: os.environ[name] for name in os.environ if not name.startswith("WANDB")}
    environment |= {"HOME": str(tmp_path), "PYTHONPATH": str(HERE), "WANDB_MODE": "online"}
    ended = subprocess.run([sys.executable, "-c", code, "--demo", "1", "--wandb", "P"], timeout=200, text=True,
                           cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, capture_output=True)
    assert ended.returncode == 2 and "work" not in ended.stdout and "Traceback" not in ended.stderr
    assert "--wandb" in ended.stderr.splitlines()[-1]

# ---- The scripts ---------------------------------------------------------------------------------
def test_patches_are_squares_in_reading_order():
    rows, columns = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    tokens = train_cifar.to_tokens(torch.stack([rows, columns, rows], 2)[None], 8)
    assert tokens.shape == (1, 16, 192)
    mean, std = torch.tensor(train_cifar.MEAN), torch.tensor(train_cifar.STD)
    square = (tokens[0, 6].view(8, 8, 3) * std + mean) * 255  # second row of patches, third column
    torch.testing.assert_close(square[:, 0, 0], torch.arange(8.0, 16), atol=1e-3, rtol=0)
    torch.testing.assert_close(square[0, :, 1], torch.arange(16.0, 24), atol=1e-3, rtol=0)

def test_augmentation_moves_a_little_and_invents_nothing():
    columns = torch.arange(32, dtype=torch.uint8).expand(32, 32)
    images = torch.stack([columns.T, columns, columns], 2).expand(200, 32, 32, 3)
    moved = train_cifar.augment(images).int()
    steps = moved[:, 16, :, 1].diff(dim=1)
    assert 60 < (steps < 0).any(1).sum() < 140 and set(steps.unique().tolist()) <= {-1, 0, 1}
    assert moved[..., 0].diff(dim=1).min() >= 0
    assert set((moved[:, 16, 16, 0] - 16).tolist()) == set(range(-4, 5))

    clips = torch.arange(100.0).expand(50, 100)
    moved = train_speech.augment(clips)
    assert torch.equal(moved.sort(1).values, clips)
    assert set(moved[:, 50].tolist()) <= set(range(40, 61)) and len(set(moved[:, 50].tolist())) > 5

    digits = torch.zeros(300, 2, 28, 28)
    digits[:, :, 13:15, 8:20] = 255  # a bar in the middle
    moved = train_mnist_add.augment(digits).flatten(0, 1)
    middle = (moved.sum(2) * torch.arange(28)).sum(1) / moved.sum((1, 2)) - 13.5
    assert moved.min() >= 0
    assert moved.mean().item() == pytest.approx(digits.mean().item(), rel=0.05)
    assert 0.5 < middle.std() and middle.abs().max() < 2.9
    assert len(moved.flatten(1).unique(dim=0)) == 600

@pytest.mark.parametrize("tokens", ["mel", "wave"])
def test_sound_as_tokens(tokens):
    waves = (8000 * torch.sin(torch.arange(16000) * 0.3)).short().repeat(2, 1)
    waves[1] //= 40  # how loud it is makes no difference, as many clips are quiet
    features = train_speech.to_tokens(waves, tokens)
    assert features.shape == (2, train_speech.TIMES[tokens], 80)
    assert features.mean().abs() < 1e-4 and features[1].std().item() == pytest.approx(1, rel=1e-2)
    assert torch.corrcoef(features.flatten(1))[0, 1] > 0.9

def test_metrics_by_hand():
    def figures(score, targets):
        score, targets = torch.tensor(score), torch.tensor(targets)
        return train_cyp3a4.metrics(torch.stack([-score, score], 1), targets)
    ranked = figures([0.4, 0.3, 0.2, -0.1, -0.2], [1, 0, 1, 1, 0])
    assert ranked["accuracy"] == pytest.approx(3 / 5)
    assert ranked["majority_accuracy"] == pytest.approx(3 / 5)
    assert ranked["auroc"] == pytest.approx(4 / 6)  # 4 of the 6 pairs are in order
    assert ranked["auprc"] == pytest.approx((1 / 1 + 2 / 3 + 3 / 4) / 3)
    ties = figures([0.5, 0.5, 0.5, 0.1], [1, 0, 0, 1])
    assert ties["auroc"] == pytest.approx((0.5 + 0.5) / 4)
    assert ties["auprc"] == pytest.approx((1 / 3 + 2 / 4) / 2)

def test_sums_use_every_digit_equally_and_never_change():
    for n in 1, 2, 5:
        index = data.sum_indices(100, n)
        assert index.shape == (100, n) and torch.equal(index, data.sum_indices(100, n))
        assert torch.equal(index.flatten().bincount(), torch.full((100,), n))
        assert n == 1 or not torch.equal(index[:, 0], index[:, 1])

def test_l1_is_the_absolute_error_of_the_sum(tmp_path):
    argv = "--demo", 1, "--n", 3, "--steps", 1, "--loss", "l1", "--out", tmp_path
    result = run_main("train_mnist_add", *argv)
    error = result["test_loss"] * 2.87 * 3 ** 0.5  # the reported one is of rounded sums
    assert error == pytest.approx(result["test_mae"], abs=0.26)

def test_each_demo_alone_learns_without_a_network_on_cuda_if_there_is_one(tmp_path):
    closed = dict.fromkeys(["HTTPS_PROXY", "https_proxy", "http_proxy"], "http://127.0.0.1:9/")
    environment = os.environ | closed | {"PYTHONPATH": str(HERE)}
    environment["WORLD_SIZE"] = "2"  # some clusters set it, without torchrun
    processes = {}
    for script in SCRIPTS:
        code = (f"import runpy, sys; runpy.run_path('{HERE}/{script}.py', run_name='__main__'); "
                "print('imports', *sys.modules)")
        (tmp_path / script).mkdir()
        processes[script] = subprocess.Popen(
            [sys.executable, "-c", code, "--demo", "1"], cwd=tmp_path / script, env=environment,
            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    for script, process in processes.items():
        printed, name = process.communicate(timeout=300)[0], script.removeprefix("train_")
        assert process.returncode == 0 and "DEMO: the data is generated" in printed, printed
        *rows, last = log_lines(tmp_path / script / "runs" / f"{name}-demo")
        assert last["test_accuracy"] > last["test_majority_accuracy"] + 0.25
        assert [last[flag] for flag in ("demo", "pretrained", "layers")] == [1, 0, 2]
        assert last["steps"] == rows[-1]["step"] and last.get("test_mae", 0) < 1
        assert min(last.get("test_auroc", 1), last.get("test_auprc", 1)) > 0.7
        imports = set(re.search("^imports (.*)$", printed, re.MULTILINE)[1].split())
        own = {"train_speech": "torchaudio", "train_cyp3a4": "rdkit"}.get(script)
        assert "fpt" in imports and not imports & ({"torchaudio", "rdkit", "wandb"} - {own}), script

@pytest.mark.parametrize("script, argv, given, classes", [
    ("cifar", "--patch_size 16", "a.png", " ".join(train_cifar.CLASSES)),
    ("speech", "--tokens wave", "a.wav", "a b c d e f"),
    ("cyp3a4", "--tokens atoms", "CC(=O)Nc1ccc(O)cc1", "inhibitor no"),
    ("mnist_add", "--n 2", "a.png,a.png", " ".join(map(str, range(19))))])
def test_a_script_trains_evaluates_and_predicts(script, argv, given, classes, tmp_path, monkeypatch, capsys):
    script, argv = f"train_{script}", [*argv.split(), "--demo", 1, "--steps", 4, "--eval_every", 4]
    results = []
    for core, pretrained in ("gpt2", 0), ("gpt2", 1), ("dinov2", 1):
        out, model = tmp_path / f"{core}{pretrained}", ["--model", folder(core)]
        results.append(run_main(script, *model, *argv, "--pretrained", pretrained, "--out", out))
        again = run_main(script, *model, "--eval", out / "best.pt")
        assert again.items() <= results[-1].items() and "test_loss" in again
    one, other = results[:2]
    differ = {name for name in one | other if one.get(name, 0) != other.get(name, 0)}
    figures = {f"test_{name}" for name in ("loss", "accuracy", "auroc", "auprc", "mae")}
    assert {"pretrained", "test_loss"} < differ <= figures | {"pretrained", "wandb_id"}

    monkeypatch.chdir(tmp_path)  # where no data is: the checkpoint is enough
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)).save("a.png")
    with wave.open("a.wav", "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes((np.arange(20000) % 500).astype("<i2").tobytes())
    capsys.readouterr()
    run_main(script, *model, "--data", "none", "--eval", out / "best.pt", "--predict", given)
    shares, names = zip(*re.findall(r"^ *([\d.]+)%  (\w+)", capsys.readouterr().out, re.MULTILINE))
    shares, classes = list(map(float, shares)), classes.split()
    assert set(names) <= set(classes) and len(names) == min(10, len(classes))
    assert shares == sorted(shares)[::-1]
    assert len(classes) > 10 or sum(shares) == pytest.approx(100, abs=0.1)

@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_examples_and_explains_every_flag(script, capsys):
    with pytest.raises(SystemExit, match="0"):
        run_main(script, "--help")
    text = capsys.readouterr().out
    flags = re.findall(r"^  --\w+", text, re.MULTILINE)
    assert f"python {script}.py --demo 1" in text
    assert text.count("(default:") >= len(flags) > 23

# ---- Bad input: one line, exit code 2 for wrong flags and 1 for the rest, no traceback -----------
def add(name, *shape):
    return lambda state: state.update({name: torch.zeros(shape)})

def spoil(state):
    next(iter(state.values())).view(-1)[0] = math.nan

def with_file(path, name, content):
    (changed("gpt2", path) / name).write_bytes(content)

def foreign(path, **config):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    (path / "code.py").write_text("open('was-run', 'w')")

AUTO_MAP = {"AutoConfig": "code.Config", "AutoModel": "code.Model"}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 548105\n"
QUANTIZED = {"load_in_8bit": True, "quant_method": "bitsandbytes"}
BAD_MODELS = {  # how its folder comes about, a word of the line
    "not causal": (lambda path: changed("gpt2", path, is_causal=False), "attention"),
    "scaled by the layer": (
        lambda path: changed("gpt2", path, scale_attn_by_inverse_layer_idx=True), "attention"),
    "not scaled": (lambda path: changed("gpt2", path, scale_attn_weights=False), "attention"),
    "newer": (lambda path: changed("llama", path, transformers_version="99.0.0"), "transformers"),
    "attention biases": (lambda path: changed(
        "llama", path, add("layers.0.self_attn.q_proj.bias", 32)), "1 not used"),
    "scales of fp8": (lambda path: changed(
        "llama", path, add("layers.0.mlp.up_proj.weight_scale_inv", 1, 1)), "1 not used"),
    "gpt2 with fewer blocks": (lambda path: changed("gpt2", path, n_layer=1), "12 not used"),
    "bert with fewer blocks": (
        lambda path: changed("bert", path, num_hidden_layers=1), "16 not used"),
    "more blocks": (lambda path: changed("gpt2", path, n_layer=4), "24 weights are missing"),
    "wider": (lambda path: changed("gpt2", path, n_embd=64), ""),
    "nan": (lambda path: changed("gpt2", path, spoil), "finite"),
    "8 bit": (lambda path: changed("gpt2", path, quantization_config=QUANTIZED), "bitsandbytes"),
    "adapter": (lambda path: with_file(path, "adapter_config.json", b"{}"), "adapter"),
    "broken config": (lambda path: with_file(path, "config.json", b'{"model_type": '), "JSON"),
    "pointer": (lambda path: with_file(path, "model.safetensors", POINTER), ""),
    "cut": (lambda path: os.truncate(changed("gpt2", path) / "model.safetensors", 20_000), ""),
    "no weights": (lambda path: (changed("gpt2", path) / "model.safetensors").unlink(), "file"),
    "code": (lambda path: foreign(path, model_type="surprise", auto_map=AUTO_MAP), ""),
    "unknown": (lambda path: foreign(path, model_type="abacus"), "abacus"),
    "t5": (lambda path: foreign(path, model_type="t5"), "it is t5"),
    "clip": (lambda path: foreign(path, model_type="clip"), "it is clip"),
    "a file": (lambda path: path.write_bytes(os.urandom(1000)), ""),
    "nothing": (lambda path: None, "")}

@pytest.mark.parametrize("name", BAD_MODELS)
def test_a_model_that_cannot_be_used_ends_with_one_line(name, tmp_path, monkeypatch):
    make, says = BAD_MODELS[name]
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "model")
    begin = time.time()
    with pytest.raises(SystemExit, match=f"^Cannot load --model {tmp_path}/model: .*{says}") as end:
        toy("--model", tmp_path / "model")
    assert "\n" not in end.value.code and time.time() - begin < 10  # nobody is asked
    assert not Path("was-run").exists() and not Path("runs").exists()

@pytest.mark.parametrize("kind, weights, config", [
    ("gpt2", add("h.0.attn.bias", 1, 1, 128, 128), {}), ("gpt2", add("h.0.attn.masked_bias"), {}),
    ("gpt2", add("score.weight", 2, 32), {}), ("bert", add("embeddings.position_ids", 1, 64), {}),
    ("bert", add("pooler.dense.weight", 32, 32), {}), ("vit", add("classifier.bias", 9), {}),
    ("llama", add("layers.0.self_attn.rotary_emb.inv_freq", 8), {}),
    ("bert", None, {"auto_map": AUTO_MAP})])
def test_heads_poolers_and_old_buffers_do_no_harm(kind, weights, config, tmp_path):
    other, tokens = changed(kind, tmp_path / "model", weights, **config), torch.randn(2, 3, 4)
    same, other = (fpt.FPT(parse("--model", model), 4, 3, 3) for model in (folder(kind), other))
    assert torch.equal(same(tokens), other(tokens))

def test_the_encoder_of_a_whisper_for_classification_is_whole(tmp_path):
    theirs = disturb(WhisperForAudioClassification(AutoConfig.for_model("whisper", **SMALL["whisper"])))
    theirs.save_pretrained(tmp_path)
    ours = dict(fpt.FPT(parse("--model", tmp_path), 4, 3, 3).core.named_parameters())
    weights = theirs.encoder.layers[1].fc1.weight
    assert any(p.shape == weights.shape and torch.equal(p, weights) for p in ours.values())

class Trap:
    def __reduce__(self):
        return os.system, ("touch was-run",)

FAKE = {"trained": {}, "fingerprint": [0.0], "splits": {}, "flags": {
    "task": "cyp3a4", "layers": 0, "model": folder("gpt2")}}
WORDS = {"task": "speech", "words": ["no", "yes"], "demo": 1}
MADE = {  # what a case names in braces
    "file": lambda path: path.write_bytes(os.urandom(1000)),
    "trap": lambda path: torch.save(FAKE | {"trained": Trap()}, path),
    "molecules": lambda path: torch.save(FAKE, path),
    "images": lambda path: torch.save(FAKE | {"flags": FAKE["flags"] | {"task": "cifar"}}, path),
    "words": lambda path: torch.save(FAKE | {"flags": FAKE["flags"] | WORDS}, path),
    "run": lambda path: toy("--out", path, "--steps", 1),
    "llama": lambda path: shutil.copytree(folder("llama"), path),
    "short": lambda path: changed("gpt2", path, n_positions=12)}
BAD_INPUT = [  # script, flags, exit code, what the line says, whether a GPU would do
    *[("cifar", flag, 2, flag.split()[0]) for flag in (
        "--layers -1", "--init_std -1", "--steps 0", "--batch_size -4", "--accumulate 0", "--lr -1",
        "--lr nan", "--lr inf", "--eval_every 0", "--seed -1", "--steps many", "--train in,nose",
        "--train in,,out", "--pool first", "--layers 0 --train in,attn", "--init_std 0.1",
        "--predict cat.png", "--nonsense", "--device abacus", "--device mps", "--resume 1",
        "--resume 1 --out {run} --eval {images}")],
    ("cifar", "--device cuda", 2, "--device", "no GPU"),
    ("mnist_add", "--n 0", 2, "--n"),
    ("cifar", "--resume 1 --out typo", 1, "typo/last.pt"),
    ("cifar", "--layers 3", 1, "2 blocks"),
    ("cifar", "--pretrained 0 --model gpt2 --layers 13", 1, "12 blocks"),
    ("cifar", "--model nobody/no-model", 1, "Cannot load --model"),
    ("toy", "--model {llama} --train pos", 1, "--train pos"),
    ("mnist_add", "--n 129", 1, "128 positions"),
    ("cyp3a4", "--demo 1 --model {short}", 1, "12 positions"),
    ("cyp3a4", "--eval {molecules} --predict C1CC", 1, "C1CC"),
    ("cifar", "--eval {images} --predict {file}", 1, "file"),
    ("cifar", "--eval {images} --predict no.png", 1, "no.png"),
    ("mnist_add", "--data {file}", 1, "file"),
    ("speech", "--eval {words}", 1, "words"),
    ("cifar", "--eval no.pt", 1, "no.pt"),
    ("cifar", "--eval {file}", 1, "not a checkpoint"),
    ("cifar", "--eval {trap}", 1, "UnpicklingError"),
    ("cifar", "--eval {run}", 1, "not a checkpoint"),
    ("cifar", "--eval {run}/best.pt", 2, "task toy"),
    ("cifar", "--resume 1 --out {run}", 2, "task toy"),
    ("toy", "--eval {run}/best.pt --pool last", 2, "pool"),
    ("toy", "--resume 1 --out {run} --lr 1", 2, "lr")]

@pytest.mark.parametrize("case", BAD_INPUT, ids=lambda case: " ".join([*case[:2], *case[4:]]))
def test_bad_input(case, tmp_path, monkeypatch, capsys):
    script, argv, code, says, *no_gpu = case
    if no_gpu and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.chdir(tmp_path)
    for name in re.findall(r"{(\w+)}", argv):
        MADE[name](tmp_path / name)
        argv = argv.replace(f"{{{name}}}", str(tmp_path / name))
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run = toy if script == "toy" else functools.partial(run_main, f"train_{script}")
        run(*shlex.split(argv))
    error, stop = capsys.readouterr().err, end.value.code
    line = error.splitlines()[-1] if code == 2 else stop  # a text is printed, the exit code is 1
    assert stop == 2 if code == 2 else isinstance(stop, str)
    assert says in line and "\n" not in line and "Traceback" not in error, line
    assert not Path("was-run").exists() and not list(Path("runs").rglob("*.pt"))
