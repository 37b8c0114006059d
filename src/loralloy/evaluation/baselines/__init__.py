"""Methods of the suite, one a file: this project's routed composition, and what it is compared with."""
