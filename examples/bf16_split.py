"""Training in bfloat16 without float32 copies: the 16 bits that a weight lacks live in the optimizer's state.

bfloat16 has 8 bits of precision, so that small updates round away and a model stops learning. With ``master="split"``
every weight trains as an exact float32 for 2 more bytes, instead of 4 for a float32 copy.

    pip install --no-build-isolation . scikit-learn
    python examples/bf16_split.py
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import fused_adaptive as fa

images, labels = load_digits(return_X_y=True)
images, labels = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)


def train(dtype, master):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10)).to(dtype)
    optimizer = fa.AdamW(model.parameters(), lr=1e-5, master=master)
    for _ in range(1500):
        batch = torch.randint(1500, (64,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[batch].to(dtype)).float(), labels[batch]).backward()
        optimizer.step()
    model.to(torch.float32)
    return nn.functional.cross_entropy(model(images[1500:]), labels[1500:]).item()


if __name__ == "__main__":
    for dtype, master in ((torch.float32, "none"), (torch.bfloat16, "none"), (torch.bfloat16, "split")):
        print(f"{dtype!s:<15} master={master:<6} test loss {train(dtype, master):.3f}")
