"""Frozen Pretrained Transformer: GPT-2 with frozen attention and MLP weights, trained on data that is not language.

    python train_cifar.py --pretrained 0        # this file is what the four scripts share: flags, model, loop
    python train_cifar.py --help                # every flag with unit, default and reason
    python fpt.py                               # benchmark: a stock GPT-2 loop against this one, on this machine

Lu et al. 2021, "Pretrained Transformers as Universal Computation Engines", https://arxiv.org/abs/2103.05247.
Read it top to bottom: flags(), FPT, then fit(), the training loop; benchmark() comes last.
"""
import argparse
import json
import math
import multiprocessing
import os
import pickle
import re
import signal
import statistics
import sys
import time
from contextlib import contextmanager
from datetime import timedelta
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm
from transformers import AttentionInterface, AutoConfig, AutoModel, GPT2Config

PARTS = ("in", "out", "ln", "pos", "attn", "ff")
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
RANK, LOCAL_RANK, WORLD = (int(os.environ.get(name, value)) for name, value in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))  # torchrun's

# Flags that belong to a machine or a call, not to a run: a checkpoint does not bring them along.
OF_THIS_CALL = ("data", "out", "device", "compile", "resume", "eval", "predict", "test", "wandb")

# The sizes of the GPT-2 family, so that random weights need no network.
GPT2_SIZES = {
    "distilgpt2": dict(n_layer=6),
    "gpt2": dict(),
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),
}


# ---- Flags ---------------------------------------------------------------------------------------------------------
class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Show every default, and the script's docstring as it was written."""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help explains every flag)\n")  # one line, not thirty of usage


def train_parts(text):
    """'in,out,ln' -> the same text, checked; 'all' stands for every part."""
    unknown = set(text.split(",")) - set(PARTS)
    if unknown and text != "all":
        raise argparse.ArgumentTypeError(f"unknown part {', '.join(sorted(unknown))}: use 'all' or some of {','.join(PARTS)}")
    return text


def number(kind, least, below=math.inf):
    """A checked type for argparse: int or float, from `least` on, below `below`."""
    def parse_number(text):
        value = kind(text)
        if not least <= value < below:
            raise argparse.ArgumentTypeError(f"{text} is not {'a whole' if kind is int else 'a'} number from {least} on" + f" and below {below}" * (below < math.inf))
        return value

    parse_number.__name__ = kind.__name__  # what argparse calls it when the text is no number at all
    return parse_number


def gains(text):
    """'0,3' -> [0.0, 3.0]"""
    return [number(float, 0)(part) for part in text.split(",")]


def flags(task, doc, random_layers=0, **defaults):
    """The flags that all scripts share; `defaults` are the task's own choices. Returns an ArgumentParser."""
    parser = Parser(description=doc, formatter_class=HelpFormatter)
    add = parser.add_argument_group("model").add_argument
    add("--model", default="gpt2", help="hub name (gpt2, distilgpt2, gpt2-medium, ...) or a local folder; other text transformers that take inputs_embeds work too")
    add("--layers", type=number(int, 0), default=None, help=f"keep at most so many blocks of the transformer, the first ones; 0: all; None: all with --pretrained 1, {random_layers or 'all'} with --pretrained 0")
    add("--pretrained", type=int, choices=[0, 1], default=1, help="1: load the weights; 0: same architecture, random weights, no download for the GPT-2 family or a folder")
    add("--init_std", type=number(float, 0), default=0.02, help="standard deviation of the random weights of --pretrained 0; GPT-2's own is 0.02")
    add("--qk_std", type=number(float, 0), default=0.02, help="the same for the queries and keys of a random GPT-2; drawn at 0.08, a head looks at one token, whichever it happens to be")
    add("--attn_gain", type=gains, default="1", metavar="G,G,...", help="factors on the attention output of a random GPT-2's first block, second, ...; the last one holds for all that follow. 0 in the first: every token is worked on alone before tokens mix")
    add("--in_gain", type=number(float, 0), default=1.41, help="scale of the input layer: gain of the orthogonal linear layer (the original's is 1.41), or standard deviation of the token embedding")
    add("--train", type=train_parts, default="in,out,ln,pos", help="parts that are trained: 'all', or some of in,out,ln,pos,attn,ff (input layer, output layer, norms, positions, attention, MLP); the rest stays frozen")
    add("--pool", choices=["last", "mean", "cls"], default="last", help="what the output layer reads: the last real token, as the original, the mean over the real tokens, or an empty token put after them")
    add("--dropout", type=number(float, 0, 1), default=0.0, help="probability; the original's 0.1 slows a mostly frozen model that does not overfit")
    add = parser.add_argument_group("optimisation").add_argument
    add("--steps", type=number(int, 1), default=2500, help="gradient steps in all")
    add("--batch_size", type=number(int, 1), default=32, help="examples a forward pass, of all processes together under torchrun")
    add("--accumulate", type=number(int, 1), default=1, help="forward passes a gradient step, for a larger batch in the same memory")
    add("--lr", type=number(float, 0), default=1e-3, help="AdamW's peak learning rate; few, well-scaled weights stand a high one")
    add("--ln_lr", type=number(float, 0), default=1.0, help="learning rate of the norms, the biases and the positions, as a multiple of --lr")
    add("--warmup", type=number(int, 0), default=50, help="steps of linear warm-up, then cosine down to zero; AdamW's second moments need some steps to settle")
    add("--weight_decay", type=number(float, 0), default=0.01, help="AdamW's, on matrices only; norms, biases and positions are not decayed")
    add("--amp", choices=["auto", "bf16", "fp16", "fp32"], default="auto", help="precision of the matrix products; auto: bf16 where the hardware has it, else fp16 with loss scaling on CUDA, fp32 on CPU")
    add("--compile", type=int, choices=[0, 1], default=None, help="torch.compile the model; None: 1 on CUDA, where fused kernels pay, 0 on CPU, where compiling takes longer than it saves")
    add("--device", default="auto", help="cuda, cuda:1, cpu, ...; auto: cuda if there is one")
    add("--seed", type=number(int, 0), default=0, help="of the random weights, the data order and the augmentation; never of the splits")
    add = parser.add_argument_group("evaluation and files").add_argument
    add("--eval_every", type=number(int, 1), default=250, help="gradient steps between two evaluations")
    add("--eval_examples", type=number(int, 0), default=0, help="validation examples an evaluation reads, the same ones each time; 0: all. The test set is always read whole")
    add("--test", type=int, choices=[0, 1], default=1, help="0: leave the test set closed and end with the validation figures, for choosing hyperparameters")
    add("--best", choices=["loss", "accuracy"], default="accuracy", help="which validation figure picks the checkpoint that is tested")
    add("--patience", type=number(int, 0), default=0, help="stop after so many evaluations without a better one; 0: never")
    add("--data", default="data", help="folder of the data sets, downloaded and decoded there on first use")
    add("--out", default=None, help=f"folder of log.jsonl, best.pt and last.pt; None: the next free runs/{task}, runs/{task}-2, ...; with --resume 1 the latest of them")
    add("--resume", type=int, choices=[0, 1], default=0, help="1: go on from <out>/last.pt as if the run had never been stopped; it brings its own flags")
    add("--eval", default=None, metavar="PATH", help="evaluate this checkpoint on the test set instead of training; it brings its own flags")
    add("--init", default=None, metavar="PATH", help="start from the trained parts of this checkpoint, with a new optimizer and schedule, to train longer than was planned")
    add("--predict", default=None, metavar="INPUT", help="print what the checkpoint of --eval says about this input (see the examples on top)")
    add("--wandb", default=None, metavar="PROJECT", help="also log to this Weights & Biases project (pip install wandb; WANDB_MODE=offline needs no account)")
    add("--demo", type=int, choices=[0, 1], default=0, help="1: a few hundred generated examples and a short run, no network; the result says nothing about the real task")

    parser.set_defaults(task=task, random_layers=random_layers, **defaults)
    return parser


def parse(parser, demo):
    """Parse the command line; `demo` holds the smaller defaults of a --demo 1 run. Returns a Namespace."""
    argv = [] if sys.argv[0].endswith("_launcher.py") else sys.argv[1:]  # in a notebook, argv is the kernel's own
    args = parser.parse_args(argv)
    if args.predict and not args.eval:
        parser.error("--predict needs the checkpoint that shall predict: --eval PATH")
    if args.eval and args.resume:
        parser.error("--eval evaluates, --resume 1 trains: choose one")
    checkpoint = args.eval
    if args.resume and args.out:
        checkpoint = Path(args.out) / "last.pt"
    elif args.resume:
        checkpoint = max(Path("runs").glob(f"{args.task}*/last.pt"), key=os.path.getmtime, default=None)
        if not checkpoint:
            sys.exit(f"No run to go on with: there is no runs/{args.task}*/last.pt; name its folder with --out")
        args.out = str(checkpoint.parent)
    saved = {}
    if args.eval or checkpoint and checkpoint.exists():  # a run that was stopped before its first last.pt starts again
        saved = load_checkpoint(checkpoint)["flags"]
        if saved["task"] != args.task:
            sys.exit(f"{checkpoint} is a checkpoint of the task {saved['task']}, not of {args.task}")
        here = OF_THIS_CALL + ("amp",) * bool(args.eval)  # a CUDA machine's checkpoint may be evaluated in fp32 elsewhere
        parser.set_defaults(**{name: value for name, value in saved.items() if name not in here}, out=args.out)
    elif args.demo:
        parser.set_defaults(**demo)
    args = parser.parse_args(argv)
    changed = [f"--{name} {getattr(args, name)} (was {value})" for name, value in saved.items()
               if args.resume and name not in OF_THIS_CALL and getattr(args, name, value) != value]
    if changed:
        sys.exit(f"{checkpoint} was made with other flags, going on with {', '.join(changed)} would be another run: leave them out, or start anew in another --out")

    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    cuda = args.device.startswith("cuda")
    if cuda and WORLD > 1:
        args.device = f"cuda:{LOCAL_RANK}"
        torch.cuda.set_device(LOCAL_RANK)
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        sys.exit(f"--device {args.device} is not there: use --device cpu, or install a torch that sees your GPU ({one_line(error)})")
    if args.amp == "auto" and cuda:
        # A T4 says it supports bf16 because it emulates it, many times slower than its fp16.
        args.amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif args.amp == "auto":
        cpu = torch.cpu.get_capabilities()
        args.amp = "bf16" if cpu.get("avx512_bf16") or cpu.get("amx_bf16") else "fp32"
    if args.compile is None:
        args.compile = int(cuda)
    if args.layers is None:
        args.layers = 0 if args.pretrained else args.random_layers
    runs = 1
    while not args.out:
        free = f"runs/{args.task}-{runs}" if runs > 1 else f"runs/{args.task}"
        args.out = None if Path(free).exists() else free
        runs += 1
    if WORLD > 1:
        if args.batch_size % WORLD:
            parser.error(f"--batch_size {args.batch_size} is shared by {WORLD} processes: choose a multiple of {WORLD}")
        if RANK:
            sys.stdout = open(os.devnull, "w")  # one process prints
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=2))  # a download may take as long
        if LOCAL_RANK:
            dist.barrier()  # until the first process of this machine has downloaded and decoded: it comes here in fit()
    if args.demo:
        print("DEMO: the data is generated on this machine; the result says nothing about the real task.")
    return args


def one_line(error):
    return " ".join(str(error).split())


def run(main):
    """Call main(); what a user can mend ends as one line and exit code 1, not as a traceback."""
    try:
        return main()
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        sys.exit(f"Out of memory: halve --batch_size and double --accumulate, or take --model distilgpt2 ({one_line(error)})")
    except OSError as error:  # a full disk, a folder that may not be written, a server that is gone
        sys.exit(f"{type(error).__name__}: {one_line(error)}")


# ---- Model ---------------------------------------------------------------------------------------------------------
def causal_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Causal attention without a mask: padding is on the right, so no real token ever sees it. (transformers' own way
    to find that no mask is needed reads the positions on the host, and would make a GPU wait once a step.)"""
    time = query.shape[2]
    if query.is_cuda or time > 512:
        heads = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, dropout_p=dropout)
    else:  # on a CPU the fused kernel's backward pass is several times slower than these products
        future = torch.full((time, time), -math.inf, dtype=query.dtype).triu(1)
        heads = F.dropout(((query * scaling) @ key.transpose(2, 3) + future).softmax(-1), dropout) @ value
    return heads.transpose(1, 2), None


AttentionInterface.register("causal", causal_attention)


def load_config(args):
    """The shape of --model: known here for a random member of the GPT-2 family, else read from the folder or the hub."""
    name = args.model.removeprefix("openai-community/")
    if name in GPT2_SIZES and not args.pretrained and not Path(args.model).is_dir():
        config = GPT2Config(**GPT2_SIZES[name])
    else:
        config = AutoConfig.from_pretrained(args.model)
    if args.layers:
        config.num_hidden_layers = min(args.layers, config.num_hidden_layers)
    return config


def load_core(args):
    """The transformer without its token table: pretrained, or with random weights of standard deviation init_std."""
    try:
        config = load_config(args)
        if config.model_type == "gpt2":
            config._attn_implementation = "causal"
            config.activation_function = "gelu_pytorch_tanh"  # the same function as GPT-2's gelu_new in one fused kernel
        if args.pretrained:
            core = AutoModel.from_pretrained(args.model, config=config, dtype=torch.float32)
        else:
            config.initializer_range = args.init_std
            core = AutoModel.from_config(config, dtype=torch.float32)
            for i, block in enumerate(core.h if config.model_type == "gpt2" else []):
                if args.qk_std != args.init_std:
                    nn.init.normal_(block.attn.c_attn.weight[:, :2 * config.n_embd], std=args.qk_std)
                gain = args.attn_gain[min(i, len(args.attn_gain) - 1)]
                block.attn.c_proj.weight.data *= gain
                if gain == 0:
                    block.attn = NoAttention()
    except (OSError, ValueError) as error:  # what transformers raises for a silent hub and for a folder without a model
        sys.exit(f"Cannot load --model {args.model}: use --pretrained 0 for random weights, or --model FOLDER for weights on this disk ({one_line(error)})")
    if not hasattr(core.config, "vocab_size"):
        sys.exit(f"--model {args.model} is no text transformer but a {core.config.model_type}")
    core.set_input_embeddings(None)  # our tokens come in as vectors
    for module in core.modules():
        if isinstance(module, nn.Dropout):
            module.p = args.dropout
    for parent in list(core.modules()):
        for child_name, child in parent.named_children():
            if type(child).__name__ == "Conv1D":  # GPT-2 stores W transposed; nn.Linear's layout multiplies faster
                linear = nn.Linear(*child.weight.shape, device="meta")
                linear.weight, linear.bias = nn.Parameter(child.weight.detach().T.contiguous()), child.bias
                setattr(parent, child_name, linear)
    return core


class NoAttention(nn.Module):
    """What --attn_gain 0 leaves of a block's attention: nothing is added to any token."""

    def forward(self, tokens, **kwargs):
        return 0 * tokens, None  # still depends on the norm before it: DistributedDataParallel wants a gradient everywhere


class FPT(nn.Module):
    """Input layer, frozen transformer, output layer.

    inputs:   numbers in a continuous token, or with discrete=True the number of token ids (id 0 is 'nothing', a zero
              vector; several ids a token are embedded and summed)
    outputs:  numbers in a prediction: classes, or 1 for a regression
    """

    def __init__(self, args, inputs, outputs, discrete=False):
        super().__init__()
        torch.manual_seed(args.seed)  # a checkpoint leaves the frozen random core out: the seed brings it back
        self.core = load_core(args)
        width = self.core.config.hidden_size
        self.pool = args.pool
        self.positions = self.core.config.max_position_embeddings - (self.pool == "cls")
        self.causal = any(getattr(module, "is_causal", False) for module in self.core.modules())
        if discrete:
            self.input = nn.Embedding(inputs, width, padding_idx=0)
            nn.init.normal_(self.input.weight, std=args.in_gain)
            nn.init.zeros_(self.input.weight[0])
        else:
            self.input = nn.Linear(inputs, width)
            nn.init.orthogonal_(self.input.weight, gain=args.in_gain)
            nn.init.zeros_(self.input.bias)
        self.output = nn.Linear(width, outputs)

        trained = PARTS if args.train == "all" else args.train.split(",")
        self.frozen_sum = 0.0  # tells two frozen cores apart when a checkpoint is loaded
        for parameter, part in self.named_parts():
            parameter.requires_grad = part in trained
            if part not in trained:
                self.frozen_sum += parameter.double().sum().item()
                if part in ("attn", "ff"):  # rounded once here, instead of by autocast at every step
                    parameter.data = parameter.data.to(PRECISIONS[args.amp])

    def named_parts(self):
        """Yields (parameter, part), part being one of PARTS."""
        for module_name, module in self.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                if module_name in ("input", "output"):
                    part = module_name.removesuffix("put")
                elif type(module).__name__.endswith("Norm"):
                    part = "ln"
                elif isinstance(module, nn.Embedding):
                    part = "pos"
                else:
                    part = "attn" if "att" in module_name else "ff"
                yield parameter, part

    def forward(self, tokens, lengths=None):
        """tokens:   float [batch, time, inputs], or int [batch, time] or [batch, time, ids], padded on the right
        lengths:  int [batch], the real tokens of each sequence, at least 1; None: all of them are real
        returns   float32 [batch, outputs], or [batch, time, outputs] where a script sets args.pool to "each"
        """
        time = tokens.shape[1]
        if time > self.positions:
            raise ValueError(f"{time} tokens are more than the {self.positions} positions of the model")
        x = self.input(tokens)
        if x.ndim == 4:
            x = x.sum(2)
        if lengths is None:
            lengths = torch.full((len(tokens),), time, device=tokens.device)
        real = torch.arange(time, device=tokens.device) < lengths[:, None]
        if self.pool == "cls":
            x, lengths = F.pad(x * real[:, :, None], (0, 0, 0, 1)), lengths + 1
            real = torch.arange(time + 1, device=tokens.device) < lengths[:, None]
        last = torch.arange(len(x), device=x.device), lengths - 1
        if self.core.config.model_type == "gpt2" and self.pool in ("last", "cls"):
            pooled = self.gpt2(x, last)
        else:
            mask = None if self.causal else real
            pooled = self.core(inputs_embeds=x, attention_mask=mask, use_cache=False).last_hidden_state
            if self.pool == "mean":
                pooled = (pooled * real[:, :, None]).sum(1) / lengths[:, None]
            elif self.pool != "each":
                pooled = pooled[last]
        with torch.autocast(tokens.device.type, enabled=False):  # bf16 cannot tell a sum of 71 from one of 71.2
            return self.output(pooled.float())

    def gpt2(self, x, last):
        """GPT2Model's forward pass, but only the token that is read goes through the last MLP: a third less work with two blocks."""
        x = self.core.drop(x + self.core.wpe.weight[:x.shape[1]])
        for block in self.core.h[:-1]:
            x = block(x)
        block = self.core.h[-1]
        x = (x + block.attn(block.ln_1(x))[0])[last]
        return self.core.ln_f(x + block.mlp(block.ln_2(x)))


# ---- Training ------------------------------------------------------------------------------------------------------
def batches(size, batch_size, seed, lengths=None):
    """Yields index tensors [batch_size] for ever, each epoch in a new order; a rest smaller than a batch is dropped.

    With lengths [size], examples of like length go together, so that little of a batch is padding: each run of 50
    shuffled batches is sorted by length, cut, and the batches are shuffled again.
    """
    batch_size = min(batch_size, size)
    for epoch in range(sys.maxsize):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(size, generator=generator)
        if lengths is not None:
            order = torch.cat([run[lengths[run].argsort()] for run in order.split(50 * batch_size)])
        order = order[: size // batch_size * batch_size].view(-1, batch_size)
        if lengths is not None:
            order = order[torch.randperm(len(order), generator=generator)]
        yield from order


def adamw(args, model):
    """AdamW over the trained parameters: matrices decay, norms, biases and positions do not, but may learn faster."""
    groups = [{"params": [], "weight_decay": args.weight_decay, "lr_scale": 1.0},
              {"params": [], "weight_decay": 0.0, "lr_scale": args.ln_lr}]
    for parameter, part in model.named_parts():
        if parameter.requires_grad:
            groups[parameter.ndim < 2 or part == "pos"]["params"].append(parameter)
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=args.lr, fused=True)


def update(model, optimizer, scaler):
    """One gradient step from the gradients that the backward passes have left."""
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_((p for p in model.parameters() if p.requires_grad), 1.0)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)


def autocast(args):
    return torch.autocast(args.device.split(":")[0], dtype=PRECISIONS[args.amp], enabled=args.amp != "fp32")


@torch.no_grad()
def infer(args, model, batch, split, order):
    """Run the examples `order` of a split through the model. Returns outputs float32 [n, outputs] and targets [n]."""
    model.eval()
    outputs, targets = [], []
    for index in tqdm(order[RANK::WORLD].split(4 * args.batch_size), f"evaluate {split}", leave=False, disable=RANK > 0):
        tokens, lengths, target = batch(split, index)
        with autocast(args):
            outputs.append(model(tokens, lengths))
        targets.append(target)
    model.train()
    outputs, targets = torch.cat(outputs), torch.cat(targets)
    return (outputs, targets) if WORLD == 1 else (gather(outputs, len(order)), gather(targets, len(order)))


def gather(part, size):
    """Every WORLD-th row from each process -> all rows [size, ...], in order."""
    whole = part.new_zeros(size, *part.shape[1:])
    whole[RANK::WORLD] = part
    dist.all_reduce(whole)
    return whole


def save(checkpoint, path):
    """Write aside, flush, rename: killed at any instant, this leaves the old file or the new one, whole."""
    with open(f"{path}.tmp", "wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.tmp", path)


def load_checkpoint(path):
    """A dict that fit() saved. weights_only: code that someone pickled into the file is refused, not run."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["trained"], checkpoint["flags"], checkpoint["frozen_sum"]
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, ValueError, pickle.UnpicklingError) as error:
        sys.exit(f"{path} is no checkpoint of this project: give the path of a best.pt or last.pt ({type(error).__name__})")
    return checkpoint


def load_trained(args, model, path):
    """Put the trained parts of a checkpoint into the model. Returns the checkpoint."""
    checkpoint = load_checkpoint(path)
    if not math.isclose(checkpoint["frozen_sum"], model.frozen_sum, rel_tol=1e-5, abs_tol=1e-3):
        sys.exit(f"{path} was trained on another frozen core than --model {args.model} --seed {args.seed} gives here")
    try:
        model.load_state_dict(checkpoint["trained"], strict=False)
    except RuntimeError as error:
        sys.exit(f"{path} does not fit the model that these flags give: {one_line(error)}")
    return checkpoint


@torch.no_grad()
def print_prediction(args, model, classes, tokens, logits=lambda outputs: outputs):
    """Print the classes and their probabilities for one example, tokens [1, ...], the likeliest first; logits(outputs) are theirs."""
    load_trained(args, model, args.eval)
    model.to(args.device).eval()
    with autocast(args):
        outputs = model(tokens.to(args.device))
    probabilities = logits(outputs)[0].softmax(-1)
    for i in probabilities.argsort(descending=True).tolist()[:10]:
        print(f"{probabilities[i]:7.2%}  {classes[i]}")


def print_table(row):
    lines = [f"| {name.replace('_', ' '):<24} | {value:>13{'.4f' if isinstance(value, float) else ''}} |" for name, value in row.items()]
    rule = "-" * len(lines[0])
    tqdm.write("\n".join([rule, *lines, rule]))


STOP = []


@contextmanager
def stop_after_step():
    """Ctrl-C and SIGTERM only ask, in STOP: fit() saves after the step it is in. Asked twice, it ends at once."""
    def ask(number, frame):
        STOP.append(number)
        signal.signal(number, before[number])

    STOP.clear()
    before = {number: signal.signal(number, signal.SIG_IGN if RANK else ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@stop_after_step()
def fit(args, model, batch, sizes, dummy, lengths=None, loss_fn=F.cross_entropy,
        predict=lambda outputs: outputs.argmax(-1), metrics=lambda outputs, targets: {}):
    """Train, keep the checkpoint that is best on the validation split, and evaluate that one once on the test split.

    batch(split, index): index int64 [batch] on the CPU -> tokens, lengths or None, targets, all on args.device
    sizes, lengths:      {"train": ..., "validation": ..., "test": ...}: number of examples, and if they differ in
                         length the length of each (int tensors on the CPU)
    dummy:               the label that a model would always give which looks at the training labels only
    loss_fn(outputs, targets), predict(outputs) -> labels, metrics(outputs, targets) -> {name: figure}
    Returns the last line of <out>/log.jsonl as a dict.
    """
    if WORLD > 1 and LOCAL_RANK == 0:
        dist.barrier()  # the data is there: lets the others out of parse()
    model.to(args.device)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    counts = {"trainable_parameters": sum(parameter.numel() for parameter in trained.values()),
              "total_parameters": sum(parameter.numel() for parameter in model.parameters())}
    order = {split: torch.arange(size) for split, size in sizes.items()}
    if args.eval_examples:  # a random part: the official lists are sorted by word
        order["validation"] = torch.randperm(sizes["validation"], generator=torch.Generator().manual_seed(0))[:args.eval_examples]
    if lengths:  # like lengths go together, so that little of a batch is padding
        order = {split: index[lengths[split][index].argsort()] for split, index in order.items()}
        longest = max(int(part.max()) for part in lengths.values())
        if longest > model.positions:
            sys.exit(f"The longest example has {longest} tokens, --model {args.model} has {model.positions} positions: take a model with more")

    def figures(split, outputs, targets):
        accuracy = (predict(outputs) == targets).float().mean()
        result = {"loss": loss_fn(outputs, targets).item(), "accuracy": accuracy.item(), **metrics(outputs, targets)}
        return {f"{split}_{name}": value for name, value in result.items()}

    def finish(path):
        step = load_trained(args, model, path)["step"]
        split = "test" if args.test else "validation"
        outputs, targets = infer(args, model, batch, split, order[split])
        result = figures(split, outputs, targets) | {"dummy_accuracy": (targets == dummy).float().mean().item(), **counts,
                                                     "step": step, "generated_data": bool(args.demo)}
        print_table(result)
        return result

    if args.eval:
        return finish(args.eval)

    # A new run, or what is left of one.
    out = Path(args.out)
    rows, last = [], {}
    if args.resume and (out / "last.pt").exists():
        last = load_trained(args, model, out / "last.pt")
        rows = last["rows"]
        done = (out / "log.jsonl").read_text().splitlines()
        if len(done) > len(rows) and re.search('"dummy_accuracy".*}$', done[-1]):
            print(f"{out} holds a finished run")
            return json.loads(done[-1])
    elif not args.resume and (out / "log.jsonl").exists():
        sys.exit(f"{out} already holds a run: go on with it (--resume 1 --out {out}), choose another --out, or delete it")
    elif args.init:
        load_trained(args, model, args.init)
    if WORLD > 1:
        dist.barrier()  # every process has looked before the first one writes
    if RANK == 0:
        out.mkdir(parents=True, exist_ok=True)
        log = open(out / "log.jsonl", "w", buffering=1)
        log.writelines(row + "\n" for row in rows)
    print("{}: {trainable_parameters:,} of {total_parameters:,} parameters are trained, in {} on {}; results go to {}/"
          .format(args.task, args.amp, args.device, out, **counts))

    optimizer = adamw(args, model)
    scaler = torch.amp.GradScaler(args.device.split(":")[0], enabled=args.amp == "fp16")
    first, best, waited, losses, seconds, input_seconds = 1, -math.inf, 0, [], 0.0, 0.0
    hits = torch.zeros((), device=args.device)
    if last:
        optimizer.load_state_dict(last["optimizer"])
        scaler.load_state_dict(last["scaler"])
        first, best, waited, seconds, input_seconds = last["step"] + 1, last["best"], last["waited"], last["seconds"], last["input_seconds"]
        losses, hits = list(last["losses"].to(args.device)), last["hits"].to(args.device)
        print(f"Going on after step {last['step']}")
    tracker = start_wandb(args, last) if args.wandb and RANK == 0 else None

    def checkpoint(**state):
        return {"trained": {name: p.detach().cpu() for name, p in trained.items()}, "flags": vars(args),
                "frozen_sum": model.frozen_sum, "step": step, **state}

    def save_last():
        save(checkpoint(optimizer=optimizer.state_dict(), scaler=scaler.state_dict(), rows=rows, best=best, waited=waited,
                        losses=torch.stack(losses) if losses else torch.zeros(0), hits=hits, seconds=time.time() - start,
                        input_seconds=input_seconds, wandb=tracker and tracker.id), out / "last.pt")

    def diverged(name, loss, step):
        kept = f" The last good checkpoint is {out}/last.pt" if (out / "last.pt").exists() else ""
        sys.exit(f"The {name} loss is {loss:.0f} at step {step}, near learning rate {optimizer.param_groups[0]['lr']:.2g}: "
                 f"try a smaller --lr, a longer --warmup or --amp fp32.{kept}")

    def check_losses():
        for i, value in enumerate(losses, 1 - len(losses)):
            if not math.isfinite(value):
                diverged("training", value, step + i // args.accumulate)

    def leave_if_asked():
        if STOP:
            check_losses()
            save_last()
            sys.stderr.write(f"\nStopped after step {step}. Go on: python train_{args.task}.py --resume 1 --out {out}\n")
            sys.exit(128 + STOP[0])

    if args.compile:
        model.compile()
    net = DistributedDataParallel(model) if WORLD > 1 else model
    model.train()
    feed = islice(batches(sizes["train"], args.batch_size, args.seed, lengths and lengths["train"]), (first - 1) * args.accumulate, None)
    start = time.time() - seconds
    bar = tqdm(total=args.steps, initial=first - 1, desc="train", unit="step", disable=RANK > 0)
    for step in range(first, args.steps + 1):
        if args.patience and waited >= args.patience:
            tqdm.write(f"No better validation {args.best} for {waited} evaluations: stopping before step {step}")
            break
        # Augmentation and dropout depend on the step alone, so a resumed run goes on exactly as the uninterrupted one.
        torch.manual_seed((args.seed * 1_000_003 + step) * WORLD + RANK)
        warm = min(1.0, step / max(1, args.warmup))
        past = max(0, step - args.warmup) / max(1, args.steps - args.warmup)
        for group in optimizer.param_groups:
            group["lr"] = group["lr_scale"] * args.lr * warm * 0.5 * (1 + math.cos(math.pi * past))

        for _ in range(args.accumulate):
            before = time.time()
            tokens, real, targets = batch("train", next(feed)[RANK::WORLD])
            input_seconds += time.time() - before
            with autocast(args):
                outputs = net(tokens, real)
            loss = loss_fn(outputs, targets)
            scaler.scale(loss / args.accumulate).backward()
            losses.append(loss.detach())  # stays on the device: reading it here would make the host wait
            hits += (predict(outputs.detach()) == targets).sum()
        update(model, optimizer, scaler)
        bar.update()
        leave_if_asked()
        if step % args.eval_every and step != args.steps:
            continue

        losses = torch.stack(losses)
        if WORLD > 1:
            dist.all_reduce(losses)
            dist.all_reduce(hits)
        losses = (losses / WORLD).tolist()
        check_losses()
        train_end = time.time()
        row = {
            "iteration": math.ceil(step / args.eval_every),
            "step": step,
            "train_loss": sum(losses) / len(losses),
            "train_loss_start": losses[0],
            "train_loss_final": losses[-1],
            "train_accuracy": hits.item() / (len(losses) * len(targets) * WORLD),
            **figures("validation", *infer(args, model, batch, "validation", order["validation"])),
            "train_seconds": train_end - start,
            "input_seconds": input_seconds,  # of the training seconds: cutting, augmenting and tokenising batches
            "evaluation_seconds": time.time() - train_end,
        }
        if args.amp == "fp16":  # the optimizer counts the steps it made, the others overflowed
            row["skipped_steps"] = step - int(max(state["step"] for state in optimizer.state.values()))
        if not math.isfinite(row["validation_loss"]):
            diverged("validation", row["validation_loss"], step)
        print_table(row)
        rows.append(json.dumps(row | {"generated_data": bool(args.demo)}))
        score = -row["validation_loss"] if args.best == "loss" else row["validation_accuracy"]
        better, waited = score > best, waited + 1
        if better:
            best, waited = score, 0
        losses, start, input_seconds = [], time.time(), 0.0
        hits.zero_()
        if RANK == 0:
            log.write(rows[-1] + "\n")
            if better:
                save(checkpoint(), out / "best.pt")
            save_last()
        if tracker:
            tracker.log(row, step=step)
        leave_if_asked()
    bar.close()

    if WORLD > 1:
        dist.barrier()  # best.pt is written
    result = finish(out / "best.pt") | vars(args)
    if RANK == 0:
        log.write(json.dumps(result) + "\n")
        log.close()
    if tracker:
        tracker.summary.update(result)
        tracker.finish()
    if WORLD > 1:
        del net  # while its process group lives: as the group's last owner it could wait for ever for one of gloo's threads
        dist.destroy_process_group()
    return result


def start_wandb(args, last):
    """A Weights & Biases run with the flags as its config; after a kill the same run goes on."""
    try:
        import wandb
    except ImportError:
        sys.exit("--wandb needs a package that is not installed: pip install wandb")
    return wandb.init(project=args.wandb, dir=args.out, config=vars(args), id=last.get("wandb"), resume="allow" if last else None)


# ---- Benchmark: python fpt.py --------------------------------------------------------------------------------------
class StockFPT(nn.Module):
    """What one writes first: GPT2Model as it comes, in fp32, with eager attention and dropout, between two linear layers."""

    def __init__(self, args):
        super().__init__()
        config = load_config(args)
        self.core = AutoModel.from_config(config, attn_implementation="eager")
        self.input, self.output = nn.Linear(48, config.n_embd), nn.Linear(config.n_embd, 10)
        for name, parameter in self.core.named_parameters():
            parameter.requires_grad = "ln" in name or "wpe" in name

    def forward(self, tokens):
        return self.output(self.core(inputs_embeds=self.input(tokens)).last_hidden_state[:, -1])


def benchmark_side(side, args, pipe):
    """One of the two loops in a process of its own, so that peak memory is its own too. Makes as many gradient steps as
    each number received says and sends the seconds a step; None ends it with the peak memory in MiB."""
    tokens = torch.randn(args.batch_size, args.tokens, 48, generator=torch.Generator().manual_seed(0)).to(args.device)
    targets = torch.arange(args.batch_size, device=args.device) % 10
    if side == "stock":
        model = StockFPT(args).to(args.device)
        optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    else:
        model = FPT(args, 48, 10).to(args.device)
        optimizer, scaler = adamw(args, model), torch.amp.GradScaler(enabled=args.amp == "fp16")
        if args.compile:
            model.compile()
    for steps in iter(pipe.recv, None):
        start = time.time()
        for _ in range(steps):
            if side == "stock":
                optimizer.zero_grad()
                loss = F.cross_entropy(model(tokens), targets)
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                loss.item()
            else:
                with autocast(args):
                    outputs = model(tokens)
                scaler.scale(F.cross_entropy(outputs, targets)).backward()
                update(model, optimizer, scaler)
        wait_for(args.device)
        pipe.send((time.time() - start) / steps)
    if args.device.startswith("cuda"):
        pipe.send(torch.cuda.max_memory_allocated() / 2**20)
    else:
        import resource  # not on Windows

        pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)


def wait_for(device):
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def matmul_rate(args):
    """Operations a second of a large matrix product in the precision of --amp, the best of five."""
    side = 8192 if args.device.startswith("cuda") else 2048
    left, right = (torch.randn(side, side, device=args.device).to(PRECISIONS[args.amp]) for _ in "ab")
    seconds = []
    for _ in range(5):
        wait_for(args.device)
        start = time.time()
        left @ right
        wait_for(args.device)
        seconds.append(time.time() - start)
    return 2 * side**3 / min(seconds)


def benchmark():
    """Time the stock loop and ours in turn, on the same batch with the same trainable parts."""
    parser = flags("benchmark", "Seconds a gradient step: GPT2Model in a stock loop, and this file's loop.", batch_size=16, pretrained=0)
    parser.add_argument("--tokens", type=int, default=64, help="tokens a sequence, of 48 numbers each; 64 as in CIFAR-10")
    args = parse(parser, demo={})
    context = multiprocessing.get_context("spawn")
    pipes, seconds, rates = {}, {"stock": [], "ours": []}, []
    for side in seconds:
        pipes[side], child = context.Pipe()
        context.Process(target=benchmark_side, args=(side, args, child), daemon=True).start()
    for _ in tqdm(range(9), "rounds"):
        for side, pipe in pipes.items():
            pipe.send(50 if args.device.startswith("cuda") else 1)
            seconds[side].append(pipe.recv())
        rates.append(matmul_rate(args))
    seconds = {side: times[1:] for side, times in seconds.items()}  # the first round warms up

    # Forward, and backward to the tokens: two operations each for every frozen weight and token. None for the weights.
    # Only the token that is read needs the last MLP.
    model = FPT(args, 48, 10)
    weights = sum(p.numel() for p, part in model.named_parts() if part in ("attn", "ff") and p.ndim == 2)
    read_once = sum(p.numel() for p in model.core.h[-1].mlp.parameters() if p.ndim == 2)
    floor = 4 * args.batch_size * (weights * args.tokens - read_once * (args.tokens - 1)) / max(rates)
    print(f"{args.batch_size} sequences of {args.tokens} tokens, {args.model}, median of 8 rounds; ours in {args.amp} on {args.device}"
          f"{', compiled' * args.compile}; matrix products reach {max(rates) / 1e9:,.0f} GFLOP/s\n"
          "| loop  | s a step | samples/s | tokens/s | peak memory | of the matmul rate |\n| --- | ---: | ---: | ---: | ---: | ---: |")
    for side, times in seconds.items():
        step = statistics.median(times)
        pipes[side].send(None)
        print(f"| {side:<5} | {step:8.3f} | {args.batch_size / step:9,.1f} | {args.batch_size * args.tokens / step:8,.0f} "
              f"| {pipes[side].recv():7,.0f} MiB | {floor / step:18.0%} |")
    pairs = [stock / ours for stock, ours in zip(seconds["stock"], seconds["ours"])]
    print(f"stock / ours: {statistics.median(pairs):.2f} (from {min(pairs):.2f} to {max(pairs):.2f}, round by round)")


if __name__ == "__main__":
    benchmark()
