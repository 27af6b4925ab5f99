"""Metal kernels and what launches them. Each `.metal` file is the body of a kernel, or functions that bodies share."""
