"""What is measured: a cell (model, mode, batch) and a task (one arm on one cell)."""

import re
from typing import Any

from attrs import asdict, frozen


@frozen
class Cell:
    """A model shape, how it is trained, and the batch.

    padding: share of a row that is padding, at most; each row's own share is drawn evenly between 0 and it.
    completion: share of a row, at its end, whose tokens bear loss.
    head_scale: factor on the head's random weights. At 1 the logits are nearly uniform, at 4 and above they are peaked.
    """

    shape: str
    mode: str
    batch: int
    length: int
    layers: int = 0
    rank: int = 16
    padding: float = 0.0
    completion: float = 1.0
    head_scale: float = 1.0
    seed: int = 0

    @property
    def name(self) -> str:
        """Return a heading such as "llama-8b nf4, 4 x 4096"."""
        extras = {
            "layers": self.layers, "rank": self.rank, "padding": self.padding, "completion": self.completion,
            "head scale": self.head_scale, "seed": self.seed,
        }  # fmt: skip
        usual = {"layers": 0, "rank": 16, "padding": 0.0, "completion": 1.0, "head scale": 1.0, "seed": 0}
        told = "".join(f", {key} {value:g}" for key, value in extras.items() if value != usual[key])
        return f"{self.shape} {self.mode}, {self.batch} x {self.length}{told}"

    @property
    def tokens(self) -> int:
        """The tokens of a batch, padding included."""
        return self.batch * self.length


@frozen
class Task:
    """One arm on one cell. `backend` is torch.compile's; `folder` holds the model for arms that load from a folder.

    `fp8`: of the reference, whether it runs with fp8 factors as well. `longer`: cells of the same model, which the same
    process measures afterwards.
    """

    arm: str
    cell: Cell
    steps: int = 20
    warmup: int = 3
    backend: str = "inductor"
    folder: str = ""
    fp8: bool = False
    longer: tuple[Cell, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the task as plain data, ready for JSON."""
        return asdict(self)


def task_from(data: dict[str, Any]) -> Task:
    """Return the task that `Task.to_dict` made `data` of."""
    return Task(**{**data, "cell": Cell(**data["cell"]), "longer": tuple(Cell(**cell) for cell in data["longer"])})


def default_cells(memory: int | None) -> tuple[Cell, ...]:
    """Return the cells for a GPU of `memory` bytes, or for a CPU (None): shapes that fit it, at common batches."""
    if memory is None:
        return (Cell("tiny", "nf4", 2, 64), Cell("tiny", "bf16", 2, 64), Cell("tiny", "full", 2, 64))
    if memory > 70e9:
        return (Cell("llama-8b", "nf4", 4, 4096), Cell("llama-1b", "nf4", 4, 2048), Cell("llama-1b", "bf16", 4, 2048))
    if memory > 20e9:
        return (Cell("llama-8b", "nf4", 1, 2048), Cell("llama-1b", "nf4", 4, 2048))
    return (Cell("llama-1b", "nf4", 1, 2048),)


def file_stem(cells: tuple[Cell, ...]) -> str:
    """Return what a file of results is named after: shapes and modes."""
    parts = [*dict.fromkeys(cell.shape for cell in cells), *dict.fromkeys(cell.mode for cell in cells)]
    return re.sub(r"[^a-z0-9-]", "-", "-".join(parts))
