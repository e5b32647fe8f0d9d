"""Which optimizer reaches the target loss first, and at what cost?"""
