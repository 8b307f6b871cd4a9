"""A candidate beside the model that answers: mirrored, then answering a share, promoted or taken back by itself."""
