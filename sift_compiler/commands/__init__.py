"""What the ``sift`` commands do, apart from the command line itself."""
