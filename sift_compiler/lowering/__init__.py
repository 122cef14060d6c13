"""From a sparse graph to frozen, backend-neutral data that a runtime can compile."""
