"""Random batched functions, as source, and what every transform must make of them.

A program is a list of steps; each is a few lines of Python that make one new variable from earlier
ones, all with the batch first. ``generate(seed)`` writes one, trying each step as it goes, and
``Program.source()`` is a script that stands alone. ``python -m tests.sweeps.programs --minutes 10``
draws programs for as long as one likes and prints a reproducer, made as short as it gets, for each
failure.
"""
