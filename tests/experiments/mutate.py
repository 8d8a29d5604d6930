"""Would the tests notice? Each of these one-line changes makes a number, a picture or a message wrong.

    python tests/experiments/mutate.py --jobs 2                  all of them; an hour on two cores
    python tests/experiments/mutate.py --only 3 17               these, by their number in the table

Each change is made in a copy of the repo, in which the tests run that could see it. Writes results/mutations.csv:
number, file, line, change, wrong (what it makes wrong), killed_by (the first test that fails, or `survived`), seconds.
Lines of killed changes are kept in a further run, survivors are tried again: delete the file to start anew. It stops
if a text is not found once, and says which tests fail without any change, as their failing tells nothing.
"""

import argparse
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pandas as pd

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "results" / "mutations.csv"
MOST_SECONDS = 900  # of the tests of one change
FORKS = multiprocessing.get_context("spawn" if os.name == "nt" else "forkserver")
if os.name != "nt":  # whose imports take longer than most tests
    FORKS.set_forkserver_preload("accelerate timm torchvision sklearn.decomposition skimage.measure pytest".split())
TRAIN, CROSS, PREDICT, EDA, DRAW = "train_model.py", "cross_validate.py", "predict.py", "eda.py", "make_sample_data.py"
READING, PLANT, GROWTH = "biomass/reading.py", "biomass/plant.py", "growth.py"
FEATURES, WRITING = "biomass/features.py", "biomass/writing.py"


class Mutation(NamedTuple):
    file: str
    old: str  # found once in the file
    new: str
    wrong: str
    tests: str  # names of test files, behind a colon what their tests are chosen by, as pytest's -k

    @property
    def change(self):
        return f"{self.old} -> {self.new}"


# fmt: off
CHANGES = [
    # the recipe, and how it is trained
    (TRAIN, "CONTRAST, SATURATION = 0.5, 10,", "CONTRAST, SATURATION = 0.0, 10,", "the study flips no photo",
     "train_model: flips_half"),
    (TRAIN, "SATURATION = 0.5, 10, 0.2, 0.2, 0.1", "SATURATION = 0.5, 100, 0.0, 0.0, 0.0",
     "the study turns by up to 100 degrees and leaves colours", "train_model: flips_half"),
    (TRAIN, "1 + (number % self.views", "1 + (0 * number % self.views",
     "the study's augmentation gives one version in all passes", "train_model: flips_half"),
    (TRAIN, "Image.Transpose(version - 1)", "Image.Transpose(min(version, 6) - 1)",
     "one of the eight symmetries twice", "recipe: eight_symmetries"),
    (TRAIN, "np.full_like(rows, number % 8)", "np.full_like(rows, 0)", "training sees one of the eight symmetries",
     "recipe train_model: eight_symmetries or next_version"),
    (TRAIN, "        if self.mixed:\n", "        if False:\n", "where layers learn a pass is of one version",
     "recipe: eight_symmetries"),
    (FEATURES, "net = make(**{flag: drop_path})", "net = make(**{flag: 1e-9})",
     "--drop_path is not obeyed", "train_model: drop_path"),
    (FEATURES, "        if conv.training:", "        if False:", "depthwise convolutions learn in bf16",
     "train_model: autocast"),
    (TRAIN, "predicted = tuple(range(8))", "predicted = (0,)", "a prediction is of one version in place of eight",
     "recipe: mean_over_eight"),
    (TRAIN, "for half in (side, side.flip(2))]", "for half in (side, side.flip(3))]",
     "an exported model sees some versions twice", "recipe: eight_symmetries"),
    (TRAIN, "shared = np.isin(contents[train_rows], contents[val_rows])", "shared = np.zeros(len(train_rows), bool)",
     "copies of validated photos are trained on", "cross_validate: one_photo_in_two"),
    (TRAIN, '"weight_decay": args.weight_decay}', '"weight_decay": 0.01}', "--weight_decay is not obeyed",
     "train_model: those_of_the_flags"),
    (TRAIN, "CosineAnnealingLR(optimizer, args.epochs)", "CosineAnnealingLR(optimizer, 10 * args.epochs)",
     "the cosine ends at nearly the first learning rate", "train_model: those_of_the_flags"),
    (TRAIN, "            schedule.step()", "            pass", "the learning rate never falls",
     "train_model: those_of_the_flags"),
    (TRAIN, "better = not choose_best or all(row[", "better = choose_best or all(row[",
     "the last epoch is taken for the best one", "train_model: lowest_error"),
    (FEATURES, "return max(math.ceil(self.args.least_steps", "return max(math.floor(self.args.least_steps",
     "an epoch takes fewer steps than --least_steps", "train_model: next_version"),
    (FEATURES, "np.random.default_rng([args.seed, number + 1])", "np.random.default_rng([args.seed, 1])",
     "all epochs take the rows in one order", "train_model: next_version"),
    (TRAIN, "learner(inputs.to(device), *(part.to(device)",
     "learner(inputs.to(device), *(part[:1].expand_as(part).to(device)",
     "a batch learns with the traits and metadata of its first photo", "train_model: plain_loop_with"),
    (TRAIN, "    model.eval()", "    model.train()", "dropout is on in predictions",
     "train_model: engine_sends_nothing"),
    (TRAIN, "torch.cat(squares).double().mean()", "sum(part.mean() for part in squares) / len(squares)",
     "train_loss is a mean of batches", "train_model: losses"),
    (TRAIN, "LOSSES[args.loss](deviation if deviation > 0 else 1.0)", "LOSSES[args.loss](1.0)",
     "huber's bend is at 1 g in place of the targets' deviation", "train_model: those_of_the_flags"),
    # scales, and the way back to grams
    (TRAIN, "targets = outputs * self.target_scale + self.target_mean", "targets = outputs + self.target_mean",
     "grams without their scale", "train_model: transforms"),
    (TRAIN, "float(measured.sum() / predicted.sum())", "float(predicted.sum() / measured.sum())",
     "the bias of an inverted root is doubled", "train_model: transforms"),
    (TRAIN, "self.to_grams(self(inputs, traits, metadata)).mean(1)",
     "self.to_grams(self(inputs, traits, metadata).mean(1))", "roots are averaged in place of grams",
     "recipe: mean_over_eight"),
    (TRAIN, "(targets * self.ratio).clamp(min=self.lowest)", "(targets * self.ratio)",
     "weights below 0 are predicted", "train_model: transforms"),
    (TRAIN, "model.fit_targets(dataset.targets[train_rows])", "model.fit_targets(dataset.targets)",
     "the target's scale knows the held-out rows", "train_model: statistics_come"),
    (TRAIN, "model.fit_traits(dataset.traits[None][train_rows])", "model.fit_traits(dataset.traits[None])",
     "the traits' scales know the held-out rows", "train_model: standardised_by"),
    (TRAIN, "self.feature_scale.fill_(float((found - found.mean(0)).pow(2).mean().sqrt()) or 1.0)",
     "self.feature_scale.copy_(found.std(0).clamp(min=1e-6))", "each feature is divided by its own deviation",
     "train_model: moves_no_other"),
    (TRAIN, ".clamp(-MOST_DEVIATIONS, MOST_DEVIATIONS) * TRAITS_WEIGHT", " * TRAITS_WEIGHT",
     "an odd trait counts without bound", "train_model: standardised_by"),
    (TRAIN, "torch.log1p(traits[:, : len(plant.SIZES)])", "traits[:, : len(plant.SIZES)]",
     "sizes go in twice, without their logarithms", "train_model: standardised_by"),
    (FEATURES, "WITH_PLANT = 0.95", "WITH_PLANT = 0.5", "traits go in where half of the photos show no plant",
     "recipe: traits_stay_out"),
    # what is fed
    (FEATURES, "return self.make(np.asarray(rows), self.dataset.augmentation.predicted, edit)",
     "return self.make(np.asarray(rows), self.dataset.augmentation.predicted)", "erased photos are judged whole",
     "looks_at_plant: own_pixels"),
    (FEATURES, "= self.traits(rows, edit) if whole.shape[1] else whole", "= whole",
     "erased photos are judged with the traits of the whole ones", "looks_at_plant: own_pixels"),
    (TRAIN, "own.judge(np.arange(len(photos)))", "own.make(np.arange(len(photos)), (0,))",
     "heat maps are of one version in place of eight", "recipe: mean_over_eight"),
    (FEATURES, "own.traits(rows, None)", "own.traits(rows, None)[:1].expand(len(rows), -1)",
     "heat maps weigh all photos with the traits of the first", "recipe: mean_over_eight"),
    (PREDICT, "checkpoint.model, batches, hidden, metadata[numbers])",
     "checkpoint.model, batches, hidden, metadata[numbers * 0])",
     "heat maps weigh all photos with the metadata of the first", "predict: whole_photo"),
    (CROSS, "tm.weigh(model, batches, hidden, metadata[numbers])",
     "tm.weigh(model, batches, hidden, metadata[numbers * 0])",
     "the folds' heat maps weigh all photos with the metadata of the first", "looks_at_plant: whole_photo"),
    # resume, checkpoint
    (TRAIN, 'range(len(done["history"]) + 1, (epochs', 'range(max(len(done["history"]), 1), (epochs',
     "a resumed run repeats an epoch", "resume: stopped_run and frozen"),
    (TRAIN, 'optimizer.load_state_dict(state["optimizer"])', "pass", "a resumed run begins AdamW's means anew",
     "resume: stopped_run and frozen"),
    (TRAIN, 'torch.set_rng_state(state["random"])', "pass", "a resumed run drops other features out",
     "resume: stopped_run and frozen"),
    (TRAIN, 'PLACES += ["num_workers",', 'PLACES += ["seed", "num_workers",', "--resume goes on with another seed",
     "resume: same_run_only"),
    (TRAIN, '"epoch": epoch, "seed": args.seed}', '"epoch": args.epochs, "seed": args.seed}',
     "the checkpoint names another epoch", "resume: ctrl_c"),
    # folds, and what they teach of new plants
    (CROSS, "GroupKFold(n_splits=args.folds, shuffle=True, random_state=args.seed)",
     "GroupKFold(n_splits=args.folds, shuffle=True, random_state=0)", "the folds do not hang on --seed",
     "cross_validate: scikit_learns_folds"),
    (CROSS, "GroupKFold(n_splits=args.folds, shuffle=True, random_state=args.seed)",
     "__import__('sklearn.model_selection').model_selection.GroupShuffleSplit(args.folds, random_state=args.seed)",
     "folds overlap, and are not balanced", "cross_validate: scikit_learns_folds or each_row"),
    (CROSS, "tm.fit(model, batches, (learn, watch),", "tm.fit(model, batches, (np.union1d(learn, held_out), watch),",
     "a fold trains on the rows that it holds out", "cross_validate: scikit_learns_folds"),
    (CROSS, "model = tm.new_model(batches, run.backbone, learn)",
     "model = tm.new_model(batches, run.backbone, held_out)", "a fold takes its scales from the rows held out",
     "cross_validate: scikit_learns_folds"),
    (CROSS, "1 / photos[group] / len(photos) * independent", "(photos[group] > 0) / len(group) * independent",
     "the calibration counts photos, not plants", "cross_validate: checkpoint_knows"),
    (CROSS, "independent / (independent + 1))[order]", "independent / (independent + 1))",
     "the calibration's weights are those of other rows", "cross_validate: checkpoint_knows"),
    (CROSS, "(between - within) / spread", "(between - within) / spread / 4",
     "photos of a plant are taken to err too differently", "cross_validate: err_as_one or however_alike"),
    (CROSS, "typical = (count - (photos**2).sum() / count) / (groups - 1)", "typical = count / groups",
     "plants are taken to have equally many photos", "cross_validate: err_as_one"),
    (CROSS, "fit(terms, np.abs(errors))", "fit(terms, np.maximum(errors, 0))",
     "the interval's width comes from half of the errors", "cross_validate: checkpoint_knows"),
    (CROSS, "calibrate(table, run.labels, args), familiar)",
     "calibrate(table.assign(error=table['error'] / 2), run.labels, args), familiar)",
     "the interval is as narrow as if from training rows", "cross_validate: checkpoint_knows"),
    (CROSS, '"variance": variance.clip(rest), "rest": rest}', '"variance": variance.clip(rest), "rest": rest / 10}',
     "what lies outside the components counts ten times", "cross_validate: squared_distance"),
    (CROSS, "FAMILIAR_SHARE = 0.99", "FAMILIAR_SHARE = 0.5", "half of all new photos are called unlike",
     "cross_validate: scikit_learns_folds"),
    (CROSS, "np.quantile(held_out, FAMILIAR_SHARE)",
     "np.quantile(writing.unlikeness(familiar, run.batches.features(model, rows)), FAMILIAR_SHARE)",
     "how unlike a photo may be comes from training rows", "cross_validate: scikit_learns_folds"),
    (CROSS, 'round(np.median([result["epoch"]', 'round(np.max([result["epoch"]',
     "the final model trains for the longest fold's epochs", "cross_validate: patience"),
    (CROSS, '{"plant erased": plant.erase_plant, "background erased": plant.erase_background}',
     '{"plant erased": plant.erase_background, "background erased": plant.erase_plant}',
     "what is erased is called by the other's name", "looks_at_plant: planted and plants"),
    (CROSS, 'kinds = {1 / 3: "from the plants"', 'kinds = {0.9: "from the plants"',
     "a model of the background is said to look at the plants", "cross_validate: hangs_on"),
    (CROSS, "if without > 1 - features.WITH_PLANT:", "if without > features.WITH_PLANT:",
     "a verdict is given where a fifth of the photos shows no plant", "cross_validate: verdict"),
    (CROSS, 'transform("mean")', 'transform("median")', "R2 within groups is about their medians",
     "cross_validate: each_ones_own"),
    (CROSS, "np.std(rmse, ddof=1)", "np.std(rmse)", "the spread of the folds is too small", "cross_validate: each_row"),
    (CROSS, 'axis.barh(places, groups["rmse"]', 'axis.barh(places, groups["bias"].abs()',
     "the picture shows the bias of experiments as their RMSE", "cross_validate: each_ones_own"),
    # scores, intervals, tables, pictures
    (WRITING, 'error=table["predicted"] - table["measured"]', 'error=table["measured"] - table["predicted"]',
     "errors and bias have the other sign", "train_model: script_with_its_folder"),
    (WRITING, "labels.iloc[val_rows].assign(", "labels.iloc[val_rows[::-1]].assign(",
     "predictions stand beside other plants", "predict: training_run and conv5"),
    (WRITING, '(measured - table["training_mean"])', "(measured - measured.mean())",
     "the baseline is the mean of the held-out rows", "cross_validate: each_row"),
    (WRITING, "stdtrit(count - 1, 0.975)", "stdtrit(count - 1, 0.9)", "95 % intervals hold 80 %",
     "train_model: intervals_cover"),
    (WRITING, "np.searchsorted(np.cumsum(weights), (1 + coverage) / 2 - 1e-9)",
     "np.searchsorted(np.cumsum(weights), coverage - 1e-9)", "90 % intervals hold 80 %",
     "predict: weighted_errors"),
    (WRITING, "low = predicted - size * quantile(-ratios[::-1], weights[::-1])",
     "low = predicted - size * quantile(ratios, weights)", "both sides of the interval are the upper one",
     "predict: weighted_errors"),
    (WRITING, "offset + slope * np.abs(predicted), max(", "offset + slope, max(",
     "heavy plants get as narrow an interval as light ones", "predict: weighted_errors"),
    (WRITING, 'outside / familiar["rest"]', 'outside * familiar["rest"]',
     "what is outside the components hardly counts", "cross_validate: squared_distance"),
    (WRITING, 'history.groupby("epoch")', 'history.groupby("fold")', "the curves' mean is by fold, not by epoch",
     "pictures"),
    (WRITING, 'axes[0].scatter(table["measured"], table["predicted"]',
     'axes[0].scatter(table["predicted"], table["measured"]', "the picture's axes are swapped",
     "pictures"),
    (WRITING, 'np.argsort(-table["error"].abs()', 'np.argsort(table["error"].abs()',
     "the worst predictions shown are the best", "pictures"),
    (WRITING, 'cmap="RdBu_r"', 'cmap="RdBu"', "the heat map's colours mean the opposite of what it says",
     "pictures"),
    (PLANT, "(predicted[:, -1:] - predicted[:, :-1])", "(predicted[:, :-1] - predicted[:, -1:])",
     "the heat map has the other sign", "looks_at_plant: heat_map"),
    (PLANT, "box = across[column], down[row], across[column + 1], down[row + 1]",
     "box = across[row], down[column], across[row + 1], down[column + 1]", "the heat map is mirrored",
     "looks_at_plant: heat_map"),
    (PLANT, "return (3 * green - total)", "return (2 * green - total)", "excess green is another",
     "eda: counts_leaf"),
    (PLANT, "power = 2 if name.endswith", "power = 1 if name.endswith", "areas in mm2 are scaled as lengths",
     "recipe: traits_are_those and eda"),
    (PLANT, '"box_length": max(sides), "box_width": min(sides)', '"box_length": min(sides), "box_width": max(sides)',
     "length is called width", "recipe: traits_are_those and eda"),
    (PLANT, "np.hstack([rgb2hsv(pixels), rgb2lab(pixels)])", "np.hstack([rgb2lab(pixels), rgb2hsv(pixels)])",
     "hue is called lightness", "recipe: traits_are_those and eda"),
    (PLANT, "(np.logical_and, np.logical_or)", "(np.logical_and, np.logical_and)",
     "leaves lose their edges to an erosion", "looks_at_plant: opening"),
    (PLANT, "mask = find_plant(small)", "mask = find_plant(small.rotate(180))",
     "traits are measured on another mask", "recipe: traits_are_those and eda"),
    (PLANT, "np.exp(log_grams - log_a - b * log_area).mean()", "1.0",
     "the law of green area tells medians, not means", "eda: baselines"),
    (PLANT, "hole = plant_mask(photo, WIDEN)", "hole = plant_mask(photo, 0)", "erasing leaves the leaves' rims",
     "looks_at_plant: erasing_takes"),
    # features and their store
    (FEATURES, "    return keys", "    return {(edit, version): keys[edit, 0] for edit, version in keys}",
     "the store knows no versions", "train_model: short_batch and torch"),
    (FEATURES, "told = [engine.name, weights_digest", 'told = ["", weights_digest',
     "features of bf16 serve where fp32 is asked for", "train_model: computed_anew"),
    (FEATURES, "places[edit][rows, numbers", "places[edit][rows[::-1], numbers",
     "rows get the features of others", "train_model: short_batch and torch"),
    (FEATURES, "dataset.contents[rows[np.nonzero(asked)[0]]]", "dataset.contents[np.sort(rows[np.nonzero(asked)[0]])]",
     "rows that do not fit in memory get the features of others", "train_model: short_batch and torch"),
    (FEATURES, "return function(edit(photo) if edit else photo)", "return function(photo)",
     "the traits of erased photos are those of whole ones", "looks_at_plant: own_pixels"),
    (FEATURES, "code_of(function, reading.open_photo, *filter(None, [edit]))", "code_of(function, reading.open_photo)",
     "traits of whole and of erased photos have one key", "looks_at_plant: own_pixels"),
    # sheets and photos
    (READING, "if not 2.5 < apart < 3.5:", "if not 0.4 < apart < 3.5:", "the warning of mg comes at 3 times the others",
     "reading train_model faults: mg or times or unit or faults_of or prefix"),
    (READING, 'return float(plain.replace(",", ".")), decimal', 'return float(plain.replace(",", "")), decimal',
     "0,25 g is read as 25 g", "train_model reading: as_scikit or meant"),
    (READING, '"g" if "weight" in "".join(words) else ""', '"g"', "any number is called grams",
     "train_model: without_a_unit"),
    (READING, 'PER_GRAM = {"mg": 1000, "g": 1,', 'PER_GRAM = {"mg": 100, "g": 1,', "a mg is a hundredth of a gram",
     "reading: unit or meant"),
    (READING, r'0*(\d+)(?:\.0+)?$"', r'0*(\d+)$"', "12.0 is another plant than 12", "train_model: one_id"),
    (READING, 'duplicated(key, keep=False)', 'duplicated(key, keep="first")',
     "of a photo with two weights one is learned", "faults: weights"),
    (READING, "ImageOps.exif_transpose(file)", "file.copy()", "photos lie on their side", "faults: turned"),
    (READING, 'BACKGROUND = "white"', 'BACKGROUND = "black"', "transparent photos get a black background",
     "faults: transparent"),
    (READING, 'f"row {row + 2} (', 'f"row {row + 1} (', "the log names the row above",
     "faults: twice"),
    (READING, "median = float(numbers.median())", "median = float(numbers.mean())",
     "missing metadata become the mean", "train_model: as_scikit"),
    # new photos
    (PREDICT, 'distances > checkpoint.familiar["limit"]', 'distances < checkpoint.familiar["limit"]',
     "familiar photos are called unlike", "predict: unlike"),
    (PREDICT, "low=low, high=high, outside=", "low=high, high=low, outside=", "low and high are swapped",
     "predict: weighted_errors"),
    (PREDICT, '(table["measured"] < low) | (table["measured"] > high)', '(table["measured"] > high)',
     "plants too light for the interval are not marked", "predict: weighted_errors"),
    (PREDICT, 'errors = known["predicted"] - known["measured"]', 'errors = known["measured"] - known["predicted"]',
     "the bias told has the other sign", "predict: measured_weights"),
    (WRITING, 'return (calibration["independent"] - 1) / (', 'return calibration["independent"] / (',
     "few plants promise more than they can", "predict: its_plants_can"),
    (PREDICT, "plant.trait_table(measured, args.mm_per_pixel).set_axis(good.index)",
     "plant.trait_table(measured[::-1], args.mm_per_pixel).set_axis(good.index)",
     "plants get the traits of others", "recipe: traits_are_those and predict"),
    (PREDICT, "dataset = tm.BiomassDataset(good, args, checkpoint.model.backbone, augmentation)",
     "dataset = tm.BiomassDataset(good, args, checkpoint.model.backbone, tm.Augmentation(0, 0))",
     "predict.py weighs one version where the training weighed eight", "recipe: mean_over_eight"),
    # growth, and how many plants must be weighed
    (GROWTH, "line = stats.linregress(times, logs)", "line = stats.linregress(logs, times)",
     "the growth rate is days a ln g", "growth: numpy"),
    (GROWTH, '"doubling_days"] = math.log(2) / rate', '"doubling_days"] = 1 / rate', "doubling takes too long",
     "growth: numpy"),
    (GROWTH, "reach = stats.t.ppf(0.975, freedom)", "reach = stats.t.ppf(0.9, freedom)", "95 % intervals hold 80 %",
     "growth: textbooks"),
    (GROWTH, "stats.ttest_ind(other, one,", "stats.ttest_ind(one, other,", "the slower group is called the faster one",
     "growth: compared"),
    (GROWTH, "confidence_interval(1 - 0.05 / len(pairs))", "confidence_interval(1 - 0.05)",
     "of many pairs of groups one differs by chance", "growth: compared"),
    (READING, "return numbers / 86400, True", "return numbers / 3600, True", "Unix seconds are hours, called days",
     "growth: formats"),
    (CROSS, 'errors = pd.Series(done[part]["predicted"].numpy(), split[1]) -',
     'errors = pd.Series(done[part]["predicted"].numpy(), split[1][::-1]) -',
     "the learning curve compares predictions with other plants", "cross_validate: learning_curve_trains"),
    (CROSS, "return a + b * plants**-c", "return a + b * plants ** (-c / 2)", "the curve falls half as fast as it says",
     "cross_validate: learning_curve"),
    # the audit, and drawn data
    (EDA, "> 0.001 + 0.01 * total.abs()", "> 1 + 0.01 * total.abs()", "the audit misses a total that is no sum",
     "eda: drawn_fault"),
    (EDA, "digests.duplicated(keep=False)", "digests.duplicated()", "the audit misses copies of photos",
     "eda: drawn_fault"),
    (EDA, "(weights < 0) & is_weight", "(weights < -1) & is_weight", "the audit misses a negative weight",
     "eda: drawn_fault"),
    (EDA, "(times.max() - times.min()) / 86400", "(times.max() - times.min()) / 3600", "hours are called days",
     "eda: summary"),
    (EDA, "plant.fit_law(areas[train], grams[train])[1](areas[held_out])",
     "plant.fit_law(areas, grams)[1](areas[held_out])", "the law of green area is judged on its own rows",
     "eda: baselines"),
    (EDA, "order = r.loc[strongest, args.target].sort_values(ascending=False).index",
     "order = r.loc[strongest, args.target].sort_values().index", "the heat map is sorted the other way",
     "eda: figures_show"),
    (EDA, '[args.target].median(), color="darkorange"', '[args.target].mean(), color="darkorange"',
     "the line of medians shows means", "eda: figure_of_ages"),
    (EDA, "jittered = rows[\"age_days\"] +", "jittered = rows[\"age_days\"].iloc[::-1].to_numpy() +",
     "weights stand at the ages of other plants", "eda: figure_of_ages"),
    (DRAW, "np.exp(hidden) / mean_factor", "np.exp(hidden)", "drawn weights are above what the photo tells",
     "make_sample_data: conditional"),
    (DRAW, 'labelled = plants[plants["labelled"]]', "labelled = plants", "the noise floor counts rows without a weight",
     "make_sample_data: noise_floor"),
    (DRAW, "shoot = (total - root).round(4)", "shoot = total", "a drawn shoot weighs as much as its plant",
     "make_sample_data: clean_sheet"),
    (DRAW, "ALLOMETRY, EXPONENT = 0.055, 1.1", "ALLOMETRY, EXPONENT = 0.055, 1.2", "drawn plants follow another law",
     "make_sample_data: follow_the_law"),
]
# fmt: on
MUTATIONS = [Mutation(*change) for change in CHANGES]


def place_of(mutation):
    """Number of the line that it changes. Exits where its text is not found once."""
    text = (ROOT / mutation.file).read_text(encoding="utf-8")
    if text.count(mutation.old) != 1:
        sys.exit(f"mutate.py: {mutation.file} holds {text.count(mutation.old)} times, not once: {mutation.old}")
    return text.partition(mutation.old)[0].count("\n") + 1


def copy_repo(folder):
    """What the tests need: scripts, biomass/ and tests."""
    for path in [*ROOT.glob("*.py"), ROOT / "pyproject.toml"]:
        shutil.copy(path, folder)
    for name in ("biomass", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))


def run_pytest(folder, *arguments):
    """Names of the tests that fail, or what kept them from running."""
    told = Path(folder) / "told.txt"
    process = FORKS.Process(target=pytest_in, args=(folder, told, arguments))
    process.start()
    process.join(MOST_SECONDS)
    if process.is_alive():
        process.kill()
        return [f"more than {MOST_SECONDS} s"]
    text = told.read_text(encoding="utf-8", errors="replace")
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+::.+?)(?: - .*)?$", text, re.M)
    if process.exitcode not in (0, 1) or (process.exitcode and not failed):
        failed = [f"NOT RUN: {text.strip().splitlines()[-1]}"]
    return failed


def pytest_in(folder, told, arguments):
    """Exit with pytest's status, in a process of its own that has the libraries already."""
    os.chdir(folder)
    with open(told, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import pytest

    sys.exit(int(pytest.main(["-q", "-n0", "--no-header", "-p", "no:cacheprovider", *arguments])))


def try_one(number):
    """The table's line for one change."""
    mutation, started = MUTATIONS[number], time.perf_counter()
    files, _, choice = (part.strip() for part in mutation.tests.partition(":"))
    tests = [f"tests/test_{name}.py" for name in files.split() if (ROOT / f"tests/test_{name}.py").is_file()]
    with tempfile.TemporaryDirectory(prefix="mutate_") as folder:
        copy_repo(Path(folder))
        path = Path(folder) / mutation.file
        text = path.read_text(encoding="utf-8").replace(mutation.old, mutation.new)
        path.write_text(text, encoding="utf-8")
        failed = run_pytest(folder, "-x", *tests, *(["-k", choice] if choice else []))
    line = {"number": number, "file": mutation.file, "line": place_of(mutation)}
    line |= {"change": mutation.change, "wrong": mutation.wrong}
    seconds = round(time.perf_counter() - started)
    return line | {"killed_by": failed[0].removeprefix("tests/") if failed else "survived", "seconds": seconds}


def fail_without_change(table):
    """Of the tests that killed, those that fail in the repo as it is."""
    killers = [f"tests/{name}" for name in table["killed_by"].unique() if "::" in name]
    with tempfile.TemporaryDirectory(prefix="mutate_") as folder:
        copy_repo(Path(folder))
        return run_pytest(folder, *killers) if killers else []


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs="+", default=range(len(MUTATIONS)), help="numbers of changes")
    parser.add_argument("--jobs", type=int, default=1, help="changes tried at once")
    args = parser.parse_args()
    for mutation in MUTATIONS:
        place_of(mutation)
    table = pd.read_csv(TABLE) if TABLE.is_file() else pd.DataFrame({"change": [], "killed_by": []}, dtype=str)
    table = table[table["change"].isin([mutation.change for mutation in MUTATIONS])]
    killed = table[table["killed_by"].str.contains("::")].set_index("change")["killed_by"]
    wanted = [number for number in args.only if MUTATIONS[number].change not in killed]
    with ThreadPoolExecutor(args.jobs) as pool:
        for line in pool.map(try_one, wanted):
            print("{number:3d}  {wrong:75s} {killed_by}  {seconds} s".format(**line), flush=True)
            table = pd.concat([table[table["change"] != line["change"]], pd.DataFrame([line])])
            table.sort_values("number").to_csv(TABLE, index=False)
    if failing := fail_without_change(table):
        sys.exit(f"mutate.py: these tests fail without any change, so that they tell nothing: {', '.join(failing)}")
    print(f"{table['killed_by'].str.contains('::').sum()} of {len(table)} killed")


if __name__ == "__main__":
    main()
