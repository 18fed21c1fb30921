"""What every wing uses. Open `errors.py` first: every mistake of a user is told in its form.

`console.py` prints. `files.py` writes files whole and hashes them. `seeds.py` is addressed randomness. `checks.py`
checks settings, `arguments.py` reads their text. `machine.py` is what the program asks of the system. `identity.py`
hashes what a network computes.
"""
