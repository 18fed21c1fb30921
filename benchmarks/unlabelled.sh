#!/usr/bin/env bash
# What unlabelled images bring, over the number of labels: Fashion-MNIST with 50 to 2,000 labelled images, with and
# without 2,000 others. The same command continues; the table is written anew at the end of each.
#
#   benchmarks/unlabelled.sh IMAGES FOLDER [TEACHER] [LABELS...]
#
# IMAGES is as for benchmarks/fashion.sh, and TEACHER the teacher.safetensors that it leaves; without one (or with "")
# the same is trained here. All images are of Fashion-MNIST's training set: 2,000 to be labelled, of which --data-seed
# takes as many as are asked for, 2,000 without labels, 4,000 to measure on. Every student sees 30,000 (SHOWN) labelled images in
# all, whatever their number; with the unlabelled ones it sees as many of them besides (--unlabelled-share 0.5). So
# baseline-matched has the compute of ft with them. SEEDS is the number of seeds (3).
# One thread, 72 runs, one to two hours. Leaves FOLDER/unlabelled.json.
set -euo pipefail
images=$(realpath "$1") teacher=${3:+$(realpath "$3")} labels=("${@:4}") seeds=${SEEDS:-3} shown=${SHOWN:-30000}
[ ${#labels[@]} -gt 0 ] || labels=(50 200 500 2000)
mkdir -p "$2" && cd "$2"
export OMP_NUM_THREADS=1
alike=(--hflip 0.5 --teacher cifar_resnet20 --student cifar_resnet20 --threads 1 --log-with none --precision fp32
  --device cpu --cache-dir cache)

[ -e done ] || python - "$images" <<"END"
import gzip, sys
from pathlib import Path
import numpy as np
from PIL import Image

folder = Path(sys.argv[1])
pixels, labels = (np.frombuffer(gzip.decompress((folder / f"train-{name}-ubyte.gz").read_bytes())[skip:], np.uint8)
                  for name, skip in (("images-idx3", 16), ("labels-idx1", 8)))
names = "tshirt trouser pullover dress coat sandal shirt sneaker bag boot".split()
parts = {"big/train": (0, 20000), "big/validation": (56000, 58000), "small/train": (40000, 42000),
         "small/validation": (50000, 54000), "bare": (42000, 44000)}
for part, (first, last) in parts.items():
    for place, (image, label) in enumerate(zip(pixels.reshape(-1, 28, 28)[first:last], labels[first:last])):
        path = Path(part, "" if part == "bare" else names[label], f"{place:05}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
Path("done").touch()
END
if [ -z "$teacher" ]; then
  if [ ! -e teacher.safetensors ]; then # the student of this run is not used
    factor-transfer distill --data big --teacher-epochs 4 --val-interval 4 --student-args 'layers=(1,1,1)' \
      'channels=(4,4,8)' --epochs 1 --beta 0 "${alike[@]}" --out teacher
    cp teacher/teacher.safetensors .
  fi
  teacher=teacher.safetensors
fi
students() {
  factor-transfer compare --data small --teacher-weights "$teacher" --student-args 'layers=(1,1,1)' \
    'channels=(8,16,32)' --factor-form slim --factor-width 32 --val-interval 1000 --batch-size 32 --lr 0.05 --views 8 \
    --seeds "$seeds" "${alike[@]}" "$@"
}
for count in "${labels[@]}"; do
  alone=(--train-images "$count" --epochs $((shown / count)))
  students "${alone[@]}" --methods baseline,kd,ft --out "labels-$count"
  students "${alone[@]}" --methods kd,ft,baseline-matched --unlabelled bare --out "labels-$count-unlabelled"
done
python - <<"END"
import json
from pathlib import Path

found = {}
for file in sorted(Path().glob("labels-*/compare.json")):
    _, count, *beside = file.parent.name.split("-")
    for each in (each for each in json.loads(file.read_text())["methods"] if each["n"]):
        name = each["name"] + " with unlabelled" * (bool(beside) and each["matched_to"] is None)
        kept = {key: each[key] for key in ("mean", "sd", "n", "epochs", "compute", "top1")}
        found.setdefault(int(count), {})[name] = kept
Path("unlabelled.json").write_text(json.dumps(found, indent=1))
for count in sorted(found):
    print(f"{count} labels")
    least = min(each["compute"] for each in found[count].values())
    for name, each in found[count].items():
        print(f"  {name:24} {each['mean']:6.2f} +- {each['sd'] or 0:.2f} (n = {each['n']}, compute {each['compute'] / least:.2f})")
END
