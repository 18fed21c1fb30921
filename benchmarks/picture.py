"""The README's picture: the first screen of a run's report, light and dark.

    python benchmarks/picture.py RUN/report.html

Needs Chromium. Writes docs/report-light.png and docs/report-dark.png.
"""

from __future__ import annotations

import base64
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from browser import browser  # type: ignore[import-not-found]  # noqa: E402

WIDTH, HEIGHT = 1000, 760


def main(report: Path) -> None:
    """Take both pictures."""
    screen = {"x": 0, "y": 0, "width": WIDTH, "height": HEIGHT, "scale": 1}
    with browser() as page:
        page.open(report)
        for scheme in ("light", "dark"):
            page.show(WIDTH, dark=scheme == "dark")
            shot = page.send("Page.captureScreenshot", format="png", clip=screen)
            (ROOT / "docs" / f"report-{scheme}.png").write_bytes(base64.b64decode(shot["data"]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
