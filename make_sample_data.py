"""Draw a synthetic FarmBot data set: photos of Arabidopsis in pots, and the sheet with their weights.

    python make_sample_data.py                                       # 400 photos into sample_data/
    python make_sample_data.py --num_images 4294 --out full_sample   # the size of the real set
    python make_sample_data.py --with_faults --out faulty_sample     # with the faults of real folders

Files in OUT, laid out as the real set: digital_biomass_labels.xlsx (one row a photo), images_med_res/*.png (256 x 256
RGB), drawn_expected_weights.csv (each row's expected weight; by this file the other scripts know that the data are
drawn) and README.txt (the command, the noise floor, the faults drawn in).

The plant model. Age, experiment, genotype, light and vigour rank the plants; the rank gives each its expected weight M.
Leaf area A (cm2) and thickness t, which colours and rounds the leaves, follow from one allometric law, and the rosette
in the photo is built of blades whose areas sum to A. The scale then shows W, which also holds what no photo shows:

    M = 0.055 * A ** 1.1 * exp(t)              W = M * exp(h) / E[exp(h)]

with h = water + scale error, both uniform and independent of all else. So E[W | photo] = M, and the best possible RMSE,
the noise floor of any rows, is sqrt(mean((W - M) ** 2)) over those of them with a weight.
"""

import os
import signal
import sys

if __name__ == "__main__":  # while the libraries load
    signal.signal(signal.SIGINT, lambda *_: (sys.stderr.write("make_sample_data.py: interrupted\n"), os._exit(130)))

import argparse
import functools
import hashlib
import math
import tempfile
import zlib
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from tqdm import tqdm

SHEET, IMAGES = "digital_biomass_labels.xlsx", "images_med_res"
EXPECTED, README = "drawn_expected_weights.csv", "README.txt"

# The real set's proportions
FULL_ROWS, FULL_UNLABELLED, FULL_WITHOUT_AGE = 4294, 610, 492
FULL_PLANT_NUMBERS, MOST_PHOTOS = 168, 42
LAYOUT_SEED = 83  # the first whose 4,294 rows GroupShuffleSplit parts as the real ones: 2,911 / 773
MOST_IMAGES = 100_000  # at 300,000 some photos of one plant come to share a second, and so a file name
FIRST_PHOTO, SPAN = 1_600_000_000, int(186.25 * 86400)  # Unix seconds, seconds
AGES, AGE_SHARES = np.array([7, 14, 21, 28]), [0.14, 0.28, 0.30, 0.28]  # days
HEAVIEST = {7: 0.1, 14: 0.9, 21: 1.1, 28: 3.1}  # g, by age in days; at 28 the quantiles end first, at 2.113
WEIGHT_AT = [0, 0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.97, 0.995, 1]  # quantiles of the expected weight M ...
WEIGHT_G = [0.0021, 0.008, 0.025, 0.061, 0.152, 0.368, 0.65, 0.95, 1.30, 2.113]  # ... and their values, g

# The plant
ALLOMETRY, EXPONENT = 0.055, 1.1  # g of fresh weight at 1 cm2 of leaf, and how it grows with leaf area
THICKNESS_SD, THICKNESS_MAX = 0.42, 0.95  # log units, seen in the photo
WATER, SCALE_ERROR = 0.25, 0.12  # log units either way, seen in no photo
GOLDEN_ANGLE = math.radians(137.5)
PROFILE = np.sin(np.pi * np.linspace(0, 1, 256) ** 1.5) ** 0.8  # half-width of a blade from base to tip: a spoon
SLOPE = np.clip(np.gradient(PROFILE, 1 / 255), -4, 4)

# The photo. Look of experiments 1 to 9: pot diameter (px; the camera's height), mean red, green, blue of the scene,
# tray colour, share of perlite, rim colour
SIZE, POT_CM = 256, 10.0
PNG = {"compress_level": 1, "compress_type": zlib.Z_RLE}  # soil is noise: a longer search saves nothing
ROWS, COLS = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
GREY, SLATE, BLACK, AMBER = (0.40, 0.41, 0.43), (0.25, 0.275, 0.32), (0.17, 0.185, 0.21), (0.40, 0.29, 0.20)
BRICK, ROSE = (0.50, 0.26, 0.19), (0.53, 0.36, 0.31)
LOOKS = [
    (218, (0.43, 0.34, 0.27), GREY, 0.40, BRICK),
    (250, (0.56, 0.32, 0.16), AMBER, 0.55, BRICK),
    (216, (0.53, 0.32, 0.17), AMBER, 0.45, BRICK),
    (246, (0.41, 0.33, 0.30), SLATE, 0.60, BRICK),
    (206, (0.36, 0.29, 0.26), SLATE, 0.35, BRICK),
    (196, (0.39, 0.31, 0.33), BLACK, 0.40, ROSE),
    (240, (0.35, 0.28, 0.28), SLATE, 0.35, BRICK),
    (204, (0.38, 0.31, 0.34), SLATE, 0.50, ROSE),
    (234, (0.40, 0.32, 0.36), GREY, 0.45, ROSE),
]
WARM = (2, 3)  # experiments under warm grow light
font = functools.cache(ImageFont.load_default)  # by size; Pillow's own, which is on every machine
SUN = math.radians(225)  # light falls from the upper left, clockwise from the right
THIN, THICK = np.array([[0.62, 0.71, 0.20], [0.28, 0.50, 0.26]], np.float32)  # colour of a leaf by its thickness
CAST = np.array([1.48, 1.13, 0.5], np.float32)  # what that light does to a leaf's colour


# --- who is photographed, and when ---


def group_sizes(rng, num_images):
    """Photos of each plant number, summing to num_images; small sets get fewer photos a number, so they still split."""
    groups = max(1, round(FULL_PLANT_NUMBERS * min(1, num_images / FULL_ROWS) ** (2 / 3)))
    mean = num_images / groups
    most = max(math.ceil(mean), round(mean * MOST_PHOTOS * FULL_PLANT_NUMBERS / FULL_ROWS))
    sizes = np.clip(np.round(rng.normal(mean, mean / 4, groups)), 1, most).astype(int)
    sizes[0] = most if groups > 1 else num_images
    while sizes.sum() != num_images:
        one = rng.integers(1, groups)
        sizes[one] = np.clip(sizes[one] + np.sign(num_images - sizes.sum()), 1, most)
    return rng.permutation(sizes)


def lay_out(num_images):
    """One row a photo: its file, experiment, tray, plant, age, time, and whether it lacks the age or the harvest."""
    rng = np.random.default_rng([LAYOUT_SEED, num_images])
    starts = np.linspace(0, SPAN - 21.4 * 86400, 9)  # experiments overlap; each is photographed on days 7 to 28
    rows = []
    for number, size in enumerate(group_sizes(rng, num_images), start=1):
        experiments = 1 + rng.permutation(9)[: np.clip(round(size / 3), 1, 9)]
        photos = 1 + rng.multinomial(size - len(experiments), np.full(len(experiments), 1 / len(experiments)))
        for experiment, count in zip(experiments, photos, strict=True):
            tray = rng.integers(1, 3)
            for visit, age in enumerate(np.sort(rng.choice(AGES, count, p=AGE_SHARES))):
                seconds = (age - 7) * 86400 + 60 * rng.integers(0, 570) + visit  # the visit keeps names apart
                rows.append((experiment, tray, number, age, FIRST_PHOTO + int(starts[experiment - 1]) + seconds))
    plants = pd.DataFrame(rows, columns=["experiment_id", "tray", "plant_number", "age", "timestamp"])
    if num_images >= 1000:
        first, last = plants["timestamp"].min(), plants["timestamp"].max()
        plants["timestamp"] = FIRST_PHOTO + (plants["timestamp"] - first) * SPAN // (last - first)
    plants = plants.sort_values(["timestamp", "experiment_id", "plant_number"], ignore_index=True)
    named_by = plants[["experiment_id", "tray", "plant_number", "timestamp"]].itertuples(index=False)
    plants["filename"] = [f"{e}_{t:02d}_{p}_{s}.png" for e, t, p, s in named_by]
    for column, full_count in (("labelled", FULL_UNLABELLED), ("age_known", FULL_WITHOUT_AGE)):
        missing = rng.permutation(num_images)[: round(num_images * full_count / FULL_ROWS)]
        plants[column] = ~plants.index.isin(missing)
    return plants


# --- the plant model ---


def hand_out(weights, score, heaviest):
    """Give the heaviest weight to the best score whose age can bear it, and so on down."""
    stacks = {limit: np.flatnonzero(heaviest == limit) for limit in np.unique(heaviest)}
    stacks = {limit: list(rows[np.argsort(score[rows])]) for limit, rows in stacks.items()}
    given = np.empty(len(weights))
    for weight in np.sort(weights)[::-1]:
        open_to = [limit for limit, rows in stacks.items() if rows and limit >= weight]
        open_to = open_to or [max(limit for limit, rows in stacks.items() if rows)]
        best = max(open_to, key=lambda limit: score[stacks[limit][-1]])
        given[stacks[best].pop()] = min(weight, best)
    return given


def grow(num_images, seed):
    """The layout with each plant's latent traits, expected weight M (g), leaf area (cm2) and weight W (g)."""
    plants = lay_out(num_images)
    rng = np.random.default_rng(seed)
    pot, codes = np.unique(plants[["experiment_id", "plant_number"]], axis=0, return_inverse=True)

    def a_plant(draw):  # the same in all photos of one plant
        return draw(size=len(pot))[codes.ravel()]

    genotype = a_plant(functools.partial(rng.integers, 6))
    vigour, plants["light"] = a_plant(rng.standard_normal), a_plant(rng.standard_normal)
    score = 0.43 * (plants["age"] - 19) / 7.2 - 0.60 * (plants["experiment_id"] - 5) / 2.58
    score += 0.34 * plants["light"] + 0.25 * (genotype - 2.5) / 1.7 + 0.7 * vigour
    score += 0.35 * rng.standard_normal(num_images)
    share = (np.arange(num_images) + 0.5) / num_images
    weights = np.exp(np.interp(share, WEIGHT_AT, np.log(WEIGHT_G)))
    bearable = plants["age"].map(HEAVIEST).to_numpy() * math.exp(-WATER - SCALE_ERROR)
    plants["expected"] = hand_out(weights, score.to_numpy(), bearable)
    rank = plants["expected"].rank(method="first").to_numpy().astype(int) - 1
    water, error = np.minimum(1, np.minimum(share, 1 - share)[rank] / 0.01) * [[WATER], [SCALE_ERROR]]
    hidden = rng.uniform(-water, water) + rng.uniform(-error, error)
    mean_factor = np.sinh(water) / water * np.sinh(error) / error  # E[exp(hidden)]
    plants["weight"] = plants["expected"] * np.exp(hidden) / mean_factor

    thickness = 0.75 * a_plant(rng.standard_normal) + 0.5 * (genotype % 3 - 1) + 0.4 * rng.standard_normal(num_images)
    plants["thickness"] = np.clip(THICKNESS_SD * thickness, -THICKNESS_MAX, THICKNESS_MAX)
    plants["leaf_area"] = (plants["expected"] / ALLOMETRY * np.exp(-plants["thickness"])) ** (1 / EXPONENT)
    plants["slender"] = 0.04 * (genotype // 3 - 0.5) + 0.02 * a_plant(rng.standard_normal)
    plants["start_angle"] = a_plant(functools.partial(rng.uniform, 0, 2 * math.pi))
    plants["hand"] = a_plant(functools.partial(rng.choice, [-1, 1]))
    for offset in ("off_x", "off_y"):  # cm from the middle of the pot
        plants[offset] = np.clip(0.9 * a_plant(rng.standard_normal), -1.6, 1.6)
    return plants


def build_rosette(plant, seed, index):
    """Leaves from oldest to youngest, dict of arrays: angle (rad), length and width (cm), petiole share, bend."""
    rng = np.random.default_rng([seed, index])
    count = 7.6 + 1.6 * math.log(plant["leaf_area"]) + 0.05 * (plant["age"] - 18) + rng.normal(0, 1.75)
    count = int(np.clip(round(count), 2, 24))
    leaf = np.arange(count)
    maturity = (count - leaf) / count  # 1: the oldest
    blade = maturity**0.8 * (1 - 0.3 * maturity**6) * np.exp(rng.normal(0, 0.12, count))
    ratio = np.clip(0.55 + 0.25 * plant["thickness"] - plant["slender"] + rng.normal(0, 0.02, count), 0.28, 0.85)
    petiole = np.clip(0.22 + 0.2 * maturity + rng.normal(0, 0.03, count), 0.15, 0.5)
    cotyledon = leaf < 2
    blade[cotyledon] *= 0.55 if count > 4 else 1.0
    ratio[cotyledon] = 0.8
    blade *= math.sqrt(plant["leaf_area"] / np.sum(PROFILE.mean() * ratio * blade**2))
    angle = plant["start_angle"] + plant["hand"] * leaf * GOLDEN_ANGLE + rng.normal(0, 0.14, count)
    bend = rng.normal(0, 0.07, count)
    return dict(angle=angle, length=blade / (1 - petiole), width=ratio * blade, petiole=petiole, bend=bend)


# --- the sheet ---


def make_sheet(plants, seed):
    """The sheet of the plants, with the real columns and gaps."""
    rng = np.random.default_rng([seed, FULL_ROWS, 1])
    n = len(plants)
    rosettes = [build_rosette(plant, seed, index) for index, plant in enumerate(plants.to_dict("records"))]
    sheet = plants[["filename", "experiment_id", "plant_number", "timestamp"]].copy()
    weather, sensor = rng.standard_normal(n), rng.standard_normal((6, n))
    lamp = 0.8 * plants["light"] + 0.6 * rng.standard_normal(n)
    sheet["temperature"] = (22 + 2.5 * (weather + 0.08 * sensor[0])).round(2)
    sheet["humidity"] = (55 + 8 * (weather + 0.08 * sensor[1])).round(1)
    sheet["illuminancelux"] = (900 + 250 * (weather + 0.05 * sensor[2])).clip(5).round(1)
    sheet["illuminanceinfrared"] = (420 + 110 * (weather + 0.05 * sensor[3])).clip(2).round(0)
    sheet["illuminancevisible"] = (800 + 180 * (lamp + 0.05 * sensor[4])).clip(5).round(0)
    sheet["illuminancefullspectrum"] = (1300 + 300 * (lamp + 0.05 * sensor[5])).clip(8).round(0)
    sheet["age_days"] = plants["age"].where(plants["age_known"])
    lengths = [rosette["length"] for rosette in rosettes]
    big = np.array([np.sum((length > 0.35 * length.max()) & (length > 0.725)) for length in lengths])
    small = np.array([len(length) for length in lengths]) - big
    big = np.maximum(0, big + np.round(rng.normal(0, 1.7, n)))  # people miscount
    small = np.maximum(big < 1, small + np.round(rng.normal(0, 0.6, n)))
    counted = rng.random(n) < 0.6
    for column, count in (("small_leaves", small), ("big_leaves", big), ("total_leaves", small + big)):
        sheet[column] = pd.Series(count).where(counted)
    disc = math.pi * (0.75 * np.array([length.max() for length in lengths])) ** 2  # cm2 within which leaves hide leaves
    covered = disc * (1 - np.exp(-plants["leaf_area"] / disc)) * np.exp(rng.normal(0, 0.53, n))
    sheet["plant_surface_area"] = covered.round(3).where(rng.random(n) < 0.6)
    scanned = plants["labelled"] & (rng.random(n) < 0.5)
    sheet["leaf_surface_area"] = (plants["leaf_area"] * np.exp(rng.normal(0, 0.24, n))).round(3).where(scanned)
    return add_harvest(sheet, plants, rng)


def add_harvest(sheet, plants, rng):
    """The weights (g), where the plant was harvested: total = shoot + root."""
    total = plants["weight"].round(4)
    ratio = 2.4 * np.exp(rng.normal(0, 0.35, len(plants))) * (1 + 0.10 * (plants["expected"] - 0.26))
    root = (total / (1 + ratio)).clip(0.0002).round(4)
    shoot = (total - root).round(4)
    harvest = pd.DataFrame({"fresh_weight_total": (shoot + root).round(4), "fresh_weight_shoot": shoot})
    harvest["fresh_weight_root"] = root
    harvest["dry_weight_shoot"] = (shoot * rng.uniform(0.08, 0.10, len(plants))).round(5)
    harvest["shoot_root_ratio_fresh"] = (shoot / root).round(3)
    sheet = sheet.join(harvest.where(plants["labelled"]))
    sheet["lab_book_page"] = 12 * plants["experiment_id"] + 3 * plants["tray"] + plants["age"] // 7
    return sheet


def noise_floor(plants):
    """RMSE (g) of the true conditional mean over the labelled rows: no model of the photo can do better."""
    labelled = plants[plants["labelled"]]
    return float(np.sqrt(np.mean((labelled["weight"] - labelled["expected"]) ** 2)))


def write_expected_weights(plants, path):
    """A row a photo with its expected weight M (g); pandas.read_csv(path, comment="#") reads it."""
    comment = "drawn by make_sample_data.py: the weight that each photo can tell at best, for the noise floor."
    table = plants[["filename", "expected"]].set_axis(["filename", "expected_weight_g"], axis=1)
    text = table.to_csv(index=False, float_format="%.9g", lineterminator="\n")
    path.write_bytes(f"# {comment} Never a model input.\n{text}".encode())


# --- the photo ---


def blotches(rng, down, across=None):
    """Smooth noise (SIZE, SIZE) of unit variance or so, this many blotches down and across."""
    noise = Image.fromarray(rng.standard_normal((down, across or down), dtype=np.float32))
    return np.asarray(noise.resize((SIZE, SIZE), Image.BICUBIC))


def rgb(colour):
    """Colour in 0..1 as Pillow wants it."""
    return tuple(int(255 * min(max(channel, 0), 1)) for channel in colour)


def draw_soil(rng, perlite, warm):
    """Soil (SIZE, SIZE, 3): dark crumbs, perlite in patches, some moss and algae; perlite is its share."""
    streaks = (150, 256) if rng.random() < 0.5 else (256, 150)
    crumbs = 0.8 * blotches(rng, *streaks) + 0.35 * blotches(rng, 75)
    patches = 0.7 * blotches(rng, 5) + 0.6 * blotches(rng, 14) + 0.4 * blotches(rng, 40)
    white = 1 / (1 + np.exp(-2.4 * (0.7 * blotches(rng, 230) + 0.7 * crumbs + patches - 2.1 + 2.6 * perlite)))
    tint = 0.8 * blotches(rng, 8) + 0.5 * blotches(rng, 50)  # red-brown to blue-grey
    dark, pale = [0.19, 0.15, 0.115], [0.62, 0.60, 0.565]
    if warm:  # shadows turn red, highlights yellow
        dark, pale = [0.19, 0.125, 0.075], [0.60, 0.61, 0.43]
    soil = np.array(dark, np.float32) + tint[..., None] * np.array([0.022, 0, -0.014], np.float32)
    soil *= np.exp(0.45 * crumbs)[..., None]
    grain = np.array(pale, np.float32) + tint[..., None] * np.array([0.05, 0, -0.05], np.float32)
    soil += (white * np.exp(0.2 * crumbs.T - 0.1))[..., None] * (grain - soil)
    algae = 0.7 * blotches(rng, 6) + 0.5 * blotches(rng, 30) - rng.uniform(-0.1, 2.4)
    algae = np.clip(algae, 0, 0.55 if warm else 0.85)
    soil += algae[..., None] * (np.array([0.27, 0.37, 0.12], np.float32) * np.exp(0.4 * crumbs)[..., None] - soil)
    return np.clip(soil, 0, 1)


def draw_pebbles(draw, rng, x, y, radius):
    """Perlite lumps and pebbles on the soil, each with its shadow; positions and radius in pixels of the canvas."""
    for _ in range(rng.integers(25, 100)):
        reach, angle = radius * math.sqrt(rng.random()), rng.uniform(0, 2 * math.pi)
        px, py = x + reach * math.cos(angle), y + reach * math.sin(angle)
        w, h = rng.gamma(2.5, 1.1, 2) + 1.5
        tone = np.array([(0.85, 0.83, 0.78), (0.62, 0.55, 0.42), (0.62, 0.40, 0.22)][rng.choice(3, p=[0.5, 0.3, 0.2])])
        draw.ellipse([px - w + 1, py - h + 2, px + w + 2, py + h + 2.5], fill=(15, 12, 10))
        draw.ellipse([px - w, py - h, px + w, py + h], fill=rgb(tone * rng.uniform(0.6, 1)))
        draw.ellipse([px - w * 0.6, py - h * 0.7, px + w * 0.2, py + h * 0.1], fill=rgb(tone * 1.15))


def draw_tray(draw, rng, x, y, radius, tone):
    """The tray under the pot: openings, ribs and moulded marks; pixels of the canvas (2 x SIZE)."""
    tone, gap = np.array(tone), 1.02 * radius
    dark, side = rgb(tone * 0.1), radius * rng.uniform(0.84, 0.9)
    draw.rounded_rectangle([x - side, y - side, x + side, y + side], 30, fill=dark)
    for sign in (-1, 1):
        low, high = y + gap * rng.uniform(-0.8, -0.5), y + gap * rng.uniform(0.4, 0.75)
        left, right = sorted([x + sign * gap * rng.uniform(0.95, 1.08), x + sign * gap * 1.7])
        draw.rounded_rectangle([left, low, right, high], 18, fill=dark)
        top, bottom = sorted([y + sign * gap * rng.uniform(0.97, 1.06), y + sign * gap * 1.7])
        draw.rounded_rectangle([x - gap * 0.6, top, x + gap * rng.uniform(0.3, 0.7), bottom], 14, fill=dark)
        rib = x + sign * gap * rng.uniform(0.85, 0.95)
        draw.line([rib, y - 2 * gap, rib, y + 2 * gap], rgb(tone * 1.12), 2)
    corner = x + rng.choice([-1, 1]) * radius * 0.84, y + rng.choice([-1, 1]) * radius * 0.93
    draw.rectangle([corner[0] - 30, corner[1] - 9, corner[0] + 30, corner[1] + 9], outline=rgb(tone * 0.6), width=2)
    for px, py in rng.uniform(0, 2 * SIZE, (rng.integers(5, 90), 2)):  # spilt soil and perlite
        draw.ellipse([px, py, px + rng.uniform(1, 3), py + 2], fill=rgb(tone * rng.choice([0.3, 1.7])))
    draw.text(corner, str(rng.choice([">PE<", "PP 5", "6er"])), fill=rgb(tone * 0.55), font=font(16), anchor="mm")


def add_labels(canvas, rng, plant, warm):
    """A paper label or coloured tags at the corners (canvas at 2 x SIZE)."""
    white = (255, 225, 190) if warm else (225, 225, 228)
    name = f"#{plant['experiment_id']} {plant['tray']:02d}_{plant['plant_number']}"
    if rng.random() < 0.75:
        label = Image.new("RGBA", (int(rng.integers(105, 135)), int(rng.integers(24, 40))), (*white, 255))
        ImageDraw.Draw(label).text((8, 4), name, fill=(70, 70, 80), font=font(int(rng.integers(14, 19))))
        label = label.rotate(float(rng.normal(0, 14)), expand=True, resample=Image.BICUBIC)
        canvas.paste(label, (int(rng.integers(-30, 80)), int(rng.integers(-12, 60))), label)
    colours = [(226, 30, 105), white, (70, 150, 60)]
    for _ in range(rng.integers(0, 3)):
        size = int(rng.integers(50, 95)), int(rng.integers(40, 80))
        tag = Image.new("RGBA", size, (*colours[rng.integers(3)], 255))
        scribble = [(int(a), int(b)) for a, b in zip(rng.integers(5, 60, 7), rng.integers(10, 50, 7), strict=True)]
        ImageDraw.Draw(tag).line(scribble, fill=(90, 20, 60), width=3)
        tag = tag.rotate(float(rng.normal(0, 15)), expand=True, resample=Image.BICUBIC)
        canvas.paste(tag, (int(rng.choice([-40, 440])), int(rng.choice([-30, 40, 430, 460]))), tag)


def draw_scene(plant, rng, x, y, radius):
    """Tray, pot and soil (SIZE, SIZE, 3), colours in 0..1; pot centre and radius in pixels."""
    _, mean_colour, tray, perlite, rim = LOOKS[plant["experiment_id"] - 1]
    warm = plant["experiment_id"] in WARM
    canvas = Image.new("RGB", (2 * SIZE, 2 * SIZE), rgb(tray))
    draw = ImageDraw.Draw(canvas)
    draw_tray(draw, rng, 2 * x, 2 * y, 2 * radius, tray)
    add_labels(canvas, rng, plant, warm)

    for inset, shade in ((-1, 0.6), (0, 0.95), (1.5, 1.15), (3.5, 0.8), (5, 0.72)):  # from the shadow to the inner wall
        draw.circle((2 * x, 2 * y), 2 * (radius - inset), fill=rgb(np.array(rim) * shade))
    mask = Image.new("L", canvas.size)
    shift_x, shift_y = rng.normal(0, 4, 2)  # seen a little from the side, the wall shows wider on one side
    ImageDraw.Draw(mask).circle((2 * x + shift_x, 2 * y + shift_y), 2 * (radius - 7), fill=255)
    soil = draw_soil(rng, perlite + rng.normal(0, 0.12), warm)
    soil = Image.fromarray(np.uint8(255 * soil)).resize(canvas.size, Image.NEAREST)
    canvas.paste(soil, mask=mask)
    draw_pebbles(draw, rng, 2 * x, 2 * y, 2 * (radius - 12))
    scene = np.asarray(canvas.reduce(2), np.float32) / 255
    distance = np.hypot(COLS - x, ROWS - y)
    light = 1 + 0.12 * np.cos(np.arctan2(ROWS - y, COLS - x) - SUN) * (distance > radius - 8)
    scene *= (light * (1 + 0.04 * blotches(rng, 7) + 0.025 * blotches(rng, 180)))[..., None]
    wanted = np.array(mean_colour) * np.exp(rng.normal(0, 0.05) + rng.normal(0, 0.02, 3))
    for _ in range(2):  # once more for what clipping takes away
        scene *= np.float32(wanted / scene.mean((0, 1)))
        np.clip(scene, 0, 1, out=scene)
    return scene


def paint_leaf(photo, x, y, zoom, leaf, colour, gloss):
    """Paint one leaf and its shadow onto the photo, its stalk starting at x, y; zoom in pixels a cm."""
    angle, length, width, petiole, bend = leaf
    length, half = length * zoom, max(width * zoom / 2, 0.7)
    cos, sin = math.cos(angle), math.sin(angle)
    margin = half + abs(bend) * length + 6
    xs, ys = sorted([x, x + length * cos]), sorted([y, y + length * sin])
    left, right = (int(np.clip(v, 0, SIZE)) for v in (xs[0] - margin, xs[1] + margin))
    top, bottom = (int(np.clip(v, 0, SIZE)) for v in (ys[0] - margin, ys[1] + margin))
    if left >= right or top >= bottom:
        return
    window = np.s_[top:bottom, left:right]
    dx, dy = COLS[window] - x, ROWS[window] - y
    along = (dx * cos + dy * sin) / length
    across = dy * cos - dx * sin - bend * length * along**2
    s = (along - petiole) / (1 - petiole)
    index = np.clip(s * 255, 0, 255).astype(np.int16)
    edge = half * PROFILE[index]
    slope = SLOPE[index] * half / (length * (1 - petiole))
    blade = np.clip((edge - np.abs(across)) / np.sqrt(1 + slope**2) + 0.5, 0, 1) * ((s > 0) & (s < 1))
    stalk = np.clip(max(0.5, 0.09 * half) - np.abs(across) + 0.5, 0, 1) * ((along > 0) & (s < 0.1))
    cover = np.maximum(blade, stalk)
    drop = 1 + int(0.03 * length)
    shadow = np.zeros_like(cover)
    shadow[drop:, drop:] = cover[:-drop, :-drop]
    side = np.clip(across / (edge + 0.5), -1, 1)
    shade = 1 + 0.12 * side * math.sin(SUN - angle) - 0.08 * side**2 + 0.12 * (np.clip(s, 0, 1) - 0.5)
    shade += 0.03 * np.cos(6.3 * (5 * s - 2 * np.abs(side))) * (half > 5)
    shine = gloss * np.exp(-((s - 0.62) ** 2) / 0.03 - (side - 0.35) ** 2 / 0.12)
    vein = 0.09 * np.exp(-((across / (0.05 * half + 0.35)) ** 2)) * (s < 0.9)
    paint = colour * shade[..., None] + (vein + shine)[..., None] * np.array([0.75, 0.8, 0.55], np.float32)
    patch = photo[window]
    patch *= (1 - 0.4 * shadow)[..., None]
    patch += cover[..., None] * (paint - patch)


def draw_photo(plant, seed, index, leaves=True):
    """The photo of one plant, or of its bare pot: the same for a seed and index, whichever process draws it."""
    rng = np.random.default_rng([seed, index, 1])
    rosette = build_rosette(plant, seed, index)
    experiment = plant["experiment_id"]
    radius = LOOKS[experiment - 1][0] / 2 * (1 + rng.normal(0, 0.008))
    spread = 16 if rng.random() < 0.1 else 3.5  # now and then the pot is cut by the frame
    x, y = (SIZE / 2 + rng.normal(0, spread, 2)).tolist()  # plain floats keep the arrays at 32 bits
    photo = draw_scene(plant, rng, x, y, radius)
    zoom = 2 * radius / POT_CM
    thick = (plant["thickness"] / THICKNESS_MAX + 1) / 2
    colour = THIN * (1 - thick) + THICK * thick
    colour *= (CAST if experiment in WARM else 1) * math.exp(rng.normal(0, 0.03))
    x, y = x + zoom * plant["off_x"] + rng.normal(0, 1), y + zoom * plant["off_y"] + rng.normal(0, 1)
    oldest_first = np.stack(list(rosette.values()), axis=1).tolist()
    for order, leaf in enumerate(oldest_first):
        young = order / len(oldest_first)
        tone = colour * (0.88 + 0.22 * young) * math.exp(rng.normal(0, 0.04))
        if leaves:
            paint_leaf(photo, x, y, zoom, leaf, tone, 0.22 * thick)
    photo += 0.012 * rng.standard_normal(photo.shape, dtype=np.float32)
    image = Image.fromarray(np.uint8(255 * np.clip(photo, 0, 1))).filter(ImageFilter.UnsharpMask(1.2, 45, 0))
    caption = f"{experiment}_{plant['tray']:02d}_{plant['plant_number']}"
    draw = ImageDraw.Draw(image)
    draw.rectangle([4, 244, 8 + 5.2 * len(caption), 254], fill=(48, 48, 48))
    draw.text((6, 244), caption, fill=(135, 135, 135), font=font(9))
    return image


def save_photo(task):
    """Draw and write one photo; task is (plant, seed, index, path)."""
    plant, seed, index, path = task
    draw_photo(plant, seed, index).save(path, **PNG)


def draw_photos(plants, folder, seed, num_workers):
    """Write the photo of every row into the folder."""
    folder.mkdir()
    records = enumerate(plants.to_dict("records"))
    tasks = [(plant, seed, index, folder / plant["filename"]) for index, plant in records]
    workers = min(num_workers, math.ceil(len(tasks) / 16), 61)  # one costs as much as 16 photos; Windows takes 61
    leave_ctrl_c_to_main = (signal.SIGINT, signal.SIG_IGN)
    with ProcessPoolExecutor(workers, initializer=signal.signal, initargs=leave_ctrl_c_to_main) as pool:
        list(tqdm(pool.map(save_photo, tasks, chunksize=8), total=len(tasks), unit="photo", disable=None))


# --- the faults of real folders ---


def add_faults(sheet, plants, folder, seed):
    """Spoil the sheet and the photos in ten known ways; returns the sheet and a line on each fault."""
    rng = np.random.default_rng([seed, FULL_ROWS, 2])
    rows = rng.permutation(np.flatnonzero(plants["labelled"]))
    names, numbers = plants["filename"].to_numpy()[rows], plants["plant_number"].to_numpy()[rows]
    paths, unused = [folder / name for name in names], f"unused_{names[9]}"
    twin = names[10:][numbers[10:] != numbers[5]][0]
    draw_photo(plants.to_dict("records")[rows[9]], seed, len(plants)).save(folder / unused, **PNG)
    paths[0].unlink()
    paths[1].write_bytes(paths[1].read_bytes()[:30_000])
    see_through, palette, grey = (Image.open(path).convert("RGB") for path in paths[2:5])
    alpha = Image.new("L", see_through.size)
    ImageDraw.Draw(alpha).circle((SIZE / 2, SIZE / 2), SIZE / 2, fill=255)
    see_through.putalpha(alpha)
    see_through.save(paths[2])
    palette.quantize(256).save(paths[3])
    Image.fromarray(np.asarray(grey.convert("L"), np.uint16) * 257).save(paths[4])
    paths[5].write_bytes((folder / twin).read_bytes())
    sheet = sheet.astype({"fresh_weight_total": object})
    sheet.at[rows[6], "fresh_weight_total"] = f"{sheet.at[rows[6], 'fresh_weight_total']:.4f}".replace(".", ",")
    sheet.at[rows[7], "fresh_weight_total"] *= -1
    sheet = pd.concat([sheet, sheet.loc[[rows[8]]]], ignore_index=True)
    kinds = ["missing file", "truncated PNG", "RGBA photo", "palette photo", "16-bit grey photo", "duplicate photo"]
    kinds += ["text weight with a decimal comma", "negative weight", "duplicate row", "unused photo"]
    listed = [*names[:5], f"{names[5]} holds the bytes of {twin}", *names[6:9], unused]
    return sheet, [f"{kind}: {name}" for kind, name in zip(kinds, listed, strict=True)]


# --- the folder and the command line ---


def fingerprint(folder):
    """A line on the two sheets and the photos' names and sizes; whatever a user changes makes it another."""
    sha = hashlib.sha256((folder / SHEET).read_bytes() + (folder / EXPECTED).read_bytes())
    for photo in sorted((folder / IMAGES).iterdir()):
        sha.update(f"{photo.name} {photo.stat().st_size}\n".encode())
    return f"Fingerprint: {sha.hexdigest()[:16]}"


def ours_to_draw(out):
    """Whether the folder is empty, or holds what this script drew and nobody changed."""
    try:
        readme = out / README
        return not any(out.iterdir()) or fingerprint(out) in readme.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return False


def describe(args, floor, faults, fingerprint):
    """Text of README.txt."""
    flags = f"--num_images {args.num_images} --seed {args.seed}" + " --with_faults" * args.with_faults
    listed = "".join(["\nFaults drawn in:\n", *(f"- {fault}\n" for fault in faults)]) if faults else ""
    return f"""Synthetic FarmBot data, drawn by make_sample_data.py
Command: python make_sample_data.py {flags}
Noise floor: {floor:.4f} g. No model of these photos can have a lower RMSE on many plants.
Nothing here was measured: plants, weights and photos come from a model.
{fingerprint}
{listed}"""


def move_into_place(drawn, out):
    """Put the whole drawn set over the old one; if that fails midway, the old one comes back."""
    names, old = (IMAGES, SHEET, EXPECTED, README), drawn / "old"
    out.mkdir(exist_ok=True)
    old.mkdir()
    moves = [(out / name, old / name) for name in names if (out / name).exists()]
    moves += [(drawn / name, out / name) for name in names]
    try:
        for source, target in moves:
            os.replace(source, target)
    except BaseException:  # Ctrl-C too
        for source, target in reversed(moves):
            if target.exists() and not source.exists():
                os.replace(target, source)
        raise


def draw(args):
    """Draw the set, and move it into its place once it is whole."""
    plants = grow(args.num_images, args.seed)
    sheet, faults, floor = make_sheet(plants, args.seed), [], noise_floor(plants)
    out = args.out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as drawn:
        drawn = Path(drawn)
        draw_photos(plants, drawn / IMAGES, args.seed, args.num_workers)
        if args.with_faults:
            sheet, faults = add_faults(sheet, plants, drawn / IMAGES, args.seed)
        sheet.to_excel(drawn / SHEET, index=False)
        write_expected_weights(plants, drawn / EXPECTED)
        (drawn / README).write_text(describe(args, floor, faults, fingerprint(drawn)), encoding="utf-8")
        move_into_place(drawn, out)
    print(f"{args.num_images} photos and {SHEET} in {args.out}")
    print(f"noise floor: {floor:.4f} g RMSE" + (f"; {len(faults)} faults drawn in" if faults else ""))


def parse_arguments(argv):
    """Arguments of the command line, checked."""
    with_defaults = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=with_defaults)
    parser.error = lambda text: parser.exit(2, f"make_sample_data.py: error: {' '.join(text.split())}\n")  # one line
    parser.add_argument("--num_images", type=int, default=400, help="photos to draw; the real set has 4294")
    parser.add_argument(
        "--out",
        type=lambda text: Path(os.path.expanduser(text)),
        default=Path("sample_data"),
        help="folder to draw into",
    )
    parser.add_argument("--seed", type=int, default=42, help="same seed, same pixels and same cells")
    parser.add_argument("--with_faults", action="store_true", help="draw in ten faults of real folders")
    parser.add_argument("--num_workers", type=int, default=os.cpu_count() or 1, help="processes that draw")
    args = parser.parse_args(argv)
    for name, least in (("num_images", 20 if args.with_faults else 1), ("seed", 0), ("num_workers", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}{' with --with_faults' if least == 20 else ''}")
    if args.num_images > MOST_IMAGES:
        parser.error(f"--num_images must be at most {MOST_IMAGES}")
    return parser, args


def main(argv=None):
    """Draw the set; returns the exit status."""
    parser, args = parse_arguments(argv)
    try:
        if args.out.exists() and not ours_to_draw(args.out):
            parser.error(f"--out {args.out} was not drawn by this script, or was changed since; name another folder")
        draw(args)
    except OSError as error:
        parser.error(f"--out {args.out}: {error}")
    except (MemoryError, BrokenExecutor):  # a drawing process that was killed
        parser.error("the memory is full: pass a smaller --num_workers, or close other programs")
    except KeyboardInterrupt:
        parser.exit(130, f"make_sample_data.py: interrupted; {args.out} is as it was\n")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdout.reconfigure(errors="backslashreplace")  # a folder's name that the console cannot show
    sys.exit(main())
