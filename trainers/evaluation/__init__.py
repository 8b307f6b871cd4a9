"""What a model is worth: metrics, bootstrap by group, the evaluation of a split or of a folder."""
