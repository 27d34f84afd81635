"""Native kernels for CPUs, in C++, built on first use."""
