"""An arm that never is ready; it leaves its process's number in the folder of the run."""

import os
import time
from pathlib import Path


def prepare(task, options, device):
    Path("pid").write_text(str(os.getpid()), encoding="utf-8")
    time.sleep(6000)
