#!/usr/bin/env bash
# All runs that the README documents, in order; from the top folder, in the quick start's environment:
#   bash tests/experiments/documented.sh FOLDER
# FOLDER holds the sets of real photos, see tests/experiments/recipes.py; without it, what needs them is left out.
# Needs the drawn sets: python make_sample_data.py, and the same with --num_images 4294 --out full_sample.
# Some seven hours on two cores, most of it the last lines.
set -euo pipefail
real=${1:-}
full="--data_dir full_sample"
lite0="--model_name tf_efficientnet_lite0"
recommended="--recipe recommended"
random="--weights none"
away="--group_by experiment_id --folds 9"

at() {  # at NAME: where the outputs of a further run go
    echo "--results_dir results/$1 --log_path results/$1/training.log --model_out models/$1.pt"
}

real_set() {  # real_set NAME FOLDER TARGET GROUP: judge a set of real photos, of which no picture is kept
    python cross_validate.py $recommended --learning_curve --labels_path "$real/$2/labels.csv" \
        --image_dir "$real/$2/images" --target "$3" --group_by "$4" $(at "$1")
    hide "$1"
}

real_fifth() {  # real_fifth NAME RECIPE FOLDER TARGET GROUP: the study's split of a set of real photos
    python train_model.py --recipe "$2" --labels_path "$real/$3/labels.csv" --image_dir "$real/$3/images" \
        --target "$4" --group_by "$5" $(at "$1")
    hide "$1"
}

hide() {  # hide NAME: photos and folders that are not ours to show
    rm -f "results/$1/where_it_looks.png" "results/$1/worst_predictions.png"
    sed -i "s#$real#FOLDER#g" "results/$1/metrics.txt" "results/$1/training.log"
}

python eda.py $full
python train_model.py $full $lite0
python train_model.py $full $lite0 --epochs 2 --batch_size 16 --learning_rate 5e-4 $(at two_epochs)
python cross_validate.py $full $recommended --learning_curve
python cross_validate.py --data_dir sample_data $recommended $(at drawn_400)
python cross_validate.py $full $lite0 $(at study_folds)
python cross_validate.py $full $recommended $away $(at by_experiment)
python cross_validate.py $full $lite0 $away $(at study_by_experiment)
python train_model.py $full $random $(at random_resnet18)
if [ -n "$real" ]; then
    real_set lettuce lettuce_hydro weight_g plant
    real_set pigs pigs weight_kg pig
    real_set food ecustfd weight_g item
    python tests/experiments/lettuces.py --real "$real"
fi
python predict.py --model models/biomass_cross_validated.pt --labels_path full_sample/digital_biomass_labels.xlsx \
    --image_dir full_sample/images_med_res --out models/predictions.csv --sheet figures/contact_sheet.png
python tests/experiments/growth.py --model models/biomass_cross_validated.pt ${real:+--real "$real/pigs"}
python tests/experiments/erasing.py $full
python tests/test_faults.py
python tests/experiments/benchmark.py $full
python train_model.py $full $recommended $(at drawn_fifth)
python train_model.py $full --recipe all_layers $(at all_layers)
if [ -n "$real" ]; then
    real_fifth pigs_fifth recommended pigs weight_kg pig
    real_fifth pigs_fifth_all_layers all_layers pigs weight_kg pig
    real_fifth food_fifth recommended ecustfd weight_g item
    real_fifth food_fifth_all_layers all_layers ecustfd weight_g item
fi
python tests/experiments/held_out.py ${real:+--real "$real"}
python tests/experiments/scale.py
python tests/experiments/recipes.py ${real:+--real "$real"}
python tests/experiments/mutate.py
