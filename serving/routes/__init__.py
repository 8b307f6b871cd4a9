"""The HTTP routes, one file per subject: a `Service` and an `Authenticator` in, a router out."""
