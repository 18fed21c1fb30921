"""Output for people: terminal, HTML page, model card, live curves. Open `html.py` (the page of one run) first.

`several.py` makes the page of several runs, `terminal.py` prints tables, `card.py` writes the model card. `findings.py`
computes what the page shows and no stage measured (`masks.py` of segmentation), `figures.py` draws plots and maps,
`trackers.py` sends the values of every pass to TensorBoard and others. Names, units and directions of figures are those
of the task's metrics.
"""
