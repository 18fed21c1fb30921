"""What a student is for: targets, supervised loss, metrics and answers. Open `base.py` first.

`base.py` is the interface that the other wings use; `classification.py` is its first user. A task of your own is a
class like that one: `--task package.module:callable`.
"""
