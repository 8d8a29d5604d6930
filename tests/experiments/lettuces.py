"""A picture of real photos with what a model that never saw their plants makes of them: figures/lettuces.png.

    python tests/experiments/lettuces.py --real FOLDER

Reads results/lettuce/predictions.csv, which cross_validate.py wrote, and FOLDER/lettuce_hydro/images. The photos are of
github.com/swarrier246/plant_weight_estimation, under the MIT licence.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from PIL import ImageOps
from recipes import ROOT, writing

from biomass import reading

COUNT, SIDE = 6, 300
FROM_THE_SIDE = "9078 9080 9083 9085 9087 9089 9092 9094 9096 9100 9103 9105 9107 9109 9110 9117 9122 9126 9128 9130"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", type=Path, required=True, metavar="FOLDER", help="of the sets of real photos")
    images = parser.parse_args().real / "lettuce_hydro" / "images"
    table = pd.read_csv(ROOT / "results" / "lettuce" / "predictions.csv").sort_values("measured_g")
    side = table["filename"].isin([f"IMG_{number}.jpg" for number in FROM_THE_SIDE.split()])
    shown = table[~side].drop_duplicates("plant")
    shown = shown.iloc[np.linspace(0, len(shown) - 1, COUNT).round().astype(int)]
    figure = Figure(figsize=(9.6, 2.5), layout="constrained")
    for axis, row in zip(figure.subplots(1, COUNT), shown.itertuples(), strict=True):
        axis.imshow(ImageOps.fit(reading.open_photo(images / row.filename), (SIDE, SIDE)))
        axis.set_axis_off()
        axis.set_title(
            f"{row.predicted_g:.0f} g ({row.low_g:.0f} to {row.high_g:.0f})\nmeasured {row.measured_g:.0f} g",
            fontsize=9,
        )
    figure.supxlabel("photos: github.com/swarrier246/plant_weight_estimation, MIT", x=0.99, ha="right", fontsize=7)
    writing.save_figure(figure, ROOT / "figures" / "lettuces.png", dpi=120)


if __name__ == "__main__":
    main()
