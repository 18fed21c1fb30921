"""One run: its stages, the loop, and the folder that is the only truth. Open `stages.py`, then `trainer.py` (the loop).

`objective.py` makes the student's loss from the settings, `step.py` computes it for one batch, and `evaluation.py`
measures a network. `engine.py` is the device and the processes, `cache.py` keeps the teacher's outputs. `run_folder.py`
is what is on disk, `summary.py` the result as a dataclass, `finished.py` builds the networks of a finished run again.
`paraphraser.py` trains the paraphraser, `form.py` chooses the form of its layers. `price.py` counts what a run costs
before it is trained, `compute.py` what its training has computed. `schedule.py` makes optimizer and learning rate,
`processes.py` is for several processes, and `orders.py` checks that a teacher numbers the classes as the data does.
"""
