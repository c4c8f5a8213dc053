"""What fastft knows of GPUs: memory, and the speeds that a step's time is predicted from. Needs no torch."""

import re

from attrs import evolve, frozen

from fastft.errors import Problem, UsageError, did_you_mean

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
# Less than this is no memory of a GPU, and no budget: a unit was left out.
LEAST_AMOUNT = 1 << 20
_SIZE = re.compile(r"\b(\d+) ?GB\b", re.IGNORECASE)
_AMOUNT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


@frozen
class Device:
    """A GPU: bytes of memory, and what it reaches in matrix products (16-bit FLOP/s), in its memory and over PCIe.

    Speeds are what long matrix products and copies reach, not data-sheet peaks: about 0.7 and 0.85 of those.
    `capability` is its compute capability; None where only the memory is known.
    """

    name: str
    memory: int
    flops: float
    bandwidth: float
    pcie: float
    capability: tuple[int, int] | None = None


def _device(name: str, gib: float, peak: float, bandwidth: float, pcie: float, capability: tuple[int, int]) -> Device:
    return Device(name, int(gib * 2**30), 0.7 * peak * 1e12, 0.85 * bandwidth * 1e9, pcie * 1e9, capability)


# Names are whole words of what the driver calls the device, the first that fits; sizes as the driver tells them.
DEVICES = (
    _device("B200", 178, 2250, 8000, 50, (10, 0)),
    _device("H200", 139.8, 989, 4800, 50, (9, 0)),
    _device("H100 PCIe", 79.2, 756, 2000, 50, (9, 0)),
    _device("H100 NVL", 93.1, 835, 3938, 50, (9, 0)),
    _device("H100", 79.2, 989, 3350, 50, (9, 0)),
    _device("A100", 79.2, 312, 2000, 24, (8, 0)),
    _device("L40S", 44.4, 362, 864, 24, (8, 9)),
    _device("L40", 44.4, 181, 864, 24, (8, 9)),
    _device("L4", 22.0, 121, 300, 12, (8, 9)),
    _device("A10G", 22.0, 70, 600, 24, (8, 6)),
    _device("A10", 22.0, 125, 600, 24, (8, 6)),
    _device("A6000", 47.4, 155, 768, 24, (8, 6)),
    _device("RTX 5090", 31.4, 210, 1792, 50, (12, 0)),
    _device("RTX 4090", 23.5, 165, 1008, 24, (8, 9)),
    _device("RTX 4070", 11.6, 58, 504, 24, (8, 9)),
    _device("RTX 4060", 7.6, 30, 272, 12, (8, 9)),
    _device("RTX 3090 Ti", 23.5, 80, 1008, 24, (8, 6)),
    _device("RTX 3090", 23.5, 71, 936, 24, (8, 6)),
    _device("RTX 3080", 9.6, 59, 760, 24, (8, 6)),
    _device("RTX 3070", 7.6, 40, 448, 24, (8, 6)),
    _device("RTX 3060", 11.6, 25, 360, 24, (8, 6)),
    _device("V100", 15.7, 125, 900, 12, (7, 0)),
    _device("T4", 14.6, 65, 320, 12, (7, 5)),
)


def parse_bytes(text: str) -> int | None:
    """Return the bytes that "24GB" (10^9), "24GiB" (2^30) or a plain number says, None for anything else."""
    found = _AMOUNT.fullmatch(text)
    if found is None or found[2].upper() not in UNITS:
        return None
    return int(float(found[1]) * UNITS[found[2].upper()])


def find_device(name: str) -> Device | None:
    """Return the known device whose name stands in `name`, case and spaces ignored; None for one that is not known.

    Where `name` says another size ("A100-PCIE-40GB"), the device has that: the driver tells some 2 % less than it. A
    laptop's card is another than the one that it is named after, and so is a "Ti" or "SUPER".
    """
    words = name.lower()
    found = next((device for device in DEVICES if _stands_in(device.name.lower(), words)), None)
    if found is None or "laptop" in words:
        return None
    said = _SIZE.search(name)
    size = int(said[1]) << 30 if said else found.memory
    if 0.9 < found.memory / size < 1.1:
        return found
    return evolve(found, name=f"{found.name} {said[1]}GB", memory=int(0.98 * size))


def _stands_in(name: str, words: str) -> bool:
    """Say whether a name stands in lower-case words, as words of its own and as the name of no variant of the card."""
    spaced = r"[\s_-]*".join(map(re.escape, name.split()))
    return re.search(rf"(?<![a-z0-9]){spaced}(?![a-z0-9])(?![\s_-]*(?:ti|super)\b)", words) is not None


def _by_number(text: str) -> Device | None:
    """Return the device that has this number in its name alone ("4090"), None if none has."""
    found = [device for device in DEVICES if text.strip().isdecimal() and device.name.split()[-1] == text.strip()]
    return found[0] if len(found) == 1 else None


def _near(text: str) -> str:
    """Return "did you mean 'x'?" for a device of the same numbers and variant: all others are another card."""
    alike = [device.name for device in DEVICES if _marks(device.name) == _marks(text)]
    return did_you_mean(text.upper(), alike)


def _marks(name: str) -> list[str]:
    """Return what tells cards of one series apart: numbers, and the words of a variant."""
    return re.findall(r"\d+|(?<![a-z])(?:ti|super|laptop|mobile)\b", name.lower())


def device_of(text: str) -> Device:
    """Return the device that "H100", "4090" or "24GB" means; one given by its memory has unknown speeds, 0.

    Raises UsageError for anything else.
    """
    if known := _by_number(text):
        return known
    size = parse_bytes(text)
    if size is not None and size < LEAST_AMOUNT:
        raise UsageError(Problem("gpu", text, "an amount of memory with its unit, such as 24GB or 24GiB"))
    if size:
        return Device(text, size, 0.0, 0.0, 0.0)
    found = find_device(text)
    if found is None:
        names = ", ".join(device.name for device in DEVICES)
        expected = f"an amount of memory such as 24GB or 24GiB, or one of {names}"
        raise UsageError(Problem("gpu", text, expected, _near(text)))
    return found
