#!/usr/bin/env python3
"""Writes tests/golden/formats/: weight files as PyTorch and safetensors themselves write them.

Needs torch and safetensors (PyPI). Values follow a rule that the tests know: element i of a tensor is i / 4 - 1 (floats) or i
(integers), so no expected values need to be stored.
"""
import pathlib

import torch
from safetensors.torch import save_file

folder = pathlib.Path(__file__).resolve().parent.parent / "tests" / "golden" / "formats"


def values(shape, dtype):
    n = 1
    for extent in shape:
        n *= extent
    x = torch.arange(n, dtype=torch.float64)
    if dtype.is_floating_point:
        x = x / 4 - 1
    return x.to(dtype).reshape(shape)


def tensors():
    return {
        "embedding.weight": values((6, 4), torch.float32),
        "conv1d.weight": values((4, 1, 3), torch.bfloat16),
        "half": values((5,), torch.float16),
        "double": values((2, 2), torch.float64),
        "int": values((3,), torch.int32),
        "long": values((3,), torch.int64),
        "byte": values((7,), torch.uint8),
        "scalar": values((), torch.float32),
        "empty": values((0, 3), torch.float32),
        "rank5": values((1, 2, 1, 2, 1), torch.float32),
        "bool": torch.tensor([True, False]),
    }


class Model(torch.nn.Module):
    """State dicts of modules carry _metadata, which plain dicts do not."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 2)
        self.linear.weight.data = values((2, 3), torch.float32)
        self.linear.bias.data = values((2,), torch.float32)
        self.head = torch.nn.Linear(3, 2, bias=False)
        self.head.weight = self.linear.weight  # tied


def main():
    folder.mkdir(parents=True, exist_ok=True)
    plain = tensors()
    save_file(plain, folder / "plain.safetensors", metadata={"format": "pt", "note": "golden"})
    base = values((4, 3), torch.float32)
    torch.save(
        plain
        | {
            "rows": base[1:3],  # part of a storage
            "transposed": base.t(),
            "parameter": torch.nn.Parameter(values((2,), torch.float32)),
            "number": 3,
        },
        folder / "plain.bin",
    )
    torch.save(Model().state_dict(), folder / "module.bin")
    torch.save(Model().state_dict(), folder / "protocol5.bin", pickle_protocol=5)
    torch.save({"w": values((2,), torch.float32)}, folder / "legacy.bin", _use_new_zipfile_serialization=False)
    torch.save({"state_dict": {"w": values((2,), torch.float32)}}, folder / "nested.bin")


if __name__ == "__main__":
    main()
