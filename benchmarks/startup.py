"""`gnomon methods` and `gnomon --help` answer in under 0.3 s, and `import gnomon` brings no torch."""

import subprocess
import sys
from pathlib import Path

from timing import check, finish, measure

GNOMON = Path(sys.executable).with_name("gnomon")


def command(*words: str) -> None:
    subprocess.run([GNOMON, *words], check=True, capture_output=True)


def main() -> None:
    medians = measure(
        {"gnomon methods": lambda: command("methods"), "gnomon --help": lambda: command("--help")}, rounds=9
    )
    for name, seconds in medians.items():
        check(f"{name}, seconds", seconds, at_most=0.3)
    code = "import gnomon, sys; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    check("import gnomon imports torch (0 is no)", float(found == "True"), at_most=0.0)
    finish()


if __name__ == "__main__":
    main()
