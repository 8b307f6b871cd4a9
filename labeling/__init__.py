"""What annotators say: the local Label Studio, tasks out, annotations in, and what readers agree on.

This room imports records only. Nothing here predicts, trains or serves; it reads review items and
blobs from the store and writes annotator labels into it.
"""
