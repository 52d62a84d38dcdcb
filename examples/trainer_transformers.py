"""Hugging Face's Trainer with ActiveAdamW: a small vision transformer learns handwritten digits.

pip install --no-build-isolation '.[trainers]'
python examples/trainer_transformers.py
"""

import tempfile

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

import fused_adaptive as fa
from fused_adaptive.integrations.transformers import EndIntervalCallback

images, labels = load_digits(return_X_y=True)
images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
rows = [{"pixel_values": image, "labels": int(label)} for image, label in zip(images, labels, strict=True)]
train_rows, test_rows = train_test_split(rows, test_size=300, random_state=0)

config = ViTConfig(
    image_size=8,
    patch_size=2,
    num_channels=1,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=128,
    num_labels=10,
)

if __name__ == "__main__":
    set_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            ViTForImageClassification(config),
            TrainingArguments(
                folder,
                num_train_epochs=10,
                per_device_train_batch_size=32,
                learning_rate=2e-3,  # for the Trainer's schedule, which goes on as always
                logging_steps=47,
                save_strategy="no",
                report_to="none",
            ),
            train_dataset=train_rows,
            eval_dataset=test_rows,
            compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
            # No number of steps to work out: the callback ends an interval with each epoch.
            optimizer_cls_and_kwargs=(fa.ActiveAdamW, {"lr": 2e-3, "interval": None}),
            callbacks=[EndIntervalCallback()],
        )
        trainer.train()
        print(f"accuracy {trainer.evaluate()['eval_accuracy']:.1%}")
