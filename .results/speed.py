"""Seconds a gradient step: what one writes first, the loop of fpt.py, and what the libraries offer.

    python .results/speed.py                            # from the top folder
    python .results/speed.py --other ../before          # also another checkout of this repository
    python .results/speed.py --batch_size 256 --model gpt2-medium --compile 1

Every side trains what FPT trains of the same random GPT-2, on the same batch of token vectors. The
sides take turns, each in a process of its own, so that its peak memory is its own too.

stock      transformers' GPT2Model as it comes (fp32, eager attention, dropout), Adam, loss.item()
this       the model and the steps of fpt.fit(); other: those of the other checkout
trainer    transformers' Trainer with PEFT's LNTuningConfig, in the precision of --amp (where peft
           is installed)
"""
import contextlib
import importlib.util
import inspect
import multiprocessing
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

HERE = str(Path(__file__).resolve().parent.parent)
SIZES = {"distilgpt2": (6, 12), "gpt2": (12, 12), "gpt2-medium": (24, 16), "gpt2-large": (36, 20)}

class Stock(nn.Module):
    def __init__(self, name):
        super().__init__()
        from transformers import GPT2Config, GPT2Model
        layers, heads = SIZES[name]
        config = GPT2Config(n_layer=layers, n_head=heads, n_embd=64 * heads)
        config._attn_implementation = "eager"
        self.core = GPT2Model(config)
        self.input, self.output = nn.Linear(48, config.n_embd), nn.Linear(config.n_embd, 10)
        for name, parameter in self.core.named_parameters():
            parameter.requires_grad = "ln" in name or "wpe" in name

    def forward(self, tokens, labels=None):
        x = self.core(inputs_embeds=self.input(tokens)).last_hidden_state[:, -1]
        logits = self.output(x)
        return logits if labels is None else {"loss": F.cross_entropy(logits, labels)}

def stock(args, tokens, targets, finished_step):
    model = Stock(args.model).to(args.device)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    while True:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(tokens), targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss.item()
        finished_step()

def trainer(args, tokens, targets, finished_step):
    from peft import LNTuningConfig, get_peft_model
    from transformers import Trainer, TrainerCallback, TrainingArguments
    model = Stock(args.model)
    modules = [name for name, module in model.named_modules()
               if isinstance(module, nn.LayerNorm)]
    model = get_peft_model(model, LNTuningConfig(
        target_modules=modules, modules_to_save=["input", "output", "wpe"]))

    class Turns(TrainerCallback):
        def on_step_end(self, *_, **__):
            finished_step()

    examples = [{"tokens": x, "labels": y} for x, y in zip(tokens.cpu(), targets.cpu())] * 10_000
    settings = TrainingArguments(
        "runs/speed", per_device_train_batch_size=len(tokens), bf16=args.amp == "bf16",
        fp16=args.amp == "fp16", use_cpu=args.device == "cpu", max_steps=10_000, report_to=[],
        save_strategy="no", logging_strategy="no", disable_tqdm=True, remove_unused_columns=False)
    Trainer(model, settings, train_dataset=examples, callbacks=[Turns()]).train()

def this(args, tokens, targets, finished_step):
    import fpt
    model = fpt.FPT(args, 48, 10, tokens.shape[1]).to(args.device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = fpt.adamw(args, model)
    scaler = torch.amp.GradScaler(args.device.split(":")[0], enabled=args.amp == "fp16")
    if args.compile:
        model.compile()
    autocast = getattr(model, "autocast", contextlib.nullcontext())  # older checkouts: in forward
    while True:
        with autocast:
            loss = F.cross_entropy(model(tokens), targets)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(trained, 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        finished_step()

def side(name, argv, pipe):
    """A process: as many steps as each number received says, then the seconds of one; None: MiB."""
    folder = argv.other if name == "other" else HERE
    sys.path.insert(0, folder)
    import fpt
    args = parse(fpt)
    cuda = args.device.startswith("cuda")
    rng = torch.Generator().manual_seed(0)
    tokens = torch.randn(args.batch_size, args.tokens, 48, generator=rng).to(args.device)
    targets = torch.arange(args.batch_size, device=args.device) % 10
    turn = {"left": pipe.recv(), "count": 0, "start": time.time()}

    def finished_step():
        turn["count"] += 1
        if turn["count"] < turn["left"]:
            return
        if cuda:
            torch.cuda.synchronize()
        pipe.send((time.time() - turn["start"]) / turn["count"])
        if (steps := pipe.recv()) is None:
            kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            pipe.send(torch.cuda.max_memory_allocated() / 2**20 if cuda else kilobytes / 2**10)
            sys.exit()
        turn.update(left=steps, count=0, start=time.time())

    {"stock": stock, "trainer": trainer}.get(name, this)(args, tokens, targets, finished_step)

def parse(fpt):
    """fpt's flags and ours; older checkouts want flags(..., demo)."""
    demo = {"demo": {}} if "demo" in inspect.signature(fpt.flags).parameters else {}
    parser = fpt.flags("speed", __doc__, **demo, batch_size=16, pretrained=0, pool="mean")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of an example")
    parser.add_argument("--rounds", type=int, default=8, help="turns of each side")
    parser.add_argument("--turn", type=int, default=0, help="steps of a turn; 0: GPU 50, CPU 1")
    parser.add_argument("--other", help="folder of another checkout")
    return fpt.parse(parser)

def matmul_rate(args, precision):
    """TFLOP/s of a large matrix product: the most that could be had."""
    size = 8192 if args.device.startswith("cuda") else 2048
    a = torch.randn(size, size, device=args.device, dtype=precision)
    for count in 5, 20:  # the first turn warms up
        start = time.time()
        for _ in range(count):
            b = a @ a
        b[0, 0].item()
    return 2 * size ** 3 * count / (time.time() - start) / 1e12

def main():
    sys.path.insert(0, HERE)
    import fpt
    args = parse(fpt)
    names = ["stock", "this"] + ["other"] * bool(args.other)
    names += ["trainer"] * bool(importlib.util.find_spec("peft"))
    context = multiprocessing.get_context("spawn")
    pipes, seconds = {}, {name: [] for name in names}
    for name in names:
        pipes[name], child = context.Pipe()
        context.Process(target=side, args=(name, args, child), daemon=True).start()
        child.close()
    steps = args.turn or (50 if args.device.startswith("cuda") else 1)
    for _ in range(args.rounds + 1):
        for name in names:
            pipes[name].send(steps)
            seconds[name].append(pipes[name].recv())

    # Every frozen matrix is used twice, forward and backward: 2 FLOP per entry and token each.
    layers, heads = SIZES[args.model]
    work = 4 * layers * 12 * (64 * heads) ** 2 * args.batch_size * args.tokens / 1e12
    rate = matmul_rate(args, fpt.PRECISIONS[args.amp])
    print(f"{args.batch_size} examples of {args.tokens} tokens, {args.model}, {args.amp} on "
          f"{args.device}, --compile {args.compile}; a large matrix product: {rate:.2f} TFLOP/s")
    print("| side | s a step | examples/s | TFLOP/s | peak MiB | stock / side | side / this |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name in names:
        times = seconds[name][1:]  # the first turn warms up
        pipes[name].send(None)
        step, memory = statistics.median(times), pipes[name].recv()
        to_stock = statistics.median(s / t for s, t in zip(seconds["stock"][1:], times))
        to_this = statistics.median(t / s for s, t in zip(seconds["this"][1:], times))
        print(f"| {name} | {step:.4f} | {args.batch_size / step:,.1f} | {work / step:.2f} | "
              f"{memory:,.0f} | {to_stock:.2f} | {to_this:.2f} |")

if __name__ == "__main__":
    main()
