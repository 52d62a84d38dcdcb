"""Training without a search for the learning rate: ActiveAdamW from any rate, against AdamW at five.

pip install --no-build-isolation . scikit-learn
python examples/no_rate.py
"""

from swap_in import train

import fused_adaptive as fa

RATES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)


def adamw(lr):
    return train(lambda model, loader: fa.AdamW(model.parameters(), lr=lr), epochs=15)


def active_adamw(lr):
    return train(lambda model, loader: fa.ActiveAdamW(model.parameters(), lr=lr, interval=len(loader)), epochs=15)


if __name__ == "__main__":
    print("initial rate      " + "".join(f"{lr:>8.0e}" for lr in RATES))
    for name, accuracy in {"AdamW": adamw, "ActiveAdamW": active_adamw}.items():
        print(f"{name:<18}" + "".join(f"{accuracy(lr):>8.1%}" for lr in RATES))
