"""What Relook answers and why: batching, triage, the HTTP app, the web page and its client.

In: images over HTTP and the model that the ledger names. Out: answers, and in the same transaction
the questions that annotators should see. It never calls Label Studio and never trains.
"""
