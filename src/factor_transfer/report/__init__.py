"""What a person reads of a run: terminal, HTML page, model card, live curves. Open `html.py` first.

`terminal.py` prints, `several.py` is the page of several runs, `findings.py` computes what no stage has measured,
`figures.py` draws, `trackers.py` tells TensorBoard and others of every pass.
"""
