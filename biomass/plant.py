"""Where a photo shows plant: its traits, the photo without it, and what a model makes of the parts of a photo."""

import itertools
import math

import numpy as np
import pandas as pd
from PIL import Image, ImageFilter

# Soil has an excess green near 0. Orange light lacks blue and lifts pale grains to 0.1 or 0.2; leaves keep 0.3 to 0.5
# under it as under white light: one threshold serves all, but for single grains, which are opened or averaged away.
EXCESS_GREEN = 0.2
GREENER = (0.1, 0.3, 0.4, 0.5)  # other thresholds: how much is how green
DARK = 60  # sum of the 8-bit channels below which the colour of a single pixel is noise
FINEST = 256  # pixels of the longer side within which a plant is looked for
MOST_SIDE, WIDEN, SOIL_RADIUS = 512, 6, 0.33  # pixels, pixels, share of the frame within which every pot shows soil
GREY = np.uint8([124, 116, 104])  # the mean of ImageNet
PATCHES = 8  # a side of a heat map
TOGETHER = 4  # photos whose heat maps are made at once: the copies of each take up to 70 MB

SIZES = ["area", "hull_area", *(f"eg{100 * green:.0f}_area" for green in GREENER)]  # eg30: more than 0.3
SIZES += ["perimeter", "long_axis", "short_axis", "box_length", "box_width", "thickness", "mean_thickness"]
SHAPES = ["solidity", "eccentricity", "parts"]
CHANNELS = ["hue", "saturation", "value", "lightness", "green_red", "blue_yellow"]  # of HSV, 0..1, and CIELAB
TRAITS = [*SIZES, *SHAPES, *CHANNELS, *(f"{channel}_sd" for channel in CHANNELS)]
SCENE = ["share", "scene_lightness", "scene_green_red", "scene_blue_yellow", "fineness"]  # of the whole photo
MEASURED = [*TRAITS, *SCENE, "scale"]  # share of the frame (0..1); pixels of the photo for one of the small copy


# ---------------------------------------------------------------- where it is, and its traits


def excess_green(photo):
    """Excess green 2g - r - b of each pixel on chromatic coordinates, r + g + b = 1: float32 (height, width).

    It equals 3g - 1 there (Woebbecke et al. 1995, Transactions of the ASAE 38, 259-269).
    """
    red, green, blue = (np.asarray(channel, np.float32) for channel in photo.split())
    total = red + green + blue
    return (3 * green - total) / np.maximum(total, 1)


def find_plant(photo, threshold=EXCESS_GREEN):
    """Where a photo within FINEST pixels shows plant, without specks below 3 x 3 pixels: bool (height, width)."""
    mask = excess_green(photo) > threshold
    for both in (np.logical_and, np.logical_or):  # binary_opening of scipy, which takes 17 times as long
        rows = np.pad(mask, 1)
        columns = both(both(rows[:-2], rows[1:-1]), rows[2:])
        mask = both(both(columns[:, :-2], columns[:, 1:-1]), columns[:, 2:])
    return mask


def shrink(photo, most):
    photo = photo.copy()
    photo.thumbnail((most, most))
    return photo


def measure_traits(photo):
    """What MEASURED names, float32, in pixels of the small copy; without a plant sizes are 0 and colours NaN."""
    from scipy.ndimage import distance_transform_edt
    from skimage.color import rgb2hsv, rgb2lab
    from skimage.measure import label, regionprops_table

    small = shrink(photo, FINEST)
    mask = find_plant(small)
    found = dict.fromkeys(TRAITS, 0.0) | {"share": mask.mean(), "scale": max(photo.size) / max(small.size)}
    found |= dict.fromkeys(TRAITS[len(SIZES) + len(SHAPES) :], np.nan) | measure_scene(small)
    found |= {f"eg{100 * green:.0f}_area": find_plant(small, green).sum() for green in GREENER}
    if mask.any():
        names = {"area": "area", "area_convex": "hull_area", "perimeter": "perimeter"}
        names |= {"axis_major_length": "long_axis", "axis_minor_length": "short_axis"}
        names |= {"solidity": "solidity", "eccentricity": "eccentricity"}
        table = regionprops_table(mask.astype(np.uint8), properties=[*names, "bbox"])
        found |= {name: table[theirs][0] for theirs, name in names.items()}
        top, left, bottom, right = (table[f"bbox-{place}"][0] for place in range(4))
        box, sides = mask[top:bottom, left:right], (bottom - top, right - left)
        depth = distance_transform_edt(np.pad(box, 1))[1:-1, 1:-1][box]
        found |= {"box_length": max(sides), "box_width": min(sides), "parts": label(box).max()}
        found |= {"thickness": depth.max(), "mean_thickness": depth.mean()}
        pixels = np.asarray(small)[mask] / 255
        for channel, values in zip(CHANNELS, np.hstack([rgb2hsv(pixels), rgb2lab(pixels)]).T, strict=True):
            found |= {channel: values.mean(), f"{channel}_sd": values.std()}
    return np.array([found[name] for name in MEASURED], np.float32)


def measure_scene(small):
    """Mean colour of a photo within FINEST pixels, in CIELAB, and how fine it is: steps between pixels by contrast."""
    from skimage.color import rgb2lab

    found = dict(zip(SCENE[1:4], rgb2lab(np.asarray(shrink(small, 64)) / 255).mean((0, 1)), strict=True))
    grey = np.asarray(small.convert("L"), float)
    return found | {"fineness": np.abs(np.diff(grey)).mean() / max(grey.std(), 1)}


def trait_table(measured, mm_per_pixel=None):
    """Traits of photos (n, len(MEASURED)) as a table in pixels of the photos as they came, or in mm."""
    table, unit = pd.DataFrame(measured, columns=MEASURED), "mm" if mm_per_pixel else "px"
    each = table["scale"] * (mm_per_pixel or 1)
    for name in SIZES:
        power = 2 if name.endswith("area") else 1
        table[name] *= each**power
    names = {name: f"{name}_{unit}{'2' if name.endswith('area') else ''}" for name in SIZES}
    return table[TRAITS].rename(columns=names)


def green_area(photo):
    """Projected plant area as a share of the frame (0..1)."""
    return float(find_plant(shrink(photo, FINEST)).mean())


def fit_law(areas, grams):
    """Fit W = a * A^b on logarithms; return its numbers, and the mean weight as a function of area.

    The exponential of a mean logarithm falls short of the mean weight; Duan (1983, JASA 78:605-610) multiplies by the
    mean exponential of the residuals. A photo without green is left out and weighs as much as the smallest area.
    """
    seen = areas > 0
    log_area, log_grams = np.log(areas[seen]), np.log(grams[seen])
    b, log_a = np.polyfit(log_area, log_grams, 1)
    a, smearing = np.exp(log_a), np.exp(log_grams - log_a - b * log_area).mean()
    law = {"law": "smearing_factor * a * A^b", "a": a, "b": b, "smearing_factor": smearing}
    return law, lambda area: smearing * a * np.maximum(area, areas[seen].min()) ** b


# ---------------------------------------------------------------- the photo without it


def plant_mask(photo, widen):
    """Where a photo is green, coarsely and with all specks, and `widen` pixels around: bool (height, width)."""
    coarse = photo.reduce(2)  # as single grains of soil are coloured at random
    green = (excess_green(coarse) > EXCESS_GREEN) & (np.asarray(coarse, int).sum(2) > DARK)
    mask = Image.fromarray(np.uint8(255 * green)).resize(photo.size, Image.Resampling.NEAREST)
    return np.asarray(mask.filter(ImageFilter.BoxBlur(widen))) > 0


def erase_background(photo):
    """The plant alone, on one grey; a photo without green stays as it is."""
    small = shrink(photo, MOST_SIDE)
    plant = plant_mask(small, 1)
    return Image.fromarray(np.where(plant[..., None], np.asarray(small), GREY)) if plant.any() else photo


def erase_plant(photo):
    """The pot without its plant, filled with soil of the same photo; one without green stays as it is.

    Soil is copied from beside the plant, within the radius in which every pot shows soil: a few large pieces, moved
    as they are, so that grain and noise stay. Leaves beyond it are replaced by what lies at the same distance from
    the pot's centre, turned or mirrored: rim by rim, tray by tray.
    """
    whole, photo = photo, shrink(photo, MOST_SIDE)
    hole = plant_mask(photo, WIDEN)
    if not hole.any():
        return whole
    centre, side = pot_centre(photo.convert("L"), hole), min(photo.size)
    soil = np.hypot(*(np.indices(hole.shape) - centre[:, None, None])) < SOIL_RADIUS * side
    pixels, left = np.array(photo), hole.copy()
    for here, ways in ((soil, shifts(side)), (True, turns(centre)), (True, shifts(side))):
        left = fill(pixels, left, np.broadcast_to(here, hole.shape), list(ways))
    soft = Image.fromarray(np.uint8(255 * hole)).filter(ImageFilter.GaussianBlur(1.2))
    weight = np.maximum(np.asarray(soft, np.float32) / 255, hole)[..., None]
    return Image.fromarray(np.uint8(np.asarray(photo) * (1 - weight) + pixels * weight + 0.5))


def pot_centre(grey, hole, reach=6, radius=28):
    """Row and column about which the photo is most like itself turned by 180 degrees, the hole left out."""
    small = np.pad(np.asarray(grey.resize((64, 64), Image.Resampling.BOX), np.int16), 32)
    seen = np.pad(np.asarray(Image.fromarray(~hole).resize((64, 64), Image.Resampling.NEAREST)), 32)
    disc = np.hypot(*np.mgrid[-radius : radius + 1, -radius : radius + 1]) < radius
    best = (math.inf, 0, 0)
    for down, right in itertools.product(range(-reach, reach + 1), repeat=2):
        part = np.s_[64 + down - radius : 65 + down + radius, 64 + right - radius : 65 + right + radius]
        both = disc & seen[part] & seen[part][::-1, ::-1]
        unlike = (np.abs(small[part] - small[part][::-1, ::-1]) * both).sum() / max(both.sum(), 1)
        best = min(best, (unlike * (1 + 0.01 * math.hypot(down, right)), down, right))
    return (0.5 + np.array(best[1:]) / 64) * hole.shape


def fill(pixels, hole, here, ways):
    """Fill the hole `here` with pixels from `here`, a way after another, the one that serves most first.

    A way (matrix, offset) takes each pixel from matrix @ place + offset. Returns what is left of the hole.
    """
    hole = hole.copy()
    while ways:
        places = np.argwhere(hole & here)
        served = [np.count_nonzero(sources(places[::16], hole, here, way)[1]) for way in ways]
        origins, good = sources(places, hole, here, ways.pop(int(np.argmax(served))))
        if not good.any():
            break
        pixels[tuple(places[good].T)] = pixels[tuple(origins[good].T)]
        hole[tuple(places[good].T)] = False
    return hole


def sources(places, hole, here, way):
    """From where a way takes the pixels at `places`, and whether they can be taken from there."""
    origins = places @ way[0].T + np.round(way[1]).astype(int)
    inside = ((origins >= 0) & (origins < hole.shape)).all(1)
    origins = np.where(inside[:, None], origins, 0)
    return origins, inside & ~hole[tuple(origins.T)] & here[tuple(origins.T)]


def shifts(side):
    """Ways to move pixels by an eighth to a half of the frame, in directions that differ."""
    for length, first in ((0.12, 0), (0.2, 1), (0.3, 2), (0.42, 3), (0.55, 4)):
        for angle in first + np.arange(10) * math.pi / 5:
            yield np.eye(2, dtype=int), length * side * np.array([math.sin(angle), math.cos(angle)])


def turns(centre):
    """The seven ways to turn and mirror a square about the pot's centre, pixel by pixel."""
    for number in range(1, 8):
        matrix = np.linalg.matrix_power([[0, 1], [-1, 0]], number % 4) @ np.diag([1, -1 if number >= 4 else 1])
        yield matrix, centre - 0.5 - matrix @ (centre - 0.5)


# ---------------------------------------------------------------- where a model looks


def heat_maps(photos, weigh):
    """What hiding each of PATCHES x PATCHES parts takes from a photo's prediction, in its unit: (n, PATCHES, PATCHES).

    Occlusion (Zeiler and Fergus 2014, Visualizing and Understanding Convolutional Networks, ECCV). `photos` are n
    Pillow images; weigh predicts (k,) from k images and the numbers (k,) of the photos that they were made of.
    """
    predicted = []
    for some in np.array_split(np.arange(len(photos)), -(-len(photos) // TOGETHER)):
        hidden = [one for number in some for one in hide_patches(photos[number])]
        predicted.append(np.reshape(weigh(hidden, some.repeat(PATCHES**2 + 1)), (len(some), -1)))
    predicted = np.concatenate(predicted)
    return (predicted[:, -1:] - predicted[:, :-1]).reshape(-1, PATCHES, PATCHES)


def hide_patches(photo):
    """The photo with each of its patches hidden in turn, and at last whole.

    A patch is hidden by the photo without its plant, turned by 180 degrees: a flat one is nothing that photos show.
    """
    whole = shrink(photo, MOST_SIDE)
    other = erase_plant(whole).transpose(Image.Transpose.ROTATE_180)
    across, down = (np.linspace(0, side, PATCHES + 1).round().astype(int).tolist() for side in whole.size)
    hidden = []
    for row, column in itertools.product(range(PATCHES), repeat=2):
        box = across[column], down[row], across[column + 1], down[row + 1]
        hidden.append(whole.copy())
        hidden[-1].paste(other.crop(box), box)
    return [*hidden, whole]
