"""What a model is worth: metrics, bootstrap by group, the evaluation of a side or of a folder."""
