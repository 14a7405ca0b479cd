"""Phantoms of three hospitals that differ in film, noise and prevalence, as PNG files and one CSV.

python -m demo.hospitals FOLDER
python retune.py --data csv --data-dir FOLDER --scenario data --parts column
"""

import argparse
import csv
import sys
from pathlib import Path

from PIL import Image

import retune
from demo import phantoms

HOSPITALS = ("hospital-a", "hospital-b", "hospital-c")  # keys of phantoms.DOMAINS


def draw_hospitals(folder: Path, images: int, seed: int = 0) -> Path:
    """Write `images` phantoms of each hospital and hospitals.csv into a new folder; the CSV's path."""
    with retune.atomic(retune.check_new_folder(folder)) as partial:
        partial.mkdir(parents=True)
        with open(partial / "hospitals.csv", "w", encoding="utf-8", newline="") as file:
            table = csv.writer(file)
            table.writerow(["path", "patient", "part", *phantoms.FINDINGS])
            for number, name in enumerate(HOSPITALS):
                drawn = phantoms.make_phantoms(images, seed + number, domain=name)
                (partial / name).mkdir()
                for i in range(images):
                    path = f"{name}/{i:05d}.png"
                    Image.fromarray(drawn.images[i]).save(partial / path)
                    table.writerow([path, drawn.patients[i], name, *drawn.labels[i].astype(int)])
    return folder / "hospitals.csv"


def execute(argv):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a new folder")
    parser.add_argument("--images", type=int, default=2000, help="phantoms of each hospital (default: 2000)")
    arguments = parser.parse_args(argv)
    table = draw_hospitals(arguments.folder, arguments.images)
    print(f"written to {table}: phantoms, not patients; nothing measured on them is clinical")


if __name__ == "__main__":
    sys.exit(retune.main(None, execute))
