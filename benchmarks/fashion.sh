#!/usr/bin/env bash
# Few images and a teacher that has seen more: 500 of Fashion-MNIST, measured on 4,000 others. The same command continues.
#
#   benchmarks/fashion.sh IMAGES FOLDER
#
# IMAGES holds train-images-idx3-ubyte.gz and train-labels-idx1-ubyte.gz (Debian's dataset-fashion-mnist puts them in
# /usr/share/datasets/fashion-mnist). All images are of its training set; its test set stays unseen. The teacher has
# 20,000, 4 passes; the students have 500 others. One thread, about half an hour. Then: python benchmarks/form_accuracy.py FOLDER
set -euo pipefail
images=$(realpath "$1") && mkdir -p "$2" && cd "$2"
export OMP_NUM_THREADS=1
alike=(--hflip 0.5 --teacher cifar_resnet20 --student cifar_resnet20 --threads 1 --log-with none --precision fp32
  --device cpu --cache-dir cache)

[ -e small ] || python - "$images" <<"END"
import gzip, sys
from pathlib import Path
import numpy as np
from PIL import Image

folder = Path(sys.argv[1])
pixels, labels = (np.frombuffer(gzip.decompress((folder / f"train-{name}-ubyte.gz").read_bytes())[skip:], np.uint8)
                  for name, skip in (("images-idx3", 16), ("labels-idx1", 8)))
names = "tshirt trouser pullover dress coat sandal shirt sneaker bag boot".split()
parts = {"big/train": (0, 20000), "big/validation": (56000, 58000), "small/train": (40000, 40500),
         "small/validation": (50000, 54000)}
for part, (first, last) in parts.items():
    for place, (image, label) in enumerate(zip(pixels.reshape(-1, 28, 28)[first:last], labels[first:last])):
        path = Path(part, names[label], f"{place:05}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
END
if [ ! -e teacher.safetensors ]; then # the student of this run is not used
  factor-transfer distill --data big --teacher-epochs 4 --val-interval 4 --student-args 'layers=(1,1,1)' 'channels=(4,4,8)' \
    --epochs 1 --beta 0 "${alike[@]}" --out teacher
  cp teacher/teacher.safetensors .
fi
students() {
  factor-transfer compare --data small --teacher-weights teacher.safetensors --student-args 'layers=(1,1,1)' \
    'channels=(8,16,32)' --val-interval 1000 --batch-size 32 --lr 0.05 --views 8 --seeds 6 "${alike[@]}" "$@"
}
students --methods baseline,kd --epochs 60 --out fashion-baseline
students --methods baseline --epochs 127 --out fashion-baseline-127 # as much compute as the slim form below
students --methods ft --epochs 60 --factor-form slim --factor-width 32 --out fashion-slim
students --methods kd --epochs 80 --out fashion-kd-80 # a little less than it
students --methods ft+kd --epochs 60 --factor-form slim --factor-width 32 --out fashion-slim-kd
students --methods ft --epochs 60 --factor-form paper --out fashion-paper
students --methods ft --epochs 60 --factor-form paper --paraphraser-epochs 40 --out fashion-paper-40
