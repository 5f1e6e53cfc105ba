"""A study: does the right gradient learn better, and when does KDRL beat its parts?

`plan.py` fixes tasks, methods, learning rates, seeds and comparisons. `methods.py` holds the losses, each a small
function of a batch. `task.py` and `model.py` are what is learnt and by whom. `train.py` is one run, `exact.py` the
noise of one batch's gradient. `jobs.py` does all of that in processes, `report.py` and `figures.py` read results alone,
and `__main__.py` is the command.
"""
