"""Make the virtual environment, and say clearly what is missing. Standard library only, Python 3.6 syntax."""

import importlib.util
import os
import subprocess
import sys

folder = sys.argv[1]
if sys.version_info < (3, 11):
    sys.exit(
        "The farm needs Python 3.11 or newer; %s is %d.%d. Name another: make demo PYTHON=python3.12"
        % (sys.executable, sys.version_info[0], sys.version_info[1])
    )
if os.path.exists(os.path.join(folder, "bin", "pip")):
    sys.exit(0)
missing = [name for name in ("venv", "ensurepip") if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(
        "This Python has no %s. On Debian and Ubuntu: sudo apt install python%d.%d-venv"
        % (" and ".join(missing), sys.version_info[0], sys.version_info[1])
    )
print("making %s with %s" % (folder, sys.executable))
sys.exit(subprocess.call([sys.executable, "-m", "venv", "--clear", folder]))
