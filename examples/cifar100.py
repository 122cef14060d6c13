"""CIFAR-100 with the recipe of the Sparse-IFT paper: ResNet-18 dense, or Sparse Wide with a moving mask, at equal FLOPs.

    python examples/cifar100.py --data DIR --sparsity 0.75 --method rigl --epochs 200 --device cuda

Recipe (Thangarasa et al. 2024, App. C): batch 128, SGD with Nesterov momentum .9, weight decay 5e-4 (none on biases and
norms), learning rate .1, times .2 at 30 %, 60 % and 80 % of the epochs, random crops and flips; RigL with delta_t 100,
drop fraction .3, until 75 % of training. ``--sparsity 0`` trains the dense network. Prints one JSON object at the end.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sift_compiler as sift
from sift_compiler.demo.datasets import load_dataset

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from models import resnet18_cifar


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Random 4-pixel shifts and horizontal flips, drawn per image; [N, C, 32, 32] → the same shape."""
    count, _, height, width = images.shape
    padded = F.pad(images, (4, 4, 4, 4))
    device = images.device
    top, left = (torch.randint(0, 9, (count,), generator=generator, device=device) for _ in range(2))
    flip = torch.rand(count, generator=generator, device=device) < 0.5
    rows = top[:, None] + torch.arange(height, device=device)
    columns = torch.arange(width, device=device).expand(count, -1)
    columns = left[:, None] + torch.where(flip[:, None], width - 1 - columns, columns)
    index = torch.arange(count, device=device)
    return padded[index[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Weights decay; biases and norms do not. The compact ``values`` of a sparse layer are weights of one dimension."""
    decayed, free = [], []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            (decayed if name in ("weight", "values") and not isinstance(module, nn.BatchNorm2d) else free).append(
                parameter
            )
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, batch: int, dtype: torch.dtype) -> float:
    """Share of right answers, in [0, 1]."""
    model.eval()
    right = 0
    for x, y in zip(images.split(batch), labels.split(batch), strict=True):
        with torch.autocast(images.device.type, dtype=dtype, enabled=dtype != torch.float32):
            right += int((model(x).argmax(1) == y).sum())
    model.train()
    return right / len(labels)


def build(arguments: argparse.Namespace, example: Tensor) -> tuple[nn.Module, float]:
    """The network on the CPU, and its FLOP ratio to the dense one."""
    torch.manual_seed(arguments.seed)
    dense = resnet18_cifar(classes=100)
    if not arguments.sparsity:
        return dense, 1.0
    sparse = sift.rewrite(dense, (example,), sift.SparseWide(sparsity=arguments.sparsity, seed=arguments.seed))
    return sparse, sift.report(dense, sparse, (example,)).ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of CIFAR-100")
    parser.add_argument("--sparsity", type=float, default=0.75)
    parser.add_argument("--method", choices=("static", "set", "rigl"), default="rigl")
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bfloat16", action="store_true", help="mixed precision")
    parser.add_argument("--compile", action="store_true", help='torch.compile(backend="sift")')
    parser.add_argument("--limit", type=int, help="use only so many training images")
    parser.add_argument("--out", help="append the JSON result to this file as well")
    arguments = parser.parse_args()

    data = load_dataset("cifar100", arguments.data)
    device = torch.device(arguments.device)
    limit = arguments.limit or len(data.train_labels)
    x_train, y_train = data.train_images[:limit].to(device), data.train_labels[:limit].to(device)
    x_test, y_test = data.test_images.to(device), data.test_labels.to(device)
    model, ratio = build(arguments, x_train[:2].cpu())
    model = model.to(device).train()
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    optimizer = torch.optim.SGD(parameter_groups(model, 5e-4), 0.1, momentum=0.9, nesterov=True)
    milestones = [round(arguments.epochs * share) for share in (0.3, 0.6, 0.8)]
    rate = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, 0.2)
    steps = -(-limit // arguments.batch)
    masks = None
    if arguments.sparsity:
        end = int(0.75 * arguments.epochs * steps)
        method = {
            "static": lambda: sift.Static(),
            "set": lambda: sift.SET(end_step=end, seed=arguments.seed),
            "rigl": lambda: sift.RigL(end_step=end, seed=arguments.seed),
        }[arguments.method]()
        masks = sift.schedule(model, optimizer, method)
    run = torch.compile(model, backend="sift") if arguments.compile else model
    dtype = torch.bfloat16 if arguments.bfloat16 else torch.float32
    generator = torch.Generator(device).manual_seed(arguments.seed)
    curve, start = [], time.perf_counter()
    for epoch in range(arguments.epochs):
        order = torch.randperm(limit, generator=generator, device=device)
        total = torch.zeros((), device=device)
        for chosen in order.split(arguments.batch):
            x, y = augment(x_train[chosen], generator), y_train[chosen]
            with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                loss = F.cross_entropy(run(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(y)
        rate.step()
        curve.append({"epoch": epoch + 1, "loss": total.item() / limit,
                      "accuracy": accuracy(run, x_test, y_test, 1000, dtype)})  # fmt: skip
        print(json.dumps({**curve[-1], "seconds": round(time.perf_counter() - start, 1)}), file=sys.stderr, flush=True)
    result = {
        "sparsity": arguments.sparsity, "method": arguments.method if arguments.sparsity else "dense",
        "epochs": arguments.epochs, "batch": arguments.batch, "seed": arguments.seed, "device": str(device),
        "dtype": str(dtype), "torch": torch.__version__, "flop_ratio": ratio, "train_images": limit,
        "parameters": sum(p.numel() for p in model.parameters()), "accuracy": curve[-1]["accuracy"],
        "best_accuracy": max(point["accuracy"] for point in curve),
        "mask_updates": len(masks.updates) if masks is not None else 0,
        "seconds": time.perf_counter() - start, "curve": curve,
    }  # fmt: skip
    if arguments.out:
        with open(arguments.out, "a") as file:
            file.write(json.dumps(result) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "curve"}))


if __name__ == "__main__":
    main()
