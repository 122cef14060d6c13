"""Train a sparse network in several processes, one for each device, so that a process may die at any moment.

    torchrun --standalone --nproc-per-node 2 --max-restarts 3 examples/train_distributed.py --checkpoint run.pt2

Rank 0 writes a checkpoint every ``--every`` steps, whole or not at all. When a process dies torchrun ends the others and starts all
anew; they go on from the last checkpoint, as does the same command given again later. With as many processes as before, what comes
out is bit for bit what an undisturbed run leaves: weights, masks, optimizer, random states. Two things are needed for that besides
the checkpoint. The batch of a step is a function of the step. And every process has a random state of its own (its dropout is its
own), so all of them are kept.

The images are drawn, so that nothing has to be downloaded; put your own data set in the place of :class:`Images`.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset

import sift_compiler as sift


class Images(Dataset[tuple[Tensor, Tensor]]):
    """Ten random patterns of 3 x 16 x 16 under noise, to be told apart."""

    def __init__(self, count: int = 4096) -> None:
        generator = torch.Generator().manual_seed(0)
        patterns = torch.randn(10, 3, 16, 16, generator=generator)
        self.labels = torch.randint(0, 10, (count,), generator=generator)
        self.images = patterns[self.labels] + 2 * torch.randn(count, 3, 16, 16, generator=generator)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, place: Any) -> tuple[Tensor, Tensor]:
        return self.images[place], self.labels[place]


def dense_network() -> nn.Module:
    """Three convolutions with batch norm, dropout, and a classifier."""
    layers: list[nn.Module] = []
    for before, after in ((3, 16), (16, 32), (32, 32)):
        layers += [nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.2), nn.Linear(128, 10))


def batch_of(step: int, data: Images, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """This rank's share of the batch of ``step``: as a sampler that shuffles every epoch, but with no state to keep."""
    per_epoch = len(data) // size
    epoch, place = divmod(step, per_epoch)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed + epoch))
    share = order[place * size : (place + 1) * size].chunk(dist.get_world_size())[dist.get_rank()]
    return data[share]


def random_states(device: torch.device) -> list[Tensor]:
    """The states of every rank's generators, first the CPU's, then those of the devices. Every rank has to call it."""
    found = []
    for own in [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else []):
        everyone = [torch.empty_like(own, device=device) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, own.to(device))
        found += [state.cpu() for state in everyone]
    return found


def restore_random_states(states: list[Tensor], device: torch.device) -> None:
    """Give this rank its own again, if there are as many ranks as there were."""
    rank, world = dist.get_rank(), dist.get_world_size()
    if len(states) != (2 if device.type == "cuda" else 1) * world:
        torch.manual_seed(rank)
        return
    torch.set_rng_state(states[rank])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[world + rank], device)


def train(arguments: argparse.Namespace, device: torch.device) -> None:
    """From the last checkpoint, or from the start, to the end."""
    path: Path = arguments.checkpoint
    checkpoint = sift.load_checkpoint(path) if path.exists() else None
    if checkpoint is None:
        torch.manual_seed(arguments.seed)  # the same in all processes: the same weights and masks
        example = torch.zeros(2, 3, 16, 16)
        model = sift.rewrite(dense_network(), example, sift.SparseWide(sparsity=arguments.sparsity))
        method: Any = sift.RigL(delta_t=arguments.delta_t, end_step=arguments.steps * 3 // 4)
        torch.manual_seed(arguments.seed + 1 + dist.get_rank())  # another in each: each drops out by itself
    else:
        model, method = checkpoint.module, checkpoint.method
    devices = [device] if device.type == "cuda" else None
    # After its first step DistributedDataParallel rearranges the buckets it sums gradients in, and three or more numbers add up to
    # something else in another order: a run that starts anew would differ in its first step. With this option it does not.
    parallel = DistributedDataParallel(model.to(device), device_ids=devices, find_unused_parameters=True)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.steps)
    masks = sift.schedule(parallel, optimizer, method)
    first = 0
    if checkpoint is not None:
        checkpoint.restore(optimizer=optimizer, masks=masks)
        rates.load_state_dict(checkpoint.extra["rates"])
        restore_random_states(checkpoint.extra["random"], device)
        first = int(checkpoint.extra["step"])
        say(f"resumed at step {first}")
    run = torch.compile(parallel, backend="sift") if arguments.compile else parallel
    data = Images()
    for step in range(first, arguments.steps):
        images, labels = batch_of(step, data, arguments.batch, arguments.seed)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(run(images.to(device)), labels.to(device))
        loss.backward()
        optimizer.step()
        rates.step()
        if (step + 1) % arguments.every == 0 or step + 1 == arguments.steps:
            extra = {"step": step + 1, "rates": rates.state_dict(), "random": random_states(device)}
            if dist.get_rank() == 0:
                sift.save(parallel, path, masks=masks, optimizer=optimizer, extra=extra)
            say(f"step {step + 1}: loss {loss.item():.4f}, {len(masks.updates)} mask updates")


def meet(backend: str) -> None:
    """Join the other processes.

    torchrun lets all its attempts share one store, where the addresses of processes that died still stand. Who comes back a little earlier
    than the others would read them and wait for nobody, so that every attempt gets keys of its own.
    """
    store, rank, world = next(dist.rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group(backend, store=dist.PrefixStore(f"attempt_{attempt}", store), rank=rank, world_size=world)


def say(text: str) -> None:
    """Print in one process."""
    if dist.get_rank() == 0:
        print(text, flush=True)


def main() -> None:
    """Read the arguments, join the other processes, train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="file to go on from, if there is one, and to write"
    )
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps in all")
    parser.add_argument("--every", type=int, default=50, help="steps between two checkpoints")
    parser.add_argument("--batch", type=int, default=64, help="images of all processes together in a step")
    parser.add_argument("--sparsity", type=float, default=0.75)
    parser.add_argument("--delta-t", type=int, default=20, help="steps between two mask updates")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="run sparse layers with compiled kernels")
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    meet("nccl" if cuda else "gloo")
    train(arguments, device)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
