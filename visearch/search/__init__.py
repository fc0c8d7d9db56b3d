"""Search algorithms, one short file each."""
