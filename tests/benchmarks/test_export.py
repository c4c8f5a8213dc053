"""`scripts/bench_export`: its checkpoint, its measurements, and that its judge sees a wrong block."""

import pytest

from benchmarks.export import MODEL, compare, make_checkpoint, measure


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    work = tmp_path_factory.mktemp("work")
    made = make_checkpoint("tiny", 0, work / MODEL)
    assert made["bytes"] == 1_639_680 and made["shards"] == 1
    return work


def test_an_export_is_measured_and_judged(work):
    result = measure(work, "q8_0", "cpu", cold=True)
    assert result["blocks_differing"] == 0 and result["blocks_compared"] > 2000
    assert result["no_16_bit_file"] and result["files"] == ["gguf/model-q8_0.gguf"]
    path = work / "gguf" / "model-q8_0.gguf"
    assert result["file_bytes"] == path.stat().st_size
    assert set(result["phases_s"]) == {"read", "quantise", "copy", "write", "finish", "whole"}
    assert result["phases_s"]["whole"] <= result["wall_s"]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # of the last tensor, whose last row is among those compared
    path.write_bytes(data)
    assert compare(work / MODEL, path) == (result["blocks_compared"], 1)
