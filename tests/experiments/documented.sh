#!/usr/bin/env bash
# All runs that the README documents, in order; from the top folder, in the quick start's environment:
#   bash tests/experiments/documented.sh
# Needs full_sample (python make_sample_data.py --num_images 4294 --out full_sample). Some three hours on two cores.
set -euo pipefail
pip install -q scikit-image  # its sample photos, for held_out.py
full="--data_dir full_sample"
lite0="--model_name tf_efficientnet_lite0"
recommended="$lite0 --features stages --standardize_features --target_transform sqrt --lr_schedule cosine --epochs 40 --weight_decay 1"
random="--weights none"
away="--group_by experiment_id --folds 9"

at() {  # at NAME: where the outputs of a further run go
    echo "--results_dir results/$1 --log_path results/$1/training.log --model_out models/$1.pt"
}

python eda.py $full
python train_model.py $full $lite0
python train_model.py $full $lite0 --epochs 2 --batch_size 16 --learning_rate 5e-4 $(at two_epochs)
python cross_validate.py $full $recommended
python cross_validate.py $full $lite0 $(at study_folds)
python cross_validate.py $full $recommended $away $(at by_experiment)
python cross_validate.py $full $lite0 $away $(at study_by_experiment)
python train_model.py $full $random $(at random_resnet18)
python train_model.py $full $random --epochs 2 --batch_size 16 --learning_rate 5e-4 $(at random_two_epochs)
python cross_validate.py $full $random --no_erasing $(at random_resnet18_folds)
python train_model.py $full $recommended --epochs 16 --weight_decay 0.05 --unfreeze_backbone --image_size 160 \
    $(at all_layers)
python predict.py --model models/biomass_cross_validated.pt --labels_path full_sample/digital_biomass_labels.xlsx \
    --image_dir full_sample/images_med_res --out models/predictions.csv --sheet figures/contact_sheet.png
python tests/experiments/held_out.py $full
python tests/experiments/erasing.py $full
python tests/test_faults.py
python tests/experiments/ablation.py $full
python tests/experiments/benchmark.py $full
