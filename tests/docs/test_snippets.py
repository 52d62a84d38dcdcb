"""Every Python block of README and of the site runs, in the order of its page."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
SNIPPET = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def pages() -> list[str]:
    """Returns the documents that have Python blocks."""
    found = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [path.relative_to(ROOT).as_posix() for path in found if "```py" in path.read_text(encoding="utf-8")]


def snippets_of(document: str) -> list[str]:
    return SNIPPET.findall((ROOT / document).read_text(encoding="utf-8"))


def given(tmp_path: Path) -> dict[str, Any]:
    """Returns the names that snippets use: a model, data, a loss, and a path."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    data = torch.utils.data.TensorDataset(torch.randn(40, 4), torch.randint(3, (40,)))
    loader, loss_fn = torch.utils.data.DataLoader(data, batch_size=8), torch.nn.functional.cross_entropy
    return {"model": model, "loader": loader, "loss_fn": loss_fn, "k": 5, "path": tmp_path / "checkpoint.pt"}


def of_trainers(names: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Returns the names that pages on trainers and controllers use besides."""
    pytest.importorskip("lightning")
    transformers = pytest.importorskip("transformers")
    evaluate = lambda model: sum(names["loss_fn"](model(x), y).item() for x, y in names["loader"])  # noqa: E731

    def train_epoch(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> float:
        for x, y in names["loader"]:
            optimizer.zero_grad()
            names["loss_fn"](model(x), y).backward()
            optimizer.step()
        return evaluate(model)

    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    optimizer = torch.optim.SGD(names["model"].parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    return {
        "evaluate": evaluate,
        "train_epoch": train_epoch,
        "epochs": 3,
        "arguments": arguments,
        "optimizer": optimizer,
        "scheduler": scheduler,
    }


@contextmanager
def of_a_process_group(names: dict[str, Any], tmp_path: Path) -> Iterator[dict[str, Any]]:
    """Yields the names that the page on many processes uses besides, in a group of one."""
    import torch.distributed as dist

    dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path}/rendezvous")
    try:
        flat = [p.detach().flatten().requires_grad_() for p in names["model"].parameters()]
        yield {"flat_shards": flat, "group": dist.group.WORLD, "path": tmp_path / "checkpoint"}
    finally:
        dist.destroy_process_group()


def run(document: str, names: dict[str, Any]) -> None:
    for snippet in snippets_of(document):
        exec(compile(snippet, document, "exec"), names)


@pytest.mark.filterwarnings("ignore")  # of trainers, and of schedulers that are stepped before there are gradients
@pytest.mark.parametrize("document", pages())
def test_snippets_run_in_order(document, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    names = given(tmp_path)
    if document in ("docs/controllers.md", "docs/trainers.md"):
        names |= of_trainers(names, tmp_path)
    if document == "docs/distributed.md":
        with of_a_process_group(names, tmp_path) as more:
            run(document, names | more)
    else:
        run(document, names)
    printed = capsys.readouterr().out
    assert "None" not in printed
    if document in ("README.md", "docs/quickstart.md", "docs/policies.md"):
        assert "'mean'" in printed
    if document == "docs/quickstart.md":
        assert names["path"].exists()


def test_every_block_is_found():
    assert len(pages()) > 15
    for document in pages():
        text = (ROOT / document).read_text(encoding="utf-8")
        assert len(snippets_of(document)) == len(re.findall(r"```py", text)), document
        assert not re.search(r"(?m)^```\w*\n(?:import|from) \w", text.replace("```python\n", "")), document
