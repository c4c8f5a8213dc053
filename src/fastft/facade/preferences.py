"""Names that preference-training scripts written for Unsloth import beside the trainer."""


def PatchDPOTrainer() -> None:  # noqa: N802  the name that scripts import
    """Say that there is nothing to do: `fastft.DPOTrainer` is a trainer of its own, and nothing is patched."""
    print("fastft: PatchDPOTrainer does nothing and is not needed; import the trainer: from fastft import DPOTrainer.")


def PatchKTOTrainer() -> None:  # noqa: N802  the name that scripts import
    """Say that there is nothing to do: `fastft.KTOTrainer` is a trainer of its own, and nothing is patched."""
    print("fastft: PatchKTOTrainer does nothing and is not needed; import the trainer: from fastft import KTOTrainer.")
