#!/usr/bin/env python3
"""Times mamba_ssm on the shapes of scripts/bench_gpu, where PyTorch, mamba_ssm (with its Mamba-1 CUDA scan:
MAMBA_KEEP_CUDA_BUILD=TRUE) and causal_conv1d are installed. Prints milliseconds, medians over CUDA events.

  python3 scripts/bench_mamba_ssm.py [scan] [conv] [train] [generate]
"""
import importlib.machinery
import importlib.util
import pathlib
import sys

import torch

loader = importlib.machinery.SourceFileLoader("bench_gpu", str(pathlib.Path(__file__).with_name("bench_gpu")))
shapes = importlib.util.module_from_spec(importlib.util.spec_from_loader("bench_gpu", loader))
loader.exec_module(shapes)


def median_ms(run, repeats=20, warmup=3):
    for _ in range(warmup):
        run()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[repeats // 2]


def forward_and_backward(forward, inputs):
    """Median forward time, and that of the backward pass alone."""
    with torch.no_grad():
        fwd = median_ms(forward)
    out = forward()
    gradient = torch.randn_like(out)
    bwd = median_ms(lambda: torch.autograd.grad(out, inputs, gradient, retain_graph=True))
    return fwd, bwd


def scan():
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    print("selective scan: sequences, d_inner, tokens, d_state: forward ms, backward ms")
    for seqs, d_inner, tokens, d_state in shapes.SCAN:
        def random(*shape, dtype=torch.bfloat16):
            return torch.randn(*shape, device="cuda", dtype=dtype).requires_grad_()
        u, dt, z = (random(seqs, d_inner, tokens) for _ in range(3))
        B, C = (random(seqs, 1, d_state, tokens) for _ in range(2))
        A = (-1 - 15 * torch.rand(d_inner, d_state, device="cuda")).requires_grad_()
        D = random(d_inner, dtype=torch.float32)
        bias = (-6 + 4 * torch.rand(d_inner, device="cuda")).requires_grad_()
        fwd, bwd = forward_and_backward(
            lambda: selective_scan_fn(u, dt, A, B, C, D, z=z, delta_bias=bias, delta_softplus=True), (u, dt, A, B, C, D, z, bias))
        print(f"{seqs}, {d_inner}, {tokens}, {d_state}: {fwd:.4f}, {bwd:.4f}", flush=True)


def conv():
    from causal_conv1d import causal_conv1d_fn
    print("causal conv1d: sequences, d_inner, tokens: forward ms, backward ms")
    for seqs, d_inner, tokens in shapes.CONV:
        x = torch.randn(seqs, d_inner, tokens, device="cuda", dtype=torch.bfloat16).requires_grad_()
        weight = torch.randn(d_inner, 4, device="cuda").requires_grad_()
        bias = torch.randn(d_inner, device="cuda").requires_grad_()
        fwd, bwd = forward_and_backward(lambda: causal_conv1d_fn(x, weight, bias, activation="silu"), (x, weight, bias))
        print(f"{seqs}, {d_inner}, {tokens}: {fwd:.4f}, {bwd:.4f}", flush=True)


def train():
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
    sizes = {"130m": (768, 24), "370m": (1024, 48), "1.4b": (2048, 48), "2.8b": (2560, 64)}
    print("training step: model, batch: ms, tokens/s, peak GiB")
    for size, batch in shapes.TRAIN:
        seqs, tokens = map(int, batch.split("x"))
        d_model, n_layer = sizes[size]
        model = MambaLMHeadModel(MambaConfig(d_model=d_model, n_layer=n_layer, vocab_size=50277), device="cuda")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        text = torch.randint(0, 50277, (seqs, tokens + 1), device="cuda")

        def step():
            with torch.autocast("cuda", dtype=torch.bfloat16):
                logits = model(text[:, :-1]).logits
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), text[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        torch.cuda.reset_peak_memory_stats()
        ms = median_ms(step, 10)
        print(f"{size}, {batch}: {ms:.1f}, {seqs * tokens / ms * 1e3:,.0f}, {torch.cuda.max_memory_allocated() / 2**30:.1f}", flush=True)
        del model, optimizer
        torch.cuda.empty_cache()


def generate():
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
    sizes = {"130m": (768, 24), "1.4b": (2048, 48), "2.8b": (2560, 64), "6.9b": (4096, 64)}
    print("generation behind a prompt of 2048, CUDA graphs: model, sequences: prompt tokens/s, written tokens/s")
    written = 128
    for size, seqs, quantize in shapes.DECODE:
        if quantize != "none":
            continue
        d_model, n_layer = sizes[size]
        model = MambaLMHeadModel(MambaConfig(d_model=d_model, n_layer=n_layer, vocab_size=50277), device="cuda", dtype=torch.bfloat16).eval()
        text = torch.randint(0, 50277, (seqs, 2048), device="cuda")

        def run(tokens):
            return model.generate(input_ids=text, max_length=2048 + tokens, cg=True, top_k=1)

        with torch.no_grad():
            one, many = (median_ms(lambda: run(n), 3) for n in (1, 1 + written))
        print(f"{size}, {seqs}: {seqs * 2048 / one * 1e3:,.0f}, {seqs * written / (many - one) * 1e3:,.0f}", flush=True)
        del model
        torch.cuda.empty_cache()


if __name__ == "__main__":
    for name in sys.argv[1:] or ["scan", "conv", "train", "generate"]:
        {"scan": scan, "conv": conv, "train": train, "generate": generate}[name]()
