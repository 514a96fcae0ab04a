"""Commands: fit, validate, test, predict and check."""
