"""``sift demo``: train a small network and its Sparse Wide versions, and show what sparsity costs and saves."""
