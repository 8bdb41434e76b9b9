#!/usr/bin/env python3
"""Makes tests/golden/model: tiny random Mamba models in the formats of transformers and state-spaces, with the logits, greedy
continuations and gradients that transformers' MambaForCausalLM (its plain PyTorch path, on the CPU) computes for them.

Needs torch, transformers, safetensors and numpy from PyPI. Run from anywhere: python scripts/make_golden_model.py [NAME..]

Each folder holds a checkpoint and expected.safetensors:
  tokens (40), targets (40; -100: not scored), greedy (256: the continuation of tokens)   i32
  logits_f32, logits_bf16 (transformers in that type, stored as f32), logits_f64           (40, vocab)
  gradient_error_bf16 (1)  f64: how far transformers' gradients in bf16 are from those, relative, over all parameters
  loss (1)  f64: mean over the scored targets;  grad.NAME  f64: its gradient by each parameter
"""

import json
import math
import pathlib
import shutil
import sys

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import MambaConfig, MambaForCausalLM
from transformers.models.mamba import modeling_mamba

OUT = pathlib.Path(__file__).resolve().parent.parent / "tests" / "golden" / "model"
EPS = float(np.float32(1e-5))  # exact in float, so that float and double runs share it

# name: (hidden, layers, intermediate, d_conv, d_state, dt_rank, vocab), switches, (format, dtype on disk)
MODELS = {
    "intermediate_not_double": ((20, 3, 28, 4, 16, "auto", 50), {}, ("hf", torch.float32)),
    "bias_sharded": ((12, 2, 24, 2, 5, 1, 37), dict(use_bias=True), ("hf-sharded", torch.float32)),
    "untied_no_conv_bias_bf16": ((16, 2, 32, 3, 1, 7, 64),
                                 dict(use_conv_bias=False, tie_word_embeddings=False), ("hf", torch.bfloat16)),
    "large_state_f16": ((8, 2, 16, 4, 32, "auto", 33), dict(residual_in_fp32=False), ("hf", torch.float16)),
    "bias_untied_residual_bf16": ((24, 2, 30, 3, 4, 5, 41),
                                  dict(use_bias=True, use_conv_bias=False, residual_in_fp32=False,
                                       tie_word_embeddings=False, layer_norm_epsilon=2.0**-10), ("hf", torch.bfloat16)),
    "state_spaces_padded": ((16, 2, 32, 4, 16, "auto", 45), {}, ("state-spaces", torch.float32)),
    "state_spaces_odd": ((10, 2, 30, 2, 3, 2, 40), dict(use_bias=True, use_conv_bias=False), ("state-spaces", torch.bfloat16)),
}


class DoubleTorch:
    """The torch module with float32 meaning float64: transformers' explicit casts to float32 then keep double."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


class in_double:
    def __enter__(self):
        self.float = torch.Tensor.float
        torch.Tensor.float = torch.Tensor.double
        modeling_mamba.torch = DoubleTorch()

    def __exit__(self, *_):
        torch.Tensor.float = self.float
        modeling_mamba.torch = torch


def randomize(model, generator):
    """Weights large enough that every parameter matters and greedy text does not settle at once, with gains of about one:
    larger ones amplify the rounding of float by much more than the arithmetic under test."""

    def normal(shape, std):
        return torch.randn(shape, generator=generator) * std

    def uniform(shape, low, high):
        return torch.rand(shape, generator=generator) * (high - low) + low

    for name, p in model.named_parameters():
        if name.endswith("A_log"):
            value = torch.log(uniform(p.shape, 0.3, p.shape[1] + 0.5))
        elif name.endswith("dt_proj.bias"):
            dt = torch.exp(uniform(p.shape, math.log(0.02), math.log(0.6)))
            value = dt + torch.log(-torch.expm1(-dt))
        elif "norm" in name or name.endswith(".D"):
            value = 1 + normal(p.shape, 0.3)
        elif name.endswith("bias"):
            value = normal(p.shape, 0.1)
        elif "embeddings" in name:
            value = normal(p.shape, 0.2)  # small: else the residual stream repeats the last token for ever
        elif "conv1d" in name:
            value = normal(p.shape, 0.5)
        else:
            value = normal(p.shape, 1.0 / math.sqrt(p.shape[-1]))
        p.data.copy_(value)


def state_spaces_config(c, vocab):
    ssm = dict(d_state=c.state_size, d_conv=c.conv_kernel, expand=c.intermediate_size // c.hidden_size,
               bias=c.use_bias, conv_bias=c.use_conv_bias, dt_rank=c.time_step_rank)
    standard = dict(d_state=16, d_conv=4, expand=2, bias=False, conv_bias=True, dt_rank=math.ceil(c.hidden_size / 16))
    return dict(d_model=c.hidden_size, n_layer=c.num_hidden_layers, vocab_size=vocab,
                ssm_cfg={k: v for k, v in ssm.items() if v != standard[k]}, rms_norm=True,
                residual_in_fp32=c.residual_in_fp32, fused_add_norm=True, pad_vocab_size_multiple=8)


def save(model, folder, form, dtype, sizes):
    model = model.to(dtype)
    if form == "state-spaces":
        state = {k.replace("backbone.embeddings.", "backbone.embedding."): v for k, v in model.state_dict().items()}
        torch.save(state, folder / "pytorch_model.bin")
        config = state_spaces_config(model.config, sizes[-1])
    else:
        model.save_pretrained(folder, max_shard_size="12KB" if form == "hf-sharded" else "1GB")
        (folder / "generation_config.json").unlink(missing_ok=True)
        config = json.loads((folder / "config.json").read_text())
        if sizes[5] == "auto":
            config["time_step_rank"] = "auto"
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def logits_of(model, tokens):
    with torch.no_grad():
        return model(tokens[None], use_cache=False).logits[0]


def greedy(model, tokens, count):
    out, ids, cache = [], tokens[None], None
    margin = math.inf
    for _ in range(count):
        with torch.no_grad():
            r = model(ids, cache_params=cache, use_cache=True)
        cache, last = r.cache_params, r.logits[0, -1]
        top = torch.topk(last, 2).values
        margin = min(margin, float((top[0] - top[1]) / last.abs().max()))
        out.append(int(last.argmax()))
        ids = torch.tensor([[out[-1]]])
    return torch.tensor(out, dtype=torch.int32), margin


def gradient_vector(model):
    return torch.cat([p.grad.double().flatten() for p in model.parameters()])


def make(name, seed):
    sizes, switches, (form, dtype) = MODELS[name]
    hidden, layers, intermediate, conv, state, rank, vocab = sizes
    padded = -(-vocab // 8) * 8 if form == "state-spaces" else vocab
    config = MambaConfig(**{**dict(
        hidden_size=hidden, num_hidden_layers=layers, intermediate_size=intermediate, conv_kernel=conv, state_size=state,
        time_step_rank=rank, vocab_size=padded, layer_norm_epsilon=EPS, tie_word_embeddings=True), **switches})
    generator = torch.Generator().manual_seed(seed)
    model = MambaForCausalLM(config).eval()
    randomize(model, generator)
    model.to(dtype).to(torch.float32)  # what the file holds
    tokens = torch.randint(0, vocab, (40,), generator=generator)
    targets = torch.randint(0, vocab, (40,), generator=generator)
    targets[[3, 17, 39]] = -100

    expected = {"tokens": tokens.int(), "targets": targets.int(), "logits_f32": logits_of(model, tokens)}
    expected["greedy"], margin = greedy(model, tokens, 256)
    if margin < 2e-4 or len(set(expected["greedy"].tolist())) < 3:  # too close to a tie, or too dull
        return None
    model.to(torch.bfloat16)
    logits = model(tokens[None], use_cache=False).logits[0]
    torch.nn.functional.cross_entropy(logits, targets).backward()
    expected["logits_bf16"] = logits.detach().float()
    gradients_bf16 = gradient_vector(model)
    model = MambaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    randomize(model, generator)
    folder = OUT / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    save(model, folder, form, dtype, sizes)

    with in_double():
        model = model.double()
        logits = model(tokens[None], use_cache=False).logits[0]
        assert logits.dtype == torch.float64
        loss = torch.nn.functional.cross_entropy(logits, targets)
        loss.backward()
    expected["logits_f64"] = logits.detach()
    expected["loss"] = loss.detach()[None]
    gradients = gradient_vector(model)
    expected["gradient_error_bf16"] = ((gradients_bf16 - gradients).norm() / gradients.norm())[None]
    for parameter, value in model.named_parameters():
        expected["grad." + parameter] = value.grad
    difference = float((expected["logits_f32"] - logits.detach()).norm() / logits.detach().norm())
    assert difference < 2e-6, difference
    save_file({k: v.contiguous() for k, v in expected.items()}, folder / "expected.safetensors")
    size = sum(f.stat().st_size for f in folder.iterdir())
    print(f"{name}: {size / 1024:.0f} KiB, {len(set(expected['greedy'].tolist()))} different tokens, "
          f"margin {margin:.1e}, f32 against f64 {difference:.1e}")
    return True


def main():
    for i, name in enumerate(MODELS):
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        seed = 100 * i
        while not make(name, seed):
            seed += 1


if __name__ == "__main__":
    main()
