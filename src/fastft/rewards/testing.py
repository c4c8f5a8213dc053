"""Run in the sandbox by `programs.py`: runs solution.py, then each test with its names, and says which ones passed."""

import contextlib
import io
import os
import runpy


def main() -> None:
    """Write a line `SECRET NUMBER` to standard output for each test that ends without an exception."""
    with open("secret", encoding="utf-8") as file:
        secret = file.read()
    os.unlink("secret")
    tests = []
    while os.path.exists(f"test_{len(tests)}.py"):
        with open(f"test_{len(tests)}.py", encoding="utf-8") as file:
            tests.append(file.read())
    told = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)  # what the code prints must not use up what may be written
    with contextlib.redirect_stdout(io.TextIOWrapper(io.FileIO(nowhere, "w"))):
        names = runpy.run_path("solution.py", run_name="solution")
        for number, text in enumerate(tests):
            with open("test.py", "w", encoding="utf-8") as file:  # anew: the code may have changed what lay there
                file.write(text)
            try:
                runpy.run_path("test.py", init_globals=dict(names), run_name="__main__")
            except BaseException:  # a test that exits has not come to its end
                continue
            os.write(told, f"{secret} {number}\n".encode())


if __name__ == "__main__":
    main()
