"""Metal kernels and their launchers. A `.metal` file is the body of one kernel, or functions shared by several."""
