"""Says that layers are being compiled while a user waits for it, how long that took, and whether it was cached."""

import time
from typing import Any

from attrs import define, field
from tqdm.auto import tqdm
from transformers import TrainerCallback

from fastft.state import get_state

# Both caches hold compiled graphs: AOTAutograd's a forward with its backward, Inductor's each of them.
_CACHES = (("aot_autograd", "autograd_cache"), ("inductor", "fxgraph_cache"))


def _counts() -> dict[str, int]:
    from torch._dynamo.utils import counters

    return {kind: sum(counters[group][f"{cache}_{kind}"] for group, cache in _CACHES) for kind in ("hit", "miss")}


def caches(backend: str) -> bool:
    """Say whether what this backend of `fastft.compile` makes is kept for later runs; only Inductor has a cache."""
    if backend != "inductor":
        return False
    from torch._inductor import config

    return config.fx_graph_cache and not config.force_disable_caches


@define(eq=False)
class CompileTime:
    """Seconds in which Dynamo and Inductor compiled, and how often their caches were asked, since this was made.

    `caching`: whether later runs will find what is compiled in a cache.
    """

    caching: bool = False
    seconds: float = 0.0
    began: float | None = None
    before: dict[str, int] = field(factory=_counts)
    told: bool = False

    def on_start(self, _: Any) -> None:
        """Note that a compilation begins; tell it once."""
        self.began = time.perf_counter()
        if not self.told:
            self.told = True
            later = "; later runs take it from a cache" if self.caching else ""
            tqdm.write(f"fastft: compiling the decoder layers, once for each kind{later}")

    def on_end(self, _: Any) -> None:
        """Add what the compilation took."""
        if self.began is not None:
            self.seconds += time.perf_counter() - self.began
            self.began = None

    def counts(self) -> dict[str, int]:
        """Return hits and misses of the caches since this was made."""
        now = _counts()
        return {name: now[name] - self.before[name] for name in now}

    def cache(self) -> str:
        """Return "warm" where everything came from a cache, "cold" where nothing did, else "partly warm"."""
        counts = self.counts()
        if not counts["miss"]:
            return "warm" if counts["hit"] else "off"
        return "partly warm" if counts["hit"] else "cold"


class CompileCallback(TrainerCallback):
    """Tells of the compilations of the first step, and puts into `record` what compiling took over the whole run."""

    def __init__(self, record: dict[str, Any]) -> None:
        self.record, self.time, self.first = record, CompileTime(), 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Listen to Dynamo, which tells every listener in the process of everybody's compilations."""
        self.time = CompileTime()
        compiled = get_state(model).compiled
        if compiled is None or not compiled.layers:
            return
        from torch._dynamo.callback import callback_handler

        self.time.caching = caches(compiled.settings.backend)
        callback_handler.register_start_callback(self.time.on_start)
        callback_handler.register_end_callback(self.time.on_end)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """After the first step that compiled, say what it took."""
        if self.first or not self.time.seconds:
            return
        self.first = self.time.seconds
        graphs = _graphs(model)
        tqdm.write(
            f"fastft: compiled {graphs} graph{'' if graphs == 1 else 's'} in {self.first:.1f} s "
            f"(cache: {self.time.cache()})"
        )

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Put graphs, seconds and the state of the caches into the record."""
        seconds = {"first_step_seconds": round(self.first, 3), "seconds": round(self.time.seconds, 3)}
        self.record["compile"] = {"graphs": _graphs(model), **seconds, "cache": self.time.cache()}

    def stop(self) -> None:
        """Stop listening; safe to call again."""
        from torch._dynamo.callback import callback_handler

        if self.time.on_start in callback_handler.start_callbacks:
            callback_handler.remove_start_callback(self.time.on_start)
        if self.time.on_end in callback_handler.end_callbacks:
            callback_handler.remove_end_callback(self.time.on_end)


def _graphs(model: Any) -> int:
    compiled = get_state(model).compiled
    return len(compiled.report().graphs) if compiled else 0
