"""Serving of predictions: batching, triage, rollout, the HTTP API, the web page and a client.

In: images over HTTP and the model that the ledger names. Out: predictions, and in the same transaction the review
items that annotators should see. It never calls Label Studio and never trains.
"""
