"""How fast regard is on this machine, beside what else could be used and beside what the machine can do.

Enters: `regard bench`, or a Python call of `regard.bench.run.bench`.
Leaves: a table against the figures asked of regard, JSON that later runs join, markdown, a plot of cost against length.
Floor 6: beside the lens, whose models it times; numbers depend on the machine, so no test asserts one.
"""
