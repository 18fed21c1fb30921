"""A network from its name, with strict weights, and where its features are read. Open `load.py` first.

`features.py` finds and taps layers, `frozen.py` is the teacher that never changes, `pair.py` is teacher and student
side by side; `weightfiles.py`, `unwrap.py` and `weights.py` read files of weights, `outputs.py` finds the logits.
"""
