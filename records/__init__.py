"""What every room agrees on: taxonomy, record types, ledger, blobs, dataset versions, bundles, errors.

This is the bottom room: it imports no other room, starts nothing and does nothing at import.
"""
