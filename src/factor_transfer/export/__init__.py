"""The student leaves alone: files that need one library and nothing of this package. Open `formats.py` first.

`shipping.py` is `factor-transfer export`; `runtimes.py` is the fresh process that proves each file; `predict.py` runs
one.
"""
