"""A model's folder: config.json and safetensors of some gigabytes each, of seeded weights.

    folder = written(model, root)      # made once; later calls find it

Weights are made on a GPU where there is one, and are then others than those of a CPU: the folder is what is compared
with, not the seed.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch

from servers.models.architectures import Model, Tensor
from servers.models.tensors import write

SHARD = 4 << 30  # bytes, about


def written(model: Model, root: Path, device: str = "") -> Path:
    folder = root / model.name
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    tensors = model.tensors()
    index: dict[str, str] = {}
    shards = list(_shards(tensors))
    for number, names in enumerate(shards, 1):
        file = folder / f"model-{number:05}-of-{len(shards):05}.safetensors"
        entries = [(name, tensors[name].shape, dtype_of(tensors[name])) for name in names]
        write(file, entries, (made(model.seed, name, tensors[name], place) for name in names))
        index |= dict.fromkeys(names, file.name)
    total = sum(nbytes(tensor) for tensor in tensors.values())
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)
    (folder / "config.json").write_text(json.dumps(model.config(), indent=2))  # last: then the folder is whole
    return folder


def made(seed: int, name: str, tensor: Tensor, device: str) -> torch.Tensor:
    """The values, which depend on seed, name and kind of device alone."""
    if tensor.kind == "fp32":
        return torch.full(tensor.shape, tensor.mean, dtype=torch.float32)
    generator = torch.Generator(device).manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    values = torch.empty(tensor.shape, device=device).normal_(0.0, tensor.deviation, generator=generator)
    if tensor.signs:
        sides = torch.rand(tensor.shape, device=device, generator=generator) < 0.5
        values += torch.where(sides, -tensor.mean, tensor.mean) - tensor.minus
    else:
        values += tensor.mean
    if tensor.kind == "fp8":
        values = (values / tensor.scale).clamp_(-448.0, 448.0)
    return values.to(dtype_of(tensor))


def dtype_of(tensor: Tensor) -> torch.dtype:
    return {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "fp32": torch.float32}[tensor.kind]


def nbytes(tensor: Tensor) -> int:
    return torch.Size(tensor.shape).numel() * dtype_of(tensor).itemsize


def _shards(tensors: dict[str, Tensor]) -> Iterator[list[str]]:
    names: list[str] = []
    held = 0
    for name, tensor in tensors.items():
        if names and held + nbytes(tensor) > SHARD:
            yield names
            names, held = [], 0
        names.append(name)
        held += nbytes(tensor)
    yield names
