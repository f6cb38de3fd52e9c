"""Seconds of a gradient step: a stock GPT-2 loop and the loop of fpt.py, in turn, on the same batch.

    python .results/speed.py                        # from the top folder
    python .results/speed.py --amp fp32 --tokens 256

Stock is what one writes first: transformers' GPT2Model as it comes (fp32, eager attention, dropout) between
two linear layers, Adam, loss.item() in every step. Neither side loads data. Each side is a process of its
own, so that its peak memory is its own too.
"""
import multiprocessing
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import fpt


class Stock(nn.Module):
    def __init__(self, name):
        super().__init__()
        from transformers import GPT2Config, GPT2Model

        config = GPT2Config(**fpt.GPT2_SIZES[name])
        config._attn_implementation = "eager"
        self.core = GPT2Model(config)
        self.input, self.output = nn.Linear(48, config.n_embd), nn.Linear(config.n_embd, 10)
        for name, parameter in self.core.named_parameters():
            parameter.requires_grad = "ln" in name or "wpe" in name

    def forward(self, tokens):
        return self.output(self.core(inputs_embeds=self.input(tokens)).last_hidden_state[:, -1])


def stock_loop(args, tokens, targets):
    """Yields after every gradient step."""
    model = Stock(args.model).to(args.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    while True:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(tokens), targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss.item()
        yield


def our_loop(args, tokens, targets):
    """The same with the pieces of fpt.fit()."""
    model = fpt.FPT(args, 48, 10, tokens.shape[1]).to(args.device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = fpt.adamw(args, model)
    scaler = torch.amp.GradScaler(args.device.split(":")[0], enabled=args.amp == "fp16")
    if args.compile:
        model.compile()
    while True:
        outputs = model(tokens)
        scaler.scale(F.cross_entropy(outputs, targets)).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(trained, 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        yield


def matmul_rate(args):
    """TFLOP/s of a large matrix product in the precision of --amp: the most that could be had."""
    size = 8192 if args.device.startswith("cuda") else 2048
    a = torch.randn(size, size, device=args.device, dtype=fpt.PRECISIONS[args.amp])
    for count in 5, 20:  # the first turn warms up
        start = time.time()
        for _ in range(count):
            b = a @ a
        b[0, 0].item()
    return 2 * size ** 3 * count / (time.time() - start) / 1e12


def side(loop, args, pipe):
    """Make as many steps as each number received says and send the seconds a step; None: send the memory."""
    cuda = args.device.startswith("cuda")
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(args.batch_size, args.tokens, 48, generator=generator).to(args.device)
    targets = torch.arange(args.batch_size, device=args.device) % 10
    steps = loop(args, tokens, targets)
    for count in iter(pipe.recv, None):
        start = time.time()
        for _ in range(count):
            next(steps)
        if cuda:
            torch.cuda.synchronize()
        pipe.send((time.time() - start) / count)
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pipe.send(torch.cuda.max_memory_allocated() / 2**20 if cuda else kilobytes / 2**10)


def main():
    parser = fpt.flags("speed", __doc__, demo={}, batch_size=16, pretrained=0)
    parser.add_argument("--tokens", type=int, default=64, help="tokens a sequence, of 48 numbers each")
    parser.add_argument("--rounds", type=int, default=8, help="how often both take their turn")
    parser.add_argument("--turn", type=int, default=0, help="steps of a turn; 0: 50 on a GPU, 1 on a CPU")
    args = fpt.parse(parser)
    context = multiprocessing.get_context("spawn")
    pipes, seconds = {}, {"stock": [], "ours": []}
    for name, loop in ("stock", stock_loop), ("ours", our_loop):
        pipes[name], child = context.Pipe()
        context.Process(target=side, args=(loop, args, child), daemon=True).start()
        child.close()  # so that a side that dies ends this process too
    for _ in range(args.rounds + 1):
        for name, pipe in pipes.items():
            try:
                pipe.send(args.turn or (50 if args.device.startswith("cuda") else 1))
                seconds[name].append(pipe.recv())
            except (EOFError, OSError):
                sys.exit(f"The process of the side {name} has died, what it said stands above")

    # Frozen matrices are met twice, forward and backward: 2 FLOP an entry and a token each time.
    width, layers = (fpt.GPT2_SIZES[args.model].get(*pair) for pair in (("n_embd", 768), ("n_layer", 12)))
    work = 2 * 2 * layers * 12 * width ** 2 * args.batch_size * args.tokens / 1e12
    print(f"{args.batch_size} sequences of {args.tokens} tokens, {args.model}, {args.amp} on {args.device}, "
          f"--compile {args.compile}; a large matrix product: {matmul_rate(args):.1f} TFLOP/s")
    print("| loop | s a step | samples/s | TFLOP/s | peak MiB | stock / this |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, times in seconds.items():
        times, stock = times[1:], seconds["stock"][1:]  # the first round warms up
        step, ratio = statistics.median(times), statistics.median(s / t for s, t in zip(stock, times))
        pipes[name].send(None)
        memory = pipes[name].recv()
        print(f"| {name} | {step:.4f} | {args.batch_size / step:,.1f} | {work / step:.2f} | {memory:,.0f} |"
              f" {ratio:.2f} |")


if __name__ == "__main__":
    main()
