#!/usr/bin/env python3
"""Times a plain Transformer of the width of Mamba 1.4B (24 layers x 2048, 16 heads of 128, no grouped queries, MLP of 8192,
vocabulary 50280; random bf16 weights) in PyTorch: a decoding step as one CUDA graph over a full key-value cache, and the pass
over the prompt with scaled_dot_product_attention. Prints one JSON object, milliseconds, medians; null: does not fit in memory.

  python3 scripts/bench_transformer.py > transformer.json
"""
import json
import sys

import torch
import torch.nn.functional as F

from bench_mamba_ssm import median_ms

LAYERS, WIDTH, HEADS, VOCAB = 24, 2048, 16, 50280
HEAD = WIDTH // HEADS
CONTEXTS, BATCHES = (2048, 16384, 131072), (1, 8, 32, 128)


class Transformer:
    def __init__(self):
        def matrix(rows, columns):
            return torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) / columns ** 0.5
        self.layers = [(matrix(3 * WIDTH, WIDTH), matrix(WIDTH, WIDTH), matrix(4 * WIDTH, WIDTH), matrix(WIDTH, 4 * WIDTH))
                       for _ in range(LAYERS)]
        self.embedding = matrix(VOCAB, WIDTH)
        self.norm = torch.ones(WIDTH, device="cuda", dtype=torch.bfloat16)

    def run(self, tokens, cache):
        """tokens: (batch, length). cache: per layer keys and values (batch, heads, context, head), of which the last position is
        written; None: the whole prompt, causally."""
        batch, length = tokens.shape
        x = F.embedding(tokens, self.embedding)
        for i, (qkv, out, up, down) in enumerate(self.layers):
            q, k, v = F.linear(F.rms_norm(x, (WIDTH,), self.norm), qkv).view(batch, length, 3, HEADS, HEAD).permute(2, 0, 3, 1, 4)
            if cache is not None:
                cache[i][0][:, :, -1:] = k
                cache[i][1][:, :, -1:] = v
                k, v = cache[i]
            y = F.scaled_dot_product_attention(q, k, v, is_causal=cache is None)
            x = x + F.linear(y.transpose(1, 2).reshape(batch, length, WIDTH), out)
            x = x + F.linear(F.gelu(F.linear(F.rms_norm(x, (WIDTH,), self.norm), up)), down)
        return F.linear(F.rms_norm(x[:, -1], (WIDTH,), self.norm), self.embedding).argmax(-1)


def decode_ms(model, batch, context):
    cache = [[torch.randn(batch, HEADS, context, HEAD, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
             for _ in range(LAYERS)]
    tokens = torch.zeros(batch, 1, device="cuda", dtype=torch.long)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            model.run(tokens, cache)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens.copy_(model.run(tokens, cache).unsqueeze(1))
    return median_ms(graph.replay, 15)


def prompt_ms(model, batch, context):
    tokens = torch.randint(0, VOCAB, (batch, context), device="cuda")
    return median_ms(lambda: model.run(tokens, None), 3 if context * batch < 65536 else 1, warmup=1)


@torch.no_grad()
def main():
    model = Transformer()
    result = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "decode_ms": {}, "prompt_ms": {}}
    for name, measure, batches in (("decode_ms", decode_ms, BATCHES), ("prompt_ms", prompt_ms, (1,))):
        for batch in batches:
            for context in CONTEXTS:
                try:
                    ms = measure(model, batch, context)
                except torch.cuda.OutOfMemoryError:
                    ms = None
                torch.cuda.empty_cache()
                result[name][f"{batch}x{context}"] = ms
                print(name, batch, context, ms, file=sys.stderr, flush=True)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
