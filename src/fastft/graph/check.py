"""Check a spec: build a tiny random model of its architecture and hold every claim against it."""

from collections.abc import Iterator

import torch
from attrs import asdict, frozen
from torch import nn

from fastft.errors import FastftError
from fastft.graph.capture import is_instance_of
from fastft.graph.compile import compile as compile_model
from fastft.graph.compile import report, uncompiled
from fastft.graph.report import RewriteReport
from fastft.graph.twin import tiny_model
from fastft.graph.verify import relative_difference
from fastft.registry.spec import ModelSpec
from fastft.state import update_state

# Largest relative difference of the loss and of the whole gradient from eager transformers. Only bf16 tells the cast
# orders of a norm apart.
ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 5e-2}


@frozen
class Claim:
    """One claim of a spec, whether it holds, and what was found."""

    what: str
    ok: bool
    found: str


@frozen
class SpecCheck:
    """The claims of a spec as they were found on tiny models of its model types."""

    spec: str
    claims: tuple[Claim, ...]

    @property
    def ok(self) -> bool:
        """Whether every claim holds."""
        return all(claim.ok for claim in self.claims)

    def to_dict(self) -> dict[str, object]:
        """Return the check as plain values."""
        return {"spec": self.spec, "ok": self.ok, "claims": [asdict(claim) for claim in self.claims]}

    def __str__(self) -> str:
        lines = [f"{'ok  ' if claim.ok else 'FAIL'} {claim.what}: {claim.found}" for claim in self.claims]
        return "\n".join([*lines, f"{self.spec}: {'every claim holds' if self.ok else 'some claims do not hold'}"])


def check_spec(spec: ModelSpec) -> SpecCheck:
    """Run every claim of `spec` against tiny random models of its model types, on the CPU, in fp32 and bf16."""
    claims: list[Claim] = []
    for model_type in spec.model_types:
        try:
            model = tiny_model(model_type)
        except (ValueError, KeyError, ImportError) as error:
            claims.append(Claim(f"{model_type}: transformers knows it", False, str(error).splitlines()[0]))
            continue
        claims += _structure(model_type, model, spec)
        for dtype in ALLOWED:
            claims += _behaviour(
                f"{model_type} {str(dtype).removeprefix('torch.')}", tiny_model(model_type, dtype=dtype), spec
            )
    return SpecCheck(spec.name, tuple(claims))


def _structure(model_type: str, model: nn.Module, spec: ModelSpec) -> Iterator[Claim]:
    names = [name for name, _ in model.named_modules()]
    points = {"layer_classes": (spec.layer_classes,)}
    for field in ("norms", "glus", "attentions"):
        points[field] = tuple(point.classes for point in getattr(spec, field))
    for field, groups in points.items():
        for index, classes in enumerate(groups):
            count = sum(is_instance_of(module, classes) for module in model.modules())
            where = field if field == "layer_classes" else f"{field}[{index}].classes"
            yield Claim(f"{model_type}: {where} {', '.join(classes)}", count > 0, f"{count} modules")
    for field in ("lora_targets", "keep_16bit"):
        missing = [t for t in getattr(spec, field) if not any(n == t or n.endswith(f".{t}") for n in names)]
        yield Claim(
            f"{model_type}: {field}", not missing, f"not in the model: {', '.join(missing)}" if missing else "all found"
        )


def _behaviour(label: str, model: nn.Module, spec: ModelSpec) -> Iterator[Claim]:
    allowed = ALLOWED[model.dtype]
    update_state(model, spec=spec)
    model = compile_model(model.train(), backend="aot_eager")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 250, (2, 40), generator=generator)
    try:
        ours = _step(model, ids)
    except FastftError as error:
        yield Claim(f"{label}: a training step", False, str(error))
        return
    done = report(model)
    with uncompiled(model):
        theirs = _step(model, ids)
    for what, a, b in (("loss", theirs[0], ours[0]), ("gradient", theirs[1], ours[1])):
        error = relative_difference(a, b)
        yield Claim(f"{label}: {what} as in eager transformers", error <= allowed, f"relative difference {error:.1e}")
    yield from _rewrites(label, spec, done)


def _rewrites(label: str, spec: ModelSpec, done: RewriteReport) -> Iterator[Claim]:
    applied = done.applied()
    rotates = any(point.rope_function for point in spec.attentions)
    for rule, claimed in (("norm", bool(spec.norms)), ("glu", bool(spec.glus)), ("rope", rotates)):
        if not claimed:
            continue
        reasons = {r.reason: r.module for r in done.refused() if r.rule == rule}
        found = f"{applied.get(rule, 0)} replaced"
        found += "".join(f"; refused as in {module}: {reason}" for reason, module in reasons.items())
        yield Claim(f"{label}: {rule} regions", applied.get(rule, 0) > 0 and not reasons, found)
    yield Claim(f"{label}: head", done.head.startswith("chunked"), done.head)


def _step(model: nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return loss.detach(), gradient
