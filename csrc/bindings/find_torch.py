"""Prints "version;directory" of the installed torch for CMake, without importing torch."""

import importlib.util
import re
import sys
from pathlib import Path

spec = importlib.util.find_spec("torch")
if spec is None or not spec.submodule_search_locations:
    sys.exit(1)
directory = Path(next(iter(spec.submodule_search_locations)))
text = (directory / "version.py").read_text(encoding="utf-8")
found = re.search(r"""__version__\s*=\s*['"]([^'"]+)['"]""", text)
if found is None:
    sys.exit(1)
print(f"{found.group(1)};{directory}")
