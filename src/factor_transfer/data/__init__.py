"""Where images and labels come from, and how they are shown. Open `dataset.py` first.

`sources.py`, `layouts.py` and `hub.py` find them; `views.py` is the replayable augmentation; `pixels.py` decodes once.
"""
