"""A network from its name, with strict weights, and where its features are read. Open `load.py` first.

`weightfiles.py` says what a file of weights is, and `weights.py` loads it. `outputs.py` finds the logits in what a
network gives. `features.py` reads the map of a layer, and has the frozen teacher; `layers.py` finds the layer.
`pair.py` is teacher and student side by side. `compiled.py` is --torchcompile. `kernels.py` replaces one of torch's
kernels that corrupts memory.
"""
