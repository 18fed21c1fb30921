#!/usr/bin/env bash
# The slim form beside the paper's, in accuracy: on photographs, and on the paper's pair. The same command continues.
#
#   benchmarks/forms.sh ../shared FOLDER
#
# Photographs: trashnet at 128 pixels, tf_efficientnet_lite0 fine-tuned here, mobilenetv3_small_050 from scratch; the
# teacher is chosen on validation/, students are measured on test/. The paper's pair: ResNet-56 to ResNet-20 on 2,500
# training images of the JPEG copy of CIFAR-10, measured on 300 test images of each class.
# Each is one thread, about four hours in all. Then: python benchmarks/form_accuracy.py FOLDER
set -euo pipefail
shared=$(realpath "$1") && mkdir -p "$2" && cd "$2"
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
alike=(--threads 1 --log-with none --precision fp32 --device cpu --cache-dir cache)

photographs=$shared/classification/trashnet
if [ ! -e lite0.safetensors ]; then
  factor-transfer distill --data "$photographs" --img-size 128 --teacher tf_efficientnet_lite0 \
    --teacher-weights "$shared/checkpoints/tf_efficientnet_lite0-imagenet.safetensors" --teacher-epochs 15 \
    --teacher-lr 0.02 --batch-size 64 --student mobilenetv3_small_050 --epochs 1 --beta 0 --workers 0 "${alike[@]}" \
    --out teacher
  cp teacher/teacher.safetensors lite0.safetensors
fi
mkdir -p trashnet && ln -sfn "$photographs/train" trashnet/train && ln -sfn "$photographs/test" trashnet/validation
trashnet() {
  factor-transfer compare --data trashnet --img-size 128 --teacher tf_efficientnet_lite0 --teacher-weights \
    lite0.safetensors --student mobilenetv3_small_050 --seeds 5 --epochs 10 --batch-size 64 --lr 0.05 --views 4 \
    --workers 0 "${alike[@]}" "$@"
}
trashnet --methods baseline,baseline-matched,ft --out trashnet-slim # auto takes the slim form here
trashnet --methods ft --factor-form paper --out trashnet-paper

if [ ! -e cifar ]; then
  mkdir -p cifar.part/train cifar.part/validation
  tar -xf "$shared/cifar10-jpeg/train.tar" -C cifar.part/train
  tar -xf "$shared/cifar10-jpeg/validation.tar" -C cifar.part/validation
  for class in cifar.part/validation/*/; do
    find "$class" -type f | LC_ALL=C sort | tail -n +301 | xargs rm
  done
  mv cifar.part cifar
fi
cifar() {
  factor-transfer compare --data cifar --teacher cifar_resnet56 --student cifar_resnet20 --teacher-weights \
    "$shared/checkpoints/resnet56-cifar10-jpeg.safetensors" --train-images 2500 --seeds 5 --epochs 20 --views 8 \
    --beta 500 "${alike[@]}" "$@"
}
cifar --methods baseline,ft --factor-form slim --factor-width 32 --out cifar-slim-32
cifar --methods ft --factor-form paper --out cifar-paper
cifar --methods ft --factor-form paper --paraphraser-epochs 6 --out cifar-paper-6-passes
