"""The benchmark behind `scripts/bench`: arms, cells, measuring, parity and the page. Not part of the package."""
