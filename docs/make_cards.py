"""Write docs/methods/NAME.md for every method, allocation and refiner; `--check` only compares."""

from __future__ import annotations

import sys
from pathlib import Path

from billhook.methods.card import card, declared

FOLDER = Path(__file__).parent / "methods"


def main() -> int:
    stale = []
    for name, cls in declared().items():
        path = FOLDER / f"{name}.md"
        if not path.is_file() or path.read_text(encoding="utf-8") != card(cls):
            stale.append(path.name)
            if "--check" not in sys.argv:
                path.write_text(card(cls), encoding="utf-8")
    print(f"{'stale' if '--check' in sys.argv else 'written'}: {', '.join(stale) or 'none'}")
    return int(bool(stale) and "--check" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())
