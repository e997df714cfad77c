"""Stands for a module that takes seconds to import: every import adds a line to the file that HEAVY names."""

import os
from pathlib import Path

with Path(os.environ["HEAVY"]).open("a") as file:
    file.write(f"{os.getpid()}\n")
