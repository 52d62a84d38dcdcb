"""A small GPT on many processes, in the manner of nanoGPT: DDP or FSDP2, checkpoints, and ActiveAdamW.

It reads the texts of Python's own manual that come with ``pydoc``, byte by byte.

    pip install --no-build-isolation .
    torchrun --standalone --nproc-per-node 2 examples/gpt.py --parallel fsdp --steps 100 --checkpoint checkpoints/gpt
    torchrun --standalone --nproc-per-node 2 examples/gpt.py --parallel fsdp --steps 200 --checkpoint checkpoints/gpt

The second command goes on where the first one has stopped, with the bits that a run of 200 steps has.
"""

import argparse
import gc
import os
import shutil
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fused_adaptive as fa

LENGTH, WIDTH, HEADS, LAYERS, BATCH = 64, 128, 4, 2, 16
TEXT = torch.tensor(list("\n".join(topics.values()).encode()))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(256, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256))

    def forward(self, tokens):
        return self.head(self.blocks(self.tokens(tokens) + self.positions.weight))


def parallelize(model, how, device):
    if how == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def batch(step):
    """Of this rank. It depends on the step and the rank only, so that a run that was resumed sees the same."""
    generator = torch.Generator().manual_seed(step * dist.get_world_size() + dist.get_rank())
    starts = torch.randint(len(TEXT) - LENGTH, (BATCH, 1), generator=generator)
    rows = TEXT[starts + torch.arange(LENGTH + 1)]
    return rows[:, :-1], rows[:, 1:]


def state(model, optimizer, step):
    """What a checkpoint has. With ``dcp`` it may be loaded with another number of processes."""
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
        "step": torch.tensor(step),
    }


def resume(folder, model, optimizer):
    if not (folder / ".metadata").exists():
        return 0
    loaded = state(model, optimizer, 0)
    dcp.load(loaded, checkpoint_id=folder)
    set_model_state_dict(model, loaded["model"])
    set_optimizer_state_dict(model, optimizer, loaded["optimizer"])
    return int(loaded["step"])


def save(saved, folder):
    """Writes the checkpoint beside the old one, which is removed when the new one is complete."""
    new = folder.with_name(f"{folder.name}.new")
    dcp.save(saved, checkpoint_id=new)
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)
    dist.barrier()


def train(args, device):
    torch.manual_seed(0)
    model = parallelize(GPT().to(device), args.parallel, device)
    # An "epoch" of text is whatever one makes it: here rates adapt every 20 steps. Biases and norms do not decay.
    optimizer = fa.ActiveAdamW(fa.param_groups(model, weight_decay=0.1), lr=1e-4, interval=20, max_grad_norm=1.0)

    step = resume(args.checkpoint, model, optimizer)
    while step < args.steps:
        inputs, targets = (tokens.to(device) for tokens in batch(step))
        loss = nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        if step % 20 == 0:
            dist.all_reduce(loss.detach_(), op=dist.ReduceOp.SUM)
            if dist.get_rank() == 0:
                rate = optimizer.learning_rates()[0]["mean"]
                print(f"step {step} loss {loss.item() / dist.get_world_size():.6f} mean rate {rate:.2e}", flush=True)
    save(state(model, optimizer, step), args.checkpoint)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--parallel", choices=["ddp", "fsdp"], default="ddp")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--checkpoint", type=Path, required=True)
    args = parser.parse_args()

    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    train(args, device)
    gc.collect()  # a model that still holds the process group would wait for ranks that have gone
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
