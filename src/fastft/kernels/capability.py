"""The compute capability that fp8 products need of a GPU. Needs no torch."""

FP8 = (8, 9)


def fp8_obstacle(name: str, have: tuple[int, int]) -> str:
    """Return why a GPU of this name and compute capability has no fp8 products, "" if it has."""
    if have >= FP8:
        return ""
    told, needed = (".".join(map(str, version)) for version in (have, FP8))
    return f"{name} has compute capability {told}; fp8 products need {needed} or more"
