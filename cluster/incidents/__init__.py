"""Incidents: a prediction missed the true class. `register` opens and closes them, `evidence` replays the prediction,
`affected` finds others like it, `cases` judges a model on the regression set, `figures` reports over all of them.
"""
