"""Rewards: what a search maximises, and judges that it never sees."""
