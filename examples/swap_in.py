"""A plain training loop in which one line changes: torch's AdamW, the same from this package, and one that adapts.

pip install --no-build-isolation . scikit-learn
python examples/swap_in.py
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import fused_adaptive as fa

images, labels = load_digits(return_X_y=True)  # 1797 handwritten digits of 8 x 8 pixels
dataset = TensorDataset(torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels))
train_set, test_set = random_split(dataset, [0.8, 0.2], torch.Generator().manual_seed(0))


def train(make_optimizer, epochs=15):
    torch.manual_seed(0)
    loader = DataLoader(train_set, batch_size=64, shuffle=True)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    optimizer = make_optimizer(model, loader)
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    x, y = test_set[:]
    return (model(x).argmax(1) == y).float().mean().item()


OPTIMIZERS = {
    "torch.optim.AdamW": lambda model, loader: torch.optim.AdamW(model.parameters(), lr=1e-4),
    # The same arguments, the same numbers, one pass over memory a step:
    "fa.AdamW": lambda model, loader: fa.AdamW(model.parameters(), lr=1e-4),
    # Each weight has a rate of its own, which follows the signs of its gradients, once an epoch:
    "fa.ActiveAdamW": lambda model, loader: fa.ActiveAdamW(model.parameters(), lr=1e-4, interval=len(loader)),
}

if __name__ == "__main__":
    for name, make_optimizer in OPTIMIZERS.items():
        print(f"{name:<18} accuracy {train(make_optimizer):.1%}")
