"""What was rewritten, what was not, and why."""

from collections import Counter

from attrs import asdict, frozen


@frozen
class Rewrite:
    """One region that a spec claims: replaced, or left as it was with the reason.

    `implementation` is "op" for a fused operation or "torch" for plain torch code that Inductor fuses. `compute` is
    "fp8" where its large products have fp8 factors; where that was asked for and is not done, `not_fp8` says why.
    `kept` is "8 bits" where what it widens is kept so for the backward; where that was asked for and is not done,
    `not_eight_bits` says why.
    """

    rule: str
    module: str
    applied: bool
    reason: str = ""
    implementation: str = ""
    fingerprint: str = ""
    compute: str = "exact"
    not_fp8: str = ""
    kept: str = ""
    not_eight_bits: str = ""


@frozen
class GraphReport:
    """One captured graph: the class of the compiled module, its size before and after, and its rewrites.

    `gradients`: whether it is for steps that learn, or for passes without gradients. `eight_bits`: whether gate and up
    of its feed-forward are kept in 8 bits, None where that was not asked for or it has none.
    """

    unit: str
    nodes_before: int
    nodes_after: int
    rewrites: tuple[Rewrite, ...]
    gradients: bool = True
    eight_bits: bool | None = None


@frozen
class RewriteReport:
    """What `fastft.compile` did to a model.

    `modes` says what the layers keep for the backward pass. `compute` is what was asked for: "fp8" and "fp8+head"
    change the numbers of training steps, "exact" does not. `graphs` fills as graphs are captured, that is with the
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
    compute: str = "exact"

    def applied(self) -> dict[str, int]:
        """Return the number of replaced regions by rule."""
        return dict(Counter(r.rule for g in self.graphs for r in g.rewrites if r.applied))

    def refused(self) -> tuple[Rewrite, ...]:
        """Return the regions that were found and left as they were."""
        return tuple(r for g in self.graphs for r in g.rewrites if not r.applied)

    def in_fp8(self) -> tuple[str, ...]:
        """Return the names of the linears whose large products have fp8 factors."""
        return tuple(r.module for g in self.graphs for r in g.rewrites if r.compute == "fp8" and r.rule == "lora")

    def not_in_fp8(self) -> tuple[Rewrite, ...]:
        """Return what fp8 was asked for and that computes as before; empty without compute="fp8"."""
        return tuple(r for g in self.graphs for r in g.rewrites if r.not_fp8)

    def not_in_eight_bits(self) -> tuple[tuple[str, str], ...]:
        """Return (name, reason) of what was to be kept in 8 bits and is kept as it is; empty without such a plan."""
        found = []
        for graph in self.graphs:
            reasons = [(r.module, r.not_eight_bits) for r in graph.rewrites if r.not_eight_bits]
            whole = "its feed-forward was not replaced as a whole"
            found += reasons or ([(graph.unit, whole)] if graph.eight_bits is False else [])
        return tuple(found)

    def why_not_in_eight_bits(self) -> str:
        """Return in how many graphs gate and up stay as they are though 8 bits were asked for, and why; "" if none."""
        asked = [graph.eight_bits for graph in self.graphs if graph.eight_bits is not None]
        reasons = dict.fromkeys(reason for _, reason in self.not_in_eight_bits())
        return f"in {asked.count(False)} of {len(asked)} graphs of layers, {'; '.join(reasons)}" if reasons else ""

    def to_dict(self) -> dict[str, object]:
        """Return the report as plain lists, dicts and strings, ready for JSON."""
        return asdict(self) | {"applied": self.applied(), "refused": [asdict(r) for r in self.refused()]}

    def __str__(self) -> str:
        family = self.family or "unknown family, not rewritten"
        lines = [f"{family}: {self.layers} layers, backend {self.backend}, plan {self.plan}"]
        lines += [f"kept for the backward: {self.modes}"] if self.modes else []
        lines += [f"attention: {self.attention}", f"loss head: {self.head}"]
        if self.compute != "exact":
            lines.append(f"compute: {self.compute} (not exact) in {len(self.in_fp8())} linears of the graphs below")
        for graph in self.graphs:
            done = Counter(f"{r.rule} ({r.implementation})" for r in graph.rewrites if r.applied)
            told = ", ".join(f"{count} {rule}" for rule, count in done.items()) or "nothing"
            unit = graph.unit if graph.gradients else f"{graph.unit}, without gradients"
            lines.append(f"{unit}: {graph.nodes_before} -> {graph.nodes_after} nodes; replaced {told}")
        lines += [f"left as it was: {r.rule} {r.module}: {r.reason}" for r in self.refused()]
        lines += [f"not in fp8: {r.module}: {r.not_fp8}" for r in self.not_in_fp8()]
        lines += [f"not kept in 8 bits: {name}: {why}" for name, why in self.not_in_eight_bits()]
        if not self.graphs and self.layers:
            lines.append("no graph captured yet: the first training step compiles")
        return "\n".join([*lines, *self.notes])
