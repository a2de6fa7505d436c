"""A sweep's runs: what they are, where they run, what they came to (launch/sweep.py)."""
