"""Frozen Pretrained Transformer (FPT): GPT-2, attention and MLP frozen, on data that is not text.

    python train_cifar.py --demo 1                      # generated images, no download
    python train_cifar.py                               # pretrained GPT-2, frozen
    python train_cifar.py --pretrained 0                # random weights in the same blocks, frozen
    python train_cifar.py --pretrained 0 --layers 0     # the baseline without blocks
    torchrun --nproc_per_node=8 -- train_cifar.py --batch_size 256

After Lu et al. 2021, arXiv 2103.05247. Shared by the train_*.py: the model (GPT-2, other models,
their weights, FPT), then the training loop, evaluation and checkpoints, processes and flags."""
import argparse
import fcntl
import inspect
import itertools
import json
import math
import os
import re
import sys
import time
import zlib
from datetime import timedelta

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModel, GPT2Config, __version__
from transformers.activations import ACT2FN

import data

# torchrun tells each process its number, and how many there are.
RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1

# ---- GPT-2 ---------------------------------------------------------------------------------------
class Block(nn.Module):
    """A block of GPT-2 (Radford et al. 2019), its parts named as in GPT-2's checkpoints."""
    def __init__(self, config):
        super().__init__()
        d, eps = config.n_embd, config.layer_norm_epsilon
        hidden = config.n_inner or 4 * d
        self.heads = config.n_head
        self.ln_1 = nn.LayerNorm(d, eps)
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(d, 3 * d), "c_proj": nn.Linear(d, d)})
        self.ln_2 = nn.LayerNorm(d, eps)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(d, hidden), "c_proj": nn.Linear(hidden, d)})
        # GPT-2's "gelu_new" is the tanh GELU, for which PyTorch has one fast kernel.
        self.act = ACT2FN[config.activation_function.replace("gelu_new", "gelu_pytorch_tanh")]

    def forward(self, x):  # [batch, time, width] -> the same
        # Causal attention: a token reads itself and the tokens before it.
        qkv = self.attn.c_attn(self.ln_1(x)).unflatten(2, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [batch, heads, time, width / heads]
        if x.is_cuda:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:  # in bf16 on a CPU, that kernel is three to four times slower than these lines
            future = torch.full((x.shape[1], x.shape[1]), -math.inf, dtype=q.dtype).triu(1)
            y = ((q * k.shape[3] ** -0.5) @ k.transpose(2, 3) + future).softmax(3) @ v
        x = x + self.attn.c_proj(y.transpose(1, 2).flatten(2))
        # MLP: applied to each token on its own.
        return x + self.mlp.c_proj(self.act(self.mlp.c_fc(self.ln_2(x))))

class GPT2(nn.Module):
    """GPT-2 without its token embedding, which the input layer replaces."""
    def __init__(self, config, layers):
        super().__init__()
        self.width, self.positions, self.causal = config.n_embd, config.n_positions, True
        self.wpe = nn.Embedding(self.positions, self.width)
        self.h = nn.ModuleList([Block(config) for _ in range(layers)])
        self.ln_f = nn.LayerNorm(self.width, config.layer_norm_epsilon)

    def forward(self, x, lengths=None):  # padding is on the right: causal attention never reads it
        x = x + self.wpe.weight[:x.shape[1]]
        for block in self.h:
            x = block(x)
        return self.ln_f(x)

# ---- Other transformers --------------------------------------------------------------------------
CAUSAL = ("llama", "mistral", "qwen2", "gemma3_text")
TEXT = ("bert", *CAUSAL)
STACKS = ("vit", "deit", "dinov2", "audio-spectrogram-transformer", "whisper")
MODEL_TYPES = ("gpt2", *TEXT, *STACKS)

class Adapter(nn.Module):
    """A model of the transformers library, called as GPT2 is.

    A text model takes our vectors as inputs_embeds. From others we take blocks and final norm. New
    positions, zero at first, replace an image model's; without blocks, also rotary ones."""
    def __init__(self, model, layers):
        super().__init__()
        config, whisper = model.config, model.config.model_type == "whisper"
        self.width, self.causal = config.hidden_size, config.model_type in CAUSAL
        self.is_text = config.model_type in TEXT and (layers > 0 or not self.causal)
        model = model.encoder if whisper else model
        blocks = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
        # Whisper's blocks require masks, one or two depending on transformers' version.
        accepted = set(inspect.signature(blocks[0].forward).parameters)
        self.no_masks = dict.fromkeys({"attention_mask", "layer_head_mask"} & accepted)
        del blocks[layers:]
        if self.is_text:
            config.num_hidden_layers, self.positions = layers, config.max_position_embeddings
            model.set_input_embeddings(None)
            model.pooler = None
            self.model = model
        else:
            self.wpe = model.embed_positions if whisper else nn.Embedding(1024, self.width)
            self.positions, self.blocks = self.wpe.num_embeddings, blocks
            self.norm = next(m for m in model.children() if type(m).__name__.endswith("Norm"))

    def forward(self, x, lengths=None):
        if lengths is not None and not self.causal:
            # Not all of these models can mask padding: run examples of equal length together.
            y = torch.zeros_like(x, dtype=torch.float32)
            for length in lengths.unique().tolist():
                rows = lengths == length
                y[rows, :length] = self(x[rows, :length]).float()
            return y
        if self.is_text:
            return self.model(inputs_embeds=x, use_cache=False).last_hidden_state
        x = x + self.wpe.weight[:x.shape[1]]
        for block in self.blocks:
            x = block(x, **self.no_masks)
            x = x if torch.is_tensor(x) else x[0]  # a tuple in older versions
        return self.norm(x)

# ---- Their weights -------------------------------------------------------------------------------
# Blocks and heads of the GPT-2 family, so that random weights need no network. A head is 64 wide.
GPT2_SIZES = {"distilgpt2": (6, 12), "gpt2": (12, 12), "gpt2-medium": (24, 16),
              "gpt2-large": (36, 20), "gpt2-xl": (48, 25)}

def normal(shape, std, seed, stream):
    """Normal random numbers, one stream per weight. A checkpoint leaves the frozen weights out, so
    every device must draw the same ones: NumPy does, torch does not."""
    numbers = np.random.default_rng([seed, stream]).standard_normal(shape, dtype=np.float32)
    return torch.from_numpy(numbers * np.float32(std))

@torch.no_grad()
def load_core(args):
    """The transformer that --model, --pretrained and --layers name, float32, on the CPU. If random,
    its matrices are normal with standard deviation --init_std, and its biases 0."""
    try:
        config, model = load_model(args)
        kind, blocks = config.model_type, config.num_hidden_layers
        layers = blocks if args.layers is None else args.layers
        assert layers <= blocks, f"it has {blocks} blocks, not {layers}"
    except Exception as error:  # offline, a broken file, a quantised model: errors of any type
        sys.exit(f"Cannot load --model {args.model}: {' '.join(str(error).split())}")
    core = GPT2(config, layers) if kind == "gpt2" else Adapter(model, layers)
    if args.pretrained and kind == "gpt2":
        weights = model.state_dict()
        for name, p in core.named_parameters():  # GPT-2 keeps its blocks' matrices transposed
            p.copy_(weights[name].T if ".c_" in name and p.ndim == 2 else weights[name])
    if not args.pretrained:
        std = core.width ** -0.5 if args.init_std is None else args.init_std
        for i, matrix in enumerate(p for p in core.parameters() if p.ndim >= 2):
            if kind != "whisper" or matrix is not core.wpe.weight:  # sines, which are not learned
                matrix.copy_(normal(matrix.shape, std, args.seed, i))
        for name, p in core.named_parameters():
            if name.endswith("bias"):
                p.zero_()
    if hasattr(core, "wpe") and kind not in ("gpt2", "whisper"):
        core.wpe.weight.zero_()  # the new positions
    return core.eval()

def load_model(args):
    """Returns --model's config and, where needed, the model. Asserts that they are usable."""
    name, options = args.model.removeprefix("openai-community/"), dict(trust_remote_code=False)
    if name in GPT2_SIZES and not args.pretrained and not os.path.isdir(args.model):
        blocks, heads = GPT2_SIZES[name]
        return GPT2Config(n_layer=blocks, n_head=heads, n_embd=64 * heads), None
    assert not os.path.exists(f"{args.model}/adapter_config.json"), "merge its PEFT adapter into it"
    config = AutoConfig.from_pretrained(args.model, **options)
    kind = config.model_type
    assert kind in MODEL_TYPES, f"it is {kind}, not one of {', '.join(MODEL_TYPES)}"
    assert kind != "gpt2" or (config.scale_attn_weights and getattr(config, "is_causal", True) and
                              not config.scale_attn_by_inverse_layer_idx), "not GPT-2's attention"
    # Transformers 4 silently misreads configs of transformers 5, rotary positions for example.
    saved_by, ours = (config.transformers_version or "0").split("."), __version__.split(".")
    assert int(saved_by[0]) <= int(ours[0]), f"it is too new for transformers {__version__}"
    options |= dict(dtype=torch.float32, attn_implementation="eager")  # fused is slow on a CPU
    if not args.pretrained:
        return config, AutoModel.from_config(config, **options)
    model, info = AutoModel.from_pretrained(args.model, output_loading_info=True, **options)
    # We need no pooler and no decoder. Unused weights may belong to a head, or be old buffers.
    missing = [key for key in info["missing_keys"] if not re.search("pooler|decoder", key)]
    unused = [key for key in info["unexpected_keys"] if re.search(r"\b(h|layers?)\.\d", key)
              and not re.search(r"decoder|\.attn\.bias|masked_bias|inv_freq", key)]
    assert not missing, f"it lacks {len(missing)} weights, such as {missing[:1]}"
    assert not unused, f"{len(unused)} of its weights have no use here, such as {unused[:1]}"
    assert all(p.isfinite().all() for p in model.parameters()), "not all its weights are finite"
    return config, model

# ---- FPT -----------------------------------------------------------------------------------------
PARTS = ("in", "out", "ln", "pos", "attn", "ff")
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

class FPT(nn.Module):
    """Input layer, frozen transformer (the core), output layer.

    inputs:    features of a token; if discrete, the size of the vocabulary, in which 0 is padding
    outputs:   number of classes, or 1 for a regression
    time:      tokens in the longest example"""
    def __init__(self, args, inputs, outputs, time, discrete=False):
        super().__init__()
        self.core = load_core(args)
        width, positions = self.core.width, self.core.positions
        if time > positions:
            sys.exit(f"{time} tokens, but --model {args.model} has only {positions} positions")
        # A checkpoint leaves the frozen weights out. This identifies the core it was trained with.
        with torch.no_grad():
            y = self.core(normal((1, min(60, positions), width), 0.1, 0, 0))
        self.fingerprint = y[0, [0, -1], :16].flatten().tolist()
        # With a causal core the output layer reads the last token, as in the paper, because it has
        # seen all others; with a bidirectional core, or without blocks, the mean of all tokens.
        self.no_blocks = args.layers == 0
        rule = "last" if self.core.causal and not self.no_blocks else "mean"
        self.pool = rule if args.pool == "auto" else args.pool
        # Token vectors start with standard deviation about 0.1; that of id 0, padding, stays zero.
        self.input = nn.Embedding(inputs, width, 0) if discrete else nn.Linear(inputs, width)
        self.output = nn.Linear(width, outputs)
        std = 0.1 if discrete else 0.1 * inputs ** -0.5
        self.input.weight.data = normal(self.input.weight.shape, std, args.seed, 10**6)
        self.output.weight.data = normal((outputs, width), width ** -0.5, args.seed, 10**6 + 1)
        (self.input.weight.data[0] if discrete else self.input.bias.data).zero_()
        self.output.bias.data.zero_()
        # Freeze. Matrix products run in the precision of --amp; the residual stream is float32.
        self.autocast = torch.autocast(args.device.split(":")[0], PRECISIONS[args.amp],
                                       enabled=args.amp != "fp32")
        for p, part in self.named_parts():
            p.requires_grad = args.train == "all" or part in args.train.split(",")
            if not p.requires_grad and part in ("attn", "ff") and p.ndim == 2:
                p.data = p.data.to(PRECISIONS[args.amp])  # once, not by autocast at every step
        self.to(args.device).eval()  # also for training: no dropout anywhere

    def named_parts(self):  # yields (parameter, one of PARTS); the last line that applies counts
        for name, module in self.named_modules():
            part = "attn" if "att" in name else "ff"
            part = "pos" if isinstance(module, nn.Embedding) else part
            part = "ln" if type(module).__name__.endswith("Norm") else part
            part = {self.input: "in", self.output: "out"}.get(module, part)
            for p in module.parameters(recurse=False):
                yield p, part

    def forward(self, tokens, lengths=None):
        """tokens float [batch, time, inputs], int [batch, time] or int [batch, time, ids], of which
        the first lengths [batch] are not padding (None: all) -> float32 [batch, outputs]"""
        x = self.input(tokens)
        if x.ndim == 4:  # several ids per token
            x = x.sum(2)
        # Float32 between the blocks: in bf16, large numbers would swallow small ones.
        x = self.core(x.float(), lengths)
        if self.no_blocks:  # without it, the baseline is almost linear, and easy to beat
            x = F.gelu(x)
        if lengths is None:
            lengths = torch.full((len(x),), x.shape[1], device=x.device)
        last, position = lengths[:, None] - 1, torch.arange(x.shape[1], device=x.device)
        read = (position == last) if self.pool == "last" else (position <= last)  # [batch, time]
        x = (x * read[:, :, None]).sum(1) / read.sum(1, keepdim=True)  # [batch, width]
        with torch.autocast(x.device.type, enabled=False):
            return self.output(x.float())

# ---- The training loop ---------------------------------------------------------------------------
def accuracy(outputs, targets):
    """What fit() reports: the accuracy, and that of always predicting the majority class."""
    majority = targets.unique(return_counts=True)[1].max()
    return {"accuracy": (outputs.argmax(1) == targets).float().mean(),
            "majority_accuracy": majority / len(targets)}

def fit(args, model, batch, labels, train_lengths=None, loss_fn=F.cross_entropy, metrics=accuracy):
    """Train, test the checkpoint with the lowest validation loss, return the log's last line.

    batch(split, index int64 [n] on the CPU) -> tokens, lengths or None (see FPT.forward) and
        targets int64 [n], all on args.device
    labels: {"train": int64 [examples] on the CPU, "validation": ..., "test": ...}, only to count
        the examples and to recognise the data; training uses batch's targets
    train_lengths: int64 [examples] on the CPU: tokens in the training examples, if they differ
    loss_fn(outputs, targets) -> mean loss, metrics(outputs, targets) -> {"accuracy": scalar}"""
    checks = {split: [len(y), zlib.crc32(y.numpy().tobytes())] for split, y in labels.items()}
    if args.eval:
        return test(args, model, batch, checks, loss_fn, metrics, args.eval)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    batch_size = min(args.batch_size, len(labels["train"]) // WORLD * WORLD)  # equal shares
    if not trained or batch_size == 0:
        sys.exit(f"--train {args.train} trains nothing, or there is too little data")

    # Optimizer, order of the data.
    optimizer = adamw(args, model)
    scaler = torch.amp.GradScaler(args.device.split(":")[0], enabled=args.amp == "fp16")
    indices = data.batches(len(labels["train"]), batch_size, args.seed, train_lengths)
    net = torch.compile(model) if args.compile else model  # evaluation uses model, not compiled
    net = nn.parallel.DistributedDataParallel(net) if WORLD > 1 else net

    # Run folder. Process 0 alone evaluates, logs and saves.
    flags = {name: value for name, value in vars(args).items()
             if name not in ("out", "device", "resume", "eval", "predict")}  # not kept
    last = {"step": 0, "best_loss": math.inf, "log_size": 0}
    if args.resume:
        last = load_checkpoint(f"{args.out}/last.pt", model, checks)
        optimizer.load_state_dict(last["optimizer"])
        scaler.load_state_dict(last["scaler"])
        indices = itertools.islice(indices, last["step"] * args.accumulate, None)
    log, wandb = (open_log(args, last["log_size"]) if RANK == 0 else None), None
    if RANK == 0 and args.wandb:  # the id is a flag, so a resumed run has the same
        import wandb
        wandb.init(project=args.wandb, id=args.wandb_id, resume="allow", config=flags, dir=args.out)

    # Train.
    best_loss, history, start = last["best_loss"], [], time.time()
    steps = range(last["step"] + 1, args.steps + 1)
    for step in tqdm(steps, "train", args.steps, initial=last["step"], disable=RANK > 0):
        # Seeded by the step, so that a resumed run is the same run.
        torch.manual_seed((args.seed * 1_000_003 + step) * WORLD + RANK)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args, step)
        for _ in range(args.accumulate):
            # Under torchrun, each process takes its share of the batch.
            tokens, lengths, targets = batch("train", next(indices)[RANK::WORLD])
            with model.autocast:
                outputs = net(tokens, lengths)
                loss = loss_fn(outputs, targets)
            scaler.scale(loss / args.accumulate).backward()
            # Stays on the device: reading it would make the CPU wait for the GPU at every step.
            history.append((loss.detach()[None], outputs.detach(), targets))
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(trained.values(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

        # Evaluate. The other processes wait for process 0 in their next backward pass.
        if step % args.eval_every and step != args.steps:
            continue
        losses, outputs, targets = map(torch.cat, zip(*history))  # as augmented, since the last row
        train_accuracy = metrics(outputs, targets)["accuracy"].item()
        history, end = [], time.time()
        if RANK > 0:
            continue
        validation = evaluate(args, model, batch, "validation", checks, loss_fn, metrics)
        row = {"step": step, "train_loss": losses.mean().item(),
               "train_loss_first": losses[0].item(), "train_loss_last": losses[-1].item(),
               "train_accuracy": train_accuracy, **validation,
               "train_seconds": end - start, "evaluation_seconds": time.time() - end}
        if not math.isfinite(row["train_loss"] + row["validation_loss"]):
            sys.exit(f"The loss is not finite by step {step}: try a smaller --lr, or --amp fp32")

        # Log and save. A run that is killed between the two saves will repeat this.
        write_row(row, log)
        if wandb:
            wandb.log(row, step=step)
        state = {"flags": flags, "splits": checks, "fingerprint": model.fingerprint,
                 "step": step, "validation": validation, "trained": trained}
        if row["validation_loss"] < best_loss:
            best_loss = row["validation_loss"]
            save(state, f"{args.out}/best.pt")
        state |= {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
                  "best_loss": best_loss, "log_size": log.tell()}
        save(state, f"{args.out}/last.pt")
        start = time.time()

    # Test.
    if RANK > 0:
        return None
    result = test(args, model, batch, checks, loss_fn, metrics, f"{args.out}/best.pt") | flags
    log.write(json.dumps(result) + "\n")
    if wandb:
        wandb.summary.update(result)
    return result

def adamw(args, model):
    """AdamW on what is trained. Matrices decay; norms, biases and positions do not."""
    matrices, others = [], []
    for p, part in model.named_parts():
        if p.requires_grad:
            (matrices if p.ndim >= 2 and part != "pos" else others).append(p)
    groups = [{"params": others, "weight_decay": 0.0}, {"params": matrices, "weight_decay": 0.01}]
    return torch.optim.AdamW(groups, lr=args.lr, fused=True)

def learning_rate(args, step):
    """The learning rate of step 1, 2, ..., --steps: a linear warm-up times a cosine to zero."""
    warmup = min(50, max(1, args.steps // 10))  # AdamW's second moments need some steps to settle
    return args.lr * min(1, step / warmup) * (1 + math.cos(math.pi * (step - 1) / args.steps)) / 2

# ---- Evaluation and checkpoints ------------------------------------------------------------------
@torch.no_grad()
def evaluate(args, model, batch, split, checks, loss_fn, metrics):
    """{"<split>_loss": ..., "<split>_accuracy": ..., ...} over all examples of a split."""
    indices, results = torch.arange(checks[split][0]).split(4 * args.batch_size), []
    for index in tqdm(indices, split, leave=False):  # larger batches: no gradients
        tokens, lengths, targets = batch(split, index)
        with model.autocast:
            results.append((model(tokens, lengths), targets))
    outputs, targets = map(torch.cat, zip(*results))
    figures = {"loss": loss_fn(outputs, targets), **metrics(outputs, targets)}
    return {f"{split}_{name}": value.item() for name, value in figures.items()}

def test(args, model, batch, checks, loss_fn, metrics, path):
    """Evaluate the checkpoint at path on the test split; with --test 0, on the validation split."""
    checkpoint, split = load_checkpoint(path, model, checks), "test" if args.test else "validation"
    figures = (evaluate(args, model, batch, split, checks, loss_fn, metrics)
               if args.test or args.eval else checkpoint["validation"])
    return write_row({
        "step": checkpoint["step"], **figures,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "total_parameters": sum(p.numel() for p in model.parameters())})

def write_row(row, log=None):
    """Print a row as a table, and log it as JSON, with null for NaN."""
    row = {name: None if value != value else value for name, value in row.items()}
    for name, value in row.items():
        text = f"{value:.4f}" if isinstance(value, float) else value
        tqdm.write(f"| {name.replace('_', ' '):<28} | {text!s:>13} |")
    tqdm.write("-" * 48)
    if log:
        log.write(json.dumps(row) + "\n")
    return row

@torch.no_grad()
def print_prediction(args, model, classes, tokens):
    """Print the ten most probable classes of one example, tokens [1, time, ...]."""
    load_checkpoint(args.eval, model)
    with model.autocast:
        probabilities = model(tokens.to(args.device))[0].softmax(0)
    for i in probabilities.argsort(descending=True).tolist()[:10]:
        print(f"{probabilities[i]:7.2%}  {classes[i]}")

def open_log(args, size):
    """Open and lock the log of the run folder, so that no second run writes there; cut it to size
    bytes. Sets args.out, by default to the first free one of runs/<task>, runs/<task>-2, ..."""
    for i in itertools.count(1):
        out = args.out or f"runs/{args.task}" + "-demo" * args.demo + f"-{i}" * (i > 1)
        os.makedirs(out, exist_ok=True)
        log, is_free = open(f"{out}/log.jsonl", "a", buffering=1), True
        try:
            fcntl.lockf(log, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process ends
        except OSError as error:  # some network drives have no locks at all
            is_free = not isinstance(error, BlockingIOError)
        if is_free and (args.resume or not os.path.exists(f"{out}/last.pt")):
            args.out = out
            log.truncate(min(size, log.tell()))
            print("DEMO: the data is generated. " * args.demo + f"Results go to {out}/. "
                  f"To resume a stopped run: python train_{args.task}.py --resume 1 --out {out}")
            return log
        if args.out:
            sys.exit(f"--out {out} holds a run. --resume 1 resumes it, unless it is still running")

def save(checkpoint, path):  # atomic write: a kill leaves the old file or the new one, whole
    torch.save(checkpoint, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)

def load_checkpoint(path, model=None, checks=None):
    """Returns a checkpoint. Puts its weights into the model, if core and data are the same."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)  # runs no code
        checkpoint["flags"]["task"], [checkpoint[key] for key in ("trained", "splits", "step")]
    except Exception as error:  # no file, a broken one, another kind of file
        sys.exit(f"{path} is missing or not a checkpoint of fpt.py ({type(error).__name__})")
    if checks and checks != checkpoint["splits"]:
        sys.exit(f"{path} was trained on other data: {checkpoint['splits']}, not {checks}")
    if model:
        # Relative differences: 1e-5 between processors or versions, over 1e-3 between cores.
        ours, theirs = np.array(model.fingerprint), np.array(checkpoint["fingerprint"])
        names = {name for name, p in model.named_parameters() if p.requires_grad}
        if (names ^ set(checkpoint["trained"]) or ours.shape != theirs.shape
                or not abs(ours - theirs).max() < 1e-3 * abs(theirs).mean()):
            sys.exit(f"{path} was trained with another core: its weights or its config differ")
        model.load_state_dict(checkpoint["trained"], strict=False)
    return checkpoint

# ---- Processes and flags -------------------------------------------------------------------------
def run(parser, main, demo={}):
    """Parse the flags and call main(args), in as many processes as torchrun started."""
    args = parse(parser, demo)
    if WORLD > 1:  # process 0 prints; evaluations may be long
        sys.stdout = sys.stdout if RANK == 0 else open(os.devnull, "w")
        backend = "gloo" if args.device == "cpu" else "nccl"
        torch.distributed.init_process_group(backend, timeout=timedelta(hours=2))
    result = main(args)
    if WORLD > 1:
        torch.distributed.destroy_process_group()
    return result

def parse(parser, demo={}):
    """The command line. With --resume or --eval the flags of the checkpoint are the defaults, and
    those that would change the run or the model cannot be overridden."""
    argv = [] if re.search("ipykernel|kernel_launcher", sys.argv[0]) else sys.argv[1:]  # notebook
    args = parser.parse_args(argv)
    path = f"{args.out}/last.pt" if args.resume and args.out else args.eval
    saved = load_checkpoint(path)["flags"] if path is not None else {}
    preset = dict(pretrained=0, layers=2, **demo) if args.demo else {}
    args = parser.parse_args(argv, argparse.Namespace(**preset | saved | {"task": args.task}))
    free = ["data", "compile", "wandb"] + ["model", "amp", "batch_size", "test"] * bool(args.eval)
    for name, value in saved.items():
        if name not in free and value != getattr(args, name):
            parser.error(f"{path} has {name} {value}, not {getattr(args, name)}")

    # Flags that do not go together, and what the machine lacks.
    parts, gpu = set(args.train.split(",")), torch.cuda.is_available()
    unset = {"WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} - set(os.environ)
    args.device = args.device.replace("auto", "cuda" if gpu else "cpu")
    for is_wrong, message in (
            (args.train != "all" and parts - set(PARTS), f"--train: all, or some of {PARTS}"),
            (args.layers == 0 and parts & {"attn", "ff"}, "--layers 0 leaves no attn or ff"),
            (args.init_std is not None and args.pretrained, "--init_std needs --pretrained 0"),
            (args.resume and (args.eval or not args.out), "--resume 1 needs --out, without --eval"),
            (args.predict == "" or args.predict and not args.eval, "--predict INPUT needs --eval"),
            ("RANK" in os.environ and unset, f"RANK is set, so torchrun should set {unset}, too"),
            (args.batch_size % WORLD, f"--batch_size: not a multiple of the {WORLD} processes"),
            (args.device != "cpu" and not gpu, f"--device {args.device}: torch finds no CUDA GPU")):
        if is_wrong:
            parser.error(message)
    if args.device != "cpu" and WORLD > 1:
        args.device = f"cuda:{RANK % torch.cuda.device_count()}"
        torch.cuda.set_device(args.device)
    if args.amp == "auto" and args.device == "cpu":
        cpu = getattr(torch.cpu, "get_capabilities", dict)()  # new in torch 2.11
        fast = "amx_bf16" if "Intel" in cpu.get("cpu_name", "") else "avx512_bf16"
        args.amp = "bf16" if cpu.get(fast) else "fp32"  # Intel's avx512_bf16 is slower than fp32
    elif args.amp == "auto":  # a T4 emulates bf16, many times slower than its fp16
        args.amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if args.wandb and RANK == 0 and not args.eval:
        try:
            import wandb
            wandb.login()
        except Exception as error:  # not installed, or nobody is logged in
            parser.error(f"--wandb: {error}")
    return args

class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Show every default, and the script's docstring as it was written."""

def at_least(minimum, kind=int):  # a type for argparse: a finite number, not below the minimum
    def number(text):
        if not minimum <= kind(text) < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is below {minimum} or not finite")
        return kind(text)
    return number

def flags(task, doc, **defaults):
    """The shared flags. task: a script's name without train_; doc: its docstring; its defaults."""
    parser = argparse.ArgumentParser(None, argparse.SUPPRESS, doc, formatter_class=HelpFormatter)
    add, switch, path = parser.add_argument, dict(type=int, choices=[0, 1]), os.path.expanduser
    add("--model", type=path, default="gpt2", help="hub name or folder: " + ", ".join(MODEL_TYPES))
    add("--pretrained", **switch, default=1, help="1: pretrained weights; 0: random weights")
    add("--layers", type=at_least(0), help="keep only the first blocks; 0: no blocks; None: all")
    add("--init_std", type=at_least(0, float), help="std of random weights; None: 1/sqrt(width)")
    add("--train", default="in,out,ln,pos", help=f"all, or some of {','.join(PARTS)}")
    add("--pool", choices=["auto", "last", "mean"], default="auto",
        help="what the output layer reads; auto: last token if causal with blocks, else mean")
    add("--steps", type=at_least(1), default=1000, help="gradient steps")
    add("--batch_size", type=at_least(1), default=32, help="examples per forward pass, on all GPUs")
    add("--accumulate", type=at_least(1), default=1, help="forward passes per gradient step")
    add("--lr", type=at_least(0, float), default=3e-3, help="peak learning rate of AdamW")
    add("--amp", choices=["auto", *PRECISIONS], default="auto", help="precision of matrix products")
    add("--compile", **switch, default=0, help="1: torch.compile the model")
    add("--device", default="auto", help="cuda, cuda:1, cpu; auto: cuda if there is one")
    add("--seed", type=at_least(0), default=0, help="of the weights, data order and augmentation")
    add("--eval_every", type=at_least(1), default=250, help="steps between evaluations (and saves)")
    add("--test", **switch, default=1, help="0: end with the validation split, not test")
    add("--data", type=path, default="data", help="folder of the data sets")
    add("--out", type=path, help="run folder; None: the first free runs/<task>, runs/<task>-2, ...")
    add("--resume", **switch, default=0, help="1: resume the run in --out")
    add("--eval", type=path, metavar="PATH", help="only evaluate this checkpoint")
    add("--predict", type=path, metavar="INPUT", help="with --eval: classify this input")
    add("--wandb", metavar="PROJECT", help="also log to Weights & Biases")
    add("--demo", **switch, default=0, help="1: smoke test, generated data, two random blocks")
    parser.set_defaults(task=task, wandb_id=os.urandom(4).hex(), **defaults)
    return parser
