"""One run: its stages, the loop, and the folder that is the only truth. Open `stages.py`, then `trainer.py` (the loop).

`objective.py` makes the student's loss from the settings; `step.py` computes it for one batch; `engine.py` is the
device and the processes; `run_folder.py` is what is on disk; `cache.py` keeps the teacher's outputs.
"""
