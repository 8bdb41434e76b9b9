#!/usr/bin/env python3
"""The first 50 steps of training a small Mamba on tinyshakespeare by bytes, in PyTorch (float32, its own autograd and AdamW).

    python scripts/make_golden_train.py tinyshakespeare.txt tests/golden/train

The initial weights are init.safetensors beside the result, written by the test `TrainingCurve.StartsFromTheInitializationOfSeed1`
(krait's initialization, seed 1), so both sides start from the same numbers. Data order: batch i of n = batch_size x
seq_len bytes is the text from byte i n on, cut into rows of seq_len; the target of each byte is the next byte of the
text. Needs torch, numpy and safetensors.
"""
import json
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

STEPS, SEQ_LEN, BATCH_SIZE = 50, 64, 8
LR, MIN_LR, WARMUP = 3e-3, 1e-5, 5
BETAS, EPS, WEIGHT_DECAY, CLIP = (0.9, 0.95), 1e-8, 0.1, 1.0
NORM_EPS = 1e-5


def rms_norm(x, weight):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + NORM_EPS) * weight


def mixer(p, x, prefix):
    """One Mamba block (arXiv 2312.00752, figure 3) on x of shape (batch, length, d_model)."""
    get = lambda name: p[prefix + name]
    A = -torch.exp(get("A_log"))
    d_inner, d_state = A.shape
    dt_rank = get("dt_proj.weight").shape[1]
    u, z = (x @ get("in_proj.weight").T).split(d_inner, dim=-1)
    d_conv = get("conv1d.weight").shape[-1]
    u = F.conv1d(u.transpose(1, 2), get("conv1d.weight"), get("conv1d.bias"), padding=d_conv - 1, groups=d_inner)
    u = F.silu(u[..., : x.shape[1]]).transpose(1, 2)
    dt, B, C = (u @ get("x_proj.weight").T).split([dt_rank, d_state, d_state], dim=-1)
    delta = F.softplus(dt @ get("dt_proj.weight").T + get("dt_proj.bias"))
    h = torch.zeros(x.shape[0], d_inner, d_state)
    y = []
    for t in range(x.shape[1]):
        h = torch.exp(delta[:, t, :, None] * A) * h + (delta[:, t] * u[:, t])[:, :, None] * B[:, t, None, :]
        y.append((h * C[:, t, None, :]).sum(-1))
    y = torch.stack(y, 1) + get("D") * u
    return (y * F.silu(z)) @ get("out_proj.weight").T


def language_model(p, tokens, n_layer):
    x = p["backbone.embeddings.weight"][tokens]
    for layer in range(n_layer):
        prefix = f"backbone.layers.{layer}."
        x = x + mixer(p, rms_norm(x, p[prefix + "norm.weight"]), prefix + "mixer.")
    return rms_norm(x, p["backbone.norm_f.weight"]) @ p["backbone.embeddings.weight"].T


def learning_rate(step):
    if step < WARMUP:
        return LR * step / WARMUP
    return MIN_LR + 0.5 * (LR - MIN_LR) * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP)))


def main(text_file, folder):
    text = Path(text_file).read_bytes()
    p = {name: tensor.requires_grad_() for name, tensor in load_file(folder / "init.safetensors").items()}
    n_layer = 1 + max(int(name.split(".")[2]) for name in p if ".layers." in name)
    no_decay = [t for name, t in p.items() if t.dim() < 2 or name.endswith("A_log")]
    decay = [t for name, t in p.items() if not (t.dim() < 2 or name.endswith("A_log"))]
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": WEIGHT_DECAY}, {"params": no_decay, "weight_decay": 0.0}],
                                  lr=LR, betas=BETAS, eps=EPS)
    losses, norms = [], []
    n = BATCH_SIZE * SEQ_LEN
    for step in range(1, STEPS + 1):
        begin = (step - 1) * n
        tokens = torch.tensor(list(text[begin : begin + n])).view(BATCH_SIZE, SEQ_LEN)
        targets = torch.tensor(list(text[begin + 1 : begin + n + 1]))
        loss = F.cross_entropy(language_model(p, tokens, n_layer).view(n, -1), targets)
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(list(p.values()), CLIP).item())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.step()
        losses.append(loss.item())
    result = {"steps": STEPS, "seq_len": SEQ_LEN, "batch_size": BATCH_SIZE, "lr": LR, "min_lr": MIN_LR, "warmup": WARMUP,
              "loss": losses, "grad_norm": norms}
    (folder / "curve.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    main(sys.argv[1], Path(sys.argv[2]))
