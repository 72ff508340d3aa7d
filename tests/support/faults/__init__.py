"""The fault campaign: damaged files, kills, full disks and races, thrown at the product from a seed.

`make faults` runs it, `tests/test_faults.py` a short form of it. Each part is a module with a class `Attempts` whose
method `attempt` tries one thing and says how it ended, or raises `Fault`.
"""
