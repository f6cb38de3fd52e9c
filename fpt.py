"""Frozen Pretrained Transformer (FPT): GPT-2, its attention and MLP frozen, on data that is not language.

    python train_cifar.py --demo 1                      # generated images, no download
    python train_cifar.py                               # pretrained GPT-2, frozen
    python train_cifar.py --pretrained 0                # the same blocks with random weights, frozen
    python train_cifar.py --pretrained 0 --layers 0     # the floor: no block at all
    python train_cifar.py --help                        # every flag

After Lu et al. 2021, "Pretrained Transformers as Universal Computation Engines", arXiv 2103.05247. This is
what the train_*.py share. From top to bottom: GPT-2, the FPT around it, its weights, other transformers, the
training loop, checkpoints, processes and folders, flags.
"""
import argparse
import inspect
import itertools
import json
import math
import os
import shlex
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModel, GPT2Config
from transformers.activations import ACT2FN


# ---- GPT-2 ---------------------------------------------------------------------------------------
class Block(nn.Module):
    """A block of GPT-2 (Radford et al. 2019), its parts named as in GPT-2's checkpoints.

    x [batch, time, width] -> [batch, time, width]
    """

    def __init__(self, config):
        super().__init__()
        width, hidden = config.n_embd, config.n_inner or 4 * config.n_embd
        self.heads = config.n_head
        self.ln_1 = nn.LayerNorm(width, eps=config.layer_norm_epsilon)
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(width, 3 * width), "c_proj": nn.Linear(width, width)})
        self.ln_2 = nn.LayerNorm(width, eps=config.layer_norm_epsilon)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, hidden), "c_proj": nn.Linear(hidden, width)})
        # GPT-2's own "gelu_new" is the tanh GELU, which PyTorch has as one fused kernel.
        name = config.activation_function
        self.activation = nn.GELU("tanh") if name == "gelu_new" else ACT2FN[name]

    def forward(self, x):
        # Causal attention: a token reads from itself and from the tokens before it.
        parts = self.attn.c_attn(self.ln_1(x)).chunk(3, dim=2)
        # Each [batch, heads, time, width / heads].
        query, key, value = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)
        if x.is_cuda:
            read = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        else:  # on a CPU in bf16 the backward pass of the fused kernel makes a step 1.6 times as long
            future = torch.full((x.shape[1], x.shape[1]), -math.inf, dtype=query.dtype).triu(1)
            scores = (query * key.shape[3] ** -0.5) @ key.transpose(2, 3)
            read = (scores + future).softmax(3) @ value
        x = x + self.attn.c_proj(read.transpose(1, 2).flatten(2))
        # MLP: each token is worked on alone.
        return x + self.mlp.c_proj(self.activation(self.mlp.c_fc(self.ln_2(x))))


class GPT2(nn.Module):
    """GPT-2 without its token table, as our tokens are vectors: x [batch, time, width] -> the same shape."""

    def __init__(self, config, layers):
        super().__init__()
        self.width, self.positions = config.n_embd, config.n_positions
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList([Block(config) for _ in range(layers)])
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)

    def forward(self, x, lengths=None):
        # The lengths are for OtherCore: padding is on the right, where no real token of GPT-2 reads.
        x = x + self.wpe.weight[:x.shape[1]]
        for block in self.h:
            x = block(x)
        return self.ln_f(x)


# ---- FPT -----------------------------------------------------------------------------------------
PARTS = ("in", "out", "ln", "pos", "attn", "ff")
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class FPT(nn.Module):
    """Input layer, frozen core, output layer.

    inputs:    numbers in a token; with discrete=True the size of the vocabulary, in which 0 is padding
    outputs:   numbers in a prediction: classes, or 1 for a regression
    time:      tokens in the longest example
    """

    def __init__(self, args, inputs, outputs, time, discrete=False):
        super().__init__()
        self.core = load_core(args)
        width, positions = self.core.width, self.core.positions
        if time > positions:
            sys.exit(f"The longest example has {time} tokens, --model {args.model} has {positions} positions")
        self.pool, self.no_block, self.dtype = args.pool, args.layers == 0, PRECISIONS[args.amp]
        # The numbers of a token vector, or of an id's, start with standard deviation --in_scale, whatever the
        # task and the core. (The input numbers have 1.)
        if discrete:
            self.input = nn.Embedding(inputs, width, padding_idx=0)
            self.input.weight.data[1:] = normal((inputs - 1, width), args.in_scale, args.seed, 1_000_000)
        else:
            self.input = nn.Linear(inputs, width)
            std = args.in_scale * inputs ** -0.5
            self.input.weight.data = normal((width, inputs), std, args.seed, 1_000_000)
            self.input.bias.data.zero_()
        self.output = nn.Linear(width, outputs)
        self.output.weight.data = normal((outputs, width), width ** -0.5, args.seed, 1_000_001)
        self.output.bias.data.zero_()

        # Freeze. A checkpoint leaves the frozen weights out. The fingerprint tells whether a model has them.
        self.fingerprint, frozen = 0.0, 0
        for parameter, part in self.named_parts():
            parameter.requires_grad = args.train == "all" or part in args.train.split(",")
            if parameter.requires_grad:
                continue
            # Absolute values, so that nothing cancels, times a ramp, so that their order counts.
            frozen += 1
            place = torch.linspace(frozen, frozen + 1, parameter.numel(), dtype=torch.float64)
            self.fingerprint += torch.dot(parameter.detach().abs().double().flatten(), place).item()
            if part in ("attn", "ff") and parameter.ndim == 2:
                # Rounded once here, instead of by autocast at every step.
                parameter.data = parameter.data.to(self.dtype)
        self.eval()  # in training too: no dropout anywhere

    def named_parts(self):
        """Yields (parameter, part), part being one of PARTS."""
        for name, module in self.named_modules():
            if name in ("input", "output"):
                part = {"input": "in", "output": "out"}[name]
            elif type(module).__name__.endswith("Norm"):
                part = "ln"
            elif isinstance(module, nn.Embedding):
                part = "pos"
            else:
                part = "attn" if "att" in name else "ff"
            for parameter in module.parameters(recurse=False):
                yield parameter, part

    def forward(self, tokens, lengths=None):
        """tokens:   float [batch, time, inputs], int [batch, time] or int [batch, time, ids]; padding is last
        lengths:  int [batch], how many tokens of each example are real, at least 1; None: all of them
        returns:  float32 [batch, outputs]
        """
        with torch.autocast(tokens.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            x = self.input(tokens)
            if x.ndim == 4:  # several ids a token
                x = x.sum(2)
            # What the blocks add to is float32 in every core: large numbers would lose small ones in bf16.
            x = self.core(x.float(), lengths)
        if self.no_block:  # hardly anything would be nonlinear, and the floor would be easy to beat
            x = F.gelu(x)
        if lengths is None:
            lengths = torch.full((len(x),), x.shape[1], device=x.device)
        if self.pool == "mean":
            real = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
            x = (x * real[:, :, None]).sum(1) / lengths[:, None]
        else:
            x = x[torch.arange(len(x), device=x.device), lengths - 1]
        return self.output(x)


# ---- The weights ---------------------------------------------------------------------------------
# The sizes of the GPT-2 family, so that random weights need no network.
GPT2_SIZES = {"distilgpt2": dict(n_layer=6), "gpt2": dict(),
              "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),
              "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),
              "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600)}
# What else can be a core: text models as a whole, of image and speech models the stack of blocks.
TEXT = ("bert", "llama", "mistral", "qwen2", "gemma3_text")
STACKS = ("vit", "deit", "dinov2", "audio-spectrogram-transformer", "whisper")
SUPPORTED = "gpt2, " + ", ".join(TEXT + STACKS)


def normal(shape, std, seed, stream):
    """Normal random numbers, float32. NumPy's, because torch draws others on another processor.

    stream: which numbers of the seed: that of the parameter in the core, or a large one for the new layers
    """
    generator = np.random.default_rng([seed, stream])
    return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32) * np.float32(std))


def load_core(args):
    """The core that --model, --pretrained, --layers, --init_std and --seed stand for, in float32 on the CPU.

    Random cores follow one rule: every matrix, the position table included, is normal with standard deviation
    --init_std, by default 1/sqrt(width); biases are 0, the norms' weights 1. --layers changes none of them.
    Positions that OtherCore adds are 0.
    """
    try:
        name = args.model.removeprefix("openai-community/")
        known = name in GPT2_SIZES and not args.pretrained and not Path(args.model).is_dir()
        config = GPT2Config(**GPT2_SIZES[name]) if known else AutoConfig.from_pretrained(args.model)
        kind = config.model_type
        if kind not in ("gpt2",) + TEXT + STACKS:
            raise ValueError(f"it is {kind}, a core can be {SUPPORTED}")
        blocks = config.num_hidden_layers
        layers = blocks if args.layers is None else args.layers
        if kind == "gpt2" and (config.scale_attn_by_inverse_layer_idx or not config.scale_attn_weights):
            raise ValueError("its attention is not scaled as GPT-2's is")
        if layers > blocks:
            raise ValueError(f"it has {blocks} blocks, --layers asks for {layers}")
        # Plain attention: the fused one is slow on CPUs.
        how = {"dtype": torch.float32, "attn_implementation": "eager"}
        if args.pretrained:
            model, info = AutoModel.from_pretrained(args.model, output_loading_info=True, **how)
            missing = sorted(name for name in info["missing_keys"] if "pooler" not in name)  # cores have none
            if missing:
                raise ValueError(f"it lacks {len(missing)} of its weights: {', '.join(missing[:3])} ...")
        elif kind != "gpt2":
            model = AutoModel.from_config(config, **how)
    except Exception as error:  # a silent hub, a broken file, a quantised model: any kind of error
        hint = ". --pretrained 0 needs no weights" if args.pretrained else ""
        sys.exit(f"Cannot load --model {args.model}: {one_line(error).rstrip('.')}{hint}")

    core = GPT2(config, layers) if kind == "gpt2" else OtherCore(model, layers)
    if args.pretrained and kind == "gpt2":
        weights = model.state_dict()
        for name, ours in core.state_dict().items():  # GPT-2 keeps the matrices of its blocks transposed
            ours.copy_(weights[name].T if ".c_" in name and ours.ndim == 2 else weights[name])
    if not args.pretrained:
        std = core.width ** -0.5 if args.init_std is None else args.init_std
        parameters = list(core.named_parameters())
        if kind != "gpt2":  # where norms stand among matrices differs between versions of transformers
            parameters.sort(key=lambda pair: pair[1].ndim < 2)
        for i, (name, parameter) in enumerate(parameters):
            if parameter.ndim >= 2:
                parameter.data = normal(parameter.shape, std, args.seed, i)
            elif name.endswith("bias"):
                parameter.data.zero_()
    if kind in STACKS and kind != "whisper":  # new positions, which start at zero: see OtherCore
        core.wpe.weight.data.zero_()
    return core


# ---- Other transformers as the core --------------------------------------------------------------
class OtherCore(nn.Module):
    """A model of the transformers library as the core, called as GPT2 is.

    A text model takes our vectors as inputs_embeds. Of an image or a speech model (of Whisper the encoder) we
    take the blocks and the norm behind them. Whisper's positions are those of a plain sequence and are kept.
    The others get 1,024 new ones that start at zero, as the vision core of Lu et al. does.
    """

    def __init__(self, model, layers):
        super().__init__()
        kind = model.config.model_type
        self.width, self.is_text = model.config.hidden_size, kind in TEXT
        model = model.encoder if kind == "whisper" else model
        blocks = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
        # Whisper's blocks insist on masks, one or two depending on the version of transformers: None will do.
        wanted = inspect.signature(blocks[0].forward).parameters
        self.nothing = dict.fromkeys({"attention_mask", "layer_head_mask"} & set(wanted))
        del blocks[layers:]
        if self.is_text:
            model.config.num_hidden_layers, self.positions = layers, model.config.max_position_embeddings
            model.set_input_embeddings(None)
            model.pooler = None
            self.model = model
        else:
            self.wpe = model.embed_positions if kind == "whisper" else nn.Embedding(1024, self.width)
            self.positions, self.blocks = self.wpe.num_embeddings, blocks
            self.norm = model.layer_norm if kind == "whisper" else model.layernorm

    def forward(self, x, lengths=None):
        if lengths is None:
            return self.forward_unpadded(x)
        # Many of these models cannot mask padding, so the examples of one length go together, without any.
        result = torch.zeros_like(x, dtype=torch.float32)
        for length in lengths.unique().tolist():
            rows = lengths == length
            result[rows, :length] = self.forward_unpadded(x[rows, :length]).float()
        return result

    def forward_unpadded(self, x):
        if self.is_text:
            return self.model(inputs_embeds=x, use_cache=False).last_hidden_state
        x = x + self.wpe.weight[:x.shape[1]]
        for block in self.blocks:
            x = block(x, **self.nothing)
            x = x if torch.is_tensor(x) else x[0]  # a tuple in older versions
        return self.norm(x)


# ---- Pieces of the training loop -----------------------------------------------------------------
# torchrun says which of how many processes this is, and which one on this machine.
RANK, LOCAL_RANK, WORLD = 0, 0, 1
if "RANK" in os.environ and "LOCAL_RANK" in os.environ:
    RANK, LOCAL_RANK, WORLD = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))


def batches(size, batch_size, seed, lengths=None):
    """Yields int64 [batch_size] for ever: the examples of a batch. Each epoch has a new order; an incomplete
    last batch is dropped.

    With lengths [size], examples of like length go together, so that little of a batch is padding: every 50
    shuffled batches are sorted by length and cut, and the batches are shuffled again.
    """
    batch_size = min(batch_size, size)
    for epoch in itertools.count():
        # Seeds are spread out, so that neighbouring ones do not share the orders of other epochs.
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(size, generator=generator)[: size // batch_size * batch_size]
        if lengths is not None:
            parts = order.split(50 * batch_size)
            order = torch.cat([part[lengths[part].argsort(stable=True)] for part in parts])
        order = order.view(-1, batch_size)
        if lengths is not None:
            order = order[torch.randperm(len(order), generator=generator)]
        yield from order


def adamw(args, model):
    """AdamW over what is trained. Matrices decay; norms, biases and positions do not."""
    matrices, others = [], []
    for parameter, part in model.named_parts():
        if parameter.requires_grad and parameter.ndim >= 2 and part != "pos":
            matrices.append(parameter)
        elif parameter.requires_grad:
            others.append(parameter)
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0}]
    return torch.optim.AdamW(groups, lr=args.lr, fused=True)


def learning_rate(args, step):
    """The rate of step 1, 2, ..., --steps: a short linear warm-up, then a cosine towards zero."""
    warmup = min(50, max(1, args.steps // 10))  # AdamW's second moments need some steps to settle
    return args.lr * min(1.0, step / warmup) * 0.5 * (1 + math.cos(math.pi * (step - 1) / args.steps))


@torch.no_grad()
def infer(args, model, batch, split, order):
    """Run the examples `order` of a split through the model: outputs float32 [n, outputs], targets [n]."""
    outputs, targets = [], []
    chunks = order.split(4 * args.batch_size)  # no gradients are kept, so more fits into memory
    for index in tqdm(chunks, f"evaluate {split}", leave=False, disable=RANK > 0):
        tokens, lengths, target = batch(split, index)
        outputs.append(model(tokens, lengths))
        targets.append(target)
    return torch.cat(outputs), torch.cat(targets)


def validation_score(row):
    """What picks the checkpoint: accuracy, and at a tie the loss."""
    return row["validation_accuracy"], -row["validation_loss"]


def print_table(row):
    lines = []
    for name, value in row.items():
        text = f"{value:.4f}" if isinstance(value, float) else f"{value}"
        lines.append(f"| {name.replace('_', ' '):<25} | {text:>13} |")
    rule = "-" * len(lines[0])
    tqdm.write("\n".join([rule, *lines, rule]))


# ---- The training loop ---------------------------------------------------------------------------
def fit(args, model, batch, sizes, dummy, all_lengths=None, loss_fn=F.cross_entropy,
        predict=lambda outputs: outputs.argmax(1), metrics=lambda outputs, targets: {}):
    """Train, keep the checkpoint with the best validation figures, and with it read the test split, once.

    batch(split, index):  index int64 [batch] on the CPU -> tokens, lengths or None (as FPT.forward wants
                          them), targets (as loss_fn wants them: int64 from 0), all on args.device
    sizes:                {"train": examples, "validation": ..., "test": ...}
    dummy:                the target that is likeliest in the training split; dummy_accuracy: always saying it
    all_lengths:          {"train": int [examples] on the CPU, ...} if examples differ in length
    loss_fn, metrics:     of outputs and targets: a scalar tensor, and further figures {name: float}
    predict:              outputs [n, outputs] -> int64 [n], to be compared with the targets
    Returns the last line of <out>/log.jsonl as a dict. With --eval it only evaluates.
    """
    if not all(sizes.values()):
        sys.exit(f"A split has no examples: {sizes}")
    if WORLD > 1 and LOCAL_RANK == 0:
        dist.barrier()  # data and weights are there: lets this machine's other processes out of run()
    model.to(args.device)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    counts = {"trainable_parameters": sum(parameter.numel() for parameter in trained.values()),
              "total_parameters": sum(parameter.numel() for parameter in model.parameters())}
    if not trained:
        sys.exit(f"--train {args.train}: --model {args.model} has no such parameters")
    all_lengths = all_lengths or dict.fromkeys(sizes)

    def evaluate(split):
        order = torch.arange(sizes[split])  # all of them in every process, so that all of these agree
        if all_lengths[split] is not None:  # like lengths together
            order = all_lengths[split].argsort(stable=True)
        outputs, targets = infer(args, model, batch, split, order)
        figures = {"loss": loss_fn(outputs, targets).item(),
                   "accuracy": (predict(outputs) == targets).float().mean().item(),
                   **metrics(outputs, targets),
                   "dummy_accuracy": (targets == dummy).float().mean().item()}
        # A figure that cannot be computed is NaN, which JSON does not know.
        return {f"{split}_{name}": value if math.isfinite(value) else None for name, value in figures.items()}

    def report(path):
        step = load_trained(args, model, path)["step"]
        result = {"step": step, **evaluate("test" if args.test else "validation"), **counts}
        print_table(result)
        return result

    if args.eval:
        return report(args.eval)

    # Begin, or go on from the last checkpoint.
    take_folder(args)
    out = Path(args.out)
    optimizer = adamw(args, model)
    scaler = torch.amp.GradScaler(args.device.split(":")[0], enabled=args.amp == "fp16")  # else does nothing
    done, rows = 0, []
    if args.resume:
        last = load_trained(args, model, out / "last.pt")
        if "result" in last:
            print(f"{out} holds a finished run")
            return last["result"]
        done, rows = last["step"], last["rows"]
        optimizer.load_state_dict(last["optimizer"])
        scaler.load_state_dict(last["scaler"])
        print(f"Going on after step {done}")
    wandb = None
    if args.wandb and RANK == 0:  # a resumed run goes on in the same W&B run, as its id is one of our flags
        import wandb
        wandb.init(project=args.wandb, dir=args.out, config=vars(args), id=args.wandb_id, resume="allow")

    def save_checkpoint(step, better):
        state = {"flags": vars(args), "fingerprint": model.fingerprint, "step": step,
                 "trained": {name: parameter.detach() for name, parameter in trained.items()}}
        if better:
            save(state, out / "best.pt")
        state |= {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "rows": rows}
        save(state, out / "last.pt")

    if RANK == 0:
        save_checkpoint(done, better=False)  # keeps the flags of a run that is stopped before it evaluates
    # Written anew from the checkpoint's rows, because steps after the checkpoint are made again.
    log = open(out / "log.jsonl" if RANK == 0 else os.devnull, "w", buffering=1)
    log.writelines(json.dumps(row) + "\n" for row in rows)
    print(f"{args.task}: {counts['trainable_parameters']:,} of {counts['total_parameters']:,} parameters"
          f" are trained, in {args.amp} on {args.device}.\n"
          f"Results go to {out}/. If this is stopped, go on with\n  {go_on(args)}")
    if args.compile:
        model.compile()
    net = nn.parallel.DistributedDataParallel(model) if WORLD > 1 else model
    indices = batches(sizes["train"], args.batch_size, args.seed, all_lengths["train"])
    indices = itertools.islice(indices, done * args.accumulate, None)
    history, start = [], time.time()  # loss and accuracy of each forward pass since the last evaluation

    steps = range(done + 1, args.steps + 1)
    for step in tqdm(steps, "train", args.steps, initial=done, unit="step", disable=RANK > 0):
        # The rate of this step. What is random depends on the step alone, so a resumed run is the same run.
        torch.manual_seed((args.seed * 1_000_003 + step) * WORLD + RANK)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args, step)

        # Forward and backward. Under torchrun every process takes its share of the batch.
        for _ in range(args.accumulate):
            tokens, lengths, targets = batch("train", next(indices)[RANK::WORLD])
            outputs = net(tokens, lengths)
            loss = loss_fn(outputs, targets)
            scaler.scale(loss / args.accumulate).backward()
            accuracy = (predict(outputs.detach()) == targets).float().mean()
            # Stays on the device: reading it here would make the CPU wait for the GPU at every step.
            history.append(torch.stack([loss.detach(), accuracy]))

        # Update.
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(trained.values(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if step % args.eval_every and step != args.steps:
            continue

        # Evaluate: from here on every --eval_every steps and after the last one.
        figures = torch.stack(history)
        if WORLD > 1:
            dist.all_reduce(figures)
        losses, accuracies = (figures / WORLD).T.tolist()
        end = time.time()
        row = {"step": step, "train_loss": sum(losses) / len(losses), "train_loss_start": losses[0],
               "train_loss_final": losses[-1], "train_accuracy": sum(accuracies) / len(accuracies),
               **evaluate("validation"), "train_seconds": end - start}
        row["evaluation_seconds"] = time.time() - end
        if not math.isfinite(row["train_loss"]) or row["validation_loss"] is None:
            sys.exit(f"The loss is no number any more before step {step}: try a smaller --lr, or --amp fp32. "
                     f"The last good checkpoint is {out}/last.pt")

        # Log.
        better = not rows or validation_score(row) > max(map(validation_score, rows))
        rows.append(row)
        print_table(row)
        log.write(json.dumps(row) + "\n")
        if wandb:
            wandb.log(row, step=step)

        # Save.
        if RANK == 0:
            save_checkpoint(step, better)
        history, start = [], time.time()

    # Test.
    if WORLD > 1:
        dist.barrier()  # best.pt is written
    result = report(out / "best.pt") | vars(args)
    log.write(json.dumps(result) + "\n")
    if RANK == 0:
        save(load_checkpoint(out / "last.pt") | {"result": result}, out / "last.pt")
    if wandb:
        wandb.summary.update(result)
    return result


# ---- Checkpoints ---------------------------------------------------------------------------------
def save(checkpoint, path):
    """Write aside, then rename: killed at any instant, this leaves the old file or the new one, whole."""
    with open(f"{path}.tmp", "wb") as file:  # an OSError where torch.save(path) would raise something else
        torch.save(checkpoint, file)
    os.replace(f"{path}.tmp", path)


def load_checkpoint(path):
    """A dict that fit() saved. weights_only: code that someone pickled into the file is refused, not run."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["trained"], checkpoint["flags"]["task"], checkpoint["fingerprint"]
    except Exception as error:  # no file, a broken one, another kind of file
        sys.exit(f"{path} is missing or no checkpoint of this project ({type(error).__name__})")
    return checkpoint


def load_trained(args, model, path):
    """Put the trained parts of a checkpoint into the model. Returns the checkpoint."""
    checkpoint = load_checkpoint(path)
    shapes = {name: weight.shape for name, weight in model.named_parameters() if weight.requires_grad}
    if (shapes != {name: weight.shape for name, weight in checkpoint["trained"].items()}
            or not math.isclose(checkpoint["fingerprint"], model.fingerprint, rel_tol=1e-8)):
        sys.exit(f"{path} was trained on another frozen core than --model {args.model} --seed {args.seed} is")
    model.load_state_dict(checkpoint["trained"], strict=False)
    return checkpoint


@torch.no_grad()
def print_prediction(args, model, classes, tokens):
    """Print the ten likeliest classes and their probabilities for one example, tokens [1, time, ...]."""
    load_trained(args, model, args.eval)
    probabilities = model.to(args.device)(tokens.to(args.device))[0].softmax(0)
    for i in probabilities.argsort(descending=True).tolist()[:10]:
        print(f"{probabilities[i]:7.2%}  {classes[i]}")


# ---- Processes and folders -----------------------------------------------------------------------
def run(parser, main):
    """Parse the flags and call main(args), in as many processes as torchrun started."""
    args = parse(parser)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    if WORLD > 1:
        if RANK:
            sys.stdout = open(os.devnull, "w")  # one process prints
        backend = "nccl" if args.device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=2))  # a download may take as long
        if LOCAL_RANK:
            dist.barrier()  # until the first process of this machine has downloaded and decoded
    try:
        result = main(args)
    except KeyboardInterrupt:
        begun = not args.eval and args.out and (Path(args.out) / "last.pt").exists()
        print(f"\nStopped. Go on with\n  {go_on(args)}" if begun else "\nStopped.", file=sys.stderr)
        sys.exit(130)
    except OSError as error:  # a folder that may not be written, a server that is gone
        sys.exit(f"{type(error).__name__}: {one_line(error)}")
    if WORLD > 1:
        dist.destroy_process_group()
    return result


def take_folder(args):
    """Make the run's folder: --out, or the first new one of runs/<task>, runs/<task>-2, ..., for a demo
    runs/<task>-demo, ... Sets args.out."""
    first = f"runs/{args.task}-demo" if args.demo else f"runs/{args.task}"
    names = itertools.chain([first], (f"{first}-{i}" for i in itertools.count(2)))
    while RANK == 0 and not args.out:
        Path("runs").mkdir(exist_ok=True)
        name = next(names)
        try:
            Path(name).mkdir()  # of runs that start at once only one can
            args.out = name
        except FileExistsError:
            pass
    if WORLD > 1:
        shared = [args.out]
        dist.broadcast_object_list(shared)
        args.out = shared[0]
    Path(args.out).mkdir(parents=True, exist_ok=True)


def go_on(args):
    """The command that goes on with this run."""
    start = "python" if WORLD == 1 else f"torchrun --nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}"
    return f"{start} train_{args.task}.py --resume 1 --out {shlex.quote(args.out)}"


def one_line(error):
    return " ".join(str(error).split()) or type(error).__name__


# ---- Flags ---------------------------------------------------------------------------------------
# These belong to a machine or to one call, not to a run.
OF_THIS_CALL = {"out", "device", "compile", "resume", "eval", "predict"}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Show every default, and the script's docstring as it was written."""


def number(kind, least, below=math.inf):
    """A type for argparse: an int or a float from `least` on, below `below`."""
    def number_in_range(value):
        if not least <= kind(value) < below:
            raise argparse.ArgumentTypeError(f"{value} is not from {least} to below {below}")
        return kind(value)

    number_in_range.__name__ = kind.__name__  # what argparse calls it when the text is no number at all
    return number_in_range


def flags(task, doc, demo, **defaults):
    """The flags that all scripts share.

    task: the script's name without train_; defaults: the task's own; demo: those of its --demo 1
    """
    # Without the usage, thirty lines, an error is one line.
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=doc, formatter_class=HelpFormatter)
    parser.demo = {"pretrained": 0, "layers": 2} | demo
    switch = {"type": int, "choices": [0, 1]}
    add = parser.add_argument_group("model").add_argument
    add("--model", default="gpt2", help=f"hub name or folder of: {SUPPORTED}")
    add("--pretrained", **switch, default=1, help="1: its weights; 0: random ones in the same blocks")
    add("--layers", type=number(int, 0), help="use the first blocks only; 0: no block, the floor; None: all")
    add("--init_std", type=number(float, 0), help="std of random weights; None: 1/sqrt(width); GPT-2: 0.02")
    add("--in_scale", type=number(float, 0), default=0.1, help="std of a token vector's numbers at the start")
    add("--train", default="in,out,ln,pos", help=f"what to train: all, or some of {','.join(PARTS)}")
    add("--pool", choices=["mean", "last"], default="mean", help="what the output layer reads of the tokens")
    add = parser.add_argument_group("optimisation").add_argument
    add("--steps", type=number(int, 1), default=1000, help="gradient steps")
    add("--batch_size", type=number(int, 1), default=32, help="examples a forward pass, over all processes")
    add("--accumulate", type=number(int, 1), default=1, help="forward passes a gradient step")
    add("--lr", type=number(float, 0), default=3e-3, help="AdamW's peak learning rate")
    add("--weight_decay", type=number(float, 0), default=0.01, help="AdamW's, on matrices")
    add("--amp", choices=["auto", *PRECISIONS], default="auto", help="precision of the matrix products")
    add("--compile", **switch, default=0, help="1: torch.compile the model")
    add("--device", default="auto", help="cuda, cuda:1, cpu; auto: cuda if there is one")
    add("--seed", type=number(int, 0, 2**31), default=0, help="of weights, order and augmentation")
    add = parser.add_argument_group("evaluation and files").add_argument
    add("--eval_every", type=number(int, 1), default=250, help="gradient steps between evaluations")
    add("--test", **switch, default=1, help="0: leave the test split closed")
    add("--data", default="data", help="folder of the data sets")
    add("--out", help="folder of the run; None: the next free runs/<task>")
    add("--resume", **switch, default=0, help="1: go on with the run in --out")
    add("--eval", metavar="PATH", help="only evaluate this checkpoint, with its flags but amp, data, test")
    add("--predict", metavar="INPUT", help="with --eval: what it says about this input")
    add("--wandb", metavar="PROJECT", help="also log to Weights & Biases")
    add("--demo", **switch, default=0, help="1: a smoke test: generated data, two random blocks")
    parser.set_defaults(task=task, wandb_id=os.urandom(4).hex(), **defaults)
    return parser


def parse(parser):
    """Parse the command line on top of the flags of the checkpoint, if there is one. Returns a Namespace."""
    argv = [] if sys.argv[0].endswith("_launcher.py") else sys.argv[1:]  # a notebook's own are the kernel's
    args = parser.parse_args(argv)
    if args.predict and (not args.eval or WORLD > 1):
        parser.error("--predict needs the checkpoint that shall predict, --eval PATH, and a single process")
    if "" in (args.out, args.eval, args.predict):
        parser.error("--out, --eval and --predict cannot be empty: is a variable of the shell not set?")
    if args.resume and args.eval:
        parser.error("--eval only evaluates, --resume 1 goes on training: choose one")
    if args.resume and not args.out:
        parser.error("--resume 1 needs the folder of the run: --out")

    # A checkpoint brings the flags of its run.
    last = Path(args.out or "") / "last.pt"
    path = args.eval or last
    saved = load_checkpoint(path)["flags"] if args.eval or args.resume else {}
    if saved and saved["task"] != args.task:
        sys.exit(f"{path} belongs to the task {saved['task']}, not to {args.task}")
    if args.out and last.with_name("best.pt").exists() and not (args.resume or args.eval):
        sys.exit(f"--out {args.out} holds a run: choose another folder, or go on with it by --resume 1")
    ignored = OF_THIS_CALL | ({"amp", "data", "test"} if args.eval else set())
    saved = {name: value for name, value in saved.items() if name not in ignored}
    preset = (parser.demo if args.demo else {}) | saved
    args = parser.parse_args(argv, argparse.Namespace(**preset))
    # Folders may move, as the weights in them are compared. An evaluation may have less memory.
    may_change = {"model", "data", "wandb"} | ({"batch_size"} if args.eval else set())
    changed = [f"--{name} {getattr(args, name)} (was {value})" for name, value in saved.items()
               if getattr(args, name) != value and name not in may_change]
    if changed:
        sys.exit(f"{path} is of a run with other flags, leave out {', '.join(changed)}")

    # What depends on the machine.
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device.startswith("cuda") and WORLD > 1:
        args.device = f"cuda:{LOCAL_RANK}"
    if args.device.split(":")[0] not in ("cpu", "cuda"):
        parser.error(f"--device {args.device}: cpu or cuda")
    try:
        torch.zeros(1, device=args.device).item()
    except (RuntimeError, AssertionError) as error:
        sys.exit(f"--device {args.device} cannot be used, --device cpu always can ({one_line(error)})")
    if args.device.startswith("cuda:"):
        torch.cuda.set_device(args.device)
    if args.amp == "auto" and args.device.startswith("cuda"):
        # A T4 says it supports bf16 because it emulates it, many times slower than its fp16.
        args.amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif args.amp == "auto":
        cpu = getattr(torch.cpu, "get_capabilities", dict)()  # new in torch 2.11
        args.amp = "bf16" if cpu.get("avx512_bf16") or cpu.get("amx_bf16") else "fp32"

    # Flags that have no effect or cannot be met.
    trained = set(args.train.split(","))
    if args.train != "all" and not trained <= set(PARTS):
        parser.error(f"--train {args.train}: all, or some of {','.join(PARTS)}")
    if args.layers == 0 and trained & {"attn", "ff"}:
        parser.error(f"--train {args.train} names parts of the blocks, --layers 0 leaves none")
    if args.init_std is not None and args.pretrained:
        parser.error("--init_std is the scale of random weights: --pretrained 0")
    if args.batch_size % WORLD:
        parser.error(f"--batch_size {args.batch_size} must be a multiple of {WORLD}, the processes")
    if args.demo:
        print("DEMO: the data is generated on this machine; the result says nothing about the real task.")
    return args
