"""The activations of MLPs, elementwise: each file's ``make`` is the function."""
