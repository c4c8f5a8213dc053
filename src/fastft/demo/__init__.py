"""The small language model that fastft ships, how it was made, and the demonstration that fine-tunes it."""

from pathlib import Path

MODEL_FOLDER = Path(__file__).parent / "model"
HELD_OUT_TEXT = Path(__file__).parent / "held_out.txt"
