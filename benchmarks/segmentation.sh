#!/usr/bin/env bash
# Baseline, kd, ft and ft+kd on the CamVid street scenes: mIoU on the 233 test images, three seeds. The same command
# continues.
#
#   benchmarks/segmentation.sh ../shared FOLDER
#
# The teacher is an LRASPP on tf_efficientnet_lite0 with ImageNet's weights; the student one on mobilenetv3_small_050
# from scratch (0.35 M parameters). The learning rate is chosen on the 101 images of val.txt, once for all methods
# (`compare --sweep` with seed 100; give the best one as LR, 0.05 without it). Students are measured on the images of
# test.txt, at equal passes, and the baseline at equal compute as well. One thread each. It has not been run to its end
# yet: the project has no figures of it.
set -euo pipefail
shared=$(realpath "$1") && mkdir -p "$2" && cd "$2"
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
scenes=$shared/segmentation/camvid
alike=(--task segmentation --ignore-index 11 --img-size 180 240 --batch-size 8 --scale 0.5 1.0 --workers 0 --threads 1
  --log-with none --precision fp32 --device cpu --cache-dir cache --teacher lraspp/tf_efficientnet_lite0
  --student lraspp/mobilenetv3_small_050)

mkdir -p tested
ln -sfn "$scenes/images" tested/images && ln -sfn "$scenes/masks" tested/masks
cp -f "$scenes/train.txt" "$scenes/classes.txt" tested/ && cp -f "$scenes/test.txt" tested/val.txt

if [ ! -e lite0.safetensors ]; then
  factor-transfer distill --data "$scenes" "${alike[@]}" --teacher-epochs 40 --teacher-lr 0.02 --epochs 1 --beta 0 \
    --teacher-weights "$shared/checkpoints/tf_efficientnet_lite0-imagenet.safetensors" --out teacher
  cp teacher/teacher.safetensors lite0.safetensors
fi
compared() {
  factor-transfer compare "${alike[@]}" --teacher-weights lite0.safetensors --epochs 60 "$@"
}
compared --data "$scenes" --methods baseline,ft --sweep lr=0.02,0.05,0.1 --sweep-on validation --seeds 1 --seed 100 \
  --out chosen
compared --data tested --methods baseline,baseline-matched,kd,ft,ft+kd --seeds 3 --lr "${LR:-0.05}" --out tested-runs
