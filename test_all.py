"""Tests: python -m pytest test_all.py, a few minutes on two cores, no network and no data set needed.

    python -m pytest test_all.py -k cuda     # on a machine with a GPU: precisions, compiler, checkpoints, resume, the scripts

Models here are tiny folders that the tests save; the sizes of GPT-2 appear where a count or the demo needs them.
"""
import errno
import functools
import hashlib
import http.server
import importlib
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import fpt
import train_cifar
import train_cyp3a4
import train_mnist_add

torch.set_num_threads(1)  # tiny models: two threads only wait for each other
HERE = Path(__file__).parent
SHARED = HERE.parent / "shared" / "data"
CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"))  # pytest -k cuda


def flags(*argv, **defaults):
    """What a script called with these words would get, for a tiny fp32 model on the CPU unless they say otherwise."""
    sys.argv = ["train_test.py", *map(str, argv)]
    parser = fpt.flags("test", "a test", device="cpu", amp="fp32", **defaults)
    return fpt.parse(parser, demo={})


@pytest.fixture(autouse=True)
def keep_argv(monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory):
    """A folder with a tiny GPT-2 that has weights, as save_pretrained writes it."""
    from transformers import GPT2Config, GPT2Model

    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("models") / "gpt2"
    GPT2Model(GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=64, vocab_size=100, initializer_range=0.2)).save_pretrained(folder)
    return folder


def run_script(name, *argv, cwd=HERE):
    return subprocess.run([sys.executable, HERE / f"{name}.py", *map(str, argv)], capture_output=True, text=True, cwd=cwd)


def run_main(monkeypatch, script, *argv):
    """The script's main in this process, which saves the imports. Returns the last line of its log."""
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, argv)])
    return fpt.run(importlib.import_module(script).main)


def last_line(folder):
    return json.loads((Path(folder) / "log.jsonl").read_text().splitlines()[-1])


# ---------------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("inputs, outputs, trained", [(48, 10, 83_722), (784, 91, 711_259), (16, 10, 59_146), (80, 35, 127_523)])
def test_trainable_parameters_as_in_the_original(inputs, outputs, trained):
    model = fpt.FPT(flags("--pretrained", 0, "--train", "in,out,ln"), inputs, outputs)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count == trained


def test_train_all_is_everything_but_the_token_table():
    model = fpt.FPT(flags("--pretrained", 0, "--train", "all"), 48, 10)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 124_485_130 - 38_597_376


def test_random_weights_need_no_network_and_have_the_asked_for_scale(gpt2, tmp_path):
    (tmp_path / "config.json").write_text((gpt2 / "config.json").read_text())
    for std in 0.02, 0.08:
        model = fpt.FPT(flags("--pretrained", 0, "--model", tmp_path, "--init_std", std, "--qk_std", 0.05, "--attn_gain", "2,3"), 4, 2)
        for block, gain in zip(model.core.h, (2, 3)):
            query, key, value = block.attn.c_attn.weight.chunk(3)
            assert [w.std().item() for w in (query, key, value)] == pytest.approx([0.05, 0.05, std], rel=0.1)
            assert block.mlp.c_fc.weight.std().item() == pytest.approx(std, rel=0.1)
            assert block.attn.c_proj.weight.std().item() == pytest.approx(gain * std / 2, rel=0.1)  # GPT-2 divides by sqrt(2 layers)


def test_a_gain_of_0_is_attention_that_adds_nothing(gpt2):
    model, zeroed = (fpt.FPT(flags("--pretrained", 0, "--model", gpt2, "--attn_gain", gains), 4, 2) for gains in ("0,3", "1,3"))
    zeroed.core.h[0].attn.c_proj.weight.data.zero_()
    tokens = torch.randn(2, 5, 4)
    torch.testing.assert_close(model(tokens), zeroed(tokens))
    model(tokens).sum().backward()
    assert all(p.grad is not None for name, p in model.core.named_parameters() if "ln" in name)  # DistributedDataParallel waits for each


def test_layers_keeps_the_first_blocks(gpt2, tmp_path):
    whole, first = (fpt.FPT(flags("--model", gpt2, "--layers", n), 4, 2).core for n in (0, 1))
    assert len(whole.h) == 2 and len(first.h) == 1 and torch.equal(whole.h[0].mlp.c_fc.weight, first.h[0].mlp.c_fc.weight)
    assert len(fpt.FPT(flags("--pretrained", 0, "--layers", 5, "--model", gpt2), 4, 2).core.h) == 2  # it has no more
    assert len(fpt.FPT(flags("--model", tiny_folder("Gemma3Text", tmp_path), "--layers", 1), 4, 2).core.layers) == 1


def test_random_cores_have_the_tasks_own_depth_and_pretrained_ones_all(monkeypatch):
    for argv, layers in ("--pretrained 0", 2), ("--pretrained 1", 0), ("--pretrained 0 --layers 0", 0), ("--layers 3", 3):
        monkeypatch.setattr(sys, "argv", ["train.py", "--out", "x", *argv.split()])
        assert fpt.parse(fpt.flags("cifar", "", random_layers=2), demo={}).layers == layers


def test_cls_reads_an_empty_token_after_the_last(gpt2):
    model = fpt.FPT(flags("--model", gpt2, "--pool", "cls"), 20, 2, discrete=True).eval()
    last = fpt.FPT(flags("--model", gpt2, "--pool", "last"), 20, 2, discrete=True).eval()
    last.load_state_dict(model.state_dict())
    ids = torch.randint(1, 20, (3, 5))
    torch.testing.assert_close(model(ids), last(F.pad(ids, (0, 1))))
    with pytest.raises(ValueError, match="64 tokens are more than the 63 positions"):
        model(torch.zeros(1, 64, dtype=torch.long))


def test_pretrained_weights_are_the_folders(gpt2):
    from transformers import GPT2Model

    ours, theirs = fpt.FPT(flags("--model", gpt2), 4, 2).core.h[1], GPT2Model.from_pretrained(gpt2).h[1]
    assert torch.equal(ours.mlp.c_fc.weight, theirs.mlp.c_fc.weight.T)
    assert torch.equal(ours.ln_2.weight, theirs.ln_2.weight)


@pytest.mark.parametrize("pool", ["last", "mean"])
def test_logits_equal_a_plain_gpt2(gpt2, pool):
    from transformers import GPT2Model

    model = fpt.FPT(flags("--model", gpt2, "--pool", pool), 12, 5).eval()
    plain = GPT2Model.from_pretrained(gpt2, attn_implementation="eager").eval()
    tokens = torch.randn(3, 9, 12)
    hidden = plain(inputs_embeds=tokens @ model.input.weight.T + model.input.bias).last_hidden_state
    pooled = hidden[:, -1] if pool == "last" else hidden.mean(1)
    expected = pooled @ model.output.weight.T + model.output.bias
    torch.testing.assert_close(model(tokens), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("time", [1, 7, 600])
def test_causal_attention_against_its_definition(time):
    query, key, value = (torch.randn(2, 3, time, 8) for _ in "qkv")
    heads, _ = fpt.causal_attention(None, query, key, value, None, scaling=0.3)
    scores = (query @ key.transpose(2, 3) * 0.3).masked_fill(torch.ones(time, time).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(heads, (scores.softmax(-1) @ value).transpose(1, 2), rtol=1e-4, atol=1e-5)


def tiny_folder(family, folder):
    import transformers

    small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=50, max_position_embeddings=64)
    if family in ("Llama", "Gemma3Text"):
        small |= dict(num_key_value_heads=1, head_dim=16)
    config_class = getattr(transformers, f"{family}Config")
    getattr(transformers, f"{family}Model")(config_class(**small)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family, norms, positions", [("Llama", 5, 0), ("Gemma3Text", 13, 0), ("Bert", 10, 66)])
def test_other_text_transformers_as_the_core(family, norms, positions, tmp_path):
    folder = tiny_folder(family, tmp_path)
    for pretrained in 0, 1:
        model = fpt.FPT(flags("--model", folder, "--pretrained", pretrained), 7, 3)
        parts = list(model.named_parts())
        assert sum(part == "ln" for _, part in parts) == norms
        assert sum(p.numel() for p, part in parts if part == "pos") == positions * 32
        model(torch.randn(2, 6, 7), torch.tensor([6, 4])).sum().backward()
        assert model.input.weight.grad.abs().sum() > 0
        assert all(p.grad is None for p, part in parts if part in ("attn", "ff"))


@pytest.mark.parametrize("family", ["GPT2", "Bert"])
@pytest.mark.parametrize("pool", ["last", "mean", "cls"])
def test_a_molecule_does_not_see_its_neighbours_padding(gpt2, tmp_path, family, pool):
    folder = gpt2 if family == "GPT2" else tiny_folder(family, tmp_path)
    model = fpt.FPT(flags("--model", folder, "--pool", pool, "--in_gain", 1), 20, 2, discrete=True).eval()
    short, long = torch.randint(1, 20, (1, 4, 3)), torch.randint(1, 20, (1, 30, 3))
    padded = F.pad(short, (0, 0, 0, 26))
    together = model(torch.cat([padded, long]), torch.tensor([4, 30]))
    torch.testing.assert_close(together[:1], model(short), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(together[1:], model(long), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(together[0], together[1])


def test_too_many_tokens_are_refused(gpt2):
    with pytest.raises(ValueError, match="65 tokens are more than the 64 positions"):
        fpt.FPT(flags("--model", gpt2), 4, 2)(torch.zeros(1, 65, 4))


# ---------------------------------------------------------------------------------------------------------------------
# Loop
# ---------------------------------------------------------------------------------------------------------------------
def toy(args):
    """A task that a linear readout can learn: which of 3 tokens is the largest. Returns (model, result of fit())."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 3, 4, generator=generator)
    y = x.sum(2).argmax(1)
    rows = {"train": range(0, 200), "validation": range(200, 240), "test": range(240, 300)}
    model = fpt.FPT(args, 4, 3)

    def batch(split, index):
        index = torch.tensor(rows[split])[index]
        return x[index].to(args.device), None, y[index].to(args.device)

    return model, fpt.fit(args, model, batch, {split: len(part) for split, part in rows.items()}, dummy=y[:200].mode().values.item())


def toy_flags(gpt2, out, *argv):
    return flags("--model", gpt2, "--out", out, "--steps", 40, "--eval_every", 20, "--lr", 0.01, "--warmup", 5, "--compile", 0, *argv)


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_checkpoints_move_between_cpu_and_gpu_and_a_run_goes_on_there(gpt2, tmp_path, monkeypatch, device):
    _, whole = toy(toy_flags(gpt2, tmp_path / "whole", "--device", device, "--dropout", 0.1))
    _, here = toy(flags("--eval", tmp_path / "whole" / "best.pt", "--device", "cpu"))
    assert here["test_loss"] == pytest.approx(whole["test_loss"], rel=1e-4)
    _, there = toy(toy_flags(gpt2, tmp_path / "there", "--device", device, "--init", tmp_path / "whole" / "best.pt", "--lr", 0))
    assert there["test_loss"] == pytest.approx(whole["test_loss"], rel=1e-4)

    update, steps = fpt.update, []

    def stopping(*parts):
        update(*parts)
        steps.append(1)
        fpt.STOP.extend([signal.SIGTERM] * (len(steps) == 27))

    monkeypatch.setattr(fpt, "update", stopping)
    with pytest.raises(SystemExit):
        toy(toy_flags(gpt2, tmp_path / "cut", "--device", device, "--dropout", 0.1))
    _, again = toy(flags("--resume", 1, "--out", tmp_path / "cut", "--device", device))
    assert again["test_loss"] == pytest.approx(whole["test_loss"], rel=1e-4)


@pytest.mark.parametrize("train", ["in,out,ln,pos", "out", "ln,attn", "in,ff", "all"])
def test_only_the_named_parts_are_trained(gpt2, tmp_path, train):
    args = toy_flags(gpt2, tmp_path / "run", "--train", train, "--steps", 3)
    before = {name: p.clone() for name, p in fpt.FPT(args, 4, 3).named_parameters()}
    model, _ = toy(args)
    parts = {id(p): part for p, part in model.named_parts()}
    wanted = fpt.PARTS if train == "all" else train.split(",")
    saved = torch.load(tmp_path / "run" / "best.pt", weights_only=True)["trained"]
    for name, parameter in model.named_parameters():
        if parts[id(parameter)] in wanted:
            assert not torch.equal(parameter, before[name]), name
            assert name in saved
        else:
            assert torch.equal(parameter, before[name]) and parameter.grad is None, name
            assert name not in saved


def test_a_run_learns_and_its_log_is_complete(gpt2, tmp_path, capsys):
    args = toy_flags(gpt2, tmp_path / "run", "--steps", 200, "--eval_every", 50)
    _, result = toy(args)
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines[:-1]] == [50, 100, 150, 200]
    for name in "train_loss train_loss_start train_loss_final validation_loss validation_accuracy train_accuracy train_seconds input_seconds evaluation_seconds".split():
        assert isinstance(lines[0][name], float), name
    assert lines[-1]["test_accuracy"] == result["test_accuracy"] > result["dummy_accuracy"] + 0.2
    assert vars(args).items() <= lines[-1].items()
    assert lines[3]["train_loss"] < lines[0]["train_loss"]
    assert "validation accuracy" in capsys.readouterr().out


def test_same_seed_same_run_other_seed_other_run(gpt2, tmp_path):
    runs = {}
    for name, seed in ("a", 0), ("b", 0), ("c", 1):
        toy(toy_flags(gpt2, tmp_path / name, "--seed", seed, "--pretrained", 0, "--init_std", 0.2))
        lines = map(json.loads, (tmp_path / name / "log.jsonl").read_text().splitlines())
        runs[name] = [{k: v for k, v in line.items() if "seconds" not in k and k not in ("out", "seed")} for line in lines]
    assert runs["a"] == runs["b"] != runs["c"]


def test_eval_gives_the_trained_models_result_and_writes_nothing(gpt2, tmp_path):
    _, trained = toy(toy_flags(gpt2, tmp_path / "run", "--train", "in,out", "--pretrained", 0, "--seed", 3))
    before = sorted(tmp_path.rglob("*"))
    args = flags("--eval", tmp_path / "run" / "best.pt", "--out", tmp_path / "new")
    assert (args.train, args.seed, args.pretrained) == ("in,out", 3, 0)
    _, evaluated = toy(args)
    assert evaluated.items() <= trained.items() and sorted(tmp_path.rglob("*")) == before
    with pytest.raises(SystemExit, match="another frozen core"):
        toy(flags("--eval", tmp_path / "run" / "best.pt", "--seed", 4))


def test_init_goes_on_from_a_checkpoint(gpt2, tmp_path):
    _, first = toy(toy_flags(gpt2, tmp_path / "first"))
    _, same = toy(toy_flags(gpt2, tmp_path / "same", "--init", tmp_path / "first" / "best.pt", "--lr", 0))
    assert same["test_loss"] == first["test_loss"]
    _, longer = toy(toy_flags(gpt2, tmp_path / "longer", "--init", tmp_path / "first" / "best.pt", "--steps", 100))
    assert longer["test_loss"] < first["test_loss"]


def test_the_best_checkpoint_is_tested_and_patience_ends_the_run(gpt2, tmp_path, monkeypatch):
    scores = iter([0.5, 0.9, 0.7, 0.6, 0.5])
    infer = fpt.infer
    seen = []

    def scripted(args, model, batch, split, order):
        seen.append((split, {name: p.clone() for name, p in model.named_parameters()}))
        if split == "test":
            return infer(args, model, batch, split, order)
        right = torch.arange(10) < 10 * next(scores)  # that share of ten examples gets its label, 0
        return torch.where(right[:, None], torch.tensor([1.0, 0, 0]), torch.tensor([0, 1.0, 0])), torch.zeros(10).long()

    monkeypatch.setattr(fpt, "infer", scripted)
    _, result = toy(toy_flags(gpt2, tmp_path / "run", "--eval_every", 5, "--steps", 100, "--patience", 2))
    assert [split for split, _ in seen] == ["validation"] * 4 + ["test"]
    assert result["step"] == 10
    assert all(torch.equal(seen[1][1][name], p) for name, p in seen[-1][1].items())


def test_eval_examples_are_a_random_part_and_the_same_every_time(gpt2, tmp_path, monkeypatch):
    seen = []
    infer = fpt.infer
    monkeypatch.setattr(fpt, "infer", lambda *a: (seen.append((a[3], a[4])), infer(*a))[1])
    toy(toy_flags(gpt2, tmp_path / "run", "--eval_examples", 10, "--seed", 5))
    (_, first), (_, second), (split, whole) = seen
    assert torch.equal(first, second) and len(set(first.tolist())) == 10 and first.max() > 15
    assert split == "test" and len(whole) == 60


def test_a_run_is_not_overwritten(gpt2, tmp_path):
    toy(toy_flags(gpt2, tmp_path / "run", "--steps", 1))
    with pytest.raises(SystemExit, match="already holds a run"):
        toy(toy_flags(gpt2, tmp_path / "run", "--steps", 1))


def test_two_half_batches_are_one_batch(gpt2, tmp_path):
    whole, _ = toy(toy_flags(gpt2, tmp_path / "a", "--steps", 3, "--batch_size", 16))
    halves, _ = toy(toy_flags(gpt2, tmp_path / "b", "--steps", 3, "--batch_size", 8, "--accumulate", 2))
    for (name, one), two in zip(whole.named_parameters(), halves.parameters()):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_half_precision_trains_as_fp32_does(gpt2, tmp_path, amp, device):
    results = {}
    for precision in "fp32", amp:
        model, results[precision] = toy(toy_flags(gpt2, tmp_path / precision, "--amp", precision, "--steps", 100, "--device", device))
    assert model.core.h[0].mlp.c_fc.weight.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    assert results[amp]["test_accuracy"] == pytest.approx(results["fp32"]["test_accuracy"], abs=0.1)
    assert results[amp]["test_loss"] == pytest.approx(results["fp32"]["test_loss"], abs=0.15)


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_a_compiled_model_is_the_same_model(gpt2, tmp_path, device):
    plain, _ = toy(toy_flags(gpt2, tmp_path / "a", "--steps", 3, "--device", device))
    compiled, _ = toy(toy_flags(gpt2, tmp_path / "b", "--steps", 3, "--device", device, "--compile", 1))
    for (name, one), two in zip(plain.named_parameters(), compiled.parameters()):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4, msg=name)


def test_a_loss_that_is_not_finite_ends_the_run(gpt2, tmp_path):
    with pytest.raises(SystemExit, match=r"training loss is nan at step \d+, near learning rate .*a smaller --lr"):
        toy(toy_flags(gpt2, tmp_path / "run", "--lr", 1e30, "--warmup", 0))


def test_learning_rate_warms_up_and_decays(gpt2, tmp_path, monkeypatch):
    rates = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a, **k: (rates.append(self.param_groups[0]["lr"]), step(self, *a, **k))[1])
    toy(toy_flags(gpt2, tmp_path / "run", "--steps", 25, "--warmup", 5, "--lr", 0.01))
    assert rates[:5] == pytest.approx([0.002, 0.004, 0.006, 0.008, 0.01])
    assert rates[14] == pytest.approx(0.005) and rates[-1] == pytest.approx(0)


def test_norms_and_positions_can_learn_faster_and_do_not_decay(gpt2):
    model = fpt.FPT(flags("--model", gpt2, "--ln_lr", 4), 4, 3)
    matrices, others = fpt.adamw(flags("--ln_lr", 4, "--weight_decay", 0.1), model).param_groups
    assert {id(p) for p in matrices["params"]} == {id(model.input.weight), id(model.output.weight)}
    assert (matrices["lr_scale"], matrices["weight_decay"], others["lr_scale"], others["weight_decay"]) == (1, 0.1, 4, 0)
    assert len(others["params"]) == 2 + 1 + 2 * 5  # two biases, the positions, weight and bias of five norms


def test_batches_cover_an_epoch_and_group_lengths():
    feed = fpt.batches(100, 10, seed=0)
    first, second = ([next(feed) for _ in range(10)] for _ in "ab")
    assert sorted(torch.cat(first).tolist()) == sorted(torch.cat(second).tolist()) == list(range(100))
    assert not torch.equal(torch.cat(first), torch.cat(second))

    lengths = torch.randint(5, 60, (3200,), generator=torch.Generator().manual_seed(0))
    feed = fpt.batches(3200, 32, seed=0, lengths=lengths)
    epoch = [lengths[next(feed)] for _ in range(100)]
    padded, real = sum(int(batch.max()) * 32 for batch in epoch), sum(int(batch.sum()) for batch in epoch)
    assert real == lengths.sum() and 1 - real / padded < 0.1
    assert [int(batch.max()) for batch in epoch] != sorted(int(batch.max()) for batch in epoch)


def test_in_a_notebook_the_kernels_own_arguments_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/lib/ipykernel_launcher.py", "-f", "kernel-1.json"])
    assert fpt.parse(fpt.flags("test", "a test"), demo={}).steps == 2500


def test_the_benchmark_prints_both_loops_and_their_ratio(gpt2):
    run = run_script("fpt", "--device", "cpu", "--amp", "fp32", "--model", gpt2, "--batch_size", 1, "--tokens", 4)
    assert run.returncode == 0, run.stderr
    rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in run.stdout.splitlines() if line.startswith("| ")}
    assert float(rows["stock"][0]) > 0 and float(rows["ours"][0]) > 0
    assert "MiB" in rows["ours"][3] and "stock / ours:" in run.stdout


# ---------------------------------------------------------------------------------------------------------------------
# Runs that are stopped
# ---------------------------------------------------------------------------------------------------------------------
def forked(args, seconds=None, number=signal.SIGKILL):
    """Train the toy in a process of its own, sent a signal after so many seconds. Returns its exit code."""
    def child():
        sys.stdout = sys.stderr = open(os.devnull, "w")
        fpt.tqdm.set_lock(threading.RLock())  # tqdm's own lock is shared with the sister processes, and one may have died holding it
        toy(args)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    if seconds is not None:
        process.join(seconds)
        if process.is_alive():
            os.kill(process.pid, number)
    process.join(120)
    return process.exitcode


def outcome(folder):
    """What must not depend on kills: log lines without their seconds and call, and every tensor of both checkpoints."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    lines = [{name: value for name, value in line.items() if "seconds" not in name and name not in ("out", "resume")} for line in lines]
    tensors = []

    def collect(item):
        if isinstance(item, torch.Tensor):
            tensors.append(item)
        elif isinstance(item, dict):
            [collect(value) for value in item.values()]
        elif isinstance(item, (list, tuple)):
            [collect(value) for value in item]

    for name in "best.pt", "last.pt":
        checkpoint = torch.load(folder / name, weights_only=True)
        tensors.append(torch.tensor(checkpoint["step"]))
        collect([checkpoint[part] for part in ("trained", "optimizer", "scaler") if part in checkpoint])
    return lines, tensors


def assert_same_outcome(one, other):
    (lines, tensors), (other_lines, other_tensors) = outcome(one), outcome(other)
    assert lines == other_lines
    assert len(tensors) == len(other_tensors) > 30
    assert all(torch.equal(a, b) for a, b in zip(tensors, other_tensors))


@pytest.mark.parametrize("amp", ["fp32", "fp16"])
def test_a_run_killed_again_and_again_equals_the_uninterrupted_one(gpt2, tmp_path, amp):  # KILLS=100 for a long one
    def run(out):
        return toy_flags(gpt2, out, "--steps", 150, "--eval_every", 3, "--dropout", 0.2, "--accumulate", 2, "--batch_size", 8, "--amp", amp, "--resume", 1)

    start = time.time()
    assert forked(run(tmp_path / "whole")) == 0
    whole = time.time() - start
    kills, wanted = 0, int(os.environ.get("KILLS", 6))
    while kills < wanted:
        out, code = tmp_path / f"killed-{kills}", -1
        while code:
            code = forked(run(out), random.uniform(0, whole / 2))
            kills += code == -signal.SIGKILL
        assert_same_outcome(tmp_path / "whole", out)
    print(f"{kills} kills")


def test_a_signal_does_not_save_a_loss_that_is_not_finite(gpt2, tmp_path, monkeypatch):
    update, steps = fpt.update, []

    def poisoned(model, optimizer, scaler):
        update(model, optimizer, scaler)
        model.output.bias.data.fill_(torch.nan)
        steps.append(1)
        fpt.STOP.extend([signal.SIGTERM] * (len(steps) == 2))

    monkeypatch.setattr(fpt, "update", poisoned)
    with pytest.raises(SystemExit, match="loss is nan at step 2"):
        toy(toy_flags(gpt2, tmp_path / "run"))
    assert not (tmp_path / "run" / "last.pt").exists()


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_the_step_and_the_run_goes_on_from_there(gpt2, tmp_path, monkeypatch, capsys, number, code):
    toy(toy_flags(gpt2, tmp_path / "whole", "--dropout", 0.1))
    update, steps = fpt.update, []

    def signalled(*parts):
        update(*parts)
        steps.append(1)
        if len(steps) == 27:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    monkeypatch.setattr(fpt, "update", signalled)
    with pytest.raises(SystemExit) as stop:
        toy(toy_flags(gpt2, tmp_path / "cut", "--dropout", 0.1))
    assert stop.value.code == code and "--resume 1 --out" in capsys.readouterr().err
    assert torch.load(tmp_path / "cut" / "last.pt", weights_only=True)["step"] == 27
    assert signal.getsignal(number) == before
    toy(flags("--resume", 1, "--out", tmp_path / "cut"))
    assert_same_outcome(tmp_path / "whole", tmp_path / "cut")


def test_a_script_killed_in_the_middle_goes_on_by_the_shown_command(gpt2, tmp_path):
    flags = ["--demo", 1, "--model", gpt2, "--device", "cpu", "--amp", "fp32", "--steps", 500, "--eval_every", 100, "--data", tmp_path / "data"]
    process = subprocess.Popen([sys.executable, HERE / "train_mnist_add.py", *map(str, flags), "--out", tmp_path / "run"], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    while not (tmp_path / "run" / "last.pt").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    error = process.communicate()[1]
    assert process.returncode == 143
    command = re.search(r"Go on: python (train_mnist_add)\.py (.*)", error)
    assert command, error
    again = run_script(command[1], *command[2].split(), "--data", tmp_path / "data")
    assert again.returncode == 0, again.stderr
    assert [json.loads(line)["step"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()][:5] == [100, 200, 300, 400, 500]


def test_resume_brings_the_flags_and_refuses_others(gpt2, tmp_path, monkeypatch):
    toy(toy_flags(gpt2, tmp_path / "run", "--lr", 0.02))
    args = flags("--resume", 1, "--out", tmp_path / "run", "--test", 0)
    assert (args.lr, args.steps, args.model, args.test) == (0.02, 40, str(gpt2), 0)
    result = last_line(tmp_path / "run")
    monkeypatch.setattr(fpt, "infer", None)  # a finished run is not tested again
    assert toy(flags("--resume", 1, "--out", tmp_path / "run"))[1] == result
    with pytest.raises(SystemExit, match=r"--lr 0.01 \(was 0.02\), --seed 3 \(was 0\)"):
        flags("--resume", 1, "--out", tmp_path / "run", "--lr", 0.01, "--seed", 3)


def test_a_loss_that_is_not_finite_is_never_best_and_the_last_good_checkpoint_stays(gpt2, tmp_path, monkeypatch):
    update, steps = fpt.update, []

    def poisoned(model, optimizer, scaler):
        update(model, optimizer, scaler)
        steps.append(1)
        if len(steps) == 24:
            model.output.bias.data.fill_(torch.nan)

    monkeypatch.setattr(fpt, "update", poisoned)
    with pytest.raises(SystemExit, match="loss is nan at step 25.*last good checkpoint is"):
        toy(toy_flags(gpt2, tmp_path / "run", "--eval_every", 10))
    for name in "best.pt", "last.pt":
        checkpoint = torch.load(tmp_path / "run" / name, weights_only=True)
        assert checkpoint["step"] in (10, 20) and all(p.isfinite().all() for p in checkpoint["trained"].values())


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_skipped_fp16_steps_are_counted(gpt2, tmp_path, monkeypatch, device):
    monkeypatch.setattr(torch.amp.GradScaler, "__init__", functools.partialmethod(torch.amp.GradScaler.__init__, init_scale=2.0**40))
    toy(toy_flags(gpt2, tmp_path / "run", "--amp", "fp16", "--device", device))
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert rows[0]["skipped_steps"] > 3 and rows[0]["train_loss"] < 10


# ---------------------------------------------------------------------------------------------------------------------
# More processes, notebooks, Weights & Biases
# ---------------------------------------------------------------------------------------------------------------------
def test_two_processes_train_as_one(gpt2, tmp_path, monkeypatch):
    argv = ["--demo", "1", "--model", str(gpt2), "--device", "cpu", "--amp", "fp32", "--steps", "40", "--eval_every", "10",
            "--batch_size", "16", "--augment", "0", "--data", str(tmp_path / "data")]  # each process augments in its own way
    script = str(HERE / "train_mnist_add.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={20000 + os.getpid() % 20000}", script]
    pair = subprocess.run([*launch, *argv, "--out", str(tmp_path / "pair")], capture_output=True, text=True, timeout=240)
    assert pair.returncode == 0, pair.stderr
    assert pair.stdout.count("parameters are trained") == 1  # one process prints
    run_main(monkeypatch, "train_mnist_add", *argv, "--out", tmp_path / "one")
    lines = {name: [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()] for name in ("pair", "one")}
    assert len(lines["pair"]) == len(lines["one"]) == 5
    for pair_line, line in zip(lines["pair"], lines["one"]):
        for name in line:
            if "loss" in name and name != "loss" or "accuracy" in name:
                assert pair_line[name] == pytest.approx(line[name], rel=1e-3, abs=2e-3), name

    # As after a kill at the second evaluation: what came later is gone, and both go on together.
    last = torch.load(tmp_path / "pair" / "last.pt", weights_only=True)
    (tmp_path / "pair" / "log.jsonl").write_text("\n".join(last["rows"][:4]) + "\n")
    again = subprocess.run([*launch, "--resume", "1", "--out", str(tmp_path / "pair"), "--data", str(tmp_path / "data")], capture_output=True, text=True, timeout=240)
    assert again.returncode == 0, again.stderr
    assert last_line(tmp_path / "pair")["test_loss"] == pytest.approx(lines["pair"][-1]["test_loss"], rel=1e-5)


def test_every_script_runs_in_a_notebook_cell(gpt2, tmp_path):
    import nbclient
    import nbformat

    cells = []
    for script in "train_cifar", "train_speech", "train_cyp3a4", "train_mnist_add":
        argv = [f"{script}.py", "--demo", "1", "--model", str(gpt2), "--steps", "2", "--eval_every", "1", "--device", "cpu", "--amp", "fp32",
                "--data", str(tmp_path / "data"), "--out", str(tmp_path / script)]
        cells += [f"import sys; sys.argv = {argv}", (HERE / f"{script}.py").read_text()]
    cells[2:2] = ["sys.argv = ['/somewhere/ipykernel_launcher.py', '-f', 'kernel-1.json']; import fpt; print(fpt.parse(fpt.flags('test', ''), demo={}).steps)"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(HERE)}}).execute()
    printed = ["".join(part.get("text", "") for part in cell.outputs) for cell in notebook.cells]
    assert "2500" in printed[2]
    for script in "train_cifar", "train_speech", "train_cyp3a4", "train_mnist_add":
        assert last_line(tmp_path / script)["step"] in (1, 2)


def test_weights_and_biases_offline_and_the_same_run_after_a_stop(gpt2, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = toy_flags(gpt2, tmp_path / "run", "--wandb", "fpt-test", "--eval_every", 10)
    infer, calls = fpt.infer, []

    def stopping(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return infer(*args)

    monkeypatch.setattr(fpt, "infer", stopping)
    with pytest.raises(KeyboardInterrupt):
        toy(run)
    import wandb

    wandb.finish()
    toy(flags("--resume", 1, "--out", tmp_path / "run", "--wandb", "fpt-test"))
    files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2 and files[0].name == files[1].name
    written = b"".join(file.read_bytes() for file in files)
    for word in b"validation_accuracy", b"test_accuracy", b"ln_lr":
        assert word in written


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: one line, exit code 2 for wrong flags and 1 for the rest, no traceback
# ---------------------------------------------------------------------------------------------------------------------
WRONG_FLAGS = [
    ("train_cifar", "--train in,nose", "unknown part nose"),
    ("train_cifar", "--pretrained 2", "invalid choice: 2"),
    ("train_cifar", "--steps many", "invalid int value: 'many'"),
    ("train_cifar", "--steps 0", "--steps: 0 is not a whole number from 1"),
    ("train_cifar", "--batch_size -4", "--batch_size: -4 is not"),
    ("train_cifar", "--accumulate 0", "--accumulate: 0 is not"),
    ("train_cifar", "--eval_every 0", "--eval_every: 0 is not"),
    ("train_cifar", "--warmup -1", "--warmup: -1 is not"),
    ("train_cifar", "--seed -1", "--seed: -1 is not"),
    ("train_cifar", "--lr -1", "--lr: -1 is not a number from 0"),
    ("train_cifar", "--lr nan", "--lr: nan is not"),
    ("train_cifar", "--dropout 1", "--dropout: 1 is not a number from 0 on and below 1"),
    ("train_cifar", "--nonsense", "unrecognized arguments: --nonsense"),
    ("train_cifar", "--patch_size 5", "--patch_size 5 does not divide 32"),
    ("train_cifar", "--patch_size 0", "--patch_size: 0 is not"),
    ("train_cifar", "--predict cat.png", "--eval PATH"),
    ("train_cifar", "--eval a.pt --resume 1", "choose one"),
    ("train_speech", "--tokens midi", "invalid choice: 'midi'"),
    ("train_mnist_add", "--n 0", "--n: 0 is not"),
    ("train_mnist_add", "--n 64 --loss ce --model {gpt2}", "--n 64 is more than the 63 positions"),
]


def ending(monkeypatch, capsys, script, *argv):
    """Run a script's main in this process. Returns (exit code, the line it ended with)."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_main(monkeypatch, script, *argv)
    error, code = capsys.readouterr().err, stop.value.code
    line = error.splitlines()[-1] if isinstance(code, int) else code  # sys.exit prints a text and makes it exit code 1
    assert "\n" not in line and "Traceback" not in error, error
    return (code if isinstance(code, int) else 1), line


@pytest.mark.parametrize("script, argv, says", WRONG_FLAGS, ids=[f"{script} {argv}" for script, argv, _ in WRONG_FLAGS])
def test_wrong_flags(gpt2, monkeypatch, capsys, script, argv, says):
    code, line = ending(monkeypatch, capsys, script, *argv.format(gpt2=gpt2).split())
    assert code == 2 and says in line and line.startswith(f"{script}.py: ")


class Bad:
    """Each method prepares one case in an empty folder and returns script, flags, and what the line must say."""

    def cuda_absent(self, t, m, gpt2):
        if torch.cuda.is_available():
            pytest.skip("there is a GPU")
        return "train_cifar", "--device cuda", ["--device cuda is not there", "--device cpu"]

    def no_such_device(self, t, m, gpt2):
        return "train_cifar", "--device abacus", ["--device abacus is not there"]

    def no_such_folder(self, t, m, gpt2):
        return "train_mnist_add", "--model /no/such/model", ["/no/such/model", "--pretrained 0", "--model FOLDER"]

    def hub_out_of_reach(self, t, m, gpt2):
        m.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        return "train_mnist_add", "--model gpt2", ["gpt2", "--pretrained 0", "--model FOLDER"]

    def folder_without_weights(self, t, m, gpt2):
        shutil.copy(gpt2 / "config.json", t)
        return "train_mnist_add", f"--model {t}", ["Cannot load", "--pretrained 0"]

    def folder_of_an_unknown_model(self, t, m, gpt2):
        (t / "config.json").write_text('{"model_type": "abacus"}')
        return "train_mnist_add", f"--model {t} --pretrained 0", ["Cannot load", str(t)]

    def folder_with_a_broken_config(self, t, m, gpt2):
        (t / "config.json").write_text('{"model_type": ')
        return "train_mnist_add", f"--model {t} --pretrained 0", ["Cannot load", str(t)]

    def folder_of_an_image_model(self, t, m, gpt2):
        (t / "config.json").write_text('{"model_type": "vit", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}')
        return "train_mnist_add", f"--model {t} --pretrained 0", ["no text transformer", "vit"]

    def cifar_server_out_of_reach(self, t, m, gpt2):
        m.setattr("torchvision.datasets.CIFAR10.url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
        return "train_cifar", "", ["Cannot get cifar-10-python.tar.gz", "put", "--demo 1"]

    def mnist_server_out_of_reach(self, t, m, gpt2):
        m.setattr("torchvision.datasets.MNIST.mirrors", ["http://127.0.0.1:9/"])
        return "train_mnist_add", "--n 2", ["Cannot get the four files *-ubyte", "MNIST/raw", "--demo 1"]

    def speech_server_out_of_reach(self, t, m, gpt2):
        m.setattr(data, "SPEECH_URL", "http://127.0.0.1:9/speech.tar.gz")
        return "train_speech", "", ["Cannot get speech_commands_v0.02.tar.gz", "put", "--demo 1"]

    def cyp3a4_server_out_of_reach(self, t, m, gpt2):
        m.setattr(data, "CYP3A4_URL", "http://127.0.0.1:9/4259582")
        return "train_cyp3a4", "", ["4259582 as cyp3a4_veith.tab", "put", "--demo 1"]

    def altered_archive(self, t, m, gpt2):
        (t / "cifar-10-python.tar.gz").write_bytes(b"not the archive")
        m.setattr("torchvision.datasets.CIFAR10.url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
        return "train_cifar", "", ["Cannot get cifar-10-python.tar.gz", "delete"]

    def truncated_archive(self, t, m, gpt2):
        tar(t / "whole.tar.gz", {"./yes/a_nohash_0.wav": os.urandom(50000)})
        (t / "speech_commands_v0.02.tar.gz").write_bytes((t / "whole.tar.gz").read_bytes()[:20000])
        return "train_speech", "", ["Cannot get speech_commands_v0.02.tar.gz", "delete"]

    def archive_that_leaves_its_folder(self, t, m, gpt2):
        tar(t / "speech_commands_v0.02.tar.gz", {"../../../outside.txt": b"x"})
        return "train_speech", "", ["Cannot get speech_commands_v0.02.tar.gz", "outside"]

    def half_written_image_cache(self, t, m, gpt2):
        np.savez(t / "whole.npz", train_x=np.zeros((99, 32, 32, 3), np.uint8))
        (t / "cifar10.npz").write_bytes((t / "whole.npz").read_bytes()[:9999])
        return "train_cifar", "", ["cifar10.npz cannot be read", "delete it"]

    def truncated_digits(self, t, m, gpt2):
        data.mnist(t, demo=True)
        (t / "demo" / "MNIST").rename(t / "MNIST")
        images = t / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
        images.write_bytes(images.read_bytes()[:5000])
        return "train_mnist_add", "--n 2", ["MNIST/raw", "delete"]

    def empty_table(self, t, m, gpt2):
        (t / "cyp3a4_veith.tab").write_text("")
        return "train_cyp3a4", "", ["cyp3a4_veith.tab is not the tab-separated table", "delete"]

    def table_without_its_columns(self, t, m, gpt2):
        (t / "cyp3a4_veith.tab").write_text("Drug_ID\tSmiles\tY\n1\tCCO\t0\n")
        return "train_cyp3a4", "", ["columns Drug_ID, Drug and Y", "'Drug'"]

    def table_with_a_word_for_a_label(self, t, m, gpt2):
        (t / "cyp3a4_veith.tab").write_text("Drug_ID\tDrug\tY\n1\tCCO\tyes\n")
        return "train_cyp3a4", "", ["'yes'", "delete"]

    def half_a_table(self, t, m, gpt2):
        (t / "cyp3a4_veith.tab").write_text("Drug_ID\tDrug\tY\n1\tCCO\t1\n")
        return "train_cyp3a4", "", ["1 molecules, 1 of them inhibitors, where 12,328"]

    def wav(self, t, content):
        data.speech_commands(t, demo=True)
        (t / "demo" / "SpeechCommands").rename(t / "SpeechCommands")
        (t / "SpeechCommands" / "speech_commands_v0.02" / "low_fall" / "00000000_nohash_0.wav").write_bytes(content)

    def wav_of_another_rate(self, t, m, gpt2):
        self.wav(t, wav_bytes(np.zeros(8), rate=8000))
        return "train_speech", "", ["low_fall/00000000_nohash_0.wav", "8000 Hz"]

    def wav_in_stereo(self, t, m, gpt2):
        self.wav(t, wav_bytes(np.zeros(8), channels=2))
        return "train_speech", "", ["2 channels", "mono"]

    def wav_without_a_sample(self, t, m, gpt2):
        self.wav(t, wav_bytes(np.zeros(0)))
        return "train_speech", "", ["0 samples"]

    def wav_that_is_none(self, t, m, gpt2):
        self.wav(t, b"")
        return "train_speech", "", ["is no wav file"]

    def missing_split_list(self, t, m, gpt2):
        self.wav(t, wav_bytes(np.zeros(8)))
        (t / "SpeechCommands" / "speech_commands_v0.02" / "testing_list.txt").unlink()
        return "train_speech", "", ["testing_list.txt"]

    def one_word(self, t, m, gpt2):
        self.wav(t, wav_bytes(np.zeros(8)))
        for word in (t / "SpeechCommands" / "speech_commands_v0.02").glob("*_*/"):
            if word.is_dir() and word.name != "low_fall":
                shutil.rmtree(word)
        return "train_speech", "", ["two words at least", "it has 1 words"]

    def out_in_a_place_without_folders(self, t, m, gpt2):
        (t / "file").write_text("")
        return "train_mnist_add", f"--demo 1 --model {gpt2} --out {t}/file/run", ["Error", str(t / "file")]

    def full_disk(self, t, m, gpt2):
        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        m.setattr(os, "fsync", full)
        return "train_mnist_add", f"--demo 1 --model {gpt2} --steps 1 --out {t}/run", ["No space left"]

    def out_of_memory(self, t, m, gpt2):
        def out(*_):
            raise torch.OutOfMemoryError("CUDA out of memory")

        m.setattr(fpt, "update", out)
        return "train_mnist_add", f"--demo 1 --model {gpt2} --out {t}/run", ["--batch_size", "--accumulate"]

    def molecule_longer_than_the_positions(self, t, m, gpt2):
        from transformers import GPT2Config

        GPT2Config(n_layer=1, n_head=1, n_embd=8, n_positions=12).save_pretrained(t / "model")
        return "train_cyp3a4", f"--demo 1 --pretrained 0 --model {t}/model --out {t}/run", ["longest example has", "12 positions"]

    def nothing_to_resume(self, t, m, gpt2):
        m.chdir(t)
        return "train_mnist_add", "--resume 1", ["No run to go on with", "--out"]

    def no_checkpoint(self, t, m, gpt2):
        return "train_mnist_add", f"--eval {t}/best.pt", ["best.pt is no checkpoint"]

    def garbage_checkpoint(self, t, m, gpt2):
        (t / "best.pt").write_bytes(os.urandom(1000))
        return "train_mnist_add", f"--eval {t}/best.pt", ["best.pt is no checkpoint"]

    def checkpoint_with_code_in_it(self, t, m, gpt2):
        class Trap:
            def __reduce__(self):
                return os.system, (f"touch {t}/executed",)

        torch.save({"trained": Trap(), "flags": {}, "frozen_sum": 0.0}, t / "best.pt")
        return "train_mnist_add", f"--eval {t}/best.pt", ["best.pt is no checkpoint", "UnpicklingError"]

    def checkpoint_of_another_task(self, t, m, gpt2):
        toy(toy_flags(gpt2, t / "run", "--steps", 1))
        return "train_mnist_add", f"--eval {t}/run/best.pt", ["a checkpoint of the task test, not of mnist_add"]

    def checkpoint_of_another_shape(self, t, m, gpt2):
        toy(toy_flags(gpt2, t / "run", "--steps", 1))
        return "train_mnist_add", f"--demo 1 --model {gpt2} --amp fp32 --init {t}/run/best.pt --out {t}/new", ["does not fit the model", "size mismatch"]

    def unreadable_smiles(self, t, m, gpt2):
        checkpoint = {"trained": {}, "frozen_sum": 0.0, "flags": {"task": "cyp3a4"}}
        torch.save(checkpoint, t / "best.pt")
        return "train_cyp3a4", f"--eval {t}/best.pt --predict C1CC", ["cannot read C1CC"]

    def unreadable_image(self, t, m, gpt2):
        torch.save({"trained": {}, "frozen_sum": 0.0, "flags": {"task": "cifar"}}, t / "best.pt")
        (t / "a.png").write_bytes(b"no image")
        return "train_cifar", f"--eval {t}/best.pt --predict {t}/a.png", ["a.png is no image"]

    def wandb_not_installed(self, t, m, gpt2):
        m.setitem(sys.modules, "wandb", None)
        return "train_mnist_add", f"--demo 1 --model {gpt2} --out {t}/run --wandb x", ["pip install wandb"]


@pytest.mark.parametrize("case", [name for name in vars(Bad) if name[0] != "_" and name != "wav"])
def test_bad_input(case, gpt2, tmp_path, monkeypatch, capsys):
    script, argv, says = getattr(Bad(), case)(tmp_path, monkeypatch, gpt2)
    argv = argv.split() if "--data" in argv else [*argv.split(), "--data", tmp_path]
    if "--model" not in argv:
        argv += ["--model", gpt2]
    code, line = ending(monkeypatch, capsys, script, *argv)
    assert code == 1
    for part in says:
        assert part in line
    assert not (tmp_path / "executed").exists() and not (tmp_path.parent / "outside.txt").exists() and not (tmp_path / "outside.txt").exists()
    assert not list(tmp_path.glob("*/*.pt")) or case in ("checkpoint_of_another_task", "checkpoint_of_another_shape")


# ---------------------------------------------------------------------------------------------------------------------
# Data sets: files in the original formats, from a local server
# ---------------------------------------------------------------------------------------------------------------------
@pytest.fixture
def server(tmp_path):
    """Serves the folder tmp_path/www; yields (folder, url)."""
    folder = tmp_path / "www"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{httpd.server_port}/"
    httpd.shutdown()


def tar(path, files):
    """Write {name: bytes} as a .tar.gz"""
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def test_cifar10_from_its_archive(server, tmp_path, monkeypatch, capfd):
    from torchvision.datasets import CIFAR10

    folder, url = server
    rng = np.random.default_rng(0)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    batches = {name: {"data": rng.integers(0, 256, (20, 3072), np.uint8), "labels": rng.integers(0, 10, 20).tolist()} for name in names}
    files = {f"cifar-10-batches-py/{name}": pickle.dumps(content) for name, content in batches.items()}
    files["cifar-10-batches-py/batches.meta"] = pickle.dumps({"label_names": list("abcdefghij")})
    tar(folder / CIFAR10.filename, files)
    md5 = {name.split("/")[1]: hashlib.md5(content).hexdigest() for name, content in files.items()}
    monkeypatch.setattr(CIFAR10, "url", url + CIFAR10.filename)
    monkeypatch.setattr(CIFAR10, "train_list", [(name, md5[name]) for name in names[:5]])
    monkeypatch.setattr(CIFAR10, "test_list", [("test_batch", md5["test_batch"])])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": md5["batches.meta"]})

    monkeypatch.setattr(CIFAR10, "tgz_md5", "0" * 32)
    with pytest.raises(SystemExit, match="corrupt"):
        data.cifar10(tmp_path / "bad")
    assert not (tmp_path / "bad" / "cifar10.npz").exists()

    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5((folder / CIFAR10.filename).read_bytes()).hexdigest())
    splits = data.cifar10(tmp_path / "good")
    assert "100%" in capfd.readouterr().err
    assert [len(splits[split][1]) for split in ("train", "validation", "test")] == [90, 10, 20]
    # Row-major planes of red, green, blue become one pixel after the other.
    assert torch.equal(splits["test"][0], torch.from_numpy(batches["test_batch"]["data"].reshape(20, 3, 32, 32).transpose(0, 2, 3, 1)))
    assert splits["test"][1].tolist() == batches["test_batch"]["labels"]
    learned = torch.cat([splits["train"][0], splits["validation"][0]]).flatten(1)
    original = torch.from_numpy(np.concatenate([batches[name]["data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1) for name in names[:5]])).flatten(1)
    assert sorted(learned.tolist()) == sorted(original.tolist())

    (folder / CIFAR10.filename).unlink()  # the second start needs neither server nor archive
    again = data.cifar10(tmp_path / "good")
    assert all(torch.equal(a, b) for split in splits for a, b in zip(splits[split], again[split]))


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape) + array.tobytes()


def test_mnist_from_its_files(server, tmp_path, monkeypatch):
    import gzip

    from torchvision.datasets import MNIST

    folder, url = server
    rng = np.random.default_rng(0)
    arrays = {}
    for name, size in ("train", 60), ("t10k", 20):
        arrays[f"{name}-images-idx3-ubyte"] = rng.integers(0, 256, (size, 28, 28), np.uint8)
        arrays[f"{name}-labels-idx1-ubyte"] = rng.integers(0, 10, size).astype(np.uint8)
    resources = []
    for name, array in arrays.items():
        content = gzip.compress(idx(array))
        (folder / f"{name}.gz").write_bytes(content)
        resources.append((f"{name}.gz", hashlib.md5(content).hexdigest()))
    monkeypatch.setattr(MNIST, "mirrors", [url])
    monkeypatch.setattr(MNIST, "resources", [(name, "0" * 32) for name, _ in resources])
    with pytest.raises(SystemExit, match="corrupt"):
        data.mnist(tmp_path / "bad")
    monkeypatch.setattr(MNIST, "resources", resources)
    splits = data.mnist(tmp_path / "good")
    assert [len(splits[split][1]) for split in ("train", "validation", "test")] == [55, 5, 20]
    assert torch.equal(splits["test"][0], torch.from_numpy(arrays["t10k-images-idx3-ubyte"]))
    assert splits["test"][1].tolist() == arrays["t10k-labels-idx1-ubyte"].tolist()


def test_sums_use_every_digit_equally_and_never_change():
    for n in 1, 2, 5:
        index = data.sum_indices(100, n)
        assert index.shape == (100, n) and torch.equal(index, data.sum_indices(100, n))
        assert torch.equal(index.flatten().bincount(), torch.full((100,), n))
    assert torch.equal(data.sum_indices(7, 1)[:, 0], torch.arange(7))


def wav_bytes(samples, rate=16000, channels=1):
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())
    return buffer.getvalue()


def test_speech_commands_from_its_archive(server, tmp_path, monkeypatch, capfd):
    folder, url = server
    rng = np.random.default_rng(0)
    clips = {f"./{word}/{speaker}_nohash_{i}.wav": rng.integers(-9999, 9999, 16000 - 500 * i)
             for word in ("yes", "no") for speaker in ("aa", "bb", "cc") for i in range(2)}
    files = {name: wav_bytes(samples) for name, samples in clips.items()}
    files["./_background_noise_/hum.wav"] = wav_bytes(np.zeros(99))
    files["./validation_list.txt"] = b"yes/bb_nohash_0.wav\nno/bb_nohash_1.wav\n"
    # A word of the lists that is not here is no class of its own.
    files["./testing_list.txt"] = b"no/cc_nohash_0.wav\nno/cc_nohash_1.wav\nzebra/cc_nohash_1.wav\n"
    tar(folder / "speech_commands_v0.02.tar.gz", files)
    monkeypatch.setattr(data, "SPEECH_URL", url + "speech_commands_v0.02.tar.gz")
    with pytest.raises(SystemExit, match="invalid hash"):
        data.speech_commands(tmp_path / "bad")
    digest = hashlib.sha256((folder / "speech_commands_v0.02.tar.gz").read_bytes()).hexdigest()
    monkeypatch.setattr(data, "SPEECH_SHA256", digest)
    splits = data.speech_commands(tmp_path / "good")
    assert "100%" in capfd.readouterr().err
    assert splits["classes"] == ["no", "yes"]
    assert [splits[split][1].tolist() for split in ("validation", "test")] == [[1, 0], [0, 0]]
    assert sorted(splits["train"][1].tolist()) == [0, 0, 0, 1, 1, 1, 1, 1]
    waves = splits["test"][0]
    assert waves.dtype == torch.int16 and waves.shape == (2, 16000)
    assert waves[1, :15500].tolist() == clips["./no/cc_nohash_1.wav"].tolist() and waves[1, 15500:].eq(0).all()

    again = data.speech_commands(tmp_path / "good")
    assert all(torch.equal(a, b) for split in ("train", "validation", "test") for a, b in zip(splits[split], again[split]))
    (tmp_path / "good" / "SpeechCommands" / "speech_commands_v0.02" / "no" / "cc_nohash_0.wav").unlink()
    (tmp_path / "good" / "speech_commands.npz").unlink()
    with pytest.raises(SystemExit, match="1 clips .* missing"):
        data.speech_commands(tmp_path / "good")


MOLECULES = [("Cc1ccccc1", 1), ("CCc1ccccc1", 0), ("C1CCCCC1N", 1), ("CCO", 0), ("c1ccncc1", 1), ("C[C@H](N)C(=O)O", 0), ("not a molecule", 1)]


@pytest.mark.parametrize("quote", ['"', ""])
def test_cyp3a4_from_its_table(server, tmp_path, monkeypatch, capfd, quote):
    folder, url = server
    rows = [("Drug_ID", "Drug", "Y"), *((f"{i}.0", smiles, label) for i, (smiles, label) in enumerate(MOLECULES))]
    text = "\n".join("\t".join(f"{quote}{field}{quote}" for field in row) for row in rows) + "\n"
    (folder / "4259582").write_text(text)
    monkeypatch.setattr(data, "CYP3A4_URL", url + "4259582")
    with pytest.raises(SystemExit, match="7 molecules, 4 of them inhibitors, where 12,328 and 5,110"):
        data.cyp3a4(tmp_path / "data")
    assert not (tmp_path / "data" / "cyp3a4_veith.tab").exists()  # half a download does not spoil the next start
    arrays = data.featurise([{"Drug": smiles, "Y": label} for smiles, label in MOLECULES])
    error = capfd.readouterr()
    assert "100%" in error.err and "1 SMILES that RDKit cannot read are left out: not a molecule" in error.out + error.err
    assert arrays["labels"].tolist() == [1, 0, 1, 0, 1, 0]
    assert arrays["atom_counts"].tolist() == [27, 28, 27, 23, 26, 26]
    assert ((arrays["atoms"][:, :20] > 0).sum((1, 2)) == 79).all()  # the numbers about the whole molecule
    assert (arrays["atoms"][0, 0, 0] == data.hashed(f"0 {10 * math.asinh(92.0626):.0f}"))  # the first is toluene's exact weight
    toluene, benzyl = arrays["atoms"][0, 20:], arrays["atoms"][1, 20:]
    assert (toluene[:7, :3] > 0).all() and (toluene[7:] == 0).all() and arrays["atoms"].max() <= data.BUCKETS
    assert toluene[0, 0] == benzyl[0, 0] and toluene[0, 1] != benzyl[0, 1]  # both methyl carbons, other neighbours
    assert data.molecule_ids("C.CO")[0][20:, 1].gt(0).tolist() == [False, True, True]  # a lone atom has no surroundings
    assert arrays["token_counts"].tolist() == [9, 10, 9, 3, 8, 11]  # [C@H] is one token


def test_the_scaffold_split_by_hand():
    # random.Random(0).shuffle turns the groups a b c d into c a b d.
    scaffolds = ["a", "b", "a", "c", "d", "c", "c", "b", "a", "d"]
    assert data.scaffold_split(scaffolds, 0.7) == ([3, 5, 6, 0, 2, 8], [1, 7, 4, 9])
    assert data.scaffold_split(scaffolds, 0.8) == ([3, 5, 6, 0, 2, 8, 1, 7], [4, 9])


def test_scaffolds_ignore_chirality_and_side_chains():
    smiles = ["C[C@H]1CCCO1", "C[C@@H]1CCCO1", "CC1CCCO1", "OCc1ccccc1"] * 3 + ["CCO"]
    split = data.featurise([{"Drug": s, "Y": 0} for s in smiles])["split"]
    for same in [0, 1, 2, 4, 5, 6], [3, 7, 11]:
        assert len(set(split[same])) == 1


@pytest.mark.skipif(not SHARED.exists(), reason="the real file is not here")
def test_the_real_cyp3a4_has_the_published_split(tmp_path):
    (tmp_path / "cyp3a4_veith.tab").write_bytes((SHARED / "cyp3a4_veith.tab").read_bytes())
    splits = data.cyp3a4(tmp_path)
    labels = {split: splits[split][4] for split in ("train", "validation", "test")}
    assert len(labels["train"]) + len(labels["validation"]) == 9862 and len(labels["test"]) == 2466
    assert sum(int(part.sum()) for part in labels.values()) == 5110
    # The rows of the test part as PyTDC 1.1.15's own create_scaffold_split(df, 0, [0.8, 0.2, 0], "Drug") gives them.
    rows = np.flatnonzero(np.load(tmp_path / "cyp3a4_ids.npz")["split"] == 2)
    assert hashlib.sha256(",".join(map(str, rows)).encode()).hexdigest() == "883f4b4070a15886f17e6f57b29941e72cde3500934ab23d3b0ca3e9a7b401e0"


# ---------------------------------------------------------------------------------------------------------------------
# Scripts
# ---------------------------------------------------------------------------------------------------------------------
def test_auroc_and_auprc_by_hand():
    score, target = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5]), torch.tensor([1, 0, 1, 1, 0])
    assert train_cyp3a4.auroc(score, target) == pytest.approx(4 / 6)  # 4 of the 6 pairs are in order
    assert train_cyp3a4.auprc(score, target) == pytest.approx((1 / 1 + 2 / 3 + 3 / 4) / 3)
    ties = torch.tensor([0.5, 0.5, 0.5, 0.1])
    target = torch.tensor([1, 0, 0, 1])
    assert train_cyp3a4.auroc(ties, target) == pytest.approx((0.5 + 0.5) / 4)
    assert train_cyp3a4.auprc(ties, target) == pytest.approx((1 / 3 + 2 / 4) / 2)


def test_the_likeliest_sum():
    digits = torch.arange(10)
    # Exact: 10 of 100 pairs, 432,457,640 of 10**10 tens. The original sampled 0.09913, 0.04434, 0.01444, 0.0047.
    for n, share in (1, 0.1), (2, 0.1), (10, 0.043245764), (100, 0.0139), (1000, 0.0044):
        sums = train_mnist_add.sum_distribution(digits, n)
        assert len(sums) == 9 * n + 1 and sums.sum() == pytest.approx(1)
        assert sums.max() == pytest.approx(share, abs=5e-5)
    assert train_mnist_add.sum_distribution(digits, 10).argmax() == 45
    assert train_mnist_add.sum_distribution(torch.tensor([7, 7, 1]), 3).argmax() in (15, 21)


def test_patches_are_squares_in_reading_order():
    rows, columns = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    images = torch.stack([rows, columns, rows * 0 + 7], 2)[None]
    tokens = train_cifar.patches(images, 8)
    assert tokens.shape == (1, 16, 192)
    square = tokens[0, 6].view(8, 8, 3)  # second row of patches, third column
    assert square[:, 0, 0].tolist() == list(range(8, 16)) and square[0, :, 1].tolist() == list(range(16, 24))


def test_augmentation_shifts_and_mirrors_but_invents_nothing():
    columns = torch.arange(32, dtype=torch.uint8).expand(32, 32)
    images = torch.stack([columns.T, columns, columns], 2).expand(200, 32, 32, 3)
    moved = train_cifar.shift_and_flip(images).int()
    steps = moved[:, 16, 1:, 1] - moved[:, 16, :-1, 1]
    mirrored = (steps < 0).any(1)
    assert 60 < mirrored.sum() < 140
    assert set(steps.unique().tolist()) <= {-1, 0, 1} and moved[:, :, :, 0].diff(dim=1).min() >= 0
    shift = moved[:, 16, 16, 0] - 16
    assert set(shift.tolist()) == set(range(-4, 5))


def test_digits_are_turned_scaled_and_shifted_a_little():
    images = torch.zeros(300, 2, 28, 28)
    images[:, :, 13:15, 8:20] = 255  # a bar in the middle
    moved = train_mnist_add.jiggle(images).flatten(0, 1)
    assert moved.min() >= 0 and moved.max() <= 255.01
    assert moved.mean().item() == pytest.approx(images.mean().item(), rel=0.05)
    middle = (moved.sum(2) * torch.arange(28)).sum(1) / moved.sum((1, 2)) - 13.5
    assert middle.abs().max() < 2.9 and middle.std() > 0.5  # 2 pixels each way, turned by 12 degrees and 15 % larger
    assert len({tuple(image.flatten().tolist()) for image in moved}) == 600


def test_bent_digits_are_warped_on_average_not_at_all():
    images = torch.zeros(300, 2, 28, 28)
    images[:, :, 13:15, 4:24] = 255  # a bar from left to right

    def middle_off_the_line(bend):  # how many pixels the bar's middle is above the line between two places left and right of it
        moved = train_mnist_add.jiggle(images, bend).flatten(0, 1)
        height = (moved * torch.arange(28)[:, None]).sum(1) / moved.sum(1)
        return height[:, 14] - (height[:, 9] + height[:, 19]) / 2

    assert middle_off_the_line(bend=False).std() < 0.2
    bent = middle_off_the_line(bend=True)
    assert 0.3 < bent.std() < 2 and bent.mean().abs() < 0.15


def test_upright_digits_are_centred_and_lose_their_slant():
    row, column = torch.meshgrid(torch.arange(28.0), torch.arange(28.0), indexing="ij")
    images = torch.zeros(1, 4, 28, 28)
    for image, slant, x, y in zip(images[0], (0, 0.3, -0.5), (13.5, 16, 11.5), (13.5, 12, 15.5)):  # strokes of one shape and size
        away = column - (x - slant * (row - y))
        image[:] = 255 * (1 - (away.abs() - 1).clamp(0, 1)) * (1 - ((row - y).abs() - 6).clamp(0, 1))
    straight = train_mnist_add.upright(images)[0]
    assert torch.allclose(straight[0], images[0, 0], atol=0.1)  # it stood there already
    for stroke in straight[1:3]:
        ink = stroke / stroke.sum()
        assert (ink * column).sum() == pytest.approx(13.5, abs=0.1) and (ink * row).sum() == pytest.approx(13.5, abs=0.1)
        assert (ink * (row - 13.5) * (column - 13.5)).sum().abs() < 0.3 and (stroke - straight[0]).abs().mean() < 4
    assert straight[3].abs().max() == 0  # nothing drawn, nothing divided by zero


def test_edges_say_in_which_direction_it_gets_brighter():
    images = torch.zeros(2, 3, 28, 28)
    images[0, 1, :, 14:] = 255  # brighter to the right
    images[1, 2, 14:] = 255     # brighter downwards
    maps = train_mnist_add.edges(images).view(2, 3, 8, 14, 14)
    towards = maps[:, :, :, 1:-1, 1:-1].sum((3, 4))
    slant = 0.5 ** 0.5
    full = towards[0, 1, 0]
    assert full > 0 and torch.allclose(towards[0, 1] / full, torch.tensor([1, slant, 0, 0, 0, 0, 0, slant]), atol=1e-5)
    assert torch.allclose(towards[1, 2] / full, torch.tensor([0, slant, 1, slant, 0, 0, 0, 0]), atol=1e-5)
    assert maps[0, 1, 0, 1:-1, [0, 5, 8, 13]].max() == 0 and (towards.sum(2) > 0).sum() == 2


def test_l1_is_the_absolute_and_mse_the_squared_error_of_the_sum(gpt2, tmp_path, monkeypatch):
    runs = {loss: run_main(monkeypatch, "train_mnist_add", "--demo", 1, "--model", gpt2, "--n", 3, "--loss", loss, "--steps", 1, "--data",
                           tmp_path / "data", "--out", tmp_path / loss) for loss in ("l1", "mse")}
    spread = 2.87 * 3 ** 0.5
    assert runs["l1"]["test_loss"] * spread == pytest.approx(runs["l1"]["test_mae"], abs=0.26)  # the error is of rounded sums
    assert runs["mse"]["test_loss"] * spread**2 == pytest.approx(runs["mse"]["test_mse"], rel=0.1)


def test_digits_loss_adds_the_distributions_of_single_digits():
    logits = torch.randn(4, 3, 10, generator=torch.Generator().manual_seed(0))
    probabilities = logits.softmax(-1)
    expected = torch.zeros(4, 28)
    for a, b, c in itertools.product(range(10), repeat=3):
        expected[:, a + b + c] += probabilities[:, 0, a] * probabilities[:, 1, b] * probabilities[:, 2, c]
    assert torch.allclose(train_mnist_add.sum_logits(logits).exp(), expected, atol=1e-6)
    sure = torch.full((1, 4, 10), -100.0)
    sure[0, torch.arange(4), torch.tensor([9, 0, 3, 9])] = 100
    assert train_mnist_add.sum_logits(sure).argmax() == 21
    assert train_mnist_add.sum_logits(sure.requires_grad_()).sum().isfinite()


def test_digits_loss_reads_each_token_and_is_evaluated_again_from_its_checkpoint(gpt2, tmp_path, monkeypatch):
    argv = "--demo", 1, "--model", gpt2, "--data", tmp_path / "data"
    run = run_main(monkeypatch, "train_mnist_add", *argv, "--n", 3, "--steps", 2, "--out", tmp_path / "run")
    again = run_main(monkeypatch, "train_mnist_add", *argv, "--eval", tmp_path / "run" / "best.pt")
    assert run["test_loss"] == again["test_loss"] and (run["loss"], run["pool"]) == ("digits", "each")
    assert run["test_loss"] < math.log(10**12) / 2  # no sum was impossible
    two = run_main(monkeypatch, "train_mnist_add", *argv, "--n", 2, "--steps", 1, "--out", tmp_path / "two")
    assert (two["loss"], two["pool"]) == ("ce", "cls")  # there the network adds


def demo(script, tmp_path, *argv):
    run = run_script(script, "--demo", 1, "--data", tmp_path / "data", "--out", tmp_path / "run", *argv)
    assert run.returncode == 0, run.stderr
    return run, last_line(tmp_path / "run")


@pytest.mark.parametrize("script, task", [("train_cifar", "cifar"), ("train_speech", "speech"), ("train_cyp3a4", "cyp3a4"), ("train_mnist_add", "mnist_add")])
def test_the_demo_of_every_script_learns_on_cuda_if_there_is_one(script, task, tmp_path):
    run, last = demo(script, tmp_path, "--pretrained", 0)
    assert "DEMO: the data is generated" in run.stdout and last["generated_data"] is True
    assert "train:" in run.stderr  # the progress bar
    assert last["test_accuracy"] > last["dummy_accuracy"] + 0.25
    assert {"test_loss", "trainable_parameters", "total_parameters", "step", "steps", "lr", "seed"} <= set(last)
    if task == "cyp3a4":
        assert last["test_auroc"] > 0.7 and last["test_auprc"] > 0.7
    if task == "mnist_add":
        assert last["test_mae"] >= 1 - last["test_accuracy"] - 1e-6 and last["test_mse"] >= last["test_mae"] - 1e-6


@pytest.mark.parametrize("script, argv", [
    ("train_cifar", ["--patch_size", 16, "--augment", 1]), ("train_speech", ["--tokens", "wave"]),
    ("train_cyp3a4", ["--tokens", "smiles"]), ("train_mnist_add", ["--n", 3, "--loss", "mse", "--tokens", "pixels"])])
def test_the_other_choices_run_on_pretrained_weights(script, argv, tmp_path, monkeypatch):
    from transformers import GPT2Config, GPT2Model

    folder = tmp_path / "model"
    GPT2Model(GPT2Config(n_layer=1, n_head=2, n_embd=32, n_positions=128, vocab_size=9)).save_pretrained(folder)
    run_main(monkeypatch, script, "--demo", 1, "--data", tmp_path / "data", "--out", tmp_path / "run", "--model", folder,
             "--pretrained", 1, "--steps", 4, "--eval_every", 2, *argv)
    last = last_line(tmp_path / "run")
    assert last["pretrained"] == 1 and last["model"] == str(folder) and last["steps"] == 4
    again = run_main(monkeypatch, script, "--eval", tmp_path / "run" / "best.pt", "--data", tmp_path / "data")
    assert again["test_loss"] == last["test_loss"]


@pytest.mark.parametrize("script, argv, given, classes", [
    ("train_cifar", ["--patch_size", 16], "image.png", set(train_cifar.CLASSES)),
    ("train_speech", [], "clip.wav", {"low_rise", "low_fall", "low_level", "high_rise", "high_fall", "high_level"}),
    ("train_cyp3a4", [], "CC(=O)Nc1ccc(O)cc1", {"inhibitor", "no inhibitor"}),
    ("train_mnist_add", ["--n", 2], "image.png,image.png", {str(i) for i in range(19)}),
    ("train_mnist_add", ["--n", 2, "--loss", "digits"], "image.png,image.png", {str(i) for i in range(19)})])
def test_a_prediction_names_classes_with_probabilities(script, argv, given, classes, gpt2, tmp_path, monkeypatch, capsys):
    from PIL import Image

    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)).save(tmp_path / "image.png")
    (tmp_path / "clip.wav").write_bytes(wav_bytes(np.arange(9000) % 500))
    monkeypatch.chdir(tmp_path)
    run_main(monkeypatch, script, "--demo", 1, "--model", gpt2, "--steps", 1, "--out", "run", *argv)
    shutil.rmtree("data")  # the checkpoint is enough
    capsys.readouterr()
    run_main(monkeypatch, script, "--eval", "run/best.pt", "--predict", given)
    lines = [line.split("%  ") for line in capsys.readouterr().out.splitlines() if "%  " in line]
    assert {name for _, name in lines} <= classes and len(lines) == min(10, len(classes))
    shares = [float(share) for share, _ in lines]
    assert shares == sorted(shares, reverse=True) and (len(classes) > 10 or sum(shares) == pytest.approx(100, abs=0.1))


def test_a_script_imports_only_what_its_task_needs():
    # torchvision is not asked for: transformers imports it by itself where it is installed.
    foreign = {"train_cifar": ["torchaudio", "rdkit"], "train_mnist_add": ["torchaudio", "rdkit"], "train_speech": ["rdkit"], "train_cyp3a4": ["torchaudio"]}
    processes = [subprocess.Popen([sys.executable, "-c", f"import sys, {script}; print([name for name in {names + ['wandb']} if name in sys.modules])"],
                                  stdout=subprocess.PIPE, text=True, cwd=HERE) for script, names in foreign.items()]
    assert [process.communicate()[0].strip() for process in processes] == ["[]"] * 4


@pytest.mark.parametrize("script", ["train_cifar", "train_speech", "train_cyp3a4", "train_mnist_add"])
def test_help_explains_every_flag(script, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run_main(monkeypatch, script, "--help")
    text = capsys.readouterr().out
    options = [line for line in text.splitlines() if line.startswith("  --")]
    assert stop.value.code == 0 and len(options) > 30 and "(default:" in text


def test_speech_is_shifted_and_nothing_is_added():
    import train_speech

    waves = torch.arange(100.0).expand(50, 100)
    moved = train_speech.shift(waves, 10)
    assert torch.equal(moved.sort(1).values, waves)
    assert set(moved[:, 50].tolist()) <= set(range(40, 61)) and len(set(moved[:, 50].tolist())) > 5
