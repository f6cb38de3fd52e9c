"""Tests: no network and no data set needed, a few minutes on two cores.

    python -m pytest test_all.py                  # everything
    python -m pytest test_all.py -k bad_input     # one part
    python -m pytest test_all.py -k cuda          # where there is a GPU: what is different there
    KILLS=100 python -m pytest test_all.py -k killed

Models are tiny folders that the tests save. `toy` is a task that takes a tenth of a second.
"""
import functools
import hashlib
import importlib
import inspect
import io
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import threading
import time
import wave
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
os.environ["OMP_NUM_THREADS"] = "1"  # tiny models: two threads only wait for each other

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModel, GPT2Config, GPT2LMHeadModel, GPT2Model

import data
import fpt
import train_cifar
import train_cyp3a4
import train_mnist_add
import train_speech

HERE, TEMPORARY = Path(__file__).parent, tempfile.TemporaryDirectory()
DATA = f"{TEMPORARY.name}/data"
SHARED = HERE.parent / "shared" / "data"  # the real files, where they are at hand
CLOSED = "http://127.0.0.1:9/"
SCRIPTS = ["train_cifar", "train_speech", "train_cyp3a4", "train_mnist_add"]
GPU = pytest.param("cuda:0", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))
COMPILER = pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++")))
                              or not Path(sysconfig.get_path("include"), "Python.h").exists(),
                              reason="no C++ compiler or no headers of Python")

BLOCKS = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
              initializer_range=0.2)
TEXT = BLOCKS | dict(vocab_size=50, max_position_embeddings=64)
IMAGE = BLOCKS | dict(image_size=16, patch_size=8, layer_norm_eps=1e-3)
SMALL = dict.fromkeys(fpt.TEXT, TEXT | dict(head_dim=16, num_key_value_heads=1)) | {
    **dict.fromkeys(fpt.STACKS, IMAGE), "bert": TEXT,
    "gpt2": dict(n_layer=2, n_head=2, n_embd=32, n_positions=128, vocab_size=100, initializer_range=0.2),
    "audio-spectrogram-transformer": IMAGE | dict(max_length=32, num_mel_bins=16),
    "whisper": dict(d_model=32, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=64, init_std=0.2,
                    decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=64, num_mel_bins=8,
                    max_source_positions=64, vocab_size=60, pad_token_id=0)}

INPUTS = {"whisper": (1, 8, 128), "audio-spectrogram-transformer": (1, 32, 16)}


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
    without = {"add_pooling_layer": False} if kind == "bert" else {}  # masked language models have none
    torch.manual_seed(1)  # the same model whichever test asks for it first
    disturb(AutoModel.from_config(AutoConfig.for_model(kind, **SMALL[kind]), **without)).save_pretrained(path)
    return str(path)


def toy_parser(*argv):
    sys.argv = ["train_toy.py", *map(str, argv)]
    parser = fpt.flags("toy", "a toy", demo={}, steps=40, eval_every=20, lr=0.01)
    parser.set_defaults(model=folder("gpt2"), device="cpu", amp="fp32")
    parser.add_argument("--noise", type=float, default=0.0, help="std of what is added to training tokens")
    return parser


def parse(*argv):
    """The flags of a script called so. Unless they say otherwise: a tiny GPT-2 in fp32 on the CPU."""
    return fpt.parse(toy_parser(*argv))


def toy(*argv):
    """Train as a script called with these words would. Returns the last line of its log."""
    return fpt.run(toy_parser(*argv), toy_main)


def toy_main(args):
    """Which of 3 tokens has the largest sum? The model stays in toy.model."""
    tokens = torch.randn(300, 3, 4, generator=torch.Generator().manual_seed(0))
    targets, first = tokens.sum(2).argmax(1), {"train": 0, "validation": 200, "test": 240}
    toy.model = fpt.FPT(args, inputs=4, outputs=3, time=3)

    def batch(split, index):
        x, y = tokens[index + first[split]], targets[index + first[split]]
        x = x + args.noise * torch.randn(x.shape) * (split == "train")
        return x.to(args.device), None, y.to(args.device)

    return fpt.fit(args, toy.model, batch, {"train": 200, "validation": 40, "test": 60}, dummy=1)


def run_main(script, *argv):
    """Run a script in this process, which saves the imports. Returns the last line of its log."""
    sys.argv = [f"{script}.py", "--model", folder("gpt2"), "--data", DATA, *map(str, argv)]
    module = importlib.import_module(script)
    return fpt.run(module.parser, module.main)


def log_lines(folder):
    lines, no_json = (folder / "log.jsonl").read_text().splitlines(), raises(ValueError("NaN is no JSON"))
    return [json.loads(line, parse_constant=no_json) for line in lines]


def checkpoint(folder, name="best.pt"):
    return torch.load(folder / name, weights_only=True)


def raises(error):
    def function(*_, **__):
        raise error

    return function


def spy(patch, stop_at=0, stop=None):
    """Returns the list of (split, order) of every evaluation from now on. Calls stop() in place of one."""
    infer, seen = fpt.infer, []

    def spying(args, model, batch, split, order):
        seen.append((split, order))
        return stop() if len(seen) == stop_at else infer(args, model, batch, split, order)

    patch.setattr(fpt, "infer", spying)
    return seen


def stopped(stop_at, run, *argv, stop=raises(KeyboardInterrupt)):
    """Call run(*argv) and stop it in its evaluation number stop_at, as Ctrl-C does. Returns its exit code."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        spy(patch, stop_at, stop)
        run(*argv)
    return end.value.code


@pytest.fixture(autouse=True)
def leave_the_process_as_it_was(monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


# ---- The model -----------------------------------------------------------------------------------
@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("activation, saved_as, pool", [
    ("gelu_new", GPT2Model, "mean"), ("relu", GPT2LMHeadModel, "last")])
def test_ours_equals_transformers_gpt2(activation, saved_as, pool, device, tmp_path):
    theirs = disturb(saved_as(GPT2Config(**SMALL["gpt2"], activation_function=activation, n_inner=80)))
    theirs.save_pretrained(tmp_path)
    ours, tokens = fpt.FPT(parse("--model", tmp_path, "--pool", pool), 12, 5, 9), torch.randn(3, 9, 12)
    hidden = theirs.base_model(inputs_embeds=ours.input(tokens)).last_hidden_state
    torch.testing.assert_close(ours.core(ours.input(tokens)), hidden, rtol=1e-5, atol=1e-5)
    pooled = hidden.mean(1) if pool == "mean" else hidden[:, -1]
    expected = ours.output(pooled)
    torch.testing.assert_close(ours.to(device)(tokens.to(device)).cpu(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", fpt.TEXT + fpt.STACKS)
def test_another_core_computes_what_transformers_computes(kind):
    theirs = AutoModel.from_pretrained(folder(kind), attn_implementation="eager").eval()
    model, x = fpt.FPT(parse("--model", folder(kind)), 7, 3, 20), torch.randn(2, 6, 32)
    if kind in fpt.TEXT:
        expected = theirs(inputs_embeds=x).last_hidden_state
    else:  # feed ours with what enters their first block
        encoder, seen = theirs.encoder if kind == "whisper" else theirs, []
        block = next(module for module in encoder.modules() if isinstance(module, nn.ModuleList))[0]
        block.register_forward_pre_hook(lambda _, x, more: seen.extend((*x, *more.values())),
                                        with_kwargs=True)
        expected = encoder(torch.randn(INPUTS.get(kind, (1, 3, 16, 16)))).last_hidden_state
        x = seen[0]
        table = encoder.embed_positions.weight if kind == "whisper" else torch.zeros(1024, 32)
        assert torch.equal(model.core.wpe.weight, table)
        model.core.wpe.weight.data.zero_()
    torch.testing.assert_close(model.core(x), expected, rtol=1e-4, atol=1e-5)
    model(torch.randn(2, 6, 7), torch.tensor([6, 4])).sum().backward()
    assert model.input.weight.grad.abs().sum() > 0
    assert all((p.grad is None) == (part in ("attn", "ff")) for p, part in model.named_parts())
    whole = fpt.FPT(parse("--model", folder(kind), "--train", "all"), 7, 3, 20)
    whole(torch.randn(2, 6, 7)).sum().backward()  # several processes wait for the gradient of each
    assert not [name for name, p in whole.named_parameters() if p.grad is None]


@pytest.mark.parametrize("layers, pool", [(2, "mean"), (2, "last"), (0, "mean")])
@pytest.mark.parametrize("kind", SMALL)
def test_an_example_does_not_see_its_neighbours_padding(kind, pool, layers):
    args = parse("--model", folder(kind), "--pool", pool, "--layers", layers, "--in_scale", 1)
    model = fpt.FPT(args, 20, 2, 30, discrete=True)
    short, long = torch.randint(1, 20, (1, 4, 3)), torch.randint(1, 20, (1, 30, 3))
    expected = torch.cat([model(short), model(long)])
    for padding in 0, 7:
        both = torch.cat([F.pad(short, (0, 0, 0, 26), value=padding), long])
        torch.testing.assert_close(model(both, torch.tensor([4, 30])), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected[0], expected[1])


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
    torch.testing.assert_close(none(tokens), none.output(F.gelu(none.core(none.input(tokens))).mean(1)))


@pytest.mark.parametrize("kind, argv, number", [
    ("gpt2", [], 30674.390560705026), ("gpt2", ["--train", "out"], 56927.06662061402),  # with the input layer
    ("bert", [], 31365.422030688784), ("llama", [], 23094.741225277918), ("whisper", [], 28009.605610257757),
    ("vit", [], 31177.769610630065), ("dinov2", [], 58145.54146297634),
    ("the real gpt2", ["--layers", 2], 3668759.5431652493)])
def test_a_random_core_is_the_same_on_every_machine(kind, argv, number, tmp_path):
    """These numbers were written down once. If one changes, checkpoints of random cores are lost."""
    model = kind.removeprefix("the real ")
    if model == kind:
        AutoConfig.for_model(kind, **SMALL[kind]).save_pretrained(model := tmp_path)  # no weights are needed
    args = parse("--model", model, "--pretrained", 0, "--in_scale", 1, *argv)
    assert fpt.FPT(args, 4, 3, 3).fingerprint == pytest.approx(number, rel=1e-9)


def test_random_matrices_have_one_scale_the_rest_does_nothing_and_tokens_have_theirs():
    for argv, std in ([], 32 ** -0.5), (["--init_std", 0.02], 0.02), (["--seed", 1], 32 ** -0.5):
        args = parse("--pretrained", 0, "--in_scale", 0.3, *argv)
        for name, p in fpt.load_core(args).named_parameters():
            if p.ndim == 2:
                chance = 0.1 + 2 / p.numel() ** 0.5
                assert p.std().item() == pytest.approx(std, rel=chance) and abs(p.mean()) < std * chance, name
            else:
                assert torch.equal(p, torch.full_like(p, float("bias" not in name))), name
    for discrete, tokens in (True, torch.arange(1, 500)[None, :]), (False, torch.randn(1, 200, 500)):
        assert fpt.FPT(args, 500, 2, 3, discrete).input(tokens).std().item() == pytest.approx(0.3, rel=0.1)


@pytest.mark.parametrize("inputs, outputs, count", [
    (48, 10, 83_722), (784, 91, 711_259), (16, 10, 59_146), (80, 35, 127_523)])
def test_as_many_parameters_are_trained_as_in_the_original(inputs, outputs, count, monkeypatch):
    with torch.device("meta"):  # shapes without numbers, which would take seconds
        core = fpt.GPT2(GPT2Config(), layers=12)
    monkeypatch.setattr(fpt, "load_core", lambda args: core)
    monkeypatch.setattr(torch, "dot", lambda *_: torch.zeros(()))  # no numbers, no fingerprint
    model = fpt.FPT(parse("--train", "in,out,ln"), inputs, outputs, 64)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
    assert sum(p.numel() for p in core.parameters()) == 124_439_808 - 50257 * 768  # all but the token table


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
    names = [f"train_{name}" for name in "loss loss_start loss_final accuracy seconds".split()] + [
        "validation_loss", "validation_accuracy", "validation_dummy_accuracy", "evaluation_seconds"]
    printed = capsys.readouterr().out
    assert all(isinstance(rows[0][name], float) and name.replace("_", " ") in printed for name in names)
    assert last["test_accuracy"] > last["test_dummy_accuracy"] + 0.2
    assert last["trainable_parameters"] == sum(p.numel() for p in toy.model.parameters() if p.requires_grad)
    assert {"seed": 3, "lr": 0.01, "model": folder("gpt2"), "pretrained": 1}.items() <= last.items()


def test_the_best_checkpoint_is_tested_once_and_a_tie_goes_to_the_lower_loss(tmp_path, monkeypatch):
    infer, script, seen = fpt.infer, iter([(5, 1), (9, 1), (9, 3), (9, 2), (8, 3)]), []

    def scripted(args, model, batch, split, order):  # (right of ten, by how much)
        seen.append((split, model.input.weight.clone()))
        if split == "test":
            return infer(args, model, batch, split, order)
        right, margin = next(script)
        return torch.eye(3)[[0] * right + [1] * (10 - right)] * margin, torch.zeros(10, dtype=torch.long)

    monkeypatch.setattr(fpt, "infer", scripted)
    result = toy("--out", tmp_path, "--steps", 25, "--eval_every", 5)
    assert [split for split, _ in seen] == ["validation"] * 5 + ["test"]
    assert result["step"] == 15 and torch.equal(seen[2][1], seen[5][1])


def test_the_test_split_may_stay_closed(tmp_path, monkeypatch):
    seen = spy(monkeypatch)
    result = toy("--out", tmp_path, "--test", 0)
    assert {split for split, _ in seen} == {"validation"} and not any("test_" in name for name in result)
    assert result["validation_loss"] in [row["validation_loss"] for row in log_lines(tmp_path)[:-1]]


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_eval_gives_the_same_figures_writes_nothing_and_moves_to_the_cpu(tmp_path, device):
    trained = toy("--out", tmp_path / "run", "--train", "in,out", "--seed", 3, "--device", device)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    evaluated = toy("--eval", tmp_path / "run" / "best.pt", "--out", tmp_path / "new", "--device", device)
    assert evaluated.items() <= trained.items() and "test_loss" in evaluated
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    moved = toy("--eval", tmp_path / "run" / "best.pt", "--device", "cpu", "--batch_size", 7)
    assert moved["test_loss"] == pytest.approx(trained["test_loss"], rel=1e-4)


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_half_precision_trains_as_fp32_does(tmp_path, amp, device):
    fp32, half = (toy("--out", tmp_path / precision, "--amp", precision, "--steps", 100, "--device", device)
                  for precision in ("fp32", amp))
    assert toy.model.core.h[0].mlp.c_fc.weight.dtype == fpt.PRECISIONS[amp]
    assert toy.model.input.weight.dtype == torch.float32 and half["test_loss"] != fp32["test_loss"]
    assert half["test_accuracy"] == pytest.approx(fp32["test_accuracy"], abs=0.1)
    assert half["test_loss"] == pytest.approx(fp32["test_loss"], abs=0.15)


@pytest.mark.parametrize("kind", SMALL)
def test_what_goes_from_block_to_block_is_float32_whatever_the_products_are(kind):
    model, seen = fpt.FPT(parse("--model", folder(kind), "--amp", "bf16"), 4, 3, 3), []
    for block in next(module for module in model.modules() if isinstance(module, nn.ModuleList)):
        block.register_forward_hook(lambda _, x, y: seen.append(y if torch.is_tensor(y) else y[0]))
    seen.append(model(torch.randn(2, 3, 4)))
    assert [x.dtype for x in seen] == 3 * [torch.float32]


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_fp16_steps_that_overflow_are_skipped(tmp_path, monkeypatch, device):
    large = functools.partialmethod(torch.amp.GradScaler.__init__, init_scale=2.0**40)
    monkeypatch.setattr(torch.amp.GradScaler, "__init__", large)
    toy("--out", tmp_path, "--amp", "fp16", "--steps", 80, "--device", device)
    states = checkpoint(tmp_path, "last.pt")["optimizer"]["state"].values()
    assert 35 < max(state["step"] for state in states) < 77


@pytest.mark.parametrize("argv", [
    ["--accumulate", 2, "--batch_size", 8], pytest.param(["--compile", 1], marks=COMPILER)],
    ids=["halves", "compile"])
@pytest.mark.parametrize("device", ["cpu", GPU])
def test_half_batches_and_a_compiled_model_train_as_plain_ones(tmp_path, monkeypatch, device, argv):
    if device == "cpu":  # all of torch.compile but the C++ compiler, which takes a minute
        without = functools.partialmethod(nn.Module.compile, backend="aot_eager")
        monkeypatch.setattr(nn.Module, "compile", without)
    for name, more in ("one", []), ("two", argv):
        toy("--out", tmp_path / name, "--steps", 3, "--batch_size", 16, "--device", device, *more)
    assert (toy.model._compiled_call_impl is not None) == ("--compile" in argv)
    one, two = checkpoint(tmp_path / "one")["trained"], checkpoint(tmp_path / "two")["trained"]
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-4, msg=name)


@COMPILER
@pytest.mark.parametrize("device", ["cpu", GPU])
def test_molecules_of_many_lengths_are_compiled_few_times(tmp_path, monkeypatch, device):
    if device == "cpu":
        without = functools.partialmethod(nn.Module.compile, backend="aot_eager")
        monkeypatch.setattr(nn.Module, "compile", without)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    argv = "--demo 1 --steps 20 --eval_every 20 --batch_size 8 --amp fp32 --device".split() + [device]
    plain, compiled = (run_main("train_cyp3a4", *argv, "--compile", compile, "--out", tmp_path / str(compile))
                       for compile in (0, 1))
    assert compiled["test_loss"] == pytest.approx(plain["test_loss"], rel=1e-2)
    assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] < 7


@pytest.mark.parametrize("device", [GPU])
@pytest.mark.parametrize("script", SCRIPTS)
def test_no_step_waits_for_the_gpu(script, device, tmp_path, monkeypatch):
    rate = fpt.learning_rate

    def strict(args, step):  # from here on waiting is an error, but in the last step, which evaluates
        torch.cuda.set_sync_debug_mode("error" if step < args.steps else 0)
        return rate(args, step)

    monkeypatch.setattr(fpt, "learning_rate", strict)
    try:
        for amp in "bf16", "fp16":
            run_main(script, "--demo", 1, "--steps", 5, "--eval_every", 5, "--device", device, "--amp", amp,
                     "--out", tmp_path / amp)
    finally:
        torch.cuda.set_sync_debug_mode(0)


def test_the_learning_rate_warms_up_and_ends_above_0(tmp_path):
    for steps, warmup in (1000, 50), (40, 4), (1, 1):
        args = parse("--steps", steps, "--lr", 1)
        rates = [fpt.learning_rate(args, step) for step in range(1, steps + 1)]
        assert rates[0] == pytest.approx(1 / warmup) and max(rates) > 0.97 and rates[-1] > 0
        assert rates.index(max(rates)) == warmup - 1 and rates[warmup:] == sorted(rates[warmup:])[::-1]
    toy("--out", tmp_path)
    used = [group["lr"] for group in checkpoint(tmp_path, "last.pt")["optimizer"]["param_groups"]]
    assert used == [fpt.learning_rate(parse(), step=40)] * 2 and used[0] < 0.0001


def test_matrices_decay_and_norms_biases_and_positions_do_not():
    args = parse("--weight_decay", 0.1)
    model = fpt.FPT(args, 4, 3, 3)
    matrices, others = fpt.adamw(args, model).param_groups
    assert {id(p) for p in matrices["params"]} == {id(model.input.weight), id(model.output.weight)}
    assert (matrices["weight_decay"], others["weight_decay"]) == (0.1, 0)
    assert len(others["params"]) == 2 + 1 + 2 * 5  # two biases, the positions, weight and bias of five norms


def test_batches_cover_an_epoch_and_group_lengths():
    feed = fpt.batches(100, 10, seed=0)
    first, second = (torch.cat([next(feed) for _ in range(10)]).tolist() for _ in "ab")
    assert sorted(first) == sorted(second) == list(range(100)) and first != second
    assert len(next(fpt.batches(5, 10, seed=0))) == 5
    feed = fpt.batches(95, 10, seed=0, lengths=torch.arange(95))  # what an epoch leaves out is random
    assert max(torch.cat([next(feed) for _ in range(9)]).tolist()) > 90
    lengths = torch.randint(5, 60, (3200,), generator=torch.Generator().manual_seed(0))
    feed = fpt.batches(3200, 32, seed=0, lengths=lengths)
    epoch = [lengths[next(feed)] for _ in range(100)]
    longest = [int(batch.max()) for batch in epoch]
    assert torch.cat(epoch).sum() == lengths.sum() > 0.9 * 32 * sum(longest)
    assert longest != sorted(longest)


@pytest.mark.parametrize("bad_from", [25, 40])  # 40: the evaluation alone sees it
def test_a_loss_that_is_no_number_ends_the_run_and_leaves_the_last_good_one(tmp_path, monkeypatch, bad_from):
    monkeypatch.setattr(fpt, "learning_rate", lambda args, step: 0.01 if step < bad_from else math.nan)
    with pytest.raises(SystemExit, match="^The loss is no number any more before step 40: .*--lr.*last.pt$"):
        toy("--out", tmp_path)
    for saved in checkpoint(tmp_path), checkpoint(tmp_path, "last.pt"):
        assert saved["step"] == 20 and all(p.isfinite().all() for p in saved["trained"].values())
    assert [row["step"] for row in log_lines(tmp_path)] == [20]


# ---- Runs that are stopped -----------------------------------------------------------------------
def silent_toy(*argv):
    sys.stdout = sys.stderr = open(os.devnull, "w")
    fpt.tqdm.set_lock(threading.RLock())  # the usual one is shared, and a sister may have died holding it
    toy(*argv)


def forked(*argv, kill_after=None):
    """Run the toy in a process of its own, killed after so many seconds. Returns its exit code."""
    context = multiprocessing.get_context("forkserver")  # its processes have seen no GPU, this one may have
    context.set_forkserver_preload(["test_all"])
    process = context.Process(target=silent_toy, args=("--model", folder("gpt2"), *argv))
    process.start()
    if kill_after is not None:
        process.join(kill_after)
        process.kill()
    process.join(120)
    return process.exitcode


def outcome(folder):
    """What must not depend on stops: the log but for seconds and paths, all numbers in both checkpoints."""
    passing = re.compile("seconds|^(out|resume|wandb_id|model)$")
    rows = [{name: row[name] for name in row if not passing.search(name)} for row in log_lines(folder)]
    saved = [checkpoint(folder, file) for file in ("best.pt", "last.pt")]
    names = "trained", "optimizer", "scaler", "step"
    numbers = tree_leaves([[part.get(name) for name in names] for part in saved])
    assert len(numbers) > 30
    return rows, [number.tolist() if torch.is_tensor(number) else number for number in numbers]


@pytest.mark.parametrize("amp", ["fp32", "fp16"])
def test_a_run_killed_again_and_again_equals_the_uninterrupted_one(tmp_path, amp):
    argv = ["--steps", 150, "--eval_every", 3, "--noise", 0.5, "--accumulate", 2, "--amp", amp]
    forked("--steps", 1, "--out", tmp_path / "first")  # the server's imports are not to be timed
    start, kills = time.time(), 0
    assert forked(*argv, "--out", tmp_path / "whole") == 0
    whole = time.time() - start
    while kills < int(os.environ.get("KILLS", 4)):
        out, code = tmp_path / f"killed-{kills}", -1
        while code:
            resume = int((out / "last.pt").exists())
            code = forked(*argv, "--resume", resume, "--out", out, kill_after=random.uniform(0, whole / 2))
            assert code in (0, -signal.SIGKILL)
            kills += code == -signal.SIGKILL
        assert outcome(out) == outcome(tmp_path / "whole")
    forked(*argv, "--out", tmp_path / "other", "--seed", 1)
    assert outcome(tmp_path / "other")[0] != outcome(out)[0]


@pytest.mark.parametrize("at, number", [(1, signal.SIGINT), (3, signal.SIGINT), (3, signal.SIGTERM)])
def test_a_signal_ends_a_run_and_the_printed_command_goes_on_as_it_was(tmp_path, capsys, at, number):
    argv = ["--noise", 0.5, "--eval_every", 10, "--lr", 0.02, "--seed", 5, "--data", "my data", "--test", 0]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores it
    toy(*argv, "--out", tmp_path / "whole")
    code = stopped(at, toy, *argv, "--out", tmp_path / "a cut",
                   stop=lambda: (os.kill(os.getpid(), number), time.sleep(5)))
    command = re.search("^  python train_toy.py (.*)$", capsys.readouterr().err, re.MULTILINE)[1]
    assert code == 130 and len(log_lines(tmp_path / "a cut")) == at - 1
    for flag, new, old in ("--lr", 0.01, 0.02), ("--test", 1, 0):  # known even before the first evaluation
        with pytest.raises(SystemExit, match=rf"{flag} {new} \(was {old}\)"):
            toy("--resume", 1, "--out", tmp_path / "a cut", flag, new)
    toy(*shlex.split(command))
    assert outcome(tmp_path / "a cut") == outcome(tmp_path / "whole")


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_a_stopped_run_goes_on_with_the_same_losses(tmp_path, device):
    argv = "--amp", "fp16", "--eval_every", 10, "--noise", 0.5, "--device", device
    whole = toy("--out", tmp_path / "whole", *argv)
    stopped(3, toy, "--out", tmp_path / "cut", *argv)
    resumed = toy("--out", tmp_path / "cut", "--resume", 1, "--device", device)
    for name in "step", "test_loss", "test_accuracy":
        assert resumed[name] == pytest.approx(whole[name], rel=1e-3)


def test_a_run_goes_on_with_a_model_folder_that_has_moved(tmp_path):
    model = shutil.copytree(folder("gpt2"), tmp_path / "model")
    stopped(3, toy, "--eval_every", 10, "--model", model, "--out", tmp_path / "run")
    shutil.move(model, tmp_path / "moved")
    again = "--resume", 1, "--out", tmp_path / "run"
    stopped(1, toy, *again, "--model", tmp_path / "moved")  # it is remembered, before the next evaluation
    assert toy(*again)["steps"] == 40


@pytest.mark.parametrize("train, other", [
    ("in,out", {}), ("in,out", {"n_embd": 64}), ("all", {"n_embd": 64}), ("all", {"n_layer": 1})])
def test_other_weights_than_the_runs_are_refused(tmp_path, train, other):
    toy("--out", tmp_path / "run", "--steps", 2, "--train", train)
    GPT2Model(GPT2Config(**SMALL["gpt2"] | other)).save_pretrained(tmp_path / "other")
    with pytest.raises(SystemExit, match="trained on another"):
        toy("--eval", tmp_path / "run" / "best.pt", "--model", tmp_path / "other")


def test_a_folder_holds_one_run(tmp_path, monkeypatch):
    stopped(1, toy, "--out", tmp_path)  # before its first evaluation, so the folder is still free
    result = toy("--out", tmp_path, "--seed", 2)
    with pytest.raises(SystemExit, match="holds a run: choose another folder, or go on"):
        toy("--out", tmp_path)
    monkeypatch.setattr(fpt, "infer", None)  # the end of a run is not tested again
    assert toy("--resume", 1, "--out", tmp_path) == result == log_lines(tmp_path)[-1]


def test_runs_started_at_once_take_different_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="it has 2 blocks"):  # a start that fails takes none
        toy("--layers", 3)
    Path("runs").symlink_to("nowhere")  # a drive that is not there
    with pytest.raises(SystemExit, match="FileExistsError"):
        toy()
    Path("runs").unlink()
    runs = [parse() for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(fpt.take_folder, runs))
    assert sorted(args.out for args in runs) == ["runs/toy", "runs/toy-2", "runs/toy-3", "runs/toy-4"]


# ---- Several processes, notebooks, Weights & Biases ----------------------------------------------
def test_two_processes_are_one_and_a_run_goes_on_with_another_number(tmp_path):
    argv = ["--demo", 1, "--n", 1, "--amp", "fp32", "--device", "cpu", "--augment", 0, "--data", DATA]
    argv += ["--steps", 40, "--eval_every", 10, "--batch_size", 16, "--model", folder("gpt2")]
    run_main("train_mnist_add", *argv, "--out", tmp_path / "one")
    stopped(3, run_main, "train_mnist_add", *argv, "--out", tmp_path / "one-two")
    torchrun = [sys.executable, *"-m torch.distributed.run --standalone --nproc_per_node=2 --".split()]
    calls, processes = {"two": argv, "one-two": ["--resume", 1, "--data", DATA, "--device", "cpu"]}, {}
    for name in calls:
        command = [*torchrun, HERE / "train_mnist_add.py", *calls[name], "--out", tmp_path / name]
        processes[name] = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE,
                                           stderr=subprocess.PIPE, text=True)
    for name, process in processes.items():
        printed, error = process.communicate(timeout=240)
        assert process.returncode == 0, error
        assert printed.count("parameters are trained") == 1 and "torchrun --nproc_per_node=2 " in printed
        rows, wanted = log_lines(tmp_path / name), log_lines(tmp_path / "one")
        assert [row["step"] for row in rows] == [row["step"] for row in wanted]
        for row, one in zip(rows, wanted):
            for figure in filter(re.compile("_(loss|accuracy|mae)").search, one):
                assert row[figure] == pytest.approx(one[figure], rel=2e-3, abs=3e-3), (name, figure)


def test_every_script_runs_in_a_notebook_cell(tmp_path):
    import nbclient
    import nbformat

    kernel = "['/somewhere/ipykernel_launcher.py', '-f', 'kernel-1.json']"
    cells = [f"import sys, fpt; sys.argv = {kernel}; parser = fpt.flags('x', '', demo={{}}, out='o')\n"
             "args = fpt.parse(parser); print(args.steps, fpt.go_on(args))"]
    for script in SCRIPTS:
        words = f"x.py --demo 1 --steps 2 --model {folder('gpt2')} --data {DATA} --out {tmp_path / script}"
        cells += [f"sys.argv = {words.split()}", (HERE / f"{script}.py").read_text()]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.execute(notebook, str(HERE), timeout=200)
    printed = "".join(part.get("text", "") for part in notebook.cells[0].outputs)
    assert "1000 python train_x.py --resume 1 --out o" in printed
    assert all(log_lines(tmp_path / script)[-1]["step"] == 2 for script in SCRIPTS)


def test_weights_and_biases_offline_and_the_same_run_after_a_stop(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    stopped(2, toy, "--out", tmp_path, "--wandb", "fpt-test")
    wandb.finish()
    toy("--resume", 1, "--out", tmp_path)
    wandb.finish()
    first, second = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    content = first.read_bytes() + second.read_bytes()
    assert first.name == second.name
    assert all(word in content for word in (b"validation_accuracy", b"test_accuracy", b"in_scale"))


# ---- What the scripts are made of ----------------------------------------------------------------
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
    moved = train_cifar.shift_and_mirror(images).int()
    steps = moved[:, 16, :, 1].diff(dim=1)
    assert 60 < (steps < 0).any(1).sum() < 140 and set(steps.unique().tolist()) <= {-1, 0, 1}
    assert moved[..., 0].diff(dim=1).min() >= 0
    assert set((moved[:, 16, 16, 0] - 16).tolist()) == set(range(-4, 5))

    clips = torch.arange(100.0).expand(50, 100)
    moved = train_speech.shift(clips, 10)
    assert torch.equal(moved.sort(1).values, clips)
    assert set(moved[:, 50].tolist()) <= set(range(40, 61)) and len(set(moved[:, 50].tolist())) > 5

    digits = torch.zeros(300, 2, 28, 28)
    digits[:, :, 13:15, 8:20] = 255  # a bar in the middle
    moved = train_mnist_add.jiggle(digits).flatten(0, 1)
    middle = (moved.sum(2) * torch.arange(28)).sum(1) / moved.sum((1, 2)) - 13.5
    assert moved.min() >= 0 and moved.mean().item() == pytest.approx(digits.mean().item(), rel=0.05)
    assert 0.5 < middle.std() and middle.abs().max() < 2.9 and len(moved.flatten(1).unique(dim=0)) == 600


@pytest.mark.parametrize("tokens", ["mel", "wave"])
def test_sound_as_tokens(tokens):
    waves = (8000 * torch.sin(torch.arange(16000) * 0.3)).short().repeat(2, 1)
    waves[1] //= 40  # how loud it is makes no difference, as many clips are quiet
    features = train_speech.tokenizer(tokens, "cpu")(waves)
    assert features.shape == (2, train_speech.TIMES[tokens], 80)
    assert features.mean().abs() < 1e-4 and features[1].std().item() == pytest.approx(1, rel=1e-2)
    assert torch.corrcoef(features.flatten(1))[0, 1] > 0.9


def test_rankings_by_hand():
    score, target = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5]), torch.tensor([1, 0, 1, 1, 0])
    assert train_cyp3a4.auroc(score, target) == pytest.approx(4 / 6)  # 4 of the 6 pairs are in order
    assert train_cyp3a4.auprc(score, target) == pytest.approx((1 / 1 + 2 / 3 + 3 / 4) / 3)
    ties, target = torch.tensor([0.5, 0.5, 0.5, 0.1]), torch.tensor([1, 0, 0, 1])
    assert train_cyp3a4.auroc(ties, target) == pytest.approx((0.5 + 0.5) / 4)
    assert train_cyp3a4.auprc(ties, target) == pytest.approx((1 / 3 + 2 / 4) / 2)


def test_a_molecule_that_rdkit_cannot_read_ends_with_one_line():
    with pytest.raises(SystemExit, match="cannot read 1 of the molecules, C1CC the first"):
        data.featurise([("CCO", 0), ("C1CC", 1)], "smiles")


def test_sums_use_every_digit_equally_and_never_change():
    for n in 1, 2, 5:
        index = data.sum_indices(100, n)
        assert index.shape == (100, n) and torch.equal(index, data.sum_indices(100, n))
        assert torch.equal(index.flatten().bincount(), torch.full((100,), n))
        assert n == 1 or not torch.equal(index[:, 0], index[:, 1])


def test_l1_is_the_absolute_and_mse_the_squared_error_of_the_sum(tmp_path):
    l1, mse = (run_main("train_mnist_add", "--demo", 1, "--n", 3, "--steps", 1, "--loss", loss,
                        "--out", tmp_path / loss) for loss in ("l1", "mse"))
    spread = 2.87 * 3 ** 0.5
    assert l1["test_loss"] * spread == pytest.approx(l1["test_mae"], abs=0.26)  # the error is of rounded sums
    assert mse["test_loss"] * spread ** 2 == pytest.approx(mse["test_mse"], rel=0.1)


# ---- Data sets: files in the original formats ----------------------------------------------------
def tar(files):
    """{name: bytes} as a .tar.gz"""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def wav_bytes(samples, rate=16000, channels=1):
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setparams((channels, 2, rate, 0, "NONE", ""))
        file.writeframes(np.asarray(samples).astype("<i2").tobytes())
    return buffer.getvalue()


def ending(run, *args):
    """The one line that run(*args) ends with."""
    with pytest.raises(SystemExit) as stop:
        run(*args)
    assert isinstance(stop.value.code, str) and "\n" not in stop.value.code
    return stop.value.code


def assert_same(one, other):
    for split in data.SPLITS:
        assert len(one[split]) == len(other[split]) and all(map(torch.equal, one[split], other[split]))


def sizes(splits):
    return [len(splits[split][-1]) for split in data.SPLITS]


def test_cifar10_from_its_archive_and_from_a_hand_made_npz(tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.utils.check_md5", lambda *_: True)  # our files are not the real
    rng = np.random.default_rng(0)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    batches = {name: {"data": rng.integers(0, 256, (20, 3072), np.uint8),
                      "labels": rng.integers(0, 10, 20).tolist()} for name in names}
    files = batches | {"batches.meta": {"label_names": list("abcdefghij")}}
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(tar(
        {f"cifar-10-batches-py/{name}": pickle.dumps(content) for name, content in files.items()}))
    splits = data.cifar10(tmp_path)
    assert sizes(splits) == [90, 10, 20]
    # Row-major planes of red, green, blue become one pixel after the other.
    pixels = {name: batches[name]["data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1) for name in names}
    assert torch.equal(splits["test"][0], torch.tensor(pixels["test_batch"]))
    assert splits["test"][1].tolist() == batches["test_batch"]["labels"]
    train_x = np.concatenate([pixels[name] for name in names[:5]])
    learned = torch.cat([splits["train"][0], splits["validation"][0]]).flatten(1)
    assert sorted(learned.tolist()) == sorted(train_x.reshape(100, -1).tolist())

    train_y = np.array([label for name in names[:5] for label in batches[name]["labels"]], np.uint8)
    (tmp_path / "npz").mkdir()
    np.savez(tmp_path / "npz" / "cifar10.npz", train_x=train_x, train_y=train_y[:, None],
             test_x=pixels["test_batch"], test_y=batches["test_batch"]["labels"])
    assert_same(splits, data.cifar10(tmp_path / "npz"))


def test_mnist_from_its_files(tmp_path):
    data.demo_mnist(tmp_path)  # in the original format
    splits, raw = data.mnist(tmp_path), tmp_path / "MNIST" / "raw"
    assert sizes(splits) == [550, 50, 200]
    assert splits["test"][0].numpy().tobytes() == (raw / "t10k-images-idx3-ubyte").read_bytes()[16:]
    assert splits["test"][1].tolist() == list((raw / "t10k-labels-idx1-ubyte").read_bytes()[8:])


def speech_archive(path):
    """Two words, three speakers, two clips each. Returns the clips' samples by name."""
    rng = np.random.default_rng(0)
    clips = {f"./{word}/{speaker}_nohash_{i}.wav": rng.integers(-9999, 9999, 16000 - 500 * i)
             for word in ("yes", "no") for speaker in ("aa", "bb", "cc") for i in range(2)}
    files = {name: wav_bytes(samples) for name, samples in clips.items()}
    for foreign in "_background_noise_", ".git", ".ipynb_checkpoints":
        files[f"./{foreign}/hum.wav"] = wav_bytes(np.zeros(99))
    files["./validation_list.txt"] = b"yes/bb_nohash_0.wav\n\nno/bb_nohash_1.wav\n\n"
    # The lists name words that are not there.
    files["./testing_list.txt"] = b"no/cc_nohash_0.wav\nno/cc_nohash_1.wav\nzebra/cc_nohash_1.wav\n"
    path.write_bytes(tar(files))
    return clips


def test_speech_commands_from_its_archive(tmp_path, monkeypatch):
    archive = tmp_path / "served.tar.gz"
    clips = speech_archive(archive)
    monkeypatch.setattr(data, "SPEECH_URL", archive.as_uri())
    assert "invalid hash" in ending(data.speech_commands, tmp_path / "bad")
    monkeypatch.setattr(data, "SPEECH_SHA256", hashlib.sha256(archive.read_bytes()).hexdigest())
    splits = data.speech_commands(tmp_path / "good")
    assert splits["classes"] == ["no", "yes"] and splits["test"][0].dtype == torch.int16
    expected = {"train": "no/aa_0 no/aa_1 no/bb_0 yes/aa_0 yes/aa_1 yes/bb_1 yes/cc_0 yes/cc_1",
                "validation": "no/bb_1 yes/bb_0", "test": "no/cc_0 no/cc_1"}
    for split, names in expected.items():
        for name, wave_, label in zip(names.split(), *splits[split], strict=True):
            samples = clips[f"./{name.replace('_', '_nohash_')}.wav"].tolist()
            assert wave_.tolist() == samples + [0] * (16000 - len(samples))
            assert splits["classes"][label] == name.split("/")[0]
    assert_same(splits, data.speech_commands(tmp_path / "good"))  # now from the cache


def test_cyp3a4_from_its_table(tmp_path, monkeypatch):
    molecules = {"Cc1ccccc1": 1, "CCc1ccccc1": 0, "C1CCCCC1N": 1, "CCO": 0, "c1ccncc1": 1,
                 "C[C@H](N)C(=O)O": 0}
    rows, table = list(molecules.items()), tmp_path / "served.tab"
    head, lines = "Drug_ID\tDrug\tY\n", [f"7.0\t{smiles}\t{label}.0\n" for smiles, label in rows]
    table.write_text("".join([head, *lines]))
    content = "".join(f"{smiles}\t{label}\n" for smiles, label in rows)
    monkeypatch.setattr(data, "CYP3A4_URL", table.as_uri())
    monkeypatch.setattr(data, "CYP3A4_SHA256", hashlib.sha256(content.encode()).hexdigest())
    splits = data.cyp3a4(tmp_path)
    ids, lengths, labels = (torch.cat([splits[split][i] for split in data.SPLITS]) for i in range(3))
    read = {"".join(chr(32 + i) for i in one[:length]): label.item()
            for one, length, label in zip(ids, lengths, labels)}
    assert read == molecules
    assert (ids.dtype, lengths.dtype, labels.dtype) == (torch.int32, torch.int64, torch.int64)
    assert_same(splits, data.cyp3a4(tmp_path))  # now from the cache
    assert data.cyp3a4(tmp_path, tokens="atoms")["train"][0].shape[2] == 4
    (tmp_path / "cyp3a4_veith.tab").write_text("".join([head, *lines[::-1]]))
    assert "6 molecules" in ending(data.cyp3a4, tmp_path)  # in another order they would be split otherwise


def test_molecules_as_tokens():
    toluene, benzyl = data.molecule_ids("Cc1ccccc1", "atoms"), data.molecule_ids("CCc1ccccc1", "atoms")
    assert toluene.shape == (7, 4) and toluene.dtype == torch.int32
    assert (toluene[:, :3] > 0).all() and benzyl.max() <= data.BUCKETS
    assert toluene[0, 0] == benzyl[0, 0] and toluene[0, 1] != benzyl[0, 1]  # two methyl carbons
    assert data.molecule_ids("C.CO", "atoms")[:, 1].gt(0).tolist() == [False, True, True]  # one is alone
    assert data.molecule_ids(" CCO\n", "smiles").tolist() == [ord("C") - 32, ord("C") - 32, ord("O") - 32]
    for tokens in "smiles", "atoms":
        for smiles in "CCO ethanol", "CCO\tethanol", "C1CC", "", " ", "CCÖ", "CC\x00O":
            assert data.molecule_ids(smiles, tokens) is None


def test_the_scaffold_split_by_hand():
    # random.Random(0).shuffle turns the groups a b c d into c a b d.
    scaffolds = ["a", "b", "a", "c", "d", "c", "c", "b", "a", "d"]
    assert data.scaffold_split(scaffolds, 0.7) == ([3, 5, 6, 0, 2, 8], [1, 7, 4, 9])
    assert data.scaffold_split(scaffolds, 0.8) == ([3, 5, 6, 0, 2, 8, 1, 7], [4, 9])


def test_scaffolds_ignore_chirality_and_side_chains(monkeypatch):
    seen = []
    monkeypatch.setattr(data, "scaffold_split", lambda scaffolds, _: seen.append(scaffolds) or ([0, 1], [1]))
    smiles = ["C1CCO[C@H]1c1ccccc1", "C1CCO[C@@H]1c1ccccc1", "CC1CCOC1c1ccccc1", "OCc1ccccc1", "CCO"]
    data.featurise([(one, 0) for one in smiles], "smiles")
    assert seen[0] == [seen[0][0], seen[0][0], seen[0][0], "c1ccccc1", ""] and "@" not in seen[0][0]


@pytest.mark.skipif(not SHARED.exists(), reason="the real file is not here")
def test_the_real_cyp3a4_has_the_published_split(tmp_path):
    shutil.copy(SHARED / "cyp3a4_veith.tab", tmp_path)
    splits = data.cyp3a4(tmp_path)
    train, validation, test = sizes(splits)
    assert train + validation == 9862 and test == 2466
    assert sum(int(splits[split][2].sum()) for split in splits) == 5110
    # The test rows as PyTDC 1.1.15's own create_scaffold_split(df, 0, [0.8, 0.2, 0], "Drug") gives them.
    rows = np.flatnonzero(np.load(*tmp_path.glob("*.npz"))["split"] == 2)
    digest = hashlib.sha256(",".join(map(str, rows)).encode()).hexdigest()
    assert digest == "883f4b4070a15886f17e6f57b29941e72cde3500934ab23d3b0ca3e9a7b401e0"


# ---- Bad data: one line each ---------------------------------------------------------------------
PIXELS, LABELS = np.zeros((20, 32, 32, 3), np.uint8), np.arange(20) % 10
ARCHIVE, TABLE, GOOD = "speech_commands_v0.02.tar.gz", "cyp3a4_veith.tab", wav_bytes(np.arange(1, 9))


def file(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def npz(**changed):
    arrays = {"train_x": PIXELS, "train_y": LABELS, "test_x": PIXELS, "test_y": LABELS} | changed
    return lambda folder: np.savez(folder / "cifar10.npz", **arrays)


def cut_mnist(folder):
    data.demo_mnist(folder)
    os.truncate(folder / "MNIST" / "raw" / "t10k-images-idx3-ubyte", 5000)


def words(change):
    """Six generated words with one change."""
    def write(folder):
        data.demo_speech(folder)
        change(folder / "SpeechCommands" / "speech_commands_v0.02")
    return write


BAD = [
    ("cifar10", lambda folder: np.savez(folder / "cifar10.npz", x=PIXELS), ["cifar10.npz", "train_x"]),
    ("cifar10", npz(train_x=PIXELS / 255), ["cifar10.npz", "float64"]),
    ("cifar10", npz(train_x=PIXELS.transpose(0, 3, 1, 2)), ["cifar10.npz", "(20, 3, 32, 32)"]),
    ("cifar10", npz(train_y=LABELS + 1), ["cifar10.npz", "integers 0..9"]),
    ("cifar10", npz(test_y=LABELS / 1), ["cifar10.npz", "labels are float64"]),
    ("cifar10", npz(test_y=LABELS[:9]), ["cifar10.npz", "not 20 integers"]),
    ("cifar10", file("cifar10.npz", b"text"), ["cifar10.npz", "Mend or delete"]),
    ("cifar10", lambda folder: None, ["refused", "Put cifar-10-python.tar.gz into", "--demo 1"]),
    ("cifar10", file("cifar-10-python.tar.gz", b"altered"), ["Put cifar-10-python", "delete what is broken"]),
    ("mnist", lambda folder: None, ["refused", "Put the four files *-ubyte into", "MNIST/raw", "--demo 1"]),
    ("mnist", cut_mnist, ["MNIST/raw", "delete what is broken"]),
    ("speech_commands", lambda folder: None, ["refused", "Put speech_commands_v0.02", "--demo 1"]),
    ("speech_commands", file(ARCHIVE, tar({"yes/a.wav": os.urandom(50000)})[:20000]), ["EOFError", "broken"]),
    ("speech_commands", file(ARCHIVE, tar({"../../../../outside.txt": b"x"})), ["outside", "delete what"]),
    ("speech_commands", words(file("a/9.wav", b"text" * 9)), ["a/9.wav", "RIFF"]),
    ("speech_commands", words(file("a/9.wav", GOOD[:-3])), ["a/9.wav", "mono"]),
    ("speech_commands", words(file("a/9.wav", GOOD[:-4])), ["a/9.wav", "it ends after"]),
    ("speech_commands", words(file("a/9.wav", wav_bytes([]))), ["a/9.wav", " 0 samples"]),
    ("speech_commands", words(file("a/9.wav", wav_bytes([1, 2], channels=2))), ["a/9.wav", "2 channels"]),
    ("speech_commands", words(file("a/9.wav", wav_bytes([1, 2], rate=8000))), ["a/9.wav", "8000 Hz"]),
    ("speech_commands", words(lambda root: (root / "a/9.wav").unlink()), ["1 clips of testing_list"]),
    ("speech_commands", words(lambda root: (root / "testing_list.txt").unlink()), ["testing_list.txt"]),
    ("speech_commands", words(file("testing_list.txt", b"\n")), ["all splits"]),
    ("speech_commands", words(lambda root: [shutil.rmtree(root / word) for word in "bcdef"]), ["two words"]),
    ("cyp3a4", lambda folder: None, ["refused", "Put cyp3a4_veith.tab from http", "--demo 1"]),
    ("cyp3a4", file(TABLE, b""), ["0 molecules", TABLE, "delete what is broken"]),
    ("cyp3a4", file(TABLE, b"Drug_ID\tSmiles\tY\n1\tCCO\t0\n"), ["KeyError", "'Drug'", TABLE]),
    ("cyp3a4", file(TABLE, b"Drug_ID\tDrug\tY\n1\tCCO\tyes\n"), ["'yes'", TABLE]),
    ("cyp3a4", file(TABLE, b"Drug_ID\tDrug\tY\n1\tCCO\t1\n"), ["1 molecules", "12,328", "--demo 1"]),
]


@pytest.mark.parametrize("load, prepare, says", BAD, ids=[f"{case[0]} {' '.join(case[2])}" for case in BAD])
def test_bad_data_ends_with_one_line(load, prepare, says, tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.CIFAR10.url", CLOSED + "cifar-10-python.tar.gz")
    monkeypatch.setattr("torchvision.datasets.MNIST.mirrors", [CLOSED])
    monkeypatch.setattr(data, "SPEECH_URL", CLOSED)
    monkeypatch.setattr(data, "CYP3A4_URL", CLOSED)
    folder = tmp_path / "a" / "b" / "c"
    folder.mkdir(parents=True)
    prepare(folder)
    line = ending(getattr(data, load), folder)
    assert all(part in line for part in says), line
    assert not list(tmp_path.rglob("outside.txt")) and not list(tmp_path.rglob("unfinished-*"))
    if list(folder.glob("speech*.tar.gz")):  # half an archive leaves no half a data set
        assert not (folder / "SpeechCommands" / "speech_commands_v0.02").exists()


def test_an_old_python_is_told_before_the_download(tmp_path, monkeypatch):
    monkeypatch.delattr(tarfile, "data_filter", raising=False)
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *args: pytest.fail("downloaded"))
    assert "3.10.12" in ending(data.speech_commands, tmp_path)


# ---- Generated files and caches ------------------------------------------------------------------
def test_generated_files_and_caches_are_used_and_made_anew_when_what_goes_in_differs(tmp_path, monkeypatch):
    def kept():
        """Start again: how many generated folders, caches of molecules and caches of clips are there now?"""
        data.cyp3a4(tmp_path, True, "atoms")
        data.speech_commands(tmp_path, True)
        return [len(list(tmp_path.rglob(name))) for name in ("demo_*", "cyp3a4_*.npz", "speech_*.npz")]

    assert kept() == [2, 1, 1]
    with monkeypatch.context() as patch:
        patch.setattr(data, "made_aside", lambda path: pytest.fail("made again"))
        assert kept() == [2, 1, 1]
    monkeypatch.setattr(data, "BUCKETS", 99)
    assert kept() == [2, 2, 1]
    monkeypatch.setattr("rdkit.__version__", "other")
    assert kept() == [2, 3, 1]
    split, read = data.scaffold_split, data.read_wav
    monkeypatch.setattr(data, "scaffold_split", lambda *args: split(*args))  # the code differs
    monkeypatch.setattr(data, "read_wav", lambda path: read(path))
    assert kept() == [2, 4, 2]
    table, = tmp_path.rglob(TABLE)
    table.write_text(table.read_text() + '\n"400"\t"CCO"\t"0"')
    assert kept() == [2, 5, 2]
    source = inspect.getsource
    monkeypatch.setattr(inspect, "getsource", lambda part: source(part) + "# changed")  # the generators' too
    assert kept() == [4, 6, 3]
    for cache in tmp_path.rglob("speech_*.npz"):
        cache.write_bytes(cache.read_bytes()[:5000])
    assert "Delete " in ending(kept)


@pytest.mark.parametrize("made", ["generated files", "a cache", "an unpacked archive"])
def test_a_process_that_was_faster_does_not_disturb_this_one(made, tmp_path, monkeypatch):
    made_aside, demo = data.made_aside, made != "an unpacked archive"
    if made == "a cache":
        data.demo_folder(tmp_path, data.demo_speech)
    elif not demo:
        speech_archive(tmp_path / ARCHIVE)

    @contextmanager
    def meanwhile_another_makes_it_too(path):
        with made_aside(path) as new:
            yield new
            monkeypatch.setattr(data, "made_aside", made_aside)
            data.speech_commands(tmp_path, demo)

    monkeypatch.setattr(data, "made_aside", meanwhile_another_makes_it_too)
    splits = data.speech_commands(tmp_path, demo)
    assert data.made_aside is made_aside  # there was another
    assert_same(splits, data.speech_commands(tmp_path, demo))
    assert not list(tmp_path.rglob("unfinished-*"))


def test_without_a_place_for_a_cache_it_says_so_and_goes_on(tmp_path, monkeypatch, capsys):
    data.demo_folder(tmp_path, data.demo_speech)
    monkeypatch.setattr("numpy.savez", raises(OSError(28, "No space left on device")))
    assert sizes(data.speech_commands(tmp_path, demo=True)) == [300, 48, 72]
    assert "Going on without a cache: " in capsys.readouterr().out
    assert not list(tmp_path.rglob("*.npz"))


def test_an_image_to_predict_is_upright_and_on_the_given_ground(tmp_path):
    from PIL import Image

    ramp = np.linspace(0, 255, 28 * 28).reshape(28, 28).astype(np.uint8)
    path = tmp_path / "ramp.png"
    Image.fromarray(ramp).save(path)
    expected = torch.from_numpy(ramp)
    assert torch.equal(data.read_image(path, "L", 28, 0), expected)
    path.write_bytes(path.read_bytes()[:100])
    assert "ramp.png is no image that can be read" in ending(data.read_image, path, "L", 28, 0)

    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(expected.numpy()).save(tmp_path / "turned.png", exif=exif)
    assert torch.equal(data.read_image(tmp_path / "turned.png", "L", 28, 0), expected.flip(0, 1))

    clear = Image.new("RGBA", (8, 8), (255, 255, 255, 0))
    clear.putpixel((0, 0), (255, 255, 255, 255))
    clear.save(tmp_path / "clear.png")
    for ground in 0, 255:
        image = data.read_image(tmp_path / "clear.png", "RGB", 8, ground)
        assert image.shape == (8, 8, 3) and image.dtype == torch.uint8
        assert image[0, 0].tolist() == [255] * 3 and image[4, 4].tolist() == [ground] * 3


# ---- The scripts ---------------------------------------------------------------------------------
def test_each_demo_alone_learns_without_a_network_on_cuda_if_there_is_one(tmp_path):
    environment = os.environ | dict.fromkeys(["HTTPS_PROXY", "https_proxy", "http_proxy"], CLOSED)
    environment |= {"PYTHONPATH": str(HERE), "WORLD_SIZE": "2"}  # as clusters set it, which is no launcher
    processes = {}
    for script in SCRIPTS:
        code = f"import sys, fpt, {script} as s; print('imports', *sys.modules); fpt.run(s.parser, s.main)"
        (tmp_path / script).mkdir()
        processes[script] = subprocess.Popen(
            [sys.executable, "-c", code, "--demo", "1"], cwd=tmp_path / script, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    printed = {script: process.communicate(timeout=300)[0] for script, process in processes.items()}
    for script in SCRIPTS:
        assert processes[script].returncode == 0 and "DEMO: the data is generated" in printed[script], printed
        *rows, last = log_lines(tmp_path / script / "runs" / f"{script.removeprefix('train_')}-demo")
        assert last["test_accuracy"] > last["test_dummy_accuracy"] + 0.25
        assert [last[flag] for flag in ("demo", "pretrained", "layers")] == [1, 0, 2]
        assert last["steps"] == rows[-1]["step"]
        assert min(last.get("test_auroc", 1), last.get("test_auprc", 1)) > 0.7 and last.get("test_mae", 0) < 1
        imports = set(re.search("^imports (.*)$", printed[script], re.MULTILINE)[1].split())
        own = {"train_speech": "torchaudio", "train_cyp3a4": "rdkit"}.get(script)
        assert "fpt" in imports and not imports & ({"torchaudio", "rdkit", "wandb"} - {own}), script


@pytest.mark.parametrize("script, argv, given, classes", [
    ("cifar", "--patch_size 16", "a.png", "airplane automobile bird cat deer dog frog horse ship truck"),
    ("speech", "--tokens wave", "a.wav", "a b c d e f"),
    ("cyp3a4", "--tokens atoms", "CC(=O)Nc1ccc(O)cc1", "inhibitor no"),
    ("mnist_add", "--n 2", "a.png,a.png", "0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18")])
def test_a_script_in_both_arms_evaluated_asked(script, argv, given, classes, tmp_path, monkeypatch, capsys):
    from PIL import Image

    script, argv = f"train_{script}", [*argv.split(), "--demo", 1, "--steps", 4, "--eval_every", 4]
    results = []
    for core, pretrained in ("gpt2", 0), ("gpt2", 1), ("dinov2", 1):
        out, model = tmp_path / f"{core}{pretrained}", ["--model", folder(core)]
        results.append(run_main(script, *model, *argv, "--pretrained", pretrained, "--out", out))
        again = run_main(script, *model, "--eval", out / "best.pt")
        assert again.items() <= results[-1].items() and "test_loss" in again
    one, other = results[:2]
    differ = {name for name in one | other if one.get(name, 0) != other.get(name, 0)}
    figures = {f"test_{name}" for name in ("loss", "accuracy", "auroc", "auprc", "mae", "mse")}
    assert {"pretrained", "test_loss"} < differ <= figures | {"pretrained", "out", "wandb_id"}

    monkeypatch.chdir(tmp_path)  # where no data is: the checkpoint is enough
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)).save("a.png")
    Path("a.wav").write_bytes(wav_bytes(np.arange(20000) % 500))
    capsys.readouterr()
    run_main(script, *model, "--data", "none", "--eval", out / "best.pt", "--predict", given)
    printed = capsys.readouterr().out
    assert ("only its first second is heard" in printed) == (script == "train_speech")
    shares, names = zip(*re.findall(r"^ *([\d.]+)%  (\w+)", printed, re.MULTILINE))
    shares, classes = list(map(float, shares)), classes.split()
    assert set(names) <= set(classes) and len(names) == min(10, len(classes))
    assert shares == sorted(shares)[::-1]
    assert len(classes) > 10 or sum(shares) == pytest.approx(100, abs=0.1)


def test_a_figure_that_cannot_be_computed_is_null(tmp_path, monkeypatch):
    monkeypatch.setattr(train_cyp3a4, "auroc", lambda *_: math.nan)
    run_main("train_cyp3a4", "--demo", 1, "--out", tmp_path, "--steps", 1)
    row = log_lines(tmp_path)[0]
    assert row["validation_auroc"] is None and isinstance(row["validation_loss"], float)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_examples_and_explains_every_flag(script, capsys):
    with pytest.raises(SystemExit, match="0"):
        run_main(script, "--help")
    text = capsys.readouterr().out
    flags = re.findall(r"^  --\w+", text, re.MULTILINE)
    assert f"python {script}.py --demo 1" in text and text.count("(default:") >= len(flags) > 25


# ---- Bad input: one line, exit code 2 for wrong flags and 1 for the rest, no traceback -----------
def change(path, **config):
    config = json.loads((path / "config.json").read_text()) | config
    (path / "config.json").write_text(json.dumps(config))


class Trap:
    def __reduce__(self):
        return os.system, ("touch was-run",)


FAKE = {"trained": {}, "flags": {"task": "cyp3a4", "layers": 0, "model": folder("gpt2")}, "fingerprint": 0.0}
WORDS = {"task": "speech", "classes": ["no", "yes"], "demo": 1}
BNB, POINTER = "bitsandbytes", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 548105\n"
MADE = {  # what a case names in braces: a file, a run, a changed copy of a model. Other names are model types
    "file": lambda path: path.write_bytes(os.urandom(1000)),
    "trap": lambda path: torch.save(FAKE | {"trained": Trap()}, path),
    "molecule_run": lambda path: torch.save(FAKE, path),
    "image_run": lambda path: torch.save(FAKE | {"flags": FAKE["flags"] | {"task": "cifar"}}, path),
    "word_run": lambda path: torch.save(FAKE | {"flags": FAKE["flags"] | WORDS}, path),
    "few_images": lambda path: (path.mkdir(), npz(train_x=PIXELS[:9], train_y=LABELS[:9])(path)),
    "no_place": lambda path: (path / "last.pt.tmp").mkdir(parents=True),
    "toy_run": lambda path: toy("--out", path, "--steps", 1),
    "model_without_weights": lambda path: (path / "model.safetensors").unlink(),
    "model_pointer": lambda path: (path / "model.safetensors").write_bytes(POINTER),
    "model_cut": lambda path: os.truncate(path / "model.safetensors", 20_000),
    "model_broken_config": lambda path: (path / "config.json").write_text('{"model_type": '),
    "model_8bit": lambda path: change(path, quantization_config={"load_in_8bit": True, "quant_method": BNB}),
    "model_wide": lambda path: change(path, n_embd=64),
    "model_deep": lambda path: change(path, n_layer=4),
    "model_scaled": lambda path: change(path, scale_attn_by_inverse_layer_idx=True),
    "model_llama": lambda path: (shutil.rmtree(path), shutil.copytree(folder("llama"), path)),
    "model_short": lambda path: change(path, n_positions=12)}
BAD_INPUT = [  # script, flags, exit code, what the line says (" ... " is anything), whether a GPU would do
    *[("cifar", flag, 2, flag.replace(" ", ": ") + " is not") for flag in (
        "--layers -1", "--init_std -1", "--in_scale -1", "--steps 0", "--batch_size -4", "--accumulate 0",
        "--lr -1", "--lr nan", "--weight_decay inf", "--eval_every 0", "--seed -1", f"--seed {10**18}")],
    ("mnist_add", "--n 0", 2, "--n: 0 is not"),
    ("cifar", "--steps many", 2, "--steps: invalid int value: 'many'"),
    ("cifar", "--nonsense", 2, "unrecognized arguments: --nonsense"),
    ("cifar", "--train in,nose", 2, "--train in,nose: all, or some of in,out,ln,pos,attn,ff"),
    ("cifar", "--train in,,out", 2, "--train in,,out: all, or"),
    ("cifar", "--layers 0 --train in,attn", 2, "--train in,attn ... --layers 0"),
    ("cifar", "--pretrained 1 --init_std 0.1", 2, "--init_std ... --pretrained 0"),
    ("cifar", "--predict cat.png", 2, "--predict ... --eval PATH"),
    ("cifar", "--eval ''", 2, "--out, --eval and --predict cannot be empty"),
    ("cyp3a4", "--eval {molecule_run} --predict ''", 2, "cannot be empty"),
    ("cifar", "--resume 1 --out runs/cifar --eval {image_run}", 2, "--eval only evaluates"),
    ("cifar", "--resume 1", 2, "--resume 1 needs ... --out"),
    ("cifar", "--resume 1 --out typo", 1, "typo/last.pt is missing or no checkpoint"),
    ("cifar", "--device abacus", 2, "--device abacus: cpu or cuda"),
    ("cifar", "--device cuda", 1, "--device cuda cannot be used, --device cpu", "no GPU"),
    ("cifar", "--device mps", 2, "--device mps: cpu or cuda"),
    ("cifar", "--device cuda:99", 1, "--device cuda:99 cannot be used, --device cpu"),
    ("cifar", "--layers 3", 1, "it has 2 blocks, --layers asks for 3"),
    ("cifar", "--pretrained 0 --model gpt2 --layers 13", 1, "it has 12 blocks, --layers asks for 13"),
    ("cifar", "--model /no/folder", 1, "Cannot load --model /no/folder: ... --pretrained 0 needs no weights"),
    ("cifar", "--model gpt2", 1, "Cannot load --model gpt2: ... --pretrained 0 needs no weights"),
    *[("cifar", f"--model {{{name}}}", 1, f"Cannot load --model ... {name}: ... {says}") for name, says in (
        ("file", ""), ("abacus", "abacus"), ("model_without_weights", "no file"), ("model_pointer", ""),
        ("model_cut", ""), ("model_broken_config", "JSON"), ("model_8bit", BNB), ("model_wide", ""))],
    ("cifar", "--model {t5}", 1, "it is t5, a core can be gpt2, bert, "),
    ("cifar", "--model {clip}", 1, "it is clip, a core can be gpt2, bert, "),
    ("cifar", "--model {model_scaled}", 1, "not scaled as GPT-2's"),
    ("cifar", "--model {model_deep}", 1, "lacks 24 of its weights: h.2."),
    ("toy", "--model {model_llama} --train pos", 1, "--train pos: ... model_llama has no such parameters"),
    ("mnist_add", "--n 129", 1, "The longest example has 129 tokens ... 128 positions"),
    ("cyp3a4", "--demo 1 --model {model_short}", 1, "The longest example has ... 12 positions"),
    ("cyp3a4", f"--eval {{molecule_run}} --predict {129 * 'C'}", 1, "has 129 tokens ... 128 positions"),
    ("cyp3a4", "--eval {molecule_run} --predict C1CC", 1, "cannot read 'C1CC'"),
    ("cifar", "--eval {image_run} --predict {file}", 1, "file is no image that can be read"),
    ("cifar", "--layers 0 --data {few_images}", 1, "A split has no examples: ... 'validation': 0"),
    ("speech", "--eval {word_run}", 1, "holds the words a b c d e f, the run no yes"),
    ("cifar", "--eval no.pt", 1, "no.pt is missing or no checkpoint"),
    ("cifar", "--eval {file}", 1, "file is missing or no checkpoint"),
    ("cifar", "--eval {trap}", 1, "trap is missing or no checkpoint ... UnpicklingError"),
    ("cifar", "--eval {toy_run}", 1, "toy_run is missing or no checkpoint"),
    ("cifar", "--eval {toy_run}/best.pt", 1, "best.pt belongs to the task toy, not to cifar"),
    ("cifar", "--resume 1 --out {toy_run}", 1, "last.pt belongs to the task toy, not to cifar"),
    ("toy", "--eval {toy_run}/best.pt --pool last", 1, "leave out --pool last (was mean)"),
    ("toy", "--out {file}/run", 1, "Error: ... file"),
    ("toy", "--out {no_place}", 1, "IsADirectoryError: ... no_place/last.pt.tmp")]


@pytest.mark.parametrize("case", BAD_INPUT, ids=lambda case: " ".join([*case[:2], *case[4:]]))
def test_bad_input(case, tmp_path, monkeypatch, capsys):
    script, argv, code, says, *no_gpu = case
    if no_gpu and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.chdir(tmp_path)
    for name in re.findall(r"{(\w+)}", argv):
        if name.startswith("model_"):
            shutil.copytree(folder("gpt2"), name)
        elif name not in MADE:
            Path(name).mkdir()
            Path(name, "config.json").write_text(json.dumps({"model_type": name}))
        MADE.get(name, str)(tmp_path / name)
        argv = argv.replace(f"{{{name}}}", str(tmp_path / name))
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        toy(*shlex.split(argv)) if script == "toy" else run_main(f"train_{script}", *shlex.split(argv))
    error, stop = capsys.readouterr().err, end.value.code
    line = error.splitlines()[-1] if code == 2 else stop  # a text is printed and makes the exit code 1
    assert stop == 2 if code == 2 else isinstance(stop, str)
    assert re.search(".*".join(map(re.escape, says.split(" ... "))), line) and "\n" not in line, line
    assert "Traceback" not in error and not Path("was-run").exists() and not list(Path("runs").rglob("*.pt"))
