"""Can the erased photos be believed? Pots of one experiment with plants of many sizes: results/erasing.json and .png.

    python tests/experiments/erasing.py --data_dir full_sample

A model of the recommended recipe, trained on other plants, weighs drawn pots of experiment 1 whole, with the plant
erased, and drawn again without any plant. If erasing leaves no trace, the erased pots tell as little as the empty ones.
And the verdict of cross_validate.py is asked in two worlds: one in which the plants tell the weight, and one in which
plants are mixed up and the brightness of the photo tells it.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from recipes import RECOMMENDED, ROOT, cross_validate, load, tm, train, writing

import make_sample_data  # found beside train_model.py
from biomass import plant

sys.path.insert(0, str(ROOT / "tests"))
from test_looks_at_plant import plant_truth

POTS = 240


def judge_world(kind):
    """What cross_validate.py says of a drawn world in which the plants tell the weight, or the background does."""
    with tempfile.TemporaryDirectory() as folder:
        data, out = Path(folder) / "data", Path(folder) / "out"
        plant_truth(data, kind, 400)
        flags = ["--labels_path", data / "labels.csv", "--image_dir", data / "images_med_res", "--results_dir", out]
        flags += ["--log_path", out / "log", "--model_out", out / "model.pt", "--cache_dir", "none", *RECOMMENDED]
        if cross_validate.main([*map(str, flags)]):
            raise SystemExit(f"the world of {kind} was not judged")
        metrics = json.loads((out / "metrics.txt").read_text())
    return {name: metrics[name] for name in ("val_r", "val_r_plant_erased", "val_r_background_erased", "looks_at")}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True)
    args = parser.parse_args()
    run, recipe = load([*RECOMMENDED, "--no_erasing", "--data_dir", args.data_dir], ROOT / "models" / "erasing")
    model = train(run, recipe, np.arange(len(run.labels)))
    plants = make_sample_data.grow(3000, seed=7)  # another seed than that of any folder drawn by default
    plants = (
        plants.sort_values("expected").iloc[np.linspace(0, len(plants) - 1, POTS).astype(int)].assign(experiment_id=1)
    )
    weights, photos = plants["expected"].to_numpy(), {"whole": [], "plant erased": [], "drawn without a plant": []}
    for index, grown in enumerate(plants.to_dict("records")):
        photo = make_sample_data.draw_photo(grown, 7, index)
        photos["whole"].append(photo)
        photos["plant erased"].append(plant.erase_plant(photo))
        photos["drawn without a plant"].append(make_sample_data.draw_photo(grown, 7, index, leaves=False))
    result = {"commit": tm.git("rev-parse", "HEAD"), "pots": POTS}
    for kind, pictures in photos.items():
        predicted = tm.weigh(model, run.batches, pictures, torch.zeros(POTS, 0))
        result[kind] = {"r": float(np.corrcoef(predicted, weights)[0, 1]), "mean_g": float(predicted.mean())}
    result["worlds"] = {kind: judge_world(kind) for kind in ("plants", "background")}
    (ROOT / "results" / "erasing.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    figure, kinds = Figure(figsize=(10, 4.9), layout="constrained"), ("whole", "plant erased", "all else erased")
    photos["all else erased"] = [plant.erase_background(photo) for photo in photos["whole"]]
    axes = figure.subplots(3, 8)
    for column, index in enumerate(np.linspace(20, POTS - 1, 8).astype(int)):
        for row, kind in enumerate(kinds):
            axes[row, column].imshow(photos[kind][index])
            axes[row, column].set(xticks=[], yticks=[])
            axes[row, 0].set_ylabel(kind, fontsize=9)
        axes[0, column].set_title(f"{weights[index]:.3f} g", fontsize=9)
    figure.suptitle("Drawn photos whole, with their plant erased, and with all but the plant erased", fontsize=10)
    figure.supxlabel("drawn data, not measured", x=0.99, ha="right", fontsize=7, color="dimgrey")
    writing.save_figure(figure, ROOT / "results" / "erasing.png", dpi=90, colours=256)


if __name__ == "__main__":
    main()
