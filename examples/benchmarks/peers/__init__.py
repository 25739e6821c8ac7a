"""The same training by functional-ep and by its peers: see ``side_by_side.py``."""
