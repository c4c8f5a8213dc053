"""What must hold in a spec beyond the types of its fields."""

import re
from collections import Counter
from collections.abc import Iterator

import attrs

from fastft.errors import Problem, did_you_mean
from fastft.registry.chat import chat_formats
from fastft.registry.spec import AttentionPoint, ModelSpec

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_DEFAULT_PROJECTIONS = attrs.fields(AttentionPoint).projections.default
Found = tuple[tuple[str | int, ...], Problem]


def semantic_problems(spec: ModelSpec) -> Iterator[Found]:
    """Yield `(path, problem)` for every claim in a well-typed spec that cannot be meant; `where` is left empty."""
    if not _NAME.fullmatch(spec.name):
        yield _problem(("name",), spec.name, "a name of letters, digits, '.', '_' and '-'")
    yield from _names(("model_types",), spec.model_types, _NAME, "a model type as config.json has it")
    yield from _classes(("layer_classes",), spec.layer_classes)
    for group in ("norms", "glus", "attentions"):
        for index, point in enumerate(getattr(spec, group)):
            yield from _classes((group, index, "classes"), point.classes)
    yield from _one_role_a_class(spec)
    yield from _norms(spec)
    for index, point in enumerate(spec.attentions):
        yield from _attention(("attentions", index), point)
    if spec.head.scale_inverse and spec.head.scale is None:
        yield _problem(("head", "scale_inverse"), True, "false, or a scale to divide by", "name it in head.scale")
    yield from _chat_format(("chat_format",), spec.chat_format)
    for index, variant in enumerate(spec.variants):
        yield from _chat_format(("variants", index, "chat_format"), variant.chat_format)
    yield from _modules(("lora_targets",), spec.lora_targets)
    yield from _patterns(("patterns",), spec.patterns)
    yield from _patterns(("not_patterns",), spec.not_patterns)
    for index, variant in enumerate(spec.variants):
        if not variant.patterns:
            yield _problem(("variants", index, "patterns"), [], "at least one pattern")
        yield from _patterns(("variants", index, "patterns"), variant.patterns)
    yield from _gguf(spec)
    for name, capability in spec.capabilities.items():
        if capability.status != "supported" and not capability.note:
            yield _problem(("capabilities", name, "note"), "", f"the reason why it is {capability.status}")


def _problem(path: tuple[str | int, ...], value: object, expected: str, remedy: str = "") -> Found:
    return path, Problem("", value, expected, remedy)


def _names(path: tuple[str | int, ...], names: tuple[str, ...], allowed: re.Pattern, expected: str) -> Iterator[Found]:
    if not names:
        yield _problem(path, [], "at least one entry", f"each is {expected}")
    for index, name in enumerate(names):
        if not allowed.fullmatch(name):
            yield _problem((*path, index), name, expected)
    for name, count in Counter(names).items():
        if count > 1:
            yield _problem(path, name, "every entry once")


def _classes(path: tuple[str | int, ...], names: tuple[str, ...]) -> Iterator[Found]:
    yield from _names(path, names, re.compile(r"[^\W\d]\w*"), "the name of a module class")


def _modules(path: tuple[str | int, ...], names: tuple[str, ...]) -> Iterator[Found]:
    yield from _names(path, names, re.compile(r"[^\W\d]\w*(\.\w+)*"), "the name of a submodule")


def _one_role_a_class(spec: ModelSpec) -> Iterator[Found]:
    seen: dict[str, str] = {}
    for group in ("norms", "glus", "attentions"):
        for index, point in enumerate(getattr(spec, group)):
            for name in point.classes:
                if name in seen:
                    yield _problem((group, index, "classes"), name, "a class with one role", f"also in {seen[name]}")
                seen[name] = f"{group}[{index}]"


def _norms(spec: ModelSpec) -> Iterator[Found]:
    for index, norm in enumerate(spec.norms):
        if not norm.eps.isidentifier():
            yield _problem(("norms", index, "eps"), norm.eps, "the name of the module's attribute that holds epsilon")
        if norm.kind == "layer" and norm.offset != 0.0:
            yield _problem(("norms", index, "offset"), norm.offset, "0 for a norm of kind 'layer'")


def _attention(path: tuple[str | int, ...], point: AttentionPoint) -> Iterator[Found]:
    if point.packed is None and len(point.projections) != 3:
        remedy = "name the query, key and value projections, or the one in `packed`"
        yield _problem((*path, "projections"), list(point.projections), "three projections", remedy)
    # The default list may stand beside a packed projection; one that was written down there is a contradiction.
    if point.packed is not None and point.projections not in ((), _DEFAULT_PROJECTIONS):
        yield _problem((*path, "projections"), list(point.projections), "none beside a packed projection")
    if point.qk_norm_config is not None and point.qk_norm is None:
        yield _problem((*path, "qk_norm_config"), point.qk_norm_config, "nothing where there is no qk_norm")
    if point.window_layers is not None and point.sliding_window is None:
        yield _problem((*path, "window_layers"), point.window_layers, "nothing where there is no sliding_window")
    if point.rope_layers is not None and point.rope_function is None:
        yield _problem((*path, "rope_layers"), point.rope_layers, "nothing where there is no rope_function")


def _chat_format(path: tuple[str | int, ...], name: str | None) -> Iterator[Found]:
    known = [known for form in chat_formats() for known in (form.name, *form.aliases)]
    if name is not None and name not in known:
        remedy = did_you_mean(name, known)
        yield _problem(path, name, "a chat format of `fastft registry formats`", remedy[:1].upper() + remedy[1:])


def _gguf(spec: ModelSpec) -> Iterator[Found]:
    point = spec.gguf
    for name in ("window_every", "rope_every", "hidden_scale_layers", "qk_norm_layers"):
        value = getattr(point, name)
        if value is not None and value < 1:
            yield _problem(("gguf", name), value, "a number of layers")
    attention = spec.attentions[0] if spec.attentions else AttentionPoint(classes=())
    held = {
        "attention_scale": attention.scale,
        "embedding_scale": spec.embedding_scale,
        "residual_scale": spec.residual_scale,
        "logit_scale": spec.head.scale,
        "attention_softcap": attention.softcap,
        "final_softcap": spec.head.softcap,
        "sliding_window": attention.sliding_window,
    }
    for index, key in enumerate(point.keys):
        if held[key] is None:
            remedy = "say elsewhere in the spec which attribute of the config holds it"
            yield _problem(("gguf", "keys", index), key, "a constant that the spec has", remedy)


def _patterns(path: tuple[str | int, ...], patterns: tuple[str, ...]) -> Iterator[Found]:
    for index, pattern in enumerate(patterns):
        if not pattern.strip("*? ") or pattern != pattern.strip():
            yield _problem((*path, index), pattern, "a glob with a letter in it, such as 'Llama-3*'")
