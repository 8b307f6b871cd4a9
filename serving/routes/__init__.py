"""The HTTP routes, one file per subject; each takes a `Service` and a `Door` and returns a router."""
