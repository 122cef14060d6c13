"""Callbacks for trainers of other packages; each file imports its package, none is imported by the rest of this one."""
