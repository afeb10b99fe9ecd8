"""Put a report's table into README.md, between its two markers, and its picture into docs/images.

python tools/readme_results.py runs/demo
"""

import argparse
from pathlib import Path

from PIL import Image

from rlir.report.document import read_report
from rlir.report.tables import markdown_table

ROOT = Path(__file__).parent.parent
OPEN, CLOSE = "<!-- results -->", "<!-- end of results -->"
KEEP = ("F1 ↑", "reward", "camera", "yaw", "forward", "left", "attack", "PSNR", "Fréchet", "motion")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a post-training run")
    arguments = parser.parse_args()
    report = read_report(arguments.run / "report.json")
    rows = markdown_table(report).splitlines()
    kept = rows[:2] + [r for r in rows[2:] if r.startswith(("| **", *(f"| {k}" for k in KEEP)))]
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, _, rest = text.partition(OPEN)
    _, _, after = rest.partition(CLOSE)
    readme.write_text(f"{before}{OPEN}\n" + "\n".join(kept) + f"\n{CLOSE}{after}", encoding="utf-8")
    picture = Image.open(arguments.run / "clips.png").convert("RGB").quantize(128)
    (ROOT / "docs" / "images").mkdir(exist_ok=True)
    picture.save(ROOT / "docs" / "images" / "demo.png", optimize=True)


if __name__ == "__main__":
    main()
