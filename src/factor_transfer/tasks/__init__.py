"""What a student is for: targets, supervised loss, metrics and answers. Open `base.py` first.

`base.py` is the interface that the other wings use; `classification.py` (a class for each image) and `segmentation.py`
(a class for each pixel) are its users. A task of your own is a class like those: `--task package.module:callable`.
"""
