"""What was rewritten, what was not, and why."""

from collections import Counter

from attrs import asdict, frozen


@frozen
class Rewrite:
    """One region that a spec claims: replaced, or left as it was with the reason.

    `implementation` is "op" for a fused operation or "torch" for plain torch code that Inductor fuses.
    """

    rule: str
    module: str
    applied: bool
    reason: str = ""
    implementation: str = ""
    fingerprint: str = ""


@frozen
class GraphReport:
    """One captured graph: the class of the compiled module, its size before and after, and its rewrites."""

    unit: str
    nodes_before: int
    nodes_after: int
    rewrites: tuple[Rewrite, ...]


@frozen
class RewriteReport:
    """What `fastft.compile` did to a model.

    `modes` says what the layers keep for the backward pass. `graphs` fills as graphs are captured, that is with the
    first training step. `notes` are plain sentences on what does not run on the fast path and why.
    """

    family: str | None
    backend: str
    plan: str
    attention: str
    head: str
    layers: int
    graphs: tuple[GraphReport, ...] = ()
    notes: tuple[str, ...] = ()
    modes: str = ""

    def applied(self) -> dict[str, int]:
        """Return the number of replaced regions by rule."""
        return dict(Counter(r.rule for g in self.graphs for r in g.rewrites if r.applied))

    def refused(self) -> tuple[Rewrite, ...]:
        """Return the regions that were found and left as they were."""
        return tuple(r for g in self.graphs for r in g.rewrites if not r.applied)

    def to_dict(self) -> dict[str, object]:
        """Return the report as plain lists, dicts and strings, ready for JSON."""
        return asdict(self) | {"applied": self.applied(), "refused": [asdict(r) for r in self.refused()]}

    def __str__(self) -> str:
        family = self.family or "unknown family, not rewritten"
        lines = [f"{family}: {self.layers} layers, backend {self.backend}, plan {self.plan}"]
        lines += [f"kept for the backward: {self.modes}"] if self.modes else []
        lines += [f"attention: {self.attention}", f"loss head: {self.head}"]
        for graph in self.graphs:
            done = Counter(f"{r.rule} ({r.implementation})" for r in graph.rewrites if r.applied)
            told = ", ".join(f"{count} {rule}" for rule, count in done.items()) or "nothing"
            lines.append(f"{graph.unit}: {graph.nodes_before} -> {graph.nodes_after} nodes; replaced {told}")
        lines += [f"left as it was: {r.rule} {r.module}: {r.reason}" for r in self.refused()]
        if not self.graphs and self.layers:
            lines.append("no graph captured yet: the first training step compiles")
        return "\n".join([*lines, *self.notes])
