"""What do six blocks of SmolLM2 do on speech, before and after training? A diagnosis.

    python .results/probe.py    # from the top folder; needs the checkpoints of transfer.py

It writes transfer-probe.jsonl, with a line for each condition, seed and state, of which figures.py
makes a table.

added: the norm of what a block adds to its input, relative to it; entropy: that of its attention,
relative to uniform attention to the tokens it may see. Means over 64 validation clips, their tokens
and the heads; one number for each block."""
import json
from pathlib import Path

import torch

from transfer import CONDITIONS, build, finished, full_runs

PROBE = Path(".results/transfer-probe.jsonl")

@torch.no_grad()
def probe(run, is_trained):
    _, model, batch, labels = build(run, is_trained)
    added, entropy = [], []

    def read_block(block, inputs, output):
        x, y = inputs[0], output if torch.is_tensor(output) else output[0]
        added.append(((y - x).norm(dim=2) / x.norm(dim=2)).mean().item())

    def read_attention(attention, inputs, output):
        p = output[1].float()[:, :, 1:]  # [batch, heads, time - 1, time]: the first sees itself
        seen = torch.arange(2, p.shape[3] + 1, device=p.device)
        entropy.append((torch.special.entr(p).sum(3) / seen.log()).mean().item())

    for block in model.core.model.layers:
        block.register_forward_hook(read_block)
        block.self_attn.register_forward_hook(read_attention)
    count = len(labels["validation"])  # clips are sorted by word: take every n-th
    tokens, lengths, _ = batch("validation", torch.arange(64) * count // 64)
    with model.autocast:
        model(tokens, lengths)
    return {"condition": run.condition, "seed": run.seed, "trained": is_trained,
            "added": added, "entropy": entropy}

def main():
    lines = []
    for condition in CONDITIONS[1:]:
        for run in full_runs("smollm2-speech", condition, finished()):
            lines += [probe(run, is_trained) for is_trained in (0, 1)]
    PROBE.write_text("".join(json.dumps(line) + "\n" for line in lines))

if __name__ == "__main__":
    main()
