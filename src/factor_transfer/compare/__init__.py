"""Several runs side by side: which they are, their processes, what they prove. Open `run.py` first.

`plan.py` has the runs that a comparison needs, `shared.py` what one of them makes for the others, `matched.py` the
baseline at equal compute, `tuning.py` the trials before it, `result.py` what was found, `words.py` its tables and
sentences, `statistics.py` the tests behind them.
"""
