"""The file format, and that a file is whole under its name or absent: errors, a full disk, a kill."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from fastft.errors import LoadError, SaveError
from fastft.export.gguf.file import (
    FileWriter,
    Value,
    check_space,
    f32,
    header,
    padded,
    read_gguf,
    tensor_entry,
    text,
    truth,
    u32,
)

METADATA = {
    "general.architecture": text("llama"),
    "a.number": u32(7),
    "a.real": f32(0.1),
    "a.truth": truth(True),
    "some.words": Value("str", ["é", "", "漢字"]),
    "some.reals": Value("f32", [1.5, -2.0]),
    "some.numbers": Value("i32", [-1, 2]),
    "some.truths": Value("bool", [True, False]),
}
TENSORS = (tensor_entry("a.weight", (3, 5), "f32"), tensor_entry("b.weight", (2, 64), "q8_0"))
DATA = {"a.weight": np.arange(15, dtype=np.float32), "b.weight": np.arange(136, dtype=np.uint8)}


def written(path, metadata=METADATA):
    with FileWriter(path, metadata, TENSORS) as file:
        for name, data in DATA.items():
            file.write(name, data)
        return file.finish()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_is_written_is_read_back(tmp_path):
    path = written(tmp_path / "m.gguf")
    found = read_gguf(path)
    assert found.metadata["some.words"] == ["é", "", "漢字"]
    assert found.metadata["a.number"] == 7 and found.metadata["a.truth"] is True
    assert found.metadata["a.real"] == np.float32(0.1) and found.metadata["some.reals"] == [1.5, -2.0]
    assert tuple(found.tensors.values()) == TENSORS
    for name, data in DATA.items():
        assert found.data(name).tobytes() == data.tobytes()
        assert found.offsets[name] % 32 == 0
    assert path.stat().st_size == FileWriter(path, METADATA, TENSORS).size


def test_gguf_s_own_reader_agrees(tmp_path):
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(written(tmp_path / "m.gguf"))
    for key, value in METADATA.items():
        found = reader.get_field(key).contents()
        assert found == value.value if value.kind != "f32" else np.allclose(found, value.value)
    assert [(t.name, t.tensor_type.name.lower(), t.n_bytes) for t in reader.tensors] == [
        (entry.name, entry.type, entry.size) for entry in TENSORS
    ]
    assert reader.tensors[0].data.tobytes() == DATA["a.weight"].tobytes()


def test_the_header_takes_whole_blocks():
    assert len(header(METADATA, TENSORS)) % 32 == 0
    assert [padded(size) for size in (0, 1, 32, 33)] == [0, 32, 32, 64]


@pytest.mark.parametrize("kept", [0.01, 0.03, 0.1, 0.4, 0.6, 0.8, 0.95])
def test_a_file_cut_short_is_told(tmp_path, kept):
    path = written(tmp_path / "m.gguf")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(LoadError, match=r"m\.gguf: (cut short|not a GGUF file)"):
        read_gguf(path)


def test_other_files_are_told(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"PK\3\4" + bytes(100))
    with pytest.raises(LoadError, match="not a GGUF file"):
        read_gguf(tmp_path / "x.gguf")
    (tmp_path / "y.gguf").write_bytes(b"GGUF" + (9).to_bytes(4, "little") + bytes(100))
    with pytest.raises(LoadError, match="version 9"):
        read_gguf(tmp_path / "y.gguf")
    with pytest.raises(LoadError, match="cannot be read"):
        read_gguf(tmp_path / "absent.gguf")


def test_an_error_leaves_what_was_there(tmp_path):
    path = written(tmp_path / "m.gguf")
    before = path.read_bytes()
    with pytest.raises(RuntimeError), FileWriter(path, METADATA, TENSORS) as file:
        file.write("a.weight", DATA["a.weight"] + 1)
        raise RuntimeError("the power went")
    assert path.read_bytes() == before and names(tmp_path) == ["m.gguf"]


def test_tensors_come_in_order_and_whole(tmp_path):
    with FileWriter(tmp_path / "m.gguf", METADATA, TENSORS) as file:
        with pytest.raises(ValueError, match=r"next is a\.weight"):
            file.write("b.weight", DATA["b.weight"])
        file.write("a.weight", DATA["a.weight"])
        with pytest.raises(ValueError, match="1 of 2 tensors"):
            file.finish()
    assert names(tmp_path) == []


def test_a_full_disk_is_told_beforehand_and_on_the_way(tmp_path):
    with pytest.raises(SaveError, match=r"needs .* bytes and .* are free"):
        check_space(tmp_path, 1 << 60, "the export")
    written(tmp_path / "m.gguf", {"old": u32(1)})
    code = """
        import resource, signal, sys
        import test_gguf_file as t
        from pathlib import Path
        from fastft.errors import SaveError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
        try:
            t.written(Path(sys.argv[1]) / "m.gguf")
        except SaveError as error:
            print(error)
    """
    done = run(code, tmp_path)
    assert "m.gguf: could not be written" in done.stdout and "the file needs" in done.stdout, done.stderr
    assert names(tmp_path) == ["m.gguf"] and read_gguf(tmp_path / "m.gguf").metadata == {"old": 1}


def test_a_kill_leaves_nothing_under_the_name(tmp_path):
    code = """
        import sys, time
        import test_gguf_file as t
        from pathlib import Path
        with t.FileWriter(Path(sys.argv[1]) / "m.gguf", t.METADATA, t.TENSORS) as file:
            file.write("a.weight", t.DATA["a.weight"])
            print("half", flush=True)
            time.sleep(600)
    """
    process = start(code, tmp_path)
    assert process.stdout.readline().strip() == "half"
    [left] = names(tmp_path)
    assert left.startswith(".m.gguf.") and left.endswith(".partial")
    written(tmp_path / "other.gguf")  # another name, and the process lives: its file stays
    written(tmp_path / "m.gguf")
    assert left in names(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait(120)
    time.sleep(0.05)
    written(tmp_path / "m.gguf")
    assert names(tmp_path) == ["m.gguf", "other.gguf"]


def start(code, *arguments):
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )


def run(code, *arguments):
    process = start(code, *arguments)
    out, err = process.communicate(timeout=600)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
