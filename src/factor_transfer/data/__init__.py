"""Where images and labels come from, and how they are shown. Open `dataset.py` first: its `open_data` calls the others.

`sources.py` finds what `--data` names: folders and tars (`layouts.py`, `trees.py`), Hugging Face datasets, WebDataset
shards (`hub.py`). `images.py` decodes one image, `frames.py` brings it to the networks' size, `content.py` says what of
it they do not see. `views.py` is the replayable augmentation, and `splits.py` gives batches. `pixels.py` decodes small
images once; `store.py` keeps them, and the teacher's factors, on disk.
"""
