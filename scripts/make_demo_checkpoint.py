"""Writes the checkpoint that the demo converts: a timm ResNet-18, saved the way that causes the most common question."""

import sys
from pathlib import Path

import torch

from ckptconv.target.torchvision_ops import import_with_torchvision


def main(path: Path) -> None:
    timm = import_with_torchvision("timm")
    torch.manual_seed(0)
    model = torch.nn.DataParallel(timm.create_model("resnet18"))
    torch.save(model.state_dict(), path)
    print(f"made {path}: torch.save(torch.nn.DataParallel(resnet18).state_dict())")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
