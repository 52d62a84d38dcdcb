"""Lightning's Trainer with ActiveAdamW on handwritten digits.

pip install --no-build-isolation '.[trainers]'
python examples/trainer_lightning.py
"""

import lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import fused_adaptive as fa
from fused_adaptive.integrations.lightning import EndIntervalCallback


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))

    def training_step(self, batch, index):
        x, y = batch
        return nn.functional.cross_entropy(self.model(x), y)

    def validation_step(self, batch, index):
        x, y = batch
        self.log("accuracy", (self.model(x).argmax(1) == y).float().mean())

    def configure_optimizers(self):
        return fa.ActiveAdamW(self.parameters(), lr=1e-4, interval=None)  # the callback ends intervals


if __name__ == "__main__":
    lightning.seed_everything(0)
    images, labels = load_digits(return_X_y=True)
    dataset = TensorDataset(torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels))
    train_set, test_set = random_split(dataset, [0.8, 0.2])
    trainer = lightning.Trainer(
        max_epochs=15, callbacks=[EndIntervalCallback()], logger=False, enable_checkpointing=False
    )
    trainer.fit(Classifier(), DataLoader(train_set, 64, shuffle=True), DataLoader(test_set, 360))
    print(f"accuracy {trainer.callback_metrics['accuracy']:.1%}")
